"""What a centre does with an update that a worker pushes.

Rules keep vectors like the centre's; `shown` is what workers pull. A rule that is `additive` adds
the update as it comes: then the worker's copy can be moved by the same, without a byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol

import torch

from commlib.optim.pprs import check_number

Takes = Literal["updates", "gradients"]


class Rule(Protocol):
    """How updates change the values of a centre."""

    @property
    def additive(self) -> bool:
        """Whether an update is added as it comes."""

    @property
    def takes(self) -> Takes:
        """What workers push: how far they came, or gradients, which the rule descends by."""

    def apply(self, values: torch.Tensor, update: torch.Tensor, delay: int) -> None:
        """Change flat `values` by `update`, made on values that are `delay` updates old."""

    def shown(self, values: torch.Tensor) -> torch.Tensor:
        """What a worker sees of `values`; may be `values` itself."""

    def state_dict(self) -> dict[str, Any]:
        """What the rule remembers."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""


class Add:
    """``xc += u``: elastic averaging, DOWNPOUR."""

    additive: ClassVar[bool] = True
    takes: ClassVar[Takes] = "updates"

    def apply(self, values: torch.Tensor, update: torch.Tensor, delay: int) -> None:
        del delay
        values += update

    def shown(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        del state


class Momentum:
    """MDOWNPOUR: the centre keeps Nesterov's momentum, workers see the point that looks ahead.

    ::

        v <- momentum v + u      u = -lr g(xc + momentum v), pushed after every step
        xc <- xc + v

    For workers of `Downpour` with period 1: it does not add updates as they come, so `EASGD` and
    `Node` refuse it.

    Source: Zhang, Choromanska, LeCun, "Deep learning with Elastic Averaging SGD", NIPS 2015, arXiv
    1412.6651, algorithms 4 and 5.
    """

    additive: ClassVar[bool] = False
    takes: ClassVar[Takes] = "updates"

    def __init__(self, momentum: float) -> None:
        check_number("Momentum: rate", momentum, positive=False)
        if momentum >= 1:
            raise ValueError(f"Momentum: rate is {momentum}, allowed: 0 to below 1")
        self.momentum = momentum
        self._velocity: torch.Tensor | None = None

    def apply(self, values: torch.Tensor, update: torch.Tensor, delay: int) -> None:
        del delay
        if self._velocity is None:
            self._velocity = torch.zeros_like(values)
        self._velocity.mul_(self.momentum).add_(update)
        values += self._velocity

    def shown(self, values: torch.Tensor) -> torch.Tensor:
        if self._velocity is None:
            return values
        return values.add(self._velocity, alpha=self.momentum)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._velocity is None else {"velocity": self._velocity.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._velocity = state["velocity"].clone() if "velocity" in state else None


class Averaged:
    """Another rule, and beside it the average of the values: ADOWNPOUR, MVADOWNPOUR.

    ::

        z <- (1 - r) z + r xc      r = 1 / t after update t, or a fixed moving rate

    Workers see the rule's values; the average is for evaluation.
    """

    def __init__(self, rule: Rule, rate: float | None = None) -> None:
        if rate is not None:
            check_number("Averaged: rate", rate, positive=True)
            if rate > 1:
                raise ValueError(f"Averaged: rate is {rate}, allowed: above 0, at most 1")
        self.rule, self.rate = rule, rate
        self.additive, self.takes = rule.additive, rule.takes
        self.average: torch.Tensor | None = None
        """z, flat; None before the first update."""
        self._updates = 0

    def apply(self, values: torch.Tensor, update: torch.Tensor, delay: int) -> None:
        if self.average is None:
            self.average = values.clone()
        self.rule.apply(values, update, delay)
        self._updates += 1
        self.average.lerp_(values, 1 / self._updates if self.rate is None else self.rate)

    def shown(self, values: torch.Tensor) -> torch.Tensor:
        return self.rule.shown(values)

    def state_dict(self) -> dict[str, Any]:
        held = {} if self.average is None else {"average": self.average.clone()}
        return {"rule": self.rule.state_dict(), "updates": self._updates, **held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rule.load_state_dict(state["rule"])
        self._updates = int(state["updates"])
        self.average = state["average"].clone() if "average" in state else None
