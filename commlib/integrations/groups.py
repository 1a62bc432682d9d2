"""The communicators of a program's process groups, one per group and device.

A group has a policy (`set_policy`; else COMMLIB_POLICY, else "auto") and a meter for each device.
Communicators are made at the first collective, which connects the ranks and so waits for them, and
stopped when their group is destroyed.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from commlib.communicator import Communicator
from commlib.feedback import Plain
from commlib.integrations import channel
from commlib.policy import Policy, Scheme
from commlib.telemetry import Meter
from commlib.transport import group_device

log = logging.getLogger("commlib")

Source = str | Scheme | Policy | dict[str, Any]

_lock = threading.Lock()  # of these dictionaries; nobody waits for other ranks with it
_communicators: dict[tuple[dist.ProcessGroup, torch.device], Communicator] = {}
_policies: weakref.WeakKeyDictionary[dist.ProcessGroup, Policy | str] = weakref.WeakKeyDictionary()
_meters: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[torch.device, Meter]] = (
    weakref.WeakKeyDictionary()
)
_making: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[torch.device, threading.Lock]] = (
    weakref.WeakKeyDictionary()
)
_seeds: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()
_told: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()


def member(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The group itself, None as the default group; RuntimeError where this rank is not in it."""
    group = group or dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise RuntimeError(
            "there is no such group on this rank: call init_process_group first, and leave a group "
            "to its members"
        )
    return group


def set_policy(group: dist.ProcessGroup, source: Source) -> None:
    """Compress the group by `source` from the next call on; its memory starts from zero."""
    parsed = "auto" if source == "auto" else Policy.parse(source)
    _stop(lambda other: other is group)
    _policies[group] = parsed
    _meters.pop(group, None)
    _told.discard(group)
    if hasattr(group, "choices"):  # a group of the backend commlib
        group.choices.renew()


def set_seed(group: dist.ProcessGroup, seed: int) -> None:
    """The seed of communicators that are yet to be made; 0 where none was set."""
    _seeds[group] = seed


def policy(group: dist.ProcessGroup) -> Policy | str:
    """The policy of a group; "auto" as it is, which each communicator measures for itself."""
    found = _policies.get(group)
    if found is None:
        text = os.environ.get("COMMLIB_POLICY") or "auto"
        found = _policies[group] = text if text.strip() == "auto" else Policy.parse(text)
    return found


def meter(group: dist.ProcessGroup, device: torch.device) -> Meter:
    """What counts the traffic of a group under its policy."""
    with _lock:
        meters = _meters.setdefault(group, {})
        if device not in meters:
            meters[device] = Meter(rank=group.rank())
        return meters[device]


def communicator(group: dist.ProcessGroup, device: torch.device | None = None) -> Communicator:
    """The communicator of a group under its policy, made on first use.

    device: of the tensors; None as in `Communicator`.
    """
    device = device or group_device(group)
    mine = (group, device)
    made = _communicators.get(mine)
    if made is not None:
        return made
    _stop(_destroyed)
    with _lock:
        making = _making.setdefault(group, {}).setdefault(device, threading.Lock())
    with making:
        made = _communicators.get(mine)
        if made is None:
            made = channel.communicator(
                group,
                policy(group),
                seed=_seeds.get(group, 0),
                device=device,
                meter=meter(group, device),
            )
            with _lock:
                _communicators[mine] = made
        return made


def flush(group: dist.ProcessGroup) -> None:
    """Wait for the calls of `group` that are under way; their errors stay with their works."""
    for (other, _), made in list(_communicators.items()):
        if other is group:
            made._carrier.flush()


def stop(group: dist.ProcessGroup | None) -> None:
    """Stop the communicators of `group`; of all groups for None and for the default group."""
    _stop(lambda other: group in (None, other, dist.group.WORLD))


def tell_anonymous(group: dist.ProcessGroup, policy: Policy) -> None:
    """Say once per group that its policy asks for a memory that tensors without a key lack."""
    if group in _told:
        return
    _told.add(group)
    schemes = [str(r.scheme) for r in policy.rules if r.scheme.feedback != Plain()]
    if schemes:
        log.warning(
            "policy %s keeps residuals, but tensors have no names in torch.distributed's calls; "
            "they travel without error feedback. For a memory, wrap the model (commlib.wrap), or "
            "pass key='...' to commlib.distributed's verbs",
            ", ".join(schemes),
        )


def _stop(which: Callable[[dist.ProcessGroup], bool]) -> None:
    with _lock:
        found = [_communicators.pop(mine) for mine in list(_communicators) if which(mine[0])]
    for made in found:
        channel.retire(made)


def _destroyed(group: dist.ProcessGroup) -> bool:
    """Whether the group is gone: destroyed through torch.distributed itself."""
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError):
        return True
    return False
