"""Compressed gradient averaging for `DistributedDataParallel`, as a communication hook.

    model = commlib.wrap(DDP(model), "int8+ef")            # one line in a DDP script
    model.register_comm_hook(DDPState("int8+ef"), hook)    # the same, as PyTorch spells it

DDP hands over flat buckets of gradients. What is remembered of them (the residual of error
feedback, the step of the random streams) belongs to a parameter's name, never to a bucket: DDP
regroups its buckets after the first iteration (after the second with `static_graph`).

No `from __future__ import annotations` here: DDP compares the hook's annotations with the classes.
"""

import logging
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from commlib.communicator import Communicator
from commlib.eager import eager
from commlib.engine import check_settings
from commlib.integrations import channel
from commlib.integrations.autoplan import AutoPlanner
from commlib.integrations.ddp_refusals import (
    PYTHON_REDUCER,
    SPARSE,
    as_ddp,
    check,
    device_of,
)
from commlib.integrations.fits import tell_unmatched
from commlib.integrations.renaming import MADE_UP, renamed
from commlib.integrations.replanning import TOLD, Replanner, Settings
from commlib.integrations.state import PolicyLike, State, parsed
from commlib.planner.schemes import CANDIDATES, DEFAULT
from commlib.policy import Policy, Role, TensorInfo

log = logging.getLogger("commlib")

Model = TypeVar("Model", bound=nn.Module)
GRADIENTS = "gradients"  # the name of the one communicator
COMPILED = "_orig_mod."  # torch.compile's prefix: a state must fit the model compiled or not


def wrap(
    model: Model,
    policy: PolicyLike | None = None,
    *,
    seed: int | None = None,
    timeout: float | None = None,
) -> Model:
    """Compress the gradients of a DDP model; returns the same object.

    Every rank calls it, with the same arguments, after `DDP(...)` (accelerate: after `prepare`).
    Gradients become `Q(1/W sum_r Q(g_r))` for W ranks, by the scheme that `policy` names for each
    parameter. W is the size of the group, under `join` too: a rank that ran out of data sends zeros
    (and what was left in its residuals).

    A second call reconfigures: what is not given stays, residuals stay unless the policy changes.
    A model that was copied or unpickled loses its hook (PyTorch does not restore it); wrapping the
    copy attaches it again, with the residuals it was copied with.

    Args:
        model: a `DistributedDataParallel`, also inside `torch.compile`.
        policy: scheme text, `Policy`, table or path of a policy file; "auto": what is measured to
            be faster on this link, planned anew for every parameter as gradients change
            (`autoplan`); None: what it was, at first COMMLIB_POLICY, at first and without that
            "int8+ef".
        seed: of the random streams; None: what it was, at first 0.
        timeout: seconds a collective may take; None: what it was, at first the group's.

    Raises:
        ValueError: not a DDP model, or DDP used in a way that leaves no room for a hook.
    """
    ddp = as_ddp(model)
    check(ddp, hook)
    state = _registered(ddp)
    attached = state is not None and not state._detached
    if state is None:
        state = DDPState(policy, seed=seed or 0, timeout=timeout)
    else:
        state._reconfigure(policy, seed, timeout)
    state._bind(ddp)
    if not attached:
        _register(ddp, state)
    return model


def of(model: nn.Module) -> "DDPState":
    """The state of a wrapped model: residuals, statistics, communicator.

    Raises:
        ValueError: the model is no DDP model or commlib's hook is not on it.
        RuntimeError: the model is a copy, and DDP has left the hook behind.
    """
    state = _registered(as_ddp(model))
    if state is None:
        raise ValueError(
            "this DDP model has no commlib hook; call commlib.wrap(model, policy) first"
        )
    if state._detached:
        raise RuntimeError(
            "this DDP model was copied or unpickled, and PyTorch does not restore communication "
            "hooks: its gradients travel uncompressed. Call commlib.wrap(model) to attach the hook "
            "again; the residuals are kept"
        )
    return state


