"""Compressed training of models sharded by FSDP2 (`torch.distributed.fsdp.fully_shard`).

    model = commlib.wrap(fully_shard(model), "int4+ef", parameters="int8")

    gradients    reduce-scattered to the owners of the shards
    parameters   gathered before each use: only where asked for
    replicas     HSDP and replicate(): gradients averaged between the ranks with the same shards

Where there are replicas, which are on other nodes as a rule, that average is what is compressed;
the reduce-scatter within a node stays torch's own. Policies choose for each parameter by its name,
blocks restart at each, and residuals belong to it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from commlib.communicator import Communicator
from commlib.integrations import channel
from commlib.integrations.fits import tell_unmatched
from commlib.integrations.fsdp_groups import Backward, Group, Segments, key_of, names_of
from commlib.integrations.fsdp_refusals import (
    check,
    check_gradients,
    check_parameters,
    groups_of,
)
from commlib.integrations.fsdp_replanning import Watched
from commlib.integrations.replanning import TOLD, Replanner, Settings
from commlib.integrations.state import PolicyLike, State, parsed
from commlib.planner.schemes import CANDIDATES, DEFAULT
from commlib.policy import Policy, Role, TensorInfo

log = logging.getLogger("commlib")

Model = TypeVar("Model", bound=nn.Module)
GRADIENTS, PARAMETERS, REPLICAS = "gradients", "parameters", "replicas"
DIGITS = "0123456789"
MINE = "commlib"  # the attribute of FSDP2's parameter groups that has our `Group`


def wrap(
    model: Model,
    policy: PolicyLike | None = None,
    *,
    parameters: PolicyLike | None = None,
    seed: int | None = None,
    timeout: float | None = None,
) -> Model:
    """Compress what an FSDP2 model sends; returns the same object.

    Every rank calls it, with the same arguments, after `fully_shard`; parameters may still be on
    the meta device. A second call reconfigures: what is not given stays, residuals stay unless the
    policy changes.

    On CPU, where FSDP2 blocks in its collectives, gathers through commlib go on while the caller
    computes (FSDP2's prefetching then overlaps them), and gradients may arrive during the rest of
    backward.

    Args:
        model: sharded by `fully_shard`, as a whole or in parts, or by `replicate`, also inside
            `torch.compile`.
        policy: for gradients: scheme text, `Policy`, table or path of a policy file; None: what it
            was, at first COMMLIB_POLICY, at first and without that "int8+ef".
        parameters: for parameters, where they are gathered; "int8", or "int4+delta": differences
            to what all ranks hold since the last step. That takes the memory of all parameters on
            every rank; a parameter travels raw the first time, and not at all for backward. After
            weights were set by other means than an optimizer or `load_state_dict`, call
            `commlib.of(model).reset()`. "fp32" gathers raw, without blocking. None: what it was, at
            first the rules of `policy` that name the role of parameters, without such FSDP2's own
            gathers.
        seed: of the random streams; None: what it was, at first 0.
        timeout: seconds a collective may take; None: what it was, at first the group's.

    Raises:
        ValueError: FSDP2 used in a way that leaves no room, or a scheme that does not suit.
    """
    torch_groups = groups_of(model)
    state = _state(torch_groups)
    if state is None:
        state = FSDPState(policy, seed=seed or 0, timeout=timeout)
        policy = state.policy  # where none was given, COMMLIB_POLICY's
    gathers = _of_parameters(policy) if parameters is None else parsed(parameters)
    check(torch_groups, gathers=gathers is not None)
    check_gradients(state.policy if policy is None else parsed(policy), torch_groups)
    if gathers is not None:
        check_parameters(gathers)
    names = names_of(model)
    own = [tuple(names[key_of(p)] for p in group.fsdp_params) for group in torch_groups]
    _check_names(torch_groups, own)
    state._configure(policy, gathers, seed, timeout)
    state._bind(torch_groups, own)
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

    Communicators, and what they remember by the parameter's name, with W the ranks that share the
    parameter and n = ceil(dim 0 / W) of its rows, its padded shard (padding is zero):

        gradients     (W, n): row r is what this rank still owes to the shard of rank r
        replicas      (n,), and under `NAME|reduced` what this rank owes as owner of a part of it
        parameters    with +delta "copies" (n,): this rank's part, as all ranks hold it

    A model whose modules are on several meshes has several, `gradients2` and so on. `shapes` has
    the shape of every parameter.
    """

    _sums = False  # FSDP2 divides them, by a number that changes with the ranks

    def __init__(
        self, policy: PolicyLike | None = None, *, seed: int = 0, timeout: float | None = None
    ) -> None:
        super().__init__(policy, seed=seed, timeout=timeout)
        self.parameters: Policy | str | None = None
        self._groups: list[Group] = []
        self._kept: dict[str, dict[str, Any]] = {}  # memory that outlives its communicator
        self._backward = Backward()
        self._names: dict[tuple[str, dist.ProcessGroup | None], str] = {}  # of communicators
        self._watched: dict[str, Watched] = {}  # communicators whose schemes are planned
        self._plans: dict[str, Policy] = {}  # what was planned for them

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every parameter that FSDP2 manages, by name."""
        return {
            name: parameter._orig_size
            for group in self._groups
            for name, parameter in zip(group.names, group.torch.fsdp_params, strict=True)
        }

    def _open(self) -> dict[str, Communicator]:
        """One communicator per use and process group that the model's groups have."""
        wanted: dict[tuple[str, dist.ProcessGroup | None], None] = {}
        for group in self._groups:
            if group.replicated:
                wanted[REPLICAS, group.replica_group] = None
            elif group.shard_group is not None:
                wanted[GRADIENTS, group.shard_group] = None
        for group in self._groups:
            if self.parameters is not None and group.shard_group is not None:
                wanted[PARAMETERS, group.shard_group] = None
        self._names, made = {}, {}
        for use, process_group in wanted:
            same = sum(other == use for other, _ in self._names)
            name = f"{use}{same + 1}" if same else use
            self._names[use, process_group] = name
            made[name] = channel.communicator(
                process_group,
                self.parameters if use == PARAMETERS and self.parameters else self.policy,
                seed=self.seed,
                timeout=self.timeout,
                device=self._groups[0].torch.device,
            )
        for name in made.keys() & self._plans.keys():
            made[name].take_policy(self._plans[name])
        kept, self._kept = self._kept, {}
        for name in made.keys() & kept.keys():
            made[name].load_state_dict(kept[name])
        return made

    def replan(
        self,
        every: int | None = 100,
        *,
        schemes: Sequence[str] = CANDIDATES,
        default: str = DEFAULT,
        alpha: float = 1.0,
        objective: Literal["bytes", "seconds"] = "bytes",
    ) -> None:
        """Choose each parameter's scheme anew every `every` steps, from the gradients as they are.

        As `DDPState.replan` does, with its arguments, for what is compressed here: gradients as
        they are reduce-scattered, or averages between replicas. A step is a backward that is
        synchronised. Ranks that exchange have one plan: where there are replicas of shards, each
        shard has its own.

        Raises: as `DDPState.replan`.
        """
        if every is None:
            for watched in self._watched.values():
                watched.replanner.stop()
            return
        settings = Settings(every, tuple(schemes), default, alpha, objective)
        found = {}
        for name, tensors in self._carried().items():
            replanner = Replanner(settings, tensors)
            replanner.start(self.communicators[name])
            found[name] = Watched(replanner)
        self._watched = found

    def _tensors(self) -> dict[str, dict[str, TensorInfo]]:
        """What is reduce-scattered, as the policy sees it."""
        found = self._carried().items()
        return {use: tensors for use, tensors in found if not use.startswith(REPLICAS)}

    def _carried(self) -> dict[str, dict[str, TensorInfo]]:
        """What communicators of gradients carry, as the policy sees it."""
        found: dict[str, dict[str, TensorInfo]] = {}
        for group in self._groups:
            use = self._use_of(group)
            if group.replicated:
                use = self._names[REPLICAS, group.replica_group]
            for name, parameter in zip(group.names, group.torch.fsdp_params, strict=True):
                if use:
                    size = parameter._orig_size
                    found.setdefault(use, {})[name] = TensorInfo(
                        name, size.numel(), group.reduce_dtype, Role.GRADIENT, len(size)
                    )
        return found

    def _shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Of what is reduce-scattered by dimension 0."""
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        for group in self._groups:
            for name, parameter in zip(group.names, group.torch.fsdp_params, strict=True):
                if (use := self._use_of(group)) and parameter.fsdp_placement.dim == 0:
                    found.setdefault(use, {})[name] = tuple(parameter._orig_size)
        return found

    def _use_of(self, group: Group) -> str:
        """The name of the communicator that reduce-scatters `group`; empty for none."""
        return self._names.get((GRADIENTS, group.shard_group), "")

    def _place(self) -> tuple[int, int]:
        mesh = self._groups[0].torch.mesh_info.mesh.mesh.flatten().tolist()
        return mesh.index(dist.get_rank()), len(mesh)

    # What the groups ask for.

    def _for_gradients(self, group: Group, segments: Segments, x: torch.Tensor) -> Communicator:
        rows = 1 if group.shard_group is None else group.shard_group.size()
        return self._watch(GRADIENTS, group.shard_group, segments, x, rows)

    def _for_parameters(self, group: Group) -> Communicator:
        return self._find(PARAMETERS, group.shard_group)

    def _told_raw(self, group: Group, why: str) -> None:
        """Parameters of `group` are gathered by torch."""
        found = self._for_parameters(group)
        if not found.policy.lossless:
            more = f" +{len(group.names) - 1}" if len(group.names) > 1 else ""
            found.meter.not_compressed(f"{group.names[0]}{more}", why)

    def _for_replicas(self, group: Group, segments: Segments, x: torch.Tensor) -> Communicator:
        return self._watch(REPLICAS, group.replica_group, segments, x, 1)

    def _watch(
        self,
        use: str,
        process_group: dist.ProcessGroup | None,
        segments: Segments,
        x: torch.Tensor,
        rows: int,
    ) -> Communicator:
        """The communicator that is about to carry gradients `x`, after planning where it is due."""
        found = self._find(use, process_group)
        name = self._names[use, process_group]
        watched = self._watched.get(name)
        policy = None if watched is None else watched.see(found, segments, x, rows)
        if policy is not None:
            self._plans[name] = policy
        return found

    def _backward_has_ended(self, group: Group) -> None:
        for watched in self._watched.values():
            watched.ended(group.names)

    def _planned(self) -> dict[str, Any]:
        found = {}
        for name in dict.fromkeys((*self._watched, *self._plans)):
            watched = self._watched.get(name)
            more = {} if watched is None else watched.state_dict()
            if self.communicators[name]._auto:  # what was measured: there is no plan yet
                more["measured"] = True
            found[name] = {"policy": self.communicators[name].policy.to_json(), **more}
        return found

    def _plans_in(self, saved: Mapping[str, Any]) -> dict[str, tuple[Policy, bool]]:
        found = {}
        for name, planned in saved.items():
            if name in self._watched and "steps" in planned:
                self._watched[name].replanner.check(planned)
            if name in self.communicators:
                found[name] = Policy.parse(planned["policy"]), "measured" in planned
        return found

    def _load_planned(self, saved: Mapping[str, Any]) -> None:
        for name, (policy, measured) in self._plans_in(saved).items():
            self.communicators[name].take_policy(policy, auto=measured)
            self._plans.pop(name, None)
            if not measured:
                self._plans[name] = policy
            if name in self._watched and "steps" in saved[name]:
                device = self._groups[0].torch.device
                self._watched[name].replanner.load_state_dict(saved[name], device)
        if not self._watched:
            log.warning(TOLD)

    def _find(self, use: str, process_group: dist.ProcessGroup | None) -> Communicator:
        return self.communicators[self._names[use, process_group]]

    def _weights_were_loaded(self) -> None:
        """What other ranks hold of this rank's parameters is no reference for these."""
        for name, communicator in (self._communicators or {}).items():
            if name.startswith(PARAMETERS):
                communicator.forget_copies()

    # What wrapping does with a state.

    def _configure(
        self,
        policy: PolicyLike | None,
        parameters: Policy | str | None,
        seed: int | None,
        timeout: float | None,
    ) -> None:
        """What is not given stays, and so does the memory of what goes on as it was."""
        new = self.policy if policy is None else parsed(policy)
        others = self.parameters if parameters is None else parameters
        if policy is not None:
            self._watched.clear()
        # what was planned has its residuals under other schemes than those of the policy
        same = new == self.policy and (policy is None or not self._plans)
        if not same:
            self._plans.clear()
        stays = {GRADIENTS: same, PARAMETERS: others == self.parameters}
        stays[REPLICAS] = stays[GRADIENTS]
        self._kept = {
            name: communicator.state_dict()
            for name, communicator in (self._communicators or {}).items()
            if stays[name.rstrip(DIGITS)]
        }
        self.policy, self.parameters = new, others
        self.seed = self.seed if seed is None else seed
        self.timeout = self.timeout if timeout is None else timeout
        self.close()

    def _bind(self, torch_groups: list[Any], names: list[tuple[str, ...]]) -> None:
        self._groups = []
        for torch_group, own in zip(torch_groups, names, strict=True):
            group = torch_group.__dict__.get(MINE)
            if group is None:
                group = Group(torch_group)
                setattr(torch_group, MINE, group)
            group.attach(self, own, gathers=self.parameters is not None)
            self._groups.append(group)
        carried = self._carried() if self._watched else {}
        for name, watched in self._watched.items():
            if carried.get(name) != watched.replanner.tensors:
                raise ValueError(
                    f"the parameters of {name} are others than those that replan() was called for: "
                    "wrap the model with a policy, which ends it"
                )
        for communicator in self.communicators.values():
            communicator.warmup()  # what fails or takes long does so here, not in backward
        if self._place()[0] == 0:
            tell_unmatched(self.policy, self.shapes, Role.GRADIENT)
            tell_unmatched(self.parameters, self.shapes, Role.PARAMETER)
        for name, tensors in self._carried().items():
            owners = name.startswith(REPLICAS)
            self.communicators[name].check_ahead(tensors.values(), owners=owners)


def _state(torch_groups: list[Any]) -> FSDPState | None:
    for torch_group in torch_groups:
        group = torch_group.__dict__.get(MINE)
        if group is not None:
            state: FSDPState = group.state
            return state
    return None


def _check_names(torch_groups: list[Any], names: list[tuple[str, ...]]) -> None:
    """Refuse a part of a wrapped model, or a whole with wrapped parts (ValueError).

    They would share one state, under other names: two parts have parameters of the same name.
    """
    for torch_group, new in zip(torch_groups, names, strict=True):
        group = torch_group.__dict__.get(MINE)
        if group is not None and group.names != new:
            raise ValueError(
                f"the parameter {new[0]!r} was wrapped before as {group.names[0]!r}: call wrap on "
                "the same module as then; for schemes by parts of a model wrap the whole, with "
                "rules by key"
            )


def _of_parameters(policy: PolicyLike | None) -> Policy | None:
    """The rules of a policy that name the role of parameters."""
    given = None if policy is None else parsed(policy)
    if not isinstance(given, Policy):
        return None
    rules = tuple(rule for rule in given.rules if rule.role == Role.PARAMETER)
    return Policy(rules) if rules else None
