"""Numbers from noisy clocks: percentiles, paired ratios with an interval, the number of rounds.

Everything is measured in rounds: each round times every contestant once, in one fixed order, so a
slow moment of the machine falls on neighbours and a ratio within a round cancels it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

MIN_ROUNDS, MAX_ROUNDS = 6, 200  # 6: the fewest that give a 95% interval of a median


class Ratio(NamedTuple):
    """A median of paired ratios and the interval that holds it with 95% confidence.

    None: of too few rounds (MIN_ROUNDS) for one.
    """

    median: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.median:.3f} [-]"
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0..100) of `values`, linear between neighbours."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("percentile of no values")
    place = (len(ordered) - 1) * q / 100.0
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def median_interval(values: Sequence[float]) -> Ratio:
    """Median of `values` with its exact 95% interval from order statistics (the sign test).

    The interval is [x_(k), x_(n+1-k)] with the largest k for which
    P(Binomial(n, 1/2) < k) <= 2.5%. It assumes nothing of how the noise is distributed, which
    matters on a shared machine where it has a heavy tail. Below 6 values no such k exists: even
    the whole range covers the median with 1 - 2^(1-n) only, and there is no interval.
    """
    ordered = sorted(values)
    n = len(ordered)
    if n == 0:
        raise ValueError("interval of no values")
    if n < MIN_ROUNDS:
        return Ratio(percentile(ordered, 50), None, None)
    # in whole numbers: of 1030 values and more, the counts are beyond a float
    k, ways, tail = 0, 1, 0  # ways: n over k; tail: their sum up to k
    while k < (n - 1) // 2:
        tail += ways
        if 40 * tail > 1 << n:
            break
        ways = ways * (n - k) // (k + 1)
        k += 1
    return Ratio(percentile(ordered, 50), ordered[k - 1], ordered[n - k])


def paired_ratio(times: Sequence[float], base: Sequence[float]) -> Ratio:
    """times[i] / base[i] of the same round, as a median with its 95% interval."""
    if len(times) != len(base):
        raise ValueError(f"paired ratio of {len(times)} times and {len(base)} base times")
    return median_interval([t / b for t, b in zip(times, base, strict=True)])


def rounds_within(budget: float, seconds_per_round: float) -> int:
    """How many rounds fit in `budget` seconds, between MIN_ROUNDS and MAX_ROUNDS."""
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget / max(seconds_per_round, 1e-9))))


def interleave(
    contestants: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each contestant in each of `rounds` rounds, on this process alone."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times
