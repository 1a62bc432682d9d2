"""One parameter group of FSDP2 and what it sends, by name.

FSDP2 moves the parameters of a module together. Its collectives get flat tensors and no names:

    reduce-scatter   W rows, each the concatenation of the group's padded shards    once in backward
    all-gather       one such row, which lies inside the output                     before each use

in the order of the group's parameters, of which the first has only those with a gradient. `Group`
knows names and sizes and finds out which have a gradient; `ReduceScatter` is what FSDP2 calls.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd import Variable
from torch.distributed.fsdp._fully_shard._fsdp_common import DDPMeshInfo, FSDPMeshInfo

from commlib.work import Work

if TYPE_CHECKING:
    from commlib.integrations.fsdp import FSDPState

ReduceOp = dist.ReduceOp
NO_BACKWARD = -1  # what autograd calls the graph task outside of any


class Segments(NamedTuple):
    """What a flat tensor of a group holds: arguments of the communicator's `*_segments`."""

    keys: tuple[str, ...]
    sizes: tuple[int, ...]  # elements of the padded shard
    ndims: tuple[int, ...]
    numels: tuple[int, ...]  # elements of the whole parameter


class Group:
    """One parameter group of a wrapped model.

    torch: FSDP2's own `FSDPParamGroup`. names: of its parameters.
    """

    def __init__(self, torch_group: Any, names: Sequence[str], state: FSDPState) -> None:
        self.torch, self.state = torch_group, state
        self.names = tuple(names)
        self._with_gradient: tuple[int, ...] = ()
        self._known: dict[tuple[int, ...], Segments] = {}
        self._late: Work | None = None  # a result that arrives during the rest of backward
        post_backward = torch_group.post_backward

        @functools.wraps(post_backward)
        def noted(*unused: Any) -> None:
            self._note()
            post_backward(*unused)

        torch_group.post_backward = noted

    @property
    def shard_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold this group's shards; None where parameters are not sharded."""
        info = self.torch.mesh_info
        return info.shard_process_group if isinstance(info, FSDPMeshInfo) else None

    @property
    def replicated(self) -> bool:
        """Whether other ranks hold the same shards (HSDP, replicate)."""
        return isinstance(self.torch.mesh_info, DDPMeshInfo)

    def all_segments(self) -> Segments:
        """All parameters, as they are gathered."""
        return self._segments(tuple(range(len(self.names))))

    def gradients(self, numel: int) -> Segments:
        """Those in a reduced gradient of `numel` elements."""
        found = self._segments(self._with_gradient)
        if sum(found.sizes) != numel:
            raise RuntimeError(
                f"FSDP2 reduces {numel} values of a group, commlib counts {sum(found.sizes)} in "
                f"the gradients of {', '.join(found.keys)}; this torch ({torch.__version__}) "
                "groups gradients in a way that commlib does not know"
            )
        return found

    def settle(self) -> None:
        """Wait for a result of this group that is still on its way."""
        late, self._late = self._late, None
        if late is not None:
            late.wait()

    def finish(self, work: Work, *, late: bool) -> None:
        """Wait for `work`, now or, if `late`, at the end of this backward."""
        if not late:
            work.wait()
            return
        self._late = work
        self.state._settle_after_backward(self)

    def may_be_late(self, x: torch.Tensor, op: Any) -> bool:
        """Whether nobody looks into the reduced gradient `x` before backward ends.

        On CPU FSDP2 blocks in its collectives. It only makes views of what it gets, except where it
        divides it (after SUM), casts it, adds it to a gradient that is there, or hands it on.
        """
        group = self.torch
        if x.device.type != "cpu" or op == ReduceOp.SUM or group._all_reduce_hook is not None:
            return False
        if group._orig_dtype not in (None, x.dtype):
            return False
        if torch._C._current_graph_task_id() == NO_BACKWARD:
            return False
        return not any(
            parameter.offload_to_cpu
            or parameter.sharded_param.grad is not None
            or getattr(parameter.sharded_param, "_post_accumulate_grad_hooks", None)
            for parameter in group.fsdp_params
        )

    def _note(self) -> None:
        """Which parameters FSDP2 is about to reduce; it takes their gradients at once."""
        self.settle()
        zeros = getattr(self.torch, "reduce_scatter_unused_params", False)
        self._with_gradient = tuple(
            place for place, p in enumerate(self.torch.fsdp_params) if _has_gradient(p, zeros)
        )

    def _segments(self, places: tuple[int, ...]) -> Segments:
        if places not in self._known:
            parameters = [self.torch.fsdp_params[place] for place in places]
            self._known[places] = Segments(
                tuple(self.names[place] for place in places),
                tuple(p.padded_sharded_param_size.numel() for p in parameters),
                tuple(len(p._orig_size) for p in parameters),
                tuple(p._orig_size.numel() for p in parameters),
            )
        return self._known[places]


def _has_gradient(parameter: Any, zeros: bool) -> bool:
    """Whether FSDP2 reduces a gradient of it; zeros: also one of zeros where it was not used."""
    if not hasattr(parameter, "_unsharded_param"):
        return False
    if parameter.unsharded_accumulated_grad is not None:
        return True
    unsharded = parameter.unsharded_param
    return unsharded.grad is not None or (zeros and unsharded.requires_grad)


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
        late = not mine.replicated and mine.may_be_late(output_tensor, op)
        work = mine.state._for_gradients(mine).reduce_scatter_segments(
            output_tensor,
            input_tensor,
            *mine.gradients(output_tensor.numel()),
            factor=factor(op, group.size()),
            async_op=late,
            own=lambda: self.inner(output_tensor, input_tensor, group, op),
        )
        mine.finish(work, late=late)


OURS = (ReduceScatter,)


class Backward:
    """Results that are waited for when the backward that is running ends."""

    def __init__(self) -> None:
        self._task = NO_BACKWARD
        self._groups: list[Group] = []

    def add(self, group: Group) -> None:
        """Settle `group` then."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            Variable._execution_engine.queue_callback(self.settle)
        self._groups.append(group)

    def settle(self) -> None:
        """Wait for all of them."""
        self._task = NO_BACKWARD
        groups, self._groups = self._groups, []
        for group in groups:
            group.settle()


def factor(op: Any, size: int) -> float:
    """What the sum over `size` ranks is multiplied by."""
    if op == ReduceOp.PREMUL_SUM:
        return float(op.factor)
    return 1.0 / size if op == ReduceOp.AVG else 1.0
