"""Step sizes of asynchronous SGD, by how fast the delays of its gradients grow.

The centre's n-th update (n from 1) is a gradient of iterate s(n) and has the delay d = n - s(n).
Delays may grow without bound; how fast, **indexed by the source iterate** s, says which steps
converge (almost surely, to the optimum, on variationally coherent problems)::

    delays           steps                       here, with m = n + 2
    bounded          sum a = inf, sum a^2 < inf  Inverse        c / m
    O(s^p), p < 1    1 / n                       Inverse        c / m
    O(s)             1 / (n log n)               InverseLog     c / (m log m)
    O(s^q), any q    1 / (n log n log log n)     InverseLogLog  c / (m log m log(1.5 + log m))

Polynomial delays with q = 2 are sources s(n) = sqrt(n): far worse than s(n) = n / 2, which are
linear ones. The shifts keep the first steps finite; constants do not change the rates.

Sources: Zhou, Mertikopoulos, Bambos, Glynn, Ye, Li, Fei-Fei, "Distributed asynchronous optimization
with unbounded delays: how slow can you go?", ICML 2018; journal version arXiv 2107.02919. Steps by
the delay itself: Ren, Zhou, Qiu, Deshpande, Kalagnanam, "Delay-adaptive distributed stochastic
optimization", AAAI 2020.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median_high
from typing import Any

from commlib.optim.pprs import check_number


class StepSize(ABC):
    """What a rule multiplies the n-th update with."""

    def observe(self, n: int, delay: int) -> None:
        """See update n before its rate is asked for; only `Auto` learns from it."""
        del n, delay

    @abstractmethod
    def rate(self, n: int, delay: int = 0) -> float:
        """The step of update n, counted from 1, which was made on values `delay` updates old.

        Raises: ValueError: n below 1, or a negative delay.
        """

    def state_dict(self) -> dict[str, Any]:
        """What was learned; nothing, for most."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        del state


@dataclass(frozen=True)
class _Scaled(StepSize):
    """Steps in units of `c`, above 0. Raises: ValueError: it is not."""

    c: float = 1.0

    def __post_init__(self) -> None:
        check_number(f"{type(self).__name__}: c", self.c, positive=True)

    def rate(self, n: int, delay: int = 0) -> float:
        check_update(n, delay)
        return self.c / self.growth(n + 2)

    def growth(self, m: int) -> float:
        """By what c is divided."""
        raise NotImplementedError


class Constant(_Scaled):
    """``a = c``: converges to a ball around the optimum, where delays are bounded and c small."""

    def growth(self, m: int) -> float:
        return 1.0


class InverseSqrt(_Scaled):
    """``a = c / sqrt(m)``: of SGD; with linear delays it does not converge."""

    def growth(self, m: int) -> float:
        return math.sqrt(m)


class Inverse(_Scaled):
    """``a = c / m``: bounded and sublinear delays."""

    def growth(self, m: int) -> float:
        return float(m)


class InverseLog(_Scaled):
    """``a = c / (m log m)``: linear delays."""

    def growth(self, m: int) -> float:
        return m * math.log(m)


class InverseLogLog(_Scaled):
    """``a = c / (m log m log(1.5 + log m))``: polynomial delays, whatever their power."""

    def growth(self, m: int) -> float:
        return m * math.log(m) * math.log(1.5 + math.log(m))


@dataclass(frozen=True)
class DelayAdaptive(StepSize):
    """``a = a_n / (1 + d)``: another schedule, each step made smaller by its own delay.

    Needs no knowledge of the delays. Where they grow linearly, 1 / (1 + d) alone is already a 1/n
    schedule, and one that decays too may stop before it is there.
    """

    schedule: StepSize

    def observe(self, n: int, delay: int) -> None:
        self.schedule.observe(n, delay)

    def rate(self, n: int, delay: int = 0) -> float:
        return self.schedule.rate(n, delay) / (1 + delay)

    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.schedule.load_state_dict(state)


CLASSES: tuple[type[_Scaled], ...] = (Inverse, InverseLog, InverseLogLog)
BOUNDS = (0.8, 1.2)  # of the exponent: up to the first it is sublinear, up to the second linear


class Auto(StepSize):
    """The schedule whose class the observed delays are of, chosen anew at every power of two of n.

    Of the updates from one power of two to the next the one with the largest delay d counts, with
    its source s. The exponent of the growth is the median of the slopes between the last `WINDOWS`
    such points, in log(1 + d) against log s (Theil and Sen); the median stands one straggler. Up
    to 0.8 is taken for sublinear, up to 1.2 for linear, beyond for polynomial.

    It begins with the smallest steps, goes to smaller ones at once, and to larger ones only when
    two decisions in a row say so. Early on, delays bounded by D look unbounded until n is some
    times D, and steps are the smaller for it.

    Args:
        c: of all its schedules, above 0.

    Raises: ValueError: c is not above 0.
    """

    WINDOWS = 5

    def __init__(self, c: float = 1.0) -> None:
        self._schedules = tuple(one(c) for one in CLASSES)
        self.c = c
        self._chosen = self._proposed = len(CLASSES) - 1
        self._points: list[tuple[float, float]] = []  # (log s, log(1 + d)), a window each
        self._largest, self._source = -1, 1  # delay of this window, and its source

    @property
    def chosen(self) -> StepSize:
        """The schedule in force."""
        return self._schedules[self._chosen]

    @property
    def exponent(self) -> float | None:
        """Of the growth of the delays in the source; None: too few updates to say."""
        if len(self._points) < 3:
            return None
        return median_high(
            slope(earlier, later)
            for place, later in enumerate(self._points)
            for earlier in self._points[:place]
        )

    def observe(self, n: int, delay: int) -> None:
        check_update(n, delay)
        if delay >= self._largest:
            self._largest, self._source = delay, max(1, n - delay)
        if n & (n - 1) == 0:
            point = math.log(self._source), math.log1p(self._largest)
            self._points = [*self._points, point][-self.WINDOWS :]
            self._largest = -1
            self._decide()

    def _decide(self) -> None:
        exponent = self.exponent
        if exponent is None:
            return
        before, self._proposed = self._proposed, sum(exponent > bound for bound in BOUNDS)
        if self._proposed > self._chosen:
            self._chosen = self._proposed
        else:
            self._chosen = min(self._chosen, max(before, self._proposed))

    def rate(self, n: int, delay: int = 0) -> float:
        return self.chosen.rate(n, delay)

    def state_dict(self) -> dict[str, Any]:
        return {
            "chosen": self._chosen,
            "proposed": self._proposed,
            "points": [list(point) for point in self._points],
            "largest": self._largest,
            "source": self._source,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._chosen, self._proposed = int(state["chosen"]), int(state["proposed"])
        self._points = [(float(x), float(y)) for x, y in state["points"]]
        self._largest, self._source = int(state["largest"]), int(state["source"])

    def __repr__(self) -> str:
        return f"Auto(c={self.c!r})"


def slope(earlier: tuple[float, float], later: tuple[float, float]) -> float:
    """Between two points; 0 where the second is not higher, infinite where only it is higher."""
    across, up = later[0] - earlier[0], later[1] - earlier[1]
    if up <= 0:
        return 0.0
    return up / across if across > 0 else math.inf


def check_update(n: int, delay: int) -> None:
    """Refuse an update that cannot be (ValueError)."""
    if n < 1 or delay < 0:
        raise ValueError(
            f"step size: update n = {n} with delay {delay}, allowed: n from 1, delays of at least 0"
        )
