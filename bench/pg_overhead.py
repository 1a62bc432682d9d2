"""What a call costs that the backend "commlib" passes through: beside the same inner backend alone.

    python -m bench.pg_overhead                 median of 10,000; exit code 1 where one costs > 2 us
    python -m bench.pg_overhead --json          append the rows to results/pg_overhead.jsonl

The inner backend is torch's `fake`, which does nothing, so that what is left is the price of the
call: torch's own Python and C++, and in the second column commlib's. One process; the two take
turns, in an order that turns as well, and the cost is the median of the differences.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch.testing._internal.distributed.fake_pg import FakeStore
from tqdm import tqdm

import commlib
from commlib.benchmark.rows import origin

RESULTS = Path(__file__).parent / "results" / "pg_overhead.jsonl"
RANKS = 4
LIMIT_US = 2.0
POLICIES = ("fp32", "int8")
WARMUP = 200

Call = Callable[[Any], object]


@dataclass(frozen=True)
class Row:
    """One call. Times in microseconds: of the inner backend, of commlib over it, the difference."""

    call: str
    tensor: str
    policy: str
    inner_us: float
    commlib_us: float
    cost_us: float
    calls: int
    passed: bool
    device: str = field(default_factory=lambda: origin().device)
    versions: dict[str, str] = field(default_factory=lambda: origin().versions)
    commit: str | None = field(default_factory=lambda: origin().commit)


def calls(x: torch.Tensor) -> dict[str, Call]:
    """Every call that the backend looks at, on tensors like `x`."""
    part, whole = x[: x.numel() // RANKS].clone(), x.clone()
    return {
        "all_reduce": lambda group: dist.all_reduce(x, group=group),
        "all_reduce async": lambda group: dist.all_reduce(x, group=group, async_op=True),
        "reduce_scatter_single": lambda group: dist.reduce_scatter_single(part, x, group=group),
        "all_gather_single": lambda group: dist.all_gather_single(whole, part, group=group),
        "all_to_all_single": lambda group: dist.all_to_all_single(whole, x, group=group),
        "broadcast": lambda group: dist.broadcast(x, 0, group=group),
        "isend": lambda group: dist.isend(x, 1, group=group),
        "barrier": lambda group: dist.barrier(group=group),
    }


def tensors(policy: str) -> dict[str, torch.Tensor]:
    """What `policy` does not compress."""
    found = {"int64 [16]": torch.ones(16, dtype=torch.int64), "fp32 [16]": torch.ones(16)}
    if policy == "fp32":
        found["fp32 [4096]"] = torch.ones(4096)
    return found


def rows(number: int) -> Iterator[Row]:
    """One row per policy, tensor and call, each of `number` calls."""
    ranks = list(range(RANKS))
    inner = dist.new_group(ranks, backend="fake")
    for policy in POLICIES:
        options = commlib.Options(policy, inner="fake")
        ours = dist.new_group(ranks, backend="commlib", pg_options=options)
        ours._by_hand = True  # look for PREMUL_SUM, as over gloo, which lacks it
        for about, x in tensors(policy).items():
            for name, call in calls(x).items():
                theirs_us, ours_us, cost_us = compare(call, inner, ours, number)
                passed = cost_us <= LIMIT_US
                yield Row(name, about, policy, theirs_us, ours_us, cost_us, number, passed)


def compare(call: Call, inner: Any, ours: Any, number: int) -> tuple[float, float, float]:
    """Medians in microseconds: of `call` on each group, and of the differences."""
    times: dict[Any, list[float]] = {inner: [], ours: []}
    for place in range(WARMUP + number):
        for group in (inner, ours) if place % 2 else (ours, inner):
            start = time.perf_counter_ns()
            call(group)
            times[group].append((time.perf_counter_ns() - start) / 1000)
    theirs, mine = times[inner][WARMUP:], times[ours][WARMUP:]
    differences = [b - a for a, b in zip(theirs, mine, strict=True)]
    return statistics.median(theirs), statistics.median(mine), statistics.median(differences)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000, help="per row (default 10000)")
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS, help=f"append rows (to {RESULTS.name})"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    gc.collect()
    gc.disable()
    try:
        found = list(tqdm(rows(args.calls), desc="calls", unit=" rows", disable=None))
    finally:
        gc.enable()
        dist.destroy_process_group()
    header = ["call", "tensor", "policy", "inner us", "commlib us", "cost us", ""]
    body = [
        [r.call, r.tensor, r.policy, r.inner_us, r.commlib_us, r.cost_us, "" if r.passed else "!"]
        for r in found
    ]
    print(tabulate(body, header, floatfmt=".2f"))
    failed = [row for row in found if not row.passed]
    print(f"{len(found) - len(failed)} of {len(found)} calls cost at most {LIMIT_US:g} us more")
    if args.json:
        with args.json.open("a", encoding="utf-8") as file:
            for row in found:
                file.write(json.dumps(asdict(row)) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
