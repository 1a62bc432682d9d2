"""Re-planning: a scheme per parameter by the gradients as they are now, every so many steps.

    model = commlib.wrap(DDP(model), "int4+ef")
    commlib.of(model).replan(every=100)

    step 99 of 100    before a bucket is sent, this rank's gradients are coded under every candidate
                      and the squared errors kept                          (planner.errors)
    step 100          before the first bucket: the tables of all ranks are added up, in fp64 and
                      rank order; every rank runs the same programme on the same sums, and the
                      communicator goes on under the plan                  (planner.schemes)

Residuals go along with their parameters. Source: L-GreCo (arXiv 2210.17357), section 4.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from commlib.algorithms import TwoPhase
from commlib.communicator import Communicator
from commlib.feedback import ErrorFeedback, Plain
from commlib.hosts import digest
from commlib.planner.errors import Errors
from commlib.planner.schemes import CANDIDATES, DEFAULT, Cost, Plan, nbytes, plan, uniform
from commlib.policy import Policy, TensorInfo
from commlib.scheme import Scheme

log = logging.getLogger("commlib")

TOLD = (
    "the state is of a run that planned its schemes anew every so often; here they stay as they "
    "were then, until replan() is called"
)


@dataclass(frozen=True)
class Settings:
    """When to plan, and from what; the same on all ranks.

    every: steps from one plan to the next. schemes: texts of the candidates. default: the one whose
    error, everywhere, times `alpha` is the budget. objective: what there is to be least of.

    Raises: ValueError: nothing to choose from, or residuals could not go from one candidate to the
        next.
    """

    every: int = 100
    schemes: tuple[str, ...] = CANDIDATES
    default: str = DEFAULT
    alpha: float = 1.0
    objective: Literal["bytes", "seconds"] = "bytes"

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every is {self.every!r}, it must be a whole number of steps >= 1")
        if not self.alpha > 0:
            raise ValueError(f"alpha is {self.alpha}, it must be > 0; 1 is default's own error")
        if self.objective not in ("bytes", "seconds"):
            raise ValueError(f"objective is {self.objective!r}; allowed: bytes, seconds")
        parsed = [Scheme.parse(text) for text in (self.default, *self.schemes)]
        texts = list(dict.fromkeys(map(str, parsed[1:])))
        object.__setattr__(self, "default", str(parsed[0]))
        object.__setattr__(self, "schemes", tuple(texts))
        if self.default not in texts or len(texts) < 2:
            raise ValueError(
                f"schemes are {', '.join(texts) or 'none'}: give two or more, the default "
                f"{self.default} among them"
            )
        first = parsed[0]
        for other in parsed[1:]:
            if not _interchangeable(first, other):
                raise ValueError(
                    f"{other} cannot take turns with {first}: residuals go from scheme to scheme, "
                    "which takes the same feedback, the same block and two_phase without back"
                )


class Replanner:
    """The gradients of one communicator, watched.

    tensors: what it carries, by name, the same on all ranks.
    """

    def __init__(self, settings: Settings, tensors: Mapping[str, TensorInfo]) -> None:
        self.settings = settings
        self.tensors = dict(tensors)
        self.steps = 0  # whose last bucket was handed over
        self.stopped = False
        self._cost: Cost = nbytes
        self._errors: Errors | None = None

    def start(self, communicator: Communicator) -> None:
        """Agree with all ranks on what is watched; measure link and codecs where seconds count.

        Raises: ValueError: residuals under the policy could not go on under the candidates; or one
            rank, which has no link. RuntimeError: ranks differ.
        """
        mine = self.settings
        first = Scheme.parse(mine.default).resolve()
        for name, info in self.tensors.items():
            # now, or by the time of the first plan
            for scheme in communicator.ahead(info).values():
                if scheme.feedback != Plain() and not _interchangeable(first, scheme):
                    raise ValueError(
                        f"{name} goes by {scheme}, whose residual could not go on under {first}: "
                        f"wrap the model with {mine.default!r}, or give schemes and a default like "
                        f"{scheme}"
                    )
        tensors = digest(
            str([(i.key, i.numel, str(i.dtype), i.ndim) for i in self.tensors.values()])
        )
        text = {"op": "replan", "key": "", **asdict(mine), "tensors": tensors}
        communicator._carrier.agree(text)
        if mine.objective == "seconds":
            self._cost = communicator.costs(mine.schemes)

    def of(self, tensors: Mapping[str, TensorInfo]) -> Replanner:
        """The same for other tensors of the same group, from the first step on."""
        other = Replanner(self.settings, tensors)
        other._cost, other.stopped = self._cost, self.stopped
        return other

    def stop(self) -> None:
        """Measure and plan no more; the schemes stay as they are."""
        self.stopped, self._errors = True, None

    @property
    def measuring(self) -> bool:
        """Whether the gradients of this step are measured."""
        return not self.stopped and (self.steps + 1) % self.settings.every == 0

    def before_step(self, communicator: Communicator) -> Policy | None:
        """Plan where the step before was measured, on all ranks; the new policy, in force."""
        errors = self._summed(communicator)
        if errors is None:
            return None
        try:
            made = plan(errors.layers(self.settings.default, self._cost), alpha=self.settings.alpha,
                        default=self.settings.default)  # fmt: skip
        except ValueError as error:  # by the sums, so on all ranks
            if communicator.rank == 0:
                log.warning("step %d: the schemes stay as they are: %s", self.steps, error)
            return None
        policy = made.policy(self.settings.default)
        communicator.set_policy(policy, self.tensors)
        if communicator.rank == 0:
            log.info(
                "step %d: %s",
                self.steps,
                _summary(made, self.settings.default, self.settings.objective),
            )
        return policy

    def _summed(self, communicator: Communicator) -> Errors | None:
        """The tables of all ranks added up, where the step before was measured."""
        errors, self._errors = self._errors, None
        if errors is None:
            return None
        every = communicator.gather(errors.table, f"error tables of step {self.steps - 1}")
        errors.table = every[0].view_as(errors.table).clone()
        for other in every[1:]:
            errors.table += other.view_as(errors.table)
        return errors

    def _table(self, device: torch.device) -> Errors:
        return Errors(self.tensors, self.settings.schemes, device)

    def see(self, names: Sequence[str], gradients: Sequence[torch.Tensor], *, last: bool) -> None:
        """The gradients of a bucket that is about to be sent."""
        if self.measuring:
            with torch.no_grad():
                for name, gradient in zip(names, gradients, strict=True):
                    if self._errors is None:
                        self._errors = self._table(gradient.device)
                    if name in self.tensors:  # else a parameter exchanged after DDP took it
                        self._errors.add(name, gradient)
        self.steps += last

    def state_dict(self) -> dict[str, Any]:
        """Steps, and the table that the next step begins with: tensors and numbers."""
        state: dict[str, Any] = {"steps": self.steps}
        if self.stopped:
            state["stopped"] = True
        if self._errors is not None:
            state["table"] = self._errors.table.to("cpu", copy=True)
        return state

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuse a state whose table is of other tensors or schemes (ValueError)."""
        if "table" not in state:
            return
        shape = self._table(torch.device("cpu")).table.shape
        if state["table"].shape != shape:
            raise ValueError(
                f"the saved error table has {tuple(state['table'].shape)} entries, these "
                f"parameters and schemes {tuple(shape)}: replan() as it was saved"
            )

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from `state_dict()`. ValueError where its table is of other tensors or schemes.

        Where either has been stopped, there are no more plans.
        """
        self.check(state)
        self.stopped |= bool(state.get("stopped", False))
        errors = None
        if "table" in state:
            errors = self._table(device)
            errors.table.copy_(state["table"])
        self.steps, self._errors = state["steps"], None if self.stopped else errors


def _interchangeable(a: Scheme, b: Scheme) -> bool:
    """Whether a residual under one is a residual under the other, the owner's too."""
    plain = all(s.algorithm == TwoPhase(slices=_slices(s)) or _raw(s) for s in (a, b))
    if not (plain and a.feedback == b.feedback):
        return False
    if not isinstance(a.feedback, ErrorFeedback):
        return True
    return a.codec.align == b.codec.align and a.codec.format.block == b.codec.format.block


def _raw(scheme: Scheme) -> bool:
    """It has no residual, so where no scheme has one it may take turns."""
    return scheme.lossless and scheme.feedback == Plain()


def _slices(scheme: Scheme) -> int | None:
    return scheme.algorithm.slices if isinstance(scheme.algorithm, TwoPhase) else None


def _summary(made: Plan, default: str, unit: str) -> str:
    gain = uniform(made.layers, default).cost / made.cost
    used = made.error / made.budget if made.budget else 0.0
    shown = f"{used:.3f} of the error allowed: {counted(made)}"
    return f"{gain:.2f}x fewer {unit} than {default}, {shown}"


def counted(made: Plan) -> str:
    """How many layers have which scheme."""
    counts: dict[str, int] = {}
    for text in made.schemes.values():
        counts[text] = counts.get(text, 0) + 1
    return ", ".join(f"{n} x {text}" for text, n in sorted(counts.items()))