@eager
def hook(
    state: "DDPState",
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # missing from the stubs
) -> torch.futures.Future[torch.Tensor]:
    """The communication hook: averages one bucket over the ranks, compressed.

    For `DistributedDataParallel.register_comm_hook` and for frameworks that take a hook by its path
    (`commlib.integrations.ddp.hook`); `state` is a `DDPState`.
    """
    if not isinstance(state, DDPState):
        raise TypeError(
            f"the state of commlib's hook is a {type(state).__name__}; register it with "
            'commlib.integrations.ddp.DDPState("int8+ef"), or call commlib.wrap(model)'
        )
    if not isinstance(bucket, dist.GradBucket):  # type: ignore[attr-defined]
        raise RuntimeError(PYTHON_REDUCER)
    return state._reduce(bucket)


class DDPState(State):
    """What commlib knows about one DDP model on this rank.

    Made by `wrap`, or by hand where a framework registers the hook itself. By hand no model is
    known until the first backward: parameters are then called `parameter0, parameter1, ...` in the
    order in which buckets bring them, which is the same on all ranks and in every run that builds
    its DDP alike. Policies with rules on names, and checkpoints that outlive a change of the model,
    want `wrap`.

    The communicator is made on first use, so a state may be built before the process group.

    Args:
        policy: as in `wrap`.
        process_group: the group of the DDP model; None: the default group.
        find_unused_parameters: as given to DDP (`wrap` reads it there). On CUDA the host then waits
            for the device once per bucket, to learn which gradients are zero.
    """

    def __init__(
        self,
        policy: PolicyLike | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        find_unused_parameters: bool = False,
        seed: int = 0,
        timeout: float | None = None,
    ) -> None:
        super().__init__(policy, seed=seed, timeout=timeout)
        self._group = process_group
        self._device: torch.device | None = None  # of the model
        self._find_unused = find_unused_parameters
        self._names: dict[torch.Tensor, str] = {}
        self._bound = False  # to a model, whose parameters have names
        self._were: dict[torch.Tensor, str] = {}  # names made up for the model this is a copy of
        self._detached = False
        self._replanner: Replanner | None = None
        self._follows = False  # a plan that came with a state

    @property
    def communicator(self) -> Communicator:
        """The communicator of the model's group; the first access makes it, on all ranks alike."""
        return self.communicators[GRADIENTS]

    def _open(self) -> dict[str, Communicator]:
        made = channel.communicator(
            self._group, self.policy, seed=self.seed, timeout=self.timeout, device=self._device
        )
        return {GRADIENTS: made}

    def _place(self) -> tuple[int, int]:
        return self.communicator.rank, self.communicator.size

    def _tensors(self) -> dict[str, dict[str, TensorInfo]]:
        if not self._bound:  # names are made up as buckets bring parameters
            return {}
        infos = {
            n: TensorInfo(n, prod(_real(p)), p.dtype.to_real(), ndim=p.dim(), shape=_real(p))
            for p, n in self._names.items()
        }
        return {GRADIENTS: infos}

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

        The fewest bytes (or seconds) whose squared error over all parameters is at most `alpha`
        times that of `default` everywhere (`planner.schemes` has the equations). Until the first
        plan the policy stays. All ranks call it alike, between steps. The measured step codes its
        gradients under every candidate, which takes as long as that many messages do without being
        sent.

        States saved from now on carry the plan; `replan` again before loading one. A second call
        starts anew, a policy given to `wrap` ends it; a copy of the model keeps the plan it has.
        Under "auto" there are plans without it, of another kind (`autoplan`), which it replaces.

        Args:
            every: steps, with a backward that is synchronised, from one plan to the next; None: no
                more plans, the schemes stay as they are now.
            schemes: texts of the candidates, with one feedback and one block between them:
                residuals go from one to the other. Default: int2+ef to int8+ef.
            objective: seconds are by the link and the codecs as measured now, so a resumed run may
                plan otherwise. `fp32` may be a candidate beside schemes without feedback.

        Raises: ValueError: schemes that do not fit each other or the policy, or no model is known
            (`wrap` knows it). RuntimeError: ranks call it with other arguments.
        """
        if not self._bound:
            raise ValueError(
                "plans are by parameter name, and this state knows of no model: use "
                "commlib.wrap(model) in place of register_comm_hook"
            )
        if every is None:
            if self._replanner is not None:
                self._replanner.stop()
            return
        settings = Settings(every, tuple(schemes), default, alpha, objective)
        replanner = Replanner(settings, self._tensors()[GRADIENTS])
        replanner.start(self.communicator)
        self._replanner = replanner

    # What wrap, of and hook do with a state.

    def _reduce(self, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        self._detached = False  # DDP calls us: the hook is in place
        buffer, parameters = bucket.buffer(), bucket.parameters()
        if buffer.is_sparse:
            raise RuntimeError(SPARSE)
        self._device = self._device or buffer.device
        communicator = self.communicator
        names = tuple(self._name(p) for p in parameters)
        if self._replanner is not None:
            self._watch(self._replanner, bucket, names)
        work = communicator.all_reduce_segments(
            buffer,
            keys=names,
            sizes=tuple(prod(_real(p)) for p in parameters),
            ndims=tuple(p.dim() for p in parameters),
            shapes=tuple(_real(p) for p in parameters),
            factor=1.0 / communicator.size,
            async_op=True,
            hold=_unused(bucket.gradients()) if self._find_unused else (),
        )
        # Through `then` an error leaves backward as itself; off a bare future DDP fails to cast it.
        future = work.get_future().then(lambda done: done.value())
        return cast("torch.futures.Future[torch.Tensor]", future)

    def _watch(self, replanner: Replanner, bucket: Any, names: tuple[str, ...]) -> None:
        if bucket.index() == 0:
            found = replanner.before_step(self.communicator)
            if found is not None and not isinstance(replanner, AutoPlanner):
                self.policy = found
        replanner.see(names, bucket.gradients(), last=bucket.is_last())

    def _planned(self) -> dict[str, Any]:
        if self._replanner is None and not self._follows:
            return {}
        more = {} if self._replanner is None else self._replanner.state_dict()
        if self.communicator._auto:  # what was measured, of which replan() has made no plan yet
            more["measured"] = True
        return {"policy": self.communicator.policy.to_json(), **more}

    def _plans_in(self, saved: Mapping[str, Any]) -> dict[str, tuple[Policy, bool]]:
        auto = "auto" in saved
        if not saved or (auto and self.policy != "auto"):
            return {}  # the user has named another: what was saved must fit that
        planner = self._planner_for(saved)
        if planner is not None and "steps" in saved:
            planner.check(saved)
        return {GRADIENTS: (Policy.parse(saved["policy"]), auto or "measured" in saved)}

    def _load_planned(self, saved: Mapping[str, Any]) -> None:
        for policy, measured in self._plans_in(saved).values():
            self._replanner = self._planner_for(saved)
            if self._replanner is None:
                log.warning(TOLD)
            elif "steps" in saved:
                device = self._device or torch.device("cpu")
                self._replanner.load_state_dict(saved, device)
            self.communicator.take_policy(policy, auto=measured)
            if "auto" not in saved:
                self.policy, self._follows = "auto" if measured else policy, True

    def _planner_for(self, saved: Mapping[str, Any]) -> Replanner | None:
        """What goes on with plans that were saved; None: nothing does."""
        auto = "auto" in saved
        if self._replanner is None or (self._auto_plans() and not auto):
            tensors = self._tensors().get(GRADIENTS, {})
            return AutoPlanner.saved(saved, tensors) if auto else None
        return self._replanner

    def _reconfigure(
        self, policy: PolicyLike | None, seed: int | None, timeout: float | None
    ) -> None:
        check_settings(seed, timeout)  # before anything is changed
        if policy is not None and not (self._auto_plans() and parsed(policy) == self.policy):
            self._replanner = None
        if policy is not None and parsed(policy) != self.policy:
            self._follows = False
        super()._reconfigure(policy, seed, timeout)

    def _auto_plans(self) -> bool:
        return isinstance(self._replanner, AutoPlanner)

    def _name(self, parameter: torch.Tensor) -> str:
        name = self._names.get(parameter)
        if name is None:  # no model, or one whose parameters were exchanged after DDP took them
            name = self._names[parameter] = MADE_UP.format(len(self._names))
        return name

    def _bind(self, ddp: DistributedDataParallel) -> None:
        before = {**self._were, **self._names}
        self._names = {p: n.replace(COMPILED, "") for n, p in ddp.module.named_parameters()}
        self._bound, self._were = True, {}
        self._rename({old: self._names[p] for p, old in before.items() if p in self._names})
        if self._replanner is not None and self._replanner.tensors != self._tensors()[GRADIENTS]:
            self._replanner = self._replanner.of(self._tensors()[GRADIENTS])
        # With a static graph DDP knows the unused ones after one step, and they never change.
        self._find_unused = bool(ddp.find_unused_parameters and not ddp.static_graph)
        device = device_of(ddp)
        if self._group is not ddp.process_group or self._device != device:
            self.close()
            self._group, self._device = ddp.process_group, device
        if self.communicator.rank == 0:
            tell_unmatched(self.policy, self._names.values(), Role.GRADIENT)
        self.communicator.check_ahead(self._tensors()[GRADIENTS].values(), owners=True)
        self.communicator.warmup()  # what fails or takes long does so here, not in backward
        if self.policy == "auto" and self._replanner is None:
            tensors = self._tensors()[GRADIENTS]
            self._replanner = AutoPlanner.measured(self.communicator, tensors)

    def _rename(self, names: Mapping[str, str]) -> None:
        """What is loaded next goes by new names; by the old ones."""
        if self._saved is None:
            return
        self._saved, lost = renamed(self._saved, names, set(self._names.values()))
        if lost:
            log.warning(
                "residuals of %s are of no parameter that the model has: dropped", ", ".join(lost)
            )

    # DDP pickles its hooks' states. Groups and threads stay behind, residuals go along; parameters
    # only where names were made up, to be found again in the copy of the model.

    def __getstate__(self) -> dict[str, Any]:
        saved = self._saved if self._communicators is None else self.state_dict()
        return {
            "policy": self.policy,
            "seed": self.seed,
            "timeout": self.timeout,
            "find_unused": self._find_unused,
            "saved": saved,
            "names": {**self._were, **({} if self._bound else self._names)},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(  # type: ignore[misc]
            state["policy"],
            find_unused_parameters=state["find_unused"],
            seed=state["seed"],
            timeout=state["timeout"],
        )
        self._saved, self._were = state["saved"], state.get("names", {})
        self._detached = True
        log.warning(
            "commlib's DDP state was copied or unpickled; PyTorch does not restore communication "
            "hooks: call commlib.wrap(model) on the copy, or it will train uncompressed"
        )


def _registered(ddp: DistributedDataParallel) -> DDPState | None:
    for function, state in getattr(ddp, "_comm_hooks", ()):
        if function is hook and isinstance(state, DDPState):
            return state
    return None


def _register(ddp: DistributedDataParallel, state: DDPState) -> None:
    ddp._comm_hooks.clear()  # a copy brings the entry along, its new reducer knows nothing of it
    try:
        ddp.register_comm_hook(state, hook)
        state._detached = False
    except RuntimeError as error:
        ddp._comm_hooks.clear()
        state.close()
        raise RuntimeError(
            "DDP takes one communication hook and already has one, a built-in of PyTorch's or "
            "another library's; build the DDP model without it"
        ) from error


def _real(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape in which DDP carries it: complex values as two real ones each."""
    return (*parameter.shape, 2) if parameter.is_complex() else tuple(parameter.shape)


def _unused(gradients: list[torch.Tensor]) -> tuple[int, ...]:
    """Indices of the all-zero gradients: DDP's `find_unused_parameters` fills in zeros.

    DDP throws away what a hook returns for a parameter that no rank used; a residual sent for it
    would be lost, so it is held. Where other ranks did use it, the residual travels a step later.
    """
    counts = torch.stack([gradient.count_nonzero() for gradient in gradients])
    return tuple(i for i, count in enumerate(counts.tolist()) if count == 0)  # one device sync
