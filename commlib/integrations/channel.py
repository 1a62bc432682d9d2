"""A process group of commlib's own beside a user's group: same ranks, other connections.

On CPU a communicator issues from its own thread while the user's thread goes on with collectives of
its own: DDP's broadcast of buffers, its map of unused parameters, `join`, SyncBatchNorm, a barrier.
On one group the two threads would meet in another order on another rank, and c10d matches
collectives by their order alone.

On CUDA it issues from the calling thread, like the user: there it takes the user's group itself,
and NCCL needs no second set of buffers on the device.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from commlib.communicator import Communicator
from commlib.policy import Policy
from commlib.telemetry import Meter
from commlib.transport import TorchTransport, backends, group_device

c10d: Any = distributed_c10d  # its helpers are missing from the stubs
_opened: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()
_channels: WeakSet[dist.ProcessGroup] = WeakSet()


def channel(group: dist.ProcessGroup | None = None) -> dist.ProcessGroup:
    """A new group for CPU tensors over the ranks of `group`; all call this, in the same order.

    Not by `new_group`: that is called by the whole world, or (use_local_synchronization) names the
    group by how many groups a rank has seen, which ranks may disagree on; then it hangs.

    Raises:
        ValueError: this process is not in the group.
        RuntimeError: not all ranks came within the group's timeout.
    """
    group = group or dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError("this process is not a member of the group it was given")
    ranks = dist.get_process_group_ranks(group)
    number = _opened[group] = _opened.get(group, 0) + 1  # by group: its ranks count alike
    name = f"{group.group_name}/commlib{number}"
    timeout = _timeout(group)
    try:
        opened, _ = c10d._new_process_group_helper(
            group.size(),
            group.rank(),
            ranks,
            dist.Backend(_backend(group)),
            c10d._get_process_group_store(group),
            name,
            timeout=timeout,
            group_desc="commlib",
        )
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {group.rank()} of {group.size()} found no connections for the group's "
            f"compressed calls: as a rule, not all ranks came to the first of them within "
            f"{timeout.total_seconds():g} s. {error}"
        ) from error
    c10d._world.pg_group_ranks[opened] = {rank: place for place, rank in enumerate(ranks)}
    result: dist.ProcessGroup = opened
    _channels.add(result)
    return result


def communicator(
    group: dist.ProcessGroup | None,
    policy: Policy | str,
    *,
    seed: int = 0,
    timeout: float | None = None,
    device: torch.device | None = None,
    meter: Meter | None = None,
) -> Communicator:
    """A communicator over the ranks of `group`, on CPU on a channel of its own.

    device: of the tensors; device and meter None as in `Communicator`.
    """
    group = group or dist.group.WORLD
    if isinstance(group, dist.ProcessGroup):  # else `channel` says what is wrong
        device = group_device(group, device)
        if device.type == "cuda":
            return Communicator(
                group, policy, seed=seed, timeout=timeout, device=device, meter=meter
            )
    opened = channel(group)
    try:
        return Communicator(opened, policy, seed=seed, timeout=timeout, meter=meter)
    except BaseException:
        _close(opened)
        raise


def retire(communicator: Communicator) -> None:
    """Stop a communicator made here, and the channel it has."""
    communicator._carrier.flush()  # what is under way may fail yet
    aborted = communicator._carrier.aborted is not None
    communicator.close()
    transport = communicator.transport
    assert isinstance(transport, TorchTransport)
    # aborted: an exchange may still be pending, and gloo would wait for it
    if not aborted and not transport.destroyed and transport.group in _channels:
        _close(transport.group)


def _close(group: dist.ProcessGroup) -> None:
    if group in c10d._world.pg_map:  # torch.distributed may have destroyed all groups
        dist.destroy_process_group(group)


def _backend(group: dist.ProcessGroup) -> str:
    """The backend string of a channel: CPU's alone where the group has one for each device."""
    served = backends(group)
    return served["cpu"] if len({*served.values()}) == 1 else f"cpu:{served['cpu']}"


def _timeout(group: dist.ProcessGroup) -> Any:
    """The timeout `group` was made with."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if options is not None:
            return options._timeout
    return c10d.default_pg_timeout
