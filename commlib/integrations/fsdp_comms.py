"""What FSDP2 calls instead of torch's collectives, for one of its parameter groups each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from commlib.integrations.calls import ReduceOp, factor
from commlib.integrations.works import AsyncWork
from commlib.transport import backends

if TYPE_CHECKING:
    from commlib.integrations.fsdp_groups import Group

Base: Any = dist.ProcessGroup  # its stubs have the names of one torch
# What c10d asks a group written in Python for, in the names of torch 2.11 to 2.13.
CALLS = (
    "allgather",
    "all_gather_single_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce_coalesced",
    "all_to_all_single",
    "alltoall_base",
    "barrier",
    "broadcast",
    "reduce_scatter",
    "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced",
    "send",
    "recv",
)


class Comm:
    """What stands in FSDP2's place of a collective; `inner` stood there before."""

    def __init__(self, group: Group, inner: Any) -> None:
        self.group, self.inner = group, inner

    def allocate(
        self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """A buffer for what is sent or received."""
        with torch.inference_mode(False):  # threads write to it that are in no such mode
            buffer: torch.Tensor = self.inner.allocate(size, dtype=dtype, device=device)
            return buffer


class ReduceScatter(Comm):
    """FSDP2's reduce-scatter, compressed."""

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        mine = self.group
        late = mine.replica_group is None and mine.may_be_late(output_tensor, op)
        segments = mine.gradients(output_tensor.numel())
        work = mine.state._for_gradients(mine, segments, input_tensor).reduce_scatter_segments(
            output_tensor,
            input_tensor,
            *segments,
            factor=factor(op, group.size()),
            async_op=late,
            own=lambda: self.inner(output_tensor, input_tensor, group, op),
        )
        mine.finish(work, late=late)


class AllGather(Comm):
    """FSDP2's all-gather, compressed; on CPU it goes on while the caller computes."""

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> Any:
        mine = self.group
        segments = mine.all_segments()
        why = ""
        if group is not mine.shard_group:  # resharded after forward
            why = f"FSDP2 gathers it among {group.size()} ranks in backward (reshard_after_forward)"
        elif input_tensor.numel() != sum(segments.sizes):
            why = (
                "FSDP2 gathers bytes: the module's parameters have several dtypes, or a format of "
                "their own"
            )
        if why:
            mine.state._told_raw(mine, why)
            return self.inner(output_tensor, input_tensor, group, async_op)
        work = mine.state._for_parameters(mine).all_gather_segments(
            output_tensor, input_tensor, *segments, async_op=True, unchanged=mine.in_backward
        )
        if output_tensor.device.type == "cpu" or async_op:
            return AsyncWork(work, [output_tensor])
        work.wait()  # FSDP2's stream does
        return None


class Replicas(Base):  # type: ignore[misc]
    """A replica group whose all-reduce of one parameter group's gradients is compressed.

    inner: the mesh's own group, which does everything else. It is handed on in Python: what this
    class left to c10d would be called with the GIL held, for which gloo's thread may wait, with the
    queue of calls locked, to free the tensors of the last one.
    """

    def __init__(self, group: Group, inner: dist.ProcessGroup) -> None:
        super().__init__(inner.rank(), inner.size())
        self.group, self.inner = group, inner
        for device, name in backends(inner).items():
            kind = getattr(dist.ProcessGroup.BackendType, name.upper(), None)
            kind = dist.ProcessGroup.BackendType.CUSTOM if kind is None else kind
            self._set_default_backend(kind)
            self._register_backend(
                torch.device(device), kind, inner._get_backend(torch.device(device))
            )

    def allreduce(self, tensors: list[torch.Tensor], opts: Any) -> None:
        """FSDP2's call on what it has reduce-scattered; `tensors` has one tensor."""
        (x,), op, mine = tensors, opts.reduceOp, self.group
        late = op == ReduceOp.AVG and mine.may_be_late(x, op)
        segments = mine.gradients(x.numel())
        work = mine.state._for_replicas(mine, segments, x).all_reduce_segments(
            x,
            *segments,
            factor=factor(op, self.size()),
            async_op=late,
            own=lambda: dist.all_reduce(x, op, self.inner),
        )
        mine.finish(work, late=late)


def _handed_on(name: str) -> Callable[..., Any]:
    def call(self: Replicas, *args: Any, **named: Any) -> Any:
        return getattr(self.inner, name)(*args, **named)

    return call


for _name in CALLS:
    if hasattr(Base, _name):
        setattr(Replicas, _name, _handed_on(_name))

OURS = (ReduceScatter, AllGather)
