"""Measuring a group: threads as ranks, an all_reduce whose cost the test decides."""

from __future__ import annotations

import importlib
import itertools
import threading
import time
from collections.abc import Callable

import pytest
import torch

from commlib.planner import CANDIDATES, Profile, choose
from commlib.planner import measure as measure_profile
from commlib.planner.auto import RAW
from commlib.planner.measure import SIZES, _fit
from commlib.transport import Transport, run_ranks

# Seconds an all_reduce of the fake path takes: (fixed, per byte).
Costs = dict[str, tuple[float, float]]
CHEAP_INT8: Costs = {"fp32": (1e-3, 4e-9), "bf16": (2e-3, 3e-9), "int8": (3e-3, 1e-9)}

measure_module = importlib.import_module("commlib.planner.measure")
real_timed = measure_module._timed
Seen = Callable[[int, str, torch.Tensor], None]


class Clock(threading.local):
    """What this rank's last all_reduce cost; None where real time counts."""

    seconds: float | None = None


clock = Clock()


@pytest.fixture(autouse=True)
def small_and_on_a_clock_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(transport: Transport, call: Callable[[], object]) -> float:
        clock.seconds = None
        real = real_timed(transport, call)
        return real if clock.seconds is None else clock.seconds

    monkeypatch.setattr(measure_module, "SPEED_NUMEL", 1 << 13)
    monkeypatch.setattr(measure_module, "_timed", timed)


def measured(costs: Costs, seen: Seen | None = None, size: int = 2) -> list[Profile]:
    """The profile on each of `size` ranks, the last of which is 2 ms slower than the others."""

    def rank(transport: Transport) -> Profile:
        def run(scheme: str, x: torch.Tensor) -> None:
            if seen:
                seen(transport.rank, scheme, x)
            fixed, per_byte = costs[scheme]
            late = 2e-3 if transport.rank == transport.size - 1 else 0.0
            clock.seconds = fixed + late + per_byte * x.nbytes
            x.mul_(transport.size)

        return measure_profile(run, transport)

    return run_ranks(size, rank)


def test_every_rank_ends_with_the_same_profile_of_the_slowest() -> None:
    first, second = measured(CHEAP_INT8)
    assert first == second
    assert first.size == 2
    assert [curve.scheme for curve in first.curves] == list(CANDIDATES)
    assert first.compressing == CANDIDATES[1:]
    for curve in first.curves:
        fixed, per_byte = CHEAP_INT8[curve.scheme]
        assert curve.nbytes == SIZES
        assert curve.seconds == pytest.approx([fixed + 2e-3 + per_byte * n for n in SIZES])
    # 16 MiB: 70 ms raw, 54 ms bf16, 22 ms int8
    assert choose(first, 1 << 22, torch.float32, 2) == "int8"
    assert choose(first, 1 << 10, torch.float32, 2) == RAW
    # a 2-rank all_reduce sends each byte once, so 4 ns a byte is 250 MB/s
    assert first.native.bandwidth == pytest.approx(250e6)
    assert first.native.latency == pytest.approx(3e-3)


def test_a_gain_in_three_rounds_of_five_is_noise() -> None:
    """int8's median is a quarter of raw's, and yet auto must not take it; bf16 always gains."""

    def rank(transport: Transport) -> Profile:
        calls = itertools.count()

        def run(scheme: str, x: torch.Tensor) -> None:
            int8 = 1e-3 if next(calls) // len(CANDIDATES) % 5 < 3 else 9e-3
            clock.seconds = {"fp32": 4e-3, "bf16": 3e-3, "int8": int8}[scheme]

        return measure_profile(run, transport)

    profile = run_ranks(2, rank)[0]
    assert profile.curve("int8").seconds == pytest.approx([9e-3] * len(SIZES))
    for nbytes in SIZES:
        assert choose(profile, nbytes // 4, torch.float32, 2) == "bf16"


def test_the_grid_ends_where_messages_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_module, "LONG", 0.01)
    slow = {scheme: (1e-3, 1e-6) for scheme in CANDIDATES}  # 4 KiB in 7 ms, 16 KiB in 19
    first, second = measured(slow)
    assert first == second
    assert first.curves[0].nbytes == SIZES[:2]


def test_two_sizes_are_measured_however_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_module, "LONG", 1e-9)
    first, _ = measured(CHEAP_INT8)
    assert first.curves[0].nbytes == SIZES[:2]


def test_ranks_run_the_same_calls_in_turn_on_fresh_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure_module, "SIZES", SIZES[:3])
    calls: dict[int, list[tuple[str, int]]] = {0: [], 1: [], 2: []}

    def seen(rank: int, scheme: str, x: torch.Tensor) -> None:
        calls[rank].append((scheme, x.nbytes))
        assert x.dtype is torch.float32
        assert 0.9 < float(x.std()) < 1.1  # a sum of sums would grow

    measured(CHEAP_INT8, seen, size=3)
    assert calls[0] == calls[1] == calls[2]
    schemes = [scheme for scheme, _ in calls[0]]
    assert schemes == list(CANDIDATES) * (len(schemes) // 3)


def test_codec_speeds_are_real() -> None:
    profile = measured({scheme: (0.0, 0.0) for scheme in CANDIDATES})[0]
    int8, bf16 = profile.speed("int8"), profile.speed("bf16")
    assert bf16.ratio == pytest.approx(0.5, rel=0.01)
    assert int8.ratio == pytest.approx((8 + 16 / 128) / 32, rel=0.02)
    for speed in (int8, bf16):
        for rate in (speed.encode, speed.decode, speed.reduce):
            assert 1e5 < rate < 1e12
    assert profile.overhead >= 0
    assert profile.exchange.bandwidth > 0


def test_a_line_through_two_measurements() -> None:
    link = _fit(1000, 1.5e-3, 101_000, 3.5e-3, sent=1.5, messages=2)
    assert link.bandwidth == pytest.approx(1.5 * 1e5 / 2e-3)
    assert 2 * link.latency + 1.5 * 1000 / link.bandwidth == pytest.approx(1.5e-3)
    assert _fit(1000, 2e-3, 2000, 1e-3, sent=1.5, messages=1).latency == pytest.approx(2e-3)


def test_time_runs_from_the_barrier() -> None:
    def rank(transport: Transport) -> float:
        time.sleep(0.5 * transport.rank)  # comes late; that is not the call's time
        return float(real_timed(transport, lambda: time.sleep(0.02)))

    assert all(0.02 <= seconds < 0.5 for seconds in run_ranks(2, rank))


def test_what_cannot_be_measured_is_refused() -> None:
    def alone(transport: Transport) -> None:
        measure_profile(lambda scheme, x: None, transport)

    with pytest.raises(ValueError, match="one rank has no link"):
        run_ranks(1, alone)

    def unordered(transport: Transport) -> None:
        measure_profile(lambda scheme, x: None, transport, ("int8", "fp32"))

    with pytest.raises(ValueError, match="must start with 'fp32'"):
        run_ranks(2, unordered)
