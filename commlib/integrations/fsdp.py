"""Compressed gradients of models sharded by FSDP2 (`torch.distributed.fsdp.fully_shard`).

    model = commlib.wrap(fully_shard(model), "int4+ef")

FSDP2 reduce-scatters the gradients of a module together; commlib takes its place in that, and knows
which parameters they belong to: a policy chooses for each, blocks restart at each, and residuals
belong to its name.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from commlib.communicator import Communicator
from commlib.integrations import channel
from commlib.integrations.fits import Carried
from commlib.integrations.fsdp_groups import Backward, Group, ReduceScatter
from commlib.integrations.fsdp_refusals import (
    check,
    check_gradients,
    device_of,
    groups_of,
    unwrapped,
)
from commlib.integrations.ranked import Ranks
from commlib.integrations.state import PolicyLike, State, parsed
from commlib.policy import TensorInfo

Model = TypeVar("Model", bound=nn.Module)
GRADIENTS = "gradients"
# What torch.compile and activation checkpointing put into names: a state must fit with or without.
PREFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.")


def wrap(
    model: Model,
    policy: PolicyLike | None = None,
    *,
    seed: int | None = None,
    timeout: float | None = None,
) -> Model:
    """Compress the gradients of an FSDP2 model; returns the same object.

    Every rank calls it, with the same arguments, after `fully_shard`; parameters may still be on
    the meta device. A second call reconfigures: what is not given stays, residuals stay unless the
    policy changes.

    Args:
        model: sharded by `fully_shard`, as a whole or in parts, also inside `torch.compile`.
        policy: scheme text, `Policy`, table or path of a policy file; None: what it was, at first
            COMMLIB_POLICY, at first and without that "int8+ef".
        seed: of the random streams; None: what it was, at first 0.
        timeout: seconds a collective may take; None: what it was, at first the group's.

    Raises:
        ValueError: FSDP2 used in a way that leaves no room.
    """
    torch_groups = groups_of(model)
    check(torch_groups, gathers=False)
    state = _state(torch_groups)
    if policy is not None:
        check_gradients(parsed(policy), sharded=True)
    if state is None:
        state = FSDPState(policy, seed=seed or 0, timeout=timeout)
    else:
        state._reconfigure(policy, seed, timeout)
    state._bind(model, torch_groups)
    return model


def of(model: nn.Module) -> FSDPState:
    """The state of a wrapped model: residuals, statistics, communicators.

    Raises:
        ValueError: the model is not wrapped.
    """
    state = _state(groups_of(model))
    if state is None:
        raise ValueError("this FSDP2 model is not wrapped; call commlib.wrap(model, policy) first")
    return state


class FSDPState(State):
    """What commlib knows about one FSDP2 model on this rank; made by `wrap`.

    Communicators: "gradients", over the ranks that share the parameters. Its residuals are float32
    (or as the policy says) of shape (W, padded shard) by parameter name: row r is what this rank
    owes to the shard of rank r; `padded shard` is ceil(dim 0 / W) rows of the parameter, of which
    the last ranks' end is padding (zero). `shapes` has every parameter's shape.
    """

    def __init__(
        self, policy: PolicyLike | None = None, *, seed: int = 0, timeout: float | None = None
    ) -> None:
        super().__init__(policy, seed=seed, timeout=timeout)
        self._groups: list[Group] = []
        self._backward = Backward()
        self._by_group: dict[dist.ProcessGroup, Communicator] = {}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every parameter of the model that FSDP2 shards, by name."""
        return {
            name: parameter._orig_size
            for group in self._groups
            for name, parameter in zip(group.names, group.torch.fsdp_params, strict=True)
        }

    def _open(self) -> dict[str, Communicator]:
        self._by_group = {}
        found: dict[str, Communicator] = {}
        for shards in dict.fromkeys(group.shard_group for group in self._groups):
            if shards is None:
                continue
            name = GRADIENTS + (f"{len(found) + 1}" if found else "")
            found[name] = self._by_group[shards] = channel.communicator(
                shards,
                self.policy,
                seed=self.seed,
                timeout=self.timeout,
                device=device_of([group.torch for group in self._groups]),
            )
        return found

    def _place(self) -> tuple[int, int]:
        mesh = self._groups[0].torch.mesh_info.mesh.mesh.flatten().tolist()
        return mesh.index(dist.get_rank()), len(mesh)

    def _carried(self, communicator: str) -> dict[str, Carried]:
        found = {}
        for group in self._groups:
            policy, ranks = group.torch.mp_policy, group.torch.mesh_info.mesh.size()
            for name, p in zip(group.names, group.torch.fsdp_params, strict=True):
                numel, dtype = p._orig_size.numel(), policy.reduce_dtype or policy.param_dtype
                info = TensorInfo(
                    name, numel, dtype or p.sharded_param.dtype, ndim=len(p._orig_size)
                )
                found[name] = Carried(info, ranks * p.padded_sharded_param_size.numel())
        return found

    def _ranks(self) -> Ranks:
        # a sum is divided by FSDP2, by a number that changes with the ranks
        return Ranks(self.shapes, sums=False)

    def _for_gradients(self, group: Group) -> Communicator:
        """The communicator of a group's reduce-scatter."""
        assert group.shard_group is not None
        self.communicators  # noqa: B018  # makes them
        return self._by_group[group.shard_group]

    def _settle_after_backward(self, group: Group) -> None:
        self._backward.add(group)

    def _bind(self, model: nn.Module, torch_groups: list[Any]) -> None:
        names = _names(model)
        self._groups = []
        for torch_group in torch_groups:
            group = torch_group.__dict__.get("commlib")
            if group is None:
                own = [_name(names, parameter) for parameter in torch_group.fsdp_params]
                group = torch_group.commlib = Group(torch_group, own, self)
                torch_group._reduce_scatter_comm = ReduceScatter(
                    group, torch_group._reduce_scatter_comm
                )
            group.state = self
            self._groups.append(group)
        for communicator in self.communicators.values():
            communicator.warmup()  # what fails or takes long does so here, not in backward


def _state(torch_groups: list[Any]) -> FSDPState | None:
    for torch_group in torch_groups:
        group = torch_group.__dict__.get("commlib")
        if group is not None:
            state: FSDPState = group.state
            return state
    return None


def _names(model: nn.Module) -> dict[tuple[int, str], str]:
    """The name of every parameter, as `named_parameters` has it, by its module and name there."""
    found: dict[tuple[int, str], str] = {}
    for prefix, module in unwrapped(model).named_modules():
        for name in module._parameters:
            path = f"{prefix}.{name}" if prefix else name
            for inserted in PREFIXES:
                path = path.replace(inserted, "")
            found.setdefault((id(module), name), path)
    return found


def _name(names: dict[tuple[int, str], str], parameter: Any) -> str:
    info = parameter._module_info
    return names[id(info.module), info.param_name]
