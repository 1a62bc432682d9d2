"""Time on the device and on the host: medians of many, contestants in turn, the cache flushed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from commlib.benchmark.timing import percentile

FLUSH_BYTES = 512 << 20
"""Read between two measurements: several times the L2 of any GPU."""


class Times(NamedTuple):
    """Milliseconds."""

    p20: float
    p50: float
    p80: float


def on_device(
    contestants: Mapping[str, Callable[[], object]], rounds: int = 25
) -> dict[str, Times]:
    """Every contestant once per round, between two events, after a flush of the L2 cache."""
    flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    total = torch.zeros((), dtype=torch.int64, device="cuda")
    for run in contestants.values():
        run()
    torch.cuda.synchronize()
    events = {
        name: [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(rounds)]
        for name in contestants
    }
    for k in range(rounds):
        for name, run in contestants.items():
            torch.sum(flush, dim=0, out=total)  # reads: lines written would be written back later
            before, after = events[name][k]
            before.record()
            run()
            after.record()
    torch.cuda.synchronize()
    found = {}
    for name, pairs in events.items():
        ms = [before.elapsed_time(after) for before, after in pairs]
        found[name] = Times(*(percentile(ms, q) for q in (20, 50, 80)))
    return found


def on_host(run: Callable[[], object], count: int = 10_000) -> Times:
    """Microseconds of the host per call: the device is let catch up, outside of the clock."""
    clock, taken = time.perf_counter, []
    for k in range(count):
        if k % 100 == 0:
            torch.cuda.synchronize()
        start = clock()
        run()
        taken.append(1e6 * (clock() - start))
    return Times(*(percentile(taken, q) for q in (20, 50, 80)))
