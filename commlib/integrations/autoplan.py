"""Plans under `policy="auto"`: a scheme per parameter, in less time and at no more error than auto.

    auto           int8 for messages of the sizes where that was measured to be clearly faster
    step 99        this rank's gradients are sampled and coded as auto would and under candidates
                   with feedback                                          (planner.errors)
    step 100       the plan of least predicted seconds, messages counted, whose squared error is at
                   most auto's own of the same gradients; the same on all ranks, taken up where it
                   is clearly faster than auto                            (planner.messages)
    steps 200, ..  the next plan; residuals go along with their parameters

Parameters that auto sends raw or as bf16 stay as they are. Where auto compresses nothing there is
none of this, and where no plan is worth it auto goes on as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from commlib.communicator import Communicator
from commlib.integrations.replanning import Replanner, Settings, counted
from commlib.planner.errors import Errors
from commlib.planner.messages import (
    CANDIDATES,
    DEFAULT,
    OWN,
    Prices,
    messages,
    plan_messages,
    worth,
)
from commlib.planner.schemes import Layer, candidates, escape
from commlib.policy import Policy, Role, Rule, TensorInfo, raw
from commlib.scheme import Scheme

log = logging.getLogger("commlib")

SETTINGS = Settings(schemes=CANDIDATES, default=DEFAULT, objective="seconds")
# elements of a parameter's gradient that are coded: the rest is much like them
SAMPLE = 1 << 16


class AutoPlanner(Replanner):
    """The gradients of a communicator under "auto", watched.

    own: what auto has measured to be best. prices: of messages, as measured.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        own: Policy,
        prices: Prices,
        settings: Settings | None = None,
    ) -> None:
        super().__init__(settings or SETTINGS, tensors)
        self.own, self.prices = own, prices
        self._buckets: list[list[str]] = []  # of the measured step, those that auto sends by OWN
        self._planned: set[str] = set()  # names that are in a plan stay in

    @classmethod
    def measured(
        cls, communicator: Communicator, tensors: Mapping[str, TensorInfo]
    ) -> AutoPlanner | None:
        """A planner where auto has found compression worth it, after measuring; collective."""
        profile, policy = communicator.profile, communicator.policy
        if profile is None or all(str(rule.scheme) != OWN for rule in policy.rules):
            return None
        speeds = communicator.speeds((OWN, *CANDIDATES))
        return cls(tensors, policy, Prices.of(profile, speeds))

    @classmethod
    def saved(cls, state: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> AutoPlanner:
        """The planner that a state is of: it measures nothing anew.

        For a group where auto has just found nothing worth it, as the saved residuals need a plan.
        """
        own, prices = Policy.parse(state["auto"]["own"]), state["auto"]["prices"]
        return cls(tensors, own, Prices.from_dict(prices))

    def of(self, tensors: Mapping[str, TensorInfo]) -> AutoPlanner:
        other = AutoPlanner(tensors, self.own, self.prices, self.settings)
        other.stopped = self.stopped
        return other

    def see(self, names: Sequence[str], gradients: Sequence[torch.Tensor], *, last: bool) -> None:
        if self.measuring:
            if self._errors is None:
                self._buckets = []
            numel = sum(gradient.numel() for gradient in gradients)  # what auto goes by
            self._buckets.append([name for name in names if self._takes(name, numel)])
        super().see(names, gradients, last=last)

    def before_step(self, communicator: Communicator) -> Policy | None:
        errors = self._summed(communicator)
        if errors is None:
            return None
        try:
            policy, text = self._plan(errors)
        except ValueError as error:  # by the sums, so on all ranks
            if communicator.rank == 0:
                log.warning("step %d: the schemes stay as they are: %s", self.steps, error)
            return None
        if policy is not None:
            communicator.set_policy(policy, self.tensors, auto=True)
        if communicator.rank == 0:
            log.info("step %d: %s", self.steps, text)
        return policy

    def _plan(self, errors: Errors) -> tuple[Policy | None, str]:
        """The policy of the next steps (None: it stays as it is), and what to say of it."""
        names = {name for bucket in self._buckets for name in bucket}
        layers, budget, own = [], 0.0, 0.0
        for layer in errors.layers(DEFAULT, self.prices.layer):
            if layer.name not in names:
                continue
            if len(layer.schemes) > 1:
                place = layer.place(OWN)
                budget += layer.errors[place]
                layer = _without(layer, place)
            layers.append(layer)
            own += self.prices.layer(self.tensors[layer.name], Scheme.parse(OWN))
        message = self.prices.message
        found = plan_messages(layers, budget, self._buckets, message) if layers else None
        if found is None:
            return None, "no plan: nothing to choose, or no candidate within the error allowed"
        made, seconds = found
        own += message * messages(dict.fromkeys(names, OWN), self._buckets)
        text = (
            f"{1e3 * seconds:.1f} ms of exchanges predicted, {1e3 * own:.1f} as {OWN}, at "
            f"{made.error / budget if budget else 0.0:.3f} of its error: {counted(made)}"
        )
        if not self._planned and not worth(seconds, own):
            return None, f"no plan is worth it: {text}"
        self._planned |= names
        return self._policy(made.schemes), text

    def _policy(self, schemes: Mapping[str, str]) -> Policy:
        """A rule for each parameter of a plan, then auto's own; what that codes beside a plan is
        small, and rides along raw."""
        rules = [
            Rule(Scheme.parse(text), key=escape(name), role=Role.GRADIENT)
            for name, text in schemes.items()
        ]
        others = (
            replace(rule, scheme=raw()) if str(rule.scheme) == OWN else rule
            for rule in self.own.rules
        )
        return Policy((*rules, *others))

    def _takes(self, name: str, numel: int) -> bool:
        """Whether a parameter in a message of so many elements takes part in plans."""
        info = self.tensors.get(name)
        if info is None or len(candidates(info, CANDIDATES)) < 2:
            return False
        sent = self.own.choose(info._replace(numel=numel))
        return name in self._planned or sent == Scheme.parse(OWN).resolve()

    def _table(self, device: torch.device) -> Errors:
        return Errors(self.tensors, (OWN, *CANDIDATES), device, SAMPLE)

    def state_dict(self) -> dict[str, Any]:
        mine = {
            "own": self.own.to_json(),
            "prices": self.prices.to_dict(),
            "planned": sorted(self._planned),
            "buckets": self._buckets if self._errors is not None else [],
        }
        return {**super().state_dict(), "auto": mine}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        super().load_state_dict(state, device)
        mine = state["auto"]
        prices = Prices.from_dict(mine["prices"])
        if prices.size == self.prices.size:  # else what was measured here is of more worth
            self.own, self.prices = Policy.parse(mine["own"]), prices
        self._planned = set(mine["planned"])
        self._buckets = [list(names) for names in mine["buckets"]]


def _without(layer: Layer, place: int) -> Layer:
    """A layer without one of its candidates."""

    def rest(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return values[:place] + values[place + 1 :]

    return Layer(layer.name, layer.numel, *map(rest, (layer.schemes, layer.errors, layer.costs)))
