"""torch.distributed's names, compressed: `import commlib.distributed as dist`.

    import commlib.distributed as dist
    dist.init_process_group("gloo")
    dist.set_policy("int8")                    # of the default group; else COMMLIB_POLICY or "auto"
    dist.all_reduce(x, op=dist.ReduceOp.AVG)   # two phases, int8 on the wire
    dist.barrier()                             # torch's own, like every name not listed here

Compressed by the group's policy: `all_reduce`, `reduce_scatter*`, `all_gather*`,
`all_to_all_single`, `broadcast`, `send`, `recv`, `isend`, `irecv`, `batch_isend_irecv`, for fp32,
fp16 and bf16 tensors under SUM, AVG and PREMUL_SUM. Other dtypes and operations are torch's own.
All ranks end with the same bits, the source of a broadcast included; a sender keeps what it had. In
the rules of a policy, the role is gradient for reductions, parameter for all_gather and broadcast,
activation for all_to_all and point to point: one rule per role keeps weights exact.

The first call of a group that may be compressed, asynchronous or not, connects its ranks and waits
for them, and so does the first after `set_policy`: in one thread, such calls of several groups come
in one order on all ranks.

The two ends of a message decide alike, from its elements and dtype: both need the same policy, the
same `scheme`, and both or neither stand inside `commlib.exact()`. Under "auto", which measures
collectives alone, messages travel raw.

Two keywords more than torch's:

    scheme  the scheme of this call instead of the policy's; ValueError where the tensor cannot
            take it.
    key     a name of this tensor alone: gives it a memory, which `+ef` schemes need.

A tensor without a key is anonymous and nothing is remembered of it: a policy with `+ef` then works
without its feedback (said once, in the log), an explicit `scheme` with `+ef` is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as _torch

from commlib.communicator import Communicator
from commlib.eager import eager
from commlib.integrations import backend, calls, groups, routes
from commlib.integrations.backend import Options
from commlib.integrations.calls import is_sum
from commlib.integrations.p2p import P2POp, batch_isend_irecv, irecv, isend, recv, send
from commlib.integrations.works import AsyncWork
from commlib.policy import Policy, Scheme
from commlib.scheme import DTYPES

__all__ = [
    "AsyncWork",
    "Options",
    "P2POp",
    "ReduceOp",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_reduce",
    "all_to_all_single",
    "batch_isend_irecv",
    "broadcast",
    "communicator",
    "destroy_process_group",
    "irecv",
    "isend",
    "recv",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
    "send",
    "set_policy",
]

backend.register()

ReduceOp = _torch.ReduceOp
Group = _torch.ProcessGroup | None

# torch renamed its flat collectives in 2.13 and warns about the old names.
_all_gather_flat = getattr(_torch, "all_gather_single", None) or _torch.all_gather_into_tensor
_reduce_scatter_flat = (
    getattr(_torch, "reduce_scatter_single", None) or _torch.reduce_scatter_tensor
)


def set_policy(policy: str | Scheme | Policy | dict[str, Any], group: Group = None) -> None:
    """Compress the collectives of `group` by `policy`, from the next call on.

    All ranks of the group call it alike. Residuals under keys start from zero again.

    Args:
        policy: scheme text, `Policy`, table, path of a policy file, or "auto": measure the group
            and compress where it is faster.
        group: None is the default group.
    """
    groups.set_policy(groups.member(group), policy)


def communicator(group: Group = None) -> Communicator:
    """What compresses the collectives of `group`: its `stats()`, `state_dict()`, `reset()`.

    Before the first compressed call of the group this makes it, as that call would: all ranks come.
    Of a group that moves tensors of both devices: those on CUDA.
    """
    return groups.communicator(groups.member(group))


def destroy_process_group(group: Group = None) -> None:
    """torch's, after the communicators of the group (None: of all groups) have stopped."""
    groups.stop(group)
    routes.forget(group)
    _torch.destroy_process_group(group)


@eager
def all_reduce(
    tensor: torch.Tensor,
    op: Any = ReduceOp.SUM,
    group: Group = None,
    async_op: bool = False,
    *,
    scheme: str | Scheme | None = None,
    key: str | None = None,
) -> Any:
    """`tensor` becomes the reduction over all ranks, in place: `factor * sum_r Q(tensor_r)`."""
    route = _route("all_reduce", group, scheme, key, op, tensor)
    if route is None:
        return _torch.all_reduce(tensor, op, group, async_op)
    work = calls.all_reduce(route, tensor, op, async_op, key=key, scheme=scheme)
    return work if async_op else None


@eager
def reduce_scatter_single(
    output: torch.Tensor,
    input: torch.Tensor,
    op: Any = ReduceOp.SUM,
    group: Group = None,
    async_op: bool = False,
    *,
    scheme: str | Scheme | None = None,
    key: str | None = None,
) -> Any:
    """`output` on rank r becomes the reduction of all ranks' r-th part of `input`."""
    route = _route("reduce_scatter", group, scheme, key, op, input, output)
    if route is None:
        return _reduce_scatter_flat(output, input, op, group, async_op)
    work = calls.reduce_scatter(route, output, input, op, async_op, key=key, scheme=scheme)
    return work if async_op else None


