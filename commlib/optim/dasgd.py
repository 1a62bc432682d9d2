"""DASGD: distributed asynchronous SGD whose gradients may come late without bound.

The centre takes gradients as they come; the n-th one was made on iterate s(n) < n::

    Y <- Y - a_n g(X_s(n))        a_n by n and by how delays grow: `schedules`
    X  = proj(Y)                  what workers see; Y is not projected (lazy projection)

    center = Center(model.named_parameters(), push="int4+ef", rule=Projected(Auto(0.1)))
    ...
    worker = DASGD(model.parameters(), connect(store, model.named_parameters(), "w3"))
    for batch in data:
        model.zero_grad()
        loss(model, batch).backward()
        worker.step()

A push is stamped with the version of the copy that its gradient was made on, so the centre knows
every delay: `Center.delays` is the histogram, `staleness` its summary. Under error feedback what
rounding left of one gradient goes with a later one, which is one more delay of the same kind: the
worker keeps the versions of its residual (`ResidualVersions`).

Source: Zhou, Mertikopoulos, Bambos, Glynn, Ye, Li, Fei-Fei, "Distributed asynchronous optimization
with unbounded delays: how slow can you go?", ICML 2018; journal version arXiv 2107.02919.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from commlib.eager import eager
from commlib.optim.center import flat, spread
from commlib.optim.link import Link, check_order, check_takes
from commlib.optim.rules import Takes
from commlib.optim.schedules import StepSize
from commlib.optim.staleness import ResidualVersions
from commlib.optim.ticks import check_count

Projection = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Box:
    """Projection onto ``low <= x <= high``, elementwise. ValueError: it is empty."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not -math.inf < self.low <= self.high < math.inf:
            raise ValueError(f"Box: {self.low} to {self.high}, allowed: finite, low <= high")

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """The nearest point, in memory of its own."""
        return values.clamp(self.low, self.high)


class Projected:
    """The rule of a centre: ``Y <- Y - a_n g``, and workers see ``X = proj(Y)``.

    `Center.values` is Y; parameters to evaluate are `Center.shown()`.

    Args:
        schedule: a_n, with n the updates that this rule has seen, from 1.
        project: from a flat tensor to the nearest point of a convex set, in memory of its own;
            None: everywhere. Not part of the state.
        lazy: False: Y itself is projected after every update, as in plain projected SGD. After
            large first steps Y is far outside, and lazy projection needs as large ones to come
            back; on the other hand it forgets no gradient.
    """

    additive: ClassVar[bool] = False
    takes: ClassVar[Takes] = "gradients"

    def __init__(
        self, schedule: StepSize, project: Projection | None = None, *, lazy: bool = True
    ) -> None:
        self.schedule, self.project, self.lazy = schedule, project, lazy
        self.updates = 0
        """So far."""

    def apply(self, values: torch.Tensor, update: torch.Tensor, delay: int) -> None:
        """One step. ValueError: the update is of a version that is not there yet."""
        n = self.updates + 1
        self.schedule.observe(n, delay)
        values.sub_(update, alpha=self.schedule.rate(n, delay))
        if self.project is not None and not self.lazy:
            values.copy_(self.project(values))
        self.updates = n

    def shown(self, values: torch.Tensor) -> torch.Tensor:
        return values if self.project is None else self.project(values)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.schedule.load_state_dict(state["schedule"])
        self.updates = int(state["updates"])


class DASGD:
    """A worker: pushes the gradient of every step, and goes on from the centre's iterate.

    The parameters begin where the centre is. Its step size is the centre's.

    Args:
        params: the parameters, in the link's order, on the CPU. One without a gradient counts 0.
        link: to a centre with the rule `Projected`.
        bound: drop what is older in the residual: elements that hold a gradient made on a version
            more than so many updates before the one of the next push. None: keep all. What is
            dropped is lost to the sum of gradients; with top-k much of it may be.
        stamp_oldest: stamp a message with the oldest version in it, residual included, so that
            delays at the centre are those of the oldest part (and steps by the delay smaller).

    Raises: ValueError: other parameters than the link's or another order, a centre whose rule takes
        no gradients, no single centre (Sharded), or bound is not at least 1.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        link: Link,
        *,
        bound: int | None = None,
        stamp_oldest: bool = False,
    ) -> None:
        self._params = list(params)
        if bound is not None:
            check_count("DASGD: bound", bound)
        if not isinstance(link, Link):
            raise ValueError(
                f"DASGD: link is a {type(link).__name__}, allowed: a Link to one centre, which "
                "local(...) or connect(...) make, as its versions tell how late a gradient comes"
            )
        check_order("DASGD", self._params, link)
        check_takes("DASGD", "gradients", link)
        self.link, self.bound, self.stamp_oldest = link, bound, stamp_oldest
        self.steps = 0
        self.dropped = 0
        """Elements of residuals that were dropped so far."""
        self._versions: ResidualVersions | None = None  # made with the first residual
        spread(link.copy, self._params)

    @property
    def oldest(self) -> int | None:
        """The oldest version that a gradient in the residual was made on; None: none is."""
        return None if self._versions is None else self._versions.oldest

    @property
    def residual_age(self) -> int:
        """By how many updates the residual's oldest part is older than the copy; 0: it has none."""
        oldest = self.oldest
        return 0 if oldest is None else self.link.version - oldest

    @eager
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Push `p.grad`, made on the copy; pull, and write the parameters; what `closure` returned.

        Raises: RuntimeError: the centre is gone.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradient = flat(torch.zeros_like(p) if p.grad is None else p.grad for p in self._params)
        self._push(gradient)
        spread(self.link.pull(), self._params)
        self.steps += 1
        return loss

    def _push(self, gradient: torch.Tensor) -> None:
        version = self.link.version
        if self.bound is not None and self._versions is not None:
            old = self._versions.before(version - self.bound)
            count = int(old.sum())
            if count:
                self.link.drop(old)
                self._versions.drop(old)
                self.dropped += count
        oldest = self.oldest if self.stamp_oldest else None
        arrives = self.link.push(gradient, source=version if oldest is None else oldest)
        residual = self.link.residual()
        if residual is not None:
            if self._versions is None:
                self._versions = ResidualVersions(gradient.numel())
            self._versions.sent(residual, arrives, version)

    def state_dict(self) -> dict[str, Any]:
        """Versions of the residual and counts; the iterate is in the link's own state."""
        kept = {} if self._versions is None else {"versions": self._versions.versions.clone()}
        numel = self.link.copy.numel()
        return {"numel": numel, "steps": self.steps, "dropped": self.dropped, **kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`, with a link that goes on from its own.

        Where the centre has another memory of this worker, the link begins anew, without a
        residual.

        Raises: ValueError: of another number of values.
        """
        if state["numel"] != self.link.copy.numel():
            raise ValueError(
                f"DASGD: the state is of {state['numel']} values, allowed: the link's "
                f"{self.link.copy.numel()}"
            )
        self._versions = None
        if "versions" in state and self.link.residual() is not None:
            self._versions = ResidualVersions(self.link.copy.numel())
            self._versions.versions.copy_(state["versions"])
        self.steps, self.dropped = int(state["steps"]), int(state["dropped"])
