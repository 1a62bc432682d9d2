"""Step sizes: their values, and what `Auto` makes of delays of every kind."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from commlib.optim import schedules, staleness
from commlib.optim.schedules import (
    Auto,
    Constant,
    DelayAdaptive,
    Inverse,
    InverseLog,
    InverseLogLog,
    InverseSqrt,
    StepSize,
)
from commlib.optim.staleness import ResidualVersions


def test_values() -> None:
    """n = 1 is m = 3: every first step is finite, and above 0."""
    log = math.log
    assert Constant(0.5).rate(1) == Constant(0.5).rate(10**6, 9) == 0.5
    assert InverseSqrt(2.0).rate(7) == 2 / 3
    assert Inverse(3.0).rate(1) == 1.0
    assert InverseLog(3.0).rate(1) == pytest.approx(1 / log(3))
    assert InverseLogLog(3.0).rate(1) == pytest.approx(1 / (log(3) * log(1.5 + log(3))))
    assert InverseLogLog(10.0).rate(98) == pytest.approx(0.1 / (log(100) * log(1.5 + log(100))))
    assert DelayAdaptive(Inverse(3.0)).rate(1, 4) == 0.2
    assert InverseLog(3.0) == InverseLog(3.0) != InverseLog(2.0)
    assert InverseLog() != InverseLogLog()
    assert eval(repr(InverseLog(3.0)), vars(schedules)) == InverseLog(3.0)
    assert repr(DelayAdaptive(Auto(3.0))) == "DelayAdaptive(schedule=Auto(c=3.0))"


@pytest.mark.parametrize("schedule", [Constant(), InverseLogLog(), DelayAdaptive(Inverse())])
def test_errors(schedule: StepSize) -> None:
    with pytest.raises(ValueError, match=r"n = 0 with delay 0, allowed: n from 1"):
        schedule.rate(0)
    with pytest.raises(ValueError, match=r"delay -1, allowed"):
        schedule.rate(3, -1)
    with pytest.raises(ValueError, match=r"InverseLog: c is 0, allowed"):
        InverseLog(0)
    with pytest.raises(ValueError, match=r"c is nan"):
        Auto(math.nan)


def seen(source: Callable[[int], int], updates: int, auto: Auto | None = None) -> Auto:
    """`Auto` after updates whose sources (iterates from 1, at most n) are source(n)."""
    auto = Auto(3.0) if auto is None else auto
    for n in range(1, updates + 1):
        auto.observe(n, n - max(1, source(n)))
    return auto


draws = random.Random(0)
KINDS: list[tuple[str, Callable[[int], int], type[StepSize]]] = [
    ("none", lambda n: n, Inverse),
    ("constant", lambda n: n - 50, Inverse),
    ("at random, up to 50", lambda n: n - draws.randrange(51), Inverse),
    ("square root", lambda n: n - math.isqrt(n), Inverse),
    ("linear", lambda n: n // 2, InverseLog),
    ("linear, of one worker in four", lambda n: n if n % 4 else n // 3, InverseLog),
    ("polynomial", math.isqrt, InverseLogLog),
    ("cubic", lambda n: round(n ** (1 / 3)), InverseLogLog),
    ("polynomial, of one in four", lambda n: n if n % 4 else math.isqrt(n), InverseLogLog),
    ("one source for ever", lambda n: 1, InverseLogLog),
]


@pytest.mark.parametrize(
    ("source", "kind"), [(s, k) for _, s, k in KINDS], ids=[k[0] for k in KINDS]
)
def test_auto_finds_the_class(source: Callable[[int], int], kind: type[StepSize]) -> None:
    auto = seen(source, 4096)
    assert type(auto.chosen) is kind, auto.exponent
    assert auto.rate(4096, 7) == kind(3.0).rate(4096, 7)  # type: ignore[call-arg]


def test_auto_measures_by_the_source() -> None:
    """d = n - sqrt(n) grows linearly in n; in s it is a square."""
    assert seen(math.isqrt, 4096).exponent == pytest.approx(2, abs=0.1)
    assert seen(lambda n: n // 2, 4096).exponent == pytest.approx(1, abs=0.05)
    assert Auto().exponent is None


def test_auto_begins_with_the_smallest_steps() -> None:
    assert isinstance(Auto().chosen, InverseLogLog)
    assert isinstance(seen(lambda n: n, 7).chosen, InverseLogLog)
    # a first decision at 4, with three points, and its like at 8
    assert isinstance(seen(lambda n: n, 8).chosen, Inverse)


def test_auto_goes_back_slowly_and_on_at_once() -> None:
    auto = seen(lambda n: n, 1024)
    for n in range(1025, 8193):
        auto.observe(n, n - n // 8)
    # half of the slopes show it by then
    assert isinstance(auto.chosen, InverseLogLog)
    assert auto.exponent == math.inf
    wanted, chosen = [2], [2]  # as places among the classes
    for n in range(8193, 2**17 + 1):
        auto.observe(n, 0)
        if n & (n - 1) == 0:
            assert auto.exponent is not None
            wanted.append(sum(auto.exponent > bound for bound in schedules.BOUNDS))
            chosen.append(schedules.CLASSES.index(type(auto.chosen)))  # type: ignore[arg-type]
    # the larger of the last two: one that is alone in its wish has to wait
    assert chosen[1:] == [max(pair) for pair in pairwise(wanted)]
    assert wanted != chosen
    assert chosen[-1] == 0


def test_auto_stands_a_straggler() -> None:
    auto = Auto()
    for n in range(1, 4097):
        auto.observe(n, n - 1 if n == 3000 else 2 if n > 2 else 0)
    assert isinstance(auto.chosen, Inverse)


def test_auto_goes_on_from_its_state() -> None:
    whole = DelayAdaptive(seen(math.isqrt, 5000, Auto(2.0)))
    other = DelayAdaptive(Auto(2.0))
    begun = DelayAdaptive(seen(math.isqrt, 777, Auto(2.0)))
    other.load_state_dict(begun.state_dict())
    for n in range(778, 5001):
        other.observe(n, n - math.isqrt(n))
    assert other.state_dict() == whole.state_dict()
    assert other.rate(5000, 3) == whole.rate(5000, 3)
    assert Inverse().state_dict() == {}


def test_staleness() -> None:
    assert staleness({}) == (0, 0, 0, 0)
    assert staleness({3: 1}) == (1, 3, 3, 3)
    assert staleness(Counter({0: 50, 1: 49, 7: 1})) == (100, 0, 1, 7)
    assert staleness({0: 49, 1: 49, 7: 2}) == (100, 1, 7, 7)
    assert staleness({9: 1000, 2: 10**6}).p99 == 2


def test_residual_versions() -> None:
    versions = ResidualVersions(4)
    assert versions.oldest is None
    #                      nothing sent  sent, some left  all sent  no gradient
    versions.sent(torch.tensor([0.3, 0.1, 0.0, 0.0]), torch.tensor([0.0, 1.0, 1.0, 0.0]), 5)
    assert versions.versions[:2].tolist() == [5, 5]
    versions.sent(torch.tensor([0.6, 0.2, 0.1, 0.0]), torch.tensor([0.0, 1.0, 1.0, 0.0]), 8)
    assert versions.versions[:3].tolist() == [5, 8, 8]
    assert versions.oldest == 5
    assert versions.before(8).tolist() == [True, False, False, False]
    versions.drop(versions.before(8))
    assert versions.oldest == 8
    versions.sent(torch.zeros(4), torch.ones(4), 9)
    assert versions.oldest is None
