"""A process group of commlib's own beside a user's group: same ranks, other connections.

On CPU a communicator issues from its own thread while the user's thread goes on with collectives of
its own: DDP's broadcast of buffers, its map of unused parameters, `join`, SyncBatchNorm, a barrier.
On one group the two threads would meet in another order on another rank, and c10d matches
collectives by their order alone.

On CUDA it issues from the calling thread, like the user: there it takes the user's group itself,
and NCCL needs no second set of buffers on the device.
"""

from __future__ import annotations

import os
import weakref
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from commlib.agreement import Agreement
from commlib.carrier import Carrier
from commlib.communicator import Communicator
from commlib.policy import Policy
from commlib.telemetry import Meter
from commlib.transport import TorchTransport, backends, close_group, group_device, open_group

c10d: Any = distributed_c10d
_channels: WeakSet[dist.ProcessGroup] = WeakSet()


def channel(group: dist.ProcessGroup | None = None) -> dist.ProcessGroup:
    """A new group for CPU tensors over the ranks of `group`; all call this, in the same order.

    Raises:
        ValueError: this process is not in the group.
        RuntimeError: not all ranks came within the group's timeout.
    """
    group = group or dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError("this process is not a member of the group it was given")
    # A store may outlive its ranks (see agreement.py): gloo would look for those before them.
    meeting = Agreement(TorchTransport(group, device="cpu"), _timeout(group).total_seconds())
    try:
        mark = meeting.meet("opening connections for compressed calls")
    except TimeoutError as error:
        raise RuntimeError(str(error)) from error
    opened = open_group(group, range(group.size()), _backend(group), _timeout(group), mark)
    _channels.add(opened)
    return opened


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
        made = Communicator(opened, policy, seed=seed, timeout=timeout, meter=meter)
    except BaseException:
        close_group(opened)
        raise
    # for models that are dropped without close()
    weakref.finalize(made, _forget, made._carrier, weakref.ref(opened), os.getpid()).atexit = False
    return made


def retire(communicator: Communicator) -> None:
    """Stop a communicator made here, and the channel it has."""
    communicator._carrier.flush()  # what is under way may fail yet
    aborted = communicator._carrier.aborted is not None
    communicator.close()
    transport = communicator.transport
    assert isinstance(transport, TorchTransport)
    # aborted: an exchange may still be pending, and gloo would wait for it
    if not aborted and not transport.destroyed and transport.group in _channels:
        close_group(transport.group)


def _forget(carrier: Carrier, opened: weakref.ref[dist.ProcessGroup], process: int) -> None:
    """Close the channel of a communicator that is gone; nothing of it was under way.

    process: whose channel it is. In a child the threads of gloo that would have to end are missing.
    """
    group = opened()
    if group is not None and carrier.aborted is None and os.getpid() == process:
        carrier.close()
        close_group(group)


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