reduce_scatter_tensor = reduce_scatter_single


@eager
def reduce_scatter(
    output: torch.Tensor,
    input_list: list[torch.Tensor],
    op: Any = ReduceOp.SUM,
    group: Group = None,
    async_op: bool = False,
    *,
    scheme: str | Scheme | None = None,
    key: str | None = None,
) -> Any:
    """Like `reduce_scatter_single`, the parts given as a list."""
    route = _route("reduce_scatter", group, scheme, key, op, output, *input_list)
    if route is None or any(part.numel() != output.numel() for part in input_list):
        return _torch.reduce_scatter(output, input_list, op, group, async_op)
    work = calls.reduce_scatter(route, output, input_list, op, async_op, key=key, scheme=scheme)
    return work if async_op else None


@eager
def all_gather_single(
    output_tensor: torch.Tensor,
    input_tensor: torch.Tensor,
    group: Group = None,
    async_op: bool = False,
    *,
    scheme: str | Scheme | None = None,
    key: str | None = None,
) -> Any:
    """`output_tensor` becomes all ranks' `input_tensor`, in rank order."""
    route = _route("all_gather", group, scheme, key, None, output_tensor, input_tensor)
    if route is None:
        return _all_gather_flat(output_tensor, input_tensor, group, async_op)
    work = calls.all_gather(route, output_tensor, input_tensor, async_op, key=key, scheme=scheme)
    return work if async_op else None


all_gather_into_tensor = all_gather_single


@eager
def all_gather(
    tensor_list: list[torch.Tensor],
    tensor: torch.Tensor,
    group: Group = None,
    async_op: bool = False,
    *,
    scheme: str | Scheme | None = None,
    key: str | None = None,
) -> Any:
    """Like `all_gather_single` into a list; parts of unequal size travel raw."""
    route = _route("all_gather", group, scheme, key, None, tensor, *tensor_list)
    if route is None or any(part.numel() != tensor.numel() for part in tensor_list):
        return _torch.all_gather(tensor_list, tensor, group, async_op)
    work = calls.all_gather(route, tensor_list, tensor, async_op, key=key, scheme=scheme)
    return work if async_op else None


@eager
def all_to_all_single(
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    group: Group = None,
    async_op: bool = False,
    *,
    scheme: str | Scheme | None = None,
) -> Any:
    """Part r of `input` goes to rank r, part r of `output` comes from it; splits are rows.

    They are given on all ranks or on none: parts of their own sizes are coded one by one.
    """
    route = _route("all_to_all", group, scheme, None, None, output, input)
    if route is None:
        return _torch.all_to_all_single(
            output, input, output_split_sizes, input_split_sizes, group, async_op
        )
    rows = output_split_sizes, input_split_sizes
    work = calls.all_to_all(route, output, input, *rows, async_op, scheme=scheme)
    return work if async_op else None


@eager
def broadcast(
    tensor: torch.Tensor,
    src: int | None = None,
    group: Group = None,
    async_op: bool = False,
    group_src: int | None = None,
    *,
    scheme: str | Scheme | None = None,
) -> Any:
    """`tensor` becomes the decoded tensor of rank `src` (of the world; `group_src`: of the group).

    On the source too: with a lossy scheme its tensor changes to what the others get.
    """
    route = _route("broadcast", group, scheme, None, None, tensor)
    if route is None:
        return _torch.broadcast(tensor, src, group, async_op, group_src)
    if src is None:
        source = group_src
    elif group_src is None:
        source = _torch.get_group_rank(groups.member(group), src)
    else:
        source = None
    if source is None:
        raise ValueError(f"broadcast takes src or group_src, got src={src}, group_src={group_src}")
    work = calls.broadcast(route, tensor, source, async_op, scheme=scheme)
    return work if async_op else None


def __getattr__(name: str) -> Any:
    return getattr(_torch, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torch)})


def _route(
    verb: str,
    group: Group,
    scheme: str | Scheme | None,
    key: str | None,
    op: Any,
    *tensors: torch.Tensor,
) -> Communicator | None:
    """Who carries this call; None: torch. Decided by what all ranks know."""
    group = group or _torch.group.WORLD
    if not isinstance(group, _torch.ProcessGroup):  # not a member, or not initialised
        return None
    sums = op is None or is_sum(op)
    strided = all(isinstance(x, torch.Tensor) and x.layout is torch.strided for x in tensors)
    if scheme is not None:
        if not sums or not strided:
            raise ValueError(
                f"{verb}: a scheme takes dense tensors and SUM, AVG or PREMUL_SUM, got {op}; name "
                "no scheme to have torch do it"
            )
        return groups.communicator(group, tensors[0].device)
    if not sums or not strided or any(x.dtype not in DTYPES for x in tensors):
        return None
    route = groups.communicator(group, tensors[0].device)
    if key is None:
        groups.tell_anonymous(group, route.policy)
    return route
