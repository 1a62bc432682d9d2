"""Elastic averaging: workers train by themselves, held to a common centre by a spring.

Every `period` steps worker i exchanges the elastic difference with the centre, and every step it
makes its optimizer's step on the gradient it had before::

    d    = Q(alpha (x_i - xc))             x_i and xc as they were before either moves
    x_i <- x_i - d        xc <- xc + d     the decoded d at both ends: x_i + xc is conserved
    x_i <- x_i - eta g_i                   g_i at the old x_i

Asynchronous (a `Link` to a centre somewhere else) xc moves by one worker's d at a time; synchronous
(`Gathered`) all workers come together, every one keeps the centre, and xc moves by the sum of all
d, made on the same xc. With an optimizer that has Nesterov's momentum it is EAMSGD: the elastic
part leaves the velocity alone, and works on the point that looks ahead, which is where torch keeps
the parameters.

xc here is the worker's copy of the centre, which the centre tells as a coded difference.

Source: Zhang, Choromanska, LeCun, "Deep learning with Elastic Averaging SGD", NIPS 2015, arXiv
1412.6651, algorithms 1 and 2; Zhang, "Distributed stochastic optimization for deep learning",
thesis, arXiv 1605.02216.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from commlib.eager import eager
from commlib.optim.center import flat, spread
from commlib.optim.fragments import check_none_added, check_steps_alone
from commlib.optim.link import End, check_additive, check_order, check_takes
from commlib.optim.pprs import check_number
from commlib.optim.ticks import check_count


def stable(eta: float, alpha: float) -> bool:
    """Whether round-robin EASGD on a quadratic lies in the region proven stable for all p.

    ``0 <= eta <= 2`` and ``0 <= alpha <= (4 - 2 eta) / (4 - eta)``.

    Args:
        eta: learning rate times curvature, the largest eigenvalue of the Hessian.
        alpha: moving rate of one exchange.

    Source: the thesis, section 3.1 (asynchronous EASGD in the round-robin scheme).
    """
    return 0 <= eta <= 2 and 0 <= alpha <= (4 - 2 * eta) / (4 - eta)


def exchange(
    params: list[torch.Tensor], center: End, moving_rate: float, center_rate: float
) -> None:
    """One elastic exchange of `params` with a centre: see above."""
    mine = flat(params)
    moved = center.push((mine - center.pull()).mul_(center_rate))
    if moving_rate != center_rate:
        moved = moved * (moving_rate / center_rate)
    spread(mine.sub_(moved), params)


class EASGD:
    """A worker of EASGD or EAMSGD around a torch optimizer whose step needs no closure.

        link = connect(store, model.named_parameters(), worker="w3")
        worker = EASGD(optimizer, link, moving_rate=0.9 / 4, period=16)
        for batch in data:
            optimizer.zero_grad()
            loss(model, batch).backward()
            worker.step()

    The parameters begin where the centre is.

    Args:
        optimizer: of this worker; its parameters, in its order, are those of the link. LBFGS would
            evaluate the model again, after the exchange.
        center: a `Link` (asynchronous) or `Gathered` (synchronous), whose rule adds updates as
            they come.
        moving_rate: alpha. The paper's is 0.9 / workers.
        period: steps from one exchange to the next (tau). The first is at the first step.
        center_rate: by which the centre moves, where that is another one; None: alpha.
        curvature: largest eigenvalue of the Hessian, if known: the region of `stable` depends on
            it. None takes the largest region, of vanishing learning rates.
        unstable: allow rates outside the proven region.

    Raises: ValueError: rates outside the region, a period below 1, other parameters than the
        link's or another order, no link, a centre of another rule, an optimizer that needs a
        closure.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        center: End,
        *,
        moving_rate: float,
        period: int = 16,
        center_rate: float | None = None,
        curvature: float | None = None,
        unstable: bool = False,
    ) -> None:
        check_count("EASGD: period", period)
        check_number("EASGD: curvature", 0.0 if curvature is None else curvature, positive=False)
        self.optimizer, self.center, self.period = optimizer, center, period
        self.moving_rate = float(moving_rate)
        self.center_rate = self.moving_rate if center_rate is None else float(center_rate)
        if self.center_rate == 0 and self.moving_rate != 0:
            raise ValueError("EASGD: center_rate is 0, allowed: others, or moving_rate 0 too")
        self._params = params_of("EASGD", optimizer, center)
        check_conserves("EASGD", center)
        rate = max(float(group["lr"]) for group in optimizer.param_groups)
        eta = rate * (0.0 if curvature is None else curvature)
        if not unstable:
            for alpha in (self.moving_rate, self.center_rate):
                if not stable(eta, alpha):
                    top = max(0.0, (4 - 2 * eta) / (4 - eta)) if eta < 4 else 0.0
                    raise ValueError(
                        f"EASGD: a rate of {alpha:g} with lr x curvature = {eta:g} is outside of "
                        f"the region proven stable, 0 <= alpha <= (4 - 2 eta) / (4 - eta) = "
                        f"{top:g}, eta <= 2; the paper's is 0.9 / workers; unstable=True allows it"
                    )
        self.steps = 0
        spread(center.copy, self._params)

    @eager
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """An exchange where it is time, and the optimizer's step; what `closure` returned.

        Raises: RuntimeError: the centre is gone, or the optimizer has got other parameters.
        """
        check_none_added("EASGD", self.optimizer, len(self._params))
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.steps % self.period == 0:
            exchange(self._params, self.center, self.moving_rate, self.center_rate)
        self.optimizer.step()
        self.steps += 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Parameters, the optimizer's state and the number of steps; the link has its own."""
        return {
            "params": flat(self._params),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`. ValueError: of another number of parameters."""
        check_params("EASGD", state, self._params)
        self.optimizer.load_state_dict(state["optimizer"])
        spread(state["params"], self._params)
        self.steps = int(state["steps"])


def check_conserves(who: str, center: End) -> None:
    """Refuse a centre that gets something else than what leaves a worker (ValueError)."""
    why = "and an elastic exchange would not conserve the sum of a worker and its centre"
    check_additive(who, center, why)


def params_of(who: str, optimizer: torch.optim.Optimizer, center: End) -> list[torch.Tensor]:
    """The optimizer's parameters, in the order of its groups, which has to be the centre's.

    Raises: ValueError: it is not, the centre is none or takes gradients, or the optimizer's step
        needs a closure.
    """
    check_takes(who, "updates", center)
    check_steps_alone(who, optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    check_order(f"{who}: in its optimizer's groups", params, center)
    return params


def check_params(who: str, state: Mapping[str, Any], params: Iterable[torch.Tensor]) -> None:
    """Refuse a state of another number of values (ValueError)."""
    there, here = state["params"].numel(), sum(p.numel() for p in params)
    if there != here:
        raise ValueError(f"{who}: the state has {there} values, the parameters {here}")
