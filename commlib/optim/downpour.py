"""DOWNPOUR: a worker trains alone for `period` steps, pushes how far it got, and begins anew.

Before every step but the first whose number the period divides::

    u    = Q(x_i - m)       m is where it began; what Q leaves out waits in a residual (+ef)
    xc  <- xc + u
    x_i <- m <- xc

and then the step itself, on the gradient of before (the paper's order, and `EASGD`'s, in which an
exchange may lie beside backward): the first step after an exchange is one of the old parameters.

The rule of the centre makes the variants: `Add` is DOWNPOUR (period 1: asynchronous SGD),
`Momentum` MDOWNPOUR (period 1 alone, else refused), `Averaged` ADOWNPOUR and MVADOWNPOUR.

Sources: Dean et al., "Large Scale Distributed Deep Networks", NIPS 2012; Zhang, Choromanska, LeCun,
arXiv 1412.6651, section 5.1 and algorithms 3 to 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from commlib.eager import eager
from commlib.optim.center import flat, spread
from commlib.optim.easgd import check_params, params_of
from commlib.optim.fragments import check_none_added
from commlib.optim.link import End, check_additive
from commlib.optim.ticks import check_count


class Downpour:
    """A worker of DOWNPOUR around a torch optimizer whose step needs no closure; used as `EASGD`.

    Args:
        optimizer: of this worker; its parameters, in its order, are those of the link.
        center: a `Link`.
        period: steps from one push to the next; 1 where the rule does not add updates as they
            come (`Momentum`).

    Raises: ValueError: a period below 1, or above it under such a rule; other parameters than the
        link's or another order, no link, an optimizer that needs a closure.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, center: End, *, period: int = 1) -> None:
        check_count("Downpour: period", period)
        self.optimizer, self.center, self.period = optimizer, center, period
        self._params = params_of("Downpour", optimizer, center)
        if period > 1:
            why = "and what several steps have gained is no step of Momentum's: give period=1"
            check_additive(f"Downpour: period is {period}", center, why)
        self.steps = 0
        self._begin()

    @eager
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """A push where it is time, and the optimizer's step; what `closure` returned.

        Raises: RuntimeError: the centre is gone, or the optimizer has got other parameters.
        """
        check_none_added("Downpour", self.optimizer, len(self._params))
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.steps and self.steps % self.period == 0:
            self.exchange()
        self.optimizer.step()
        self.steps += 1
        return loss

    @eager
    def exchange(self) -> None:
        """Push what is not pushed yet, and begin anew: where it is time, and after the last step.

        Raises: RuntimeError: the centre is gone.
        """
        self.center.push(flat(self._params) - self._start)
        self.center.pull()
        self._begin()

    def _begin(self) -> None:
        copy = self.center.copy
        spread(copy, self._params)
        # as the parameters hold it: what they round (bfloat16 of a float32 centre) is no progress
        self._start = flat(self._params).to(copy.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Parameters, where they began, the optimizer's state and the number of steps."""
        return {
            "params": flat(self._params),
            "start": self._start.clone(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`. ValueError: of another number of parameters."""
        check_params("Downpour", state, self._params)
        self.optimizer.load_state_dict(state["optimizer"])
        spread(state["params"], self._params)
        self._start = state["start"].clone()
        self.steps = int(state["steps"])
