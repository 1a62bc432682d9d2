"""One parameter group of FSDP2 and what it sends, by name.

FSDP2 moves the parameters of a module together. Its collectives get flat tensors and no names:

    all-gather       one row: the group's padded shards; it lies inside the output   before each use
    reduce-scatter   W such rows, of the parameters that have a gradient             in backward
    all-reduce       one row of those, among the ranks that hold the same shards     after that

in the order of the group's parameters. `Group` knows names and sizes and finds out which have a
gradient; `fsdp_comms` has what FSDP2 calls.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Variable
from torch.distributed.fsdp._fully_shard._fsdp_common import (
    DDPMeshInfo,
    FSDPMeshInfo,
    TrainingState,
)

from commlib.integrations.calls import ReduceOp
from commlib.integrations.fsdp_comms import AllGather, ReduceScatter, Replicas
from commlib.work import Work

if TYPE_CHECKING:
    from commlib.integrations.fsdp import FSDPState

# What torch.compile and checkpoint_wrapper put into names: a state must fit with and without.
INSERTED = ("_orig_mod.", "_checkpoint_wrapped_module.")
NO_BACKWARD = -1  # what autograd calls the graph task outside of any


class Segments(NamedTuple):
    """What a flat tensor of a group holds: arguments of the communicator's `*_segments`."""

    keys: tuple[str, ...]
    sizes: tuple[int, ...]  # elements of the padded shard
    ndims: tuple[int, ...]
    numels: tuple[int, ...]  # elements of the whole parameter


class Group:
    """One parameter group of a wrapped model.

    torch: FSDP2's own `FSDPParamGroup`. state: of the model. names: of the group's parameters.
    """

    state: FSDPState
    names: tuple[str, ...]

    def __init__(self, torch_group: Any) -> None:
        self.torch = torch_group
        self._with_gradient: tuple[int, ...] = ()
        self._known: dict[tuple[int, ...], Segments] = {}
        self._late: Work | None = None  # a result that arrives during the rest of backward
        post_backward = torch_group.post_backward

        @functools.wraps(post_backward)
        def noted(*unused: Any) -> None:
            self._note()
            post_backward(*unused)

        torch_group.post_backward = noted
        finalize = torch_group.finalize_backward

        @functools.wraps(finalize)
        def finalized() -> None:
            finalize()
            self.state._backward_has_ended(self)

        torch_group.finalize_backward = finalized
        for module in torch_group.modules:
            module.register_load_state_dict_post_hook(self._loaded)

    def attach(self, state: FSDPState, names: Sequence[str], *, gathers: bool) -> None:
        """Stand in FSDP2's place where this group's gradients travel, and if asked its gathers."""
        self.state, self.names = state, tuple(names)
        self._known.clear()
        group = self.torch
        if self.replicated:
            info = copy.copy(group.mesh_info)  # which all groups of the mesh share
            inner = info.replicate_process_group
            if not isinstance(inner, Replicas):
                info.replicate_process_group = Replicas(self, inner)
                group.mesh_info = info
        elif not isinstance(group._reduce_scatter_comm, ReduceScatter):
            group._reduce_scatter_comm = ReduceScatter(self, group._reduce_scatter_comm)
        if gathers and not isinstance(group._all_gather_comm, AllGather):
            group._all_gather_comm = AllGather(self, group._all_gather_comm)

    @property
    def shard_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold this group's shards; None where parameters are not sharded."""
        info = self.torch.mesh_info
        return info.shard_process_group if isinstance(info, FSDPMeshInfo) else None

    @property
    def replica_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same shards; None where no others do."""
        info = self.torch.mesh_info
        if not isinstance(info, DDPMeshInfo):
            return None
        group: dist.ProcessGroup = info.replicate_process_group
        return group.inner if isinstance(group, Replicas) else group

    @property
    def replicated(self) -> bool:
        """Whether gradients go to other nodes by an all-reduce (HSDP, replicate)."""
        group = self.replica_group
        return group is not None and (group.size() > 1 or self.shard_group is None)

    @property
    def reduce_dtype(self) -> torch.dtype:
        """Of the gradients as they travel; frozen parameters have none, and may be integers."""
        mixed, shards = self.torch.mp_policy, [p.sharded_param for p in self.torch.fsdp_params]
        trained = next((shard for shard in shards if shard.requires_grad), shards[0])
        dtype: torch.dtype = trained.dtype
        return mixed.reduce_dtype or mixed.param_dtype or dtype

    @property
    def in_backward(self) -> bool:
        """Whether parameters are gathered again for backward: they are those of forward."""
        return bool(self.torch._training_state == TrainingState.PRE_BACKWARD)

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
        self.state._backward.add(self)

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

    def _loaded(self, *unused: Any) -> None:
        self.state._weights_were_loaded()

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


def names_of(model: nn.Module) -> dict[tuple[int, str], str]:
    """The name of every parameter in `model.named_parameters()`, by its module and name there."""
    found: dict[tuple[int, str], str] = {}
    for prefix, module in model.named_modules():
        for name in module._parameters:
            path = f"{prefix}.{name}" if prefix else name
            for inserted in INSERTED:
                path = path.replace(inserted, "")
            found.setdefault((id(module), name), path)
    return found


def key_of(parameter: Any) -> tuple[int, str]:
    """A parameter of FSDP2 as `names_of` has it."""
    info = parameter._module_info
    return id(info.module), info.param_name
