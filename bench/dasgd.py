"""Which step size stands which delays? DASGD's table, through the shipped centre and rule.

f(x) = 1/2 x'Ax, A = diag(linspace(.1, 1, 20)) on [-5, 5]^20, from x = 5 (f = 137.5), gradients with
noise of standard deviation .5; update n is a gradient of iterate s(n), which the bench remembers:

    none        s = n - 1           linear        s = n / 2
    constant    s = n - 51          polynomial    s = sqrt(n)

Each row is f after the last update, the mean of all seeds, under two projections: "at once", of
plain projected SGD, which the published figures are of (as these show), and "lazy", of the paper
and of the default rule. Then the same with real processes, whose gradients the centre holds until
their update is due: `bench/dasgd_held.py`.

    python -m bench.dasgd                        every bar; exit code 1 where one fails
    python -m bench.dasgd --table simulated --seeds 3 --steps 20000

All seeds are one vector, as everything here is elementwise.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tabulate import tabulate
from tqdm import tqdm

from bench.feedback import Row, conclude, holds, number, verdict
from commlib.optim import Box, Center, Projected, staleness
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

RESULTS = Path(__file__).parent / "results" / "dasgd.jsonl"
CURVATURE = torch.linspace(0.1, 1, 20, dtype=torch.float64)
BOX = Box(-5.0, 5.0)
START, NOISE = 5.0, 0.5

Source = Callable[[int], int]
SOURCES: dict[str, Source] = {  # the iterate that update n is made on, from 0, at most n - 1
    "none": lambda n: n - 1,
    "constant": lambda n: max(0, n - 51),
    "linear": lambda n: min(n - 1, n // 2),
    "polynomial": lambda n: min(n - 1, math.isqrt(n)),
}


class Case(NamedTuple):
    """A column: a schedule, and what was published of it by delay, in the order of `SOURCES`."""

    name: str
    make: Callable[[], StepSize]
    published: tuple[float, ...] = ()


CASES = (
    Case("const .5", lambda: Constant(0.5), (0.88, 126, 137, 136)),
    Case("1/sqrt n", lambda: InverseSqrt(1.0), (0.0073, 0.0086, 136, 132)),
    Case("1/n c=1", lambda: Inverse(1.0), (0.49, 0.35, 0.36, 49)),
    Case("1/n c=3", lambda: Inverse(3.0), (0.0067, 0.0054, 8.8, 112)),
    Case("1/(n log n) c=3", lambda: InverseLog(3.0), (0.89, 3.4, 0.71, 4.0)),
    Case("1/(n log n) c=10", lambda: InverseLog(10.0), (0.013, 0.27, 0.12, 93)),
    Case("1/(n log n loglog n) c=3", lambda: InverseLogLog(3.0), (2.0, 15, 1.7, 1.5)),
    Case("1/(n log n loglog n) c=10", lambda: InverseLogLog(10.0), (0.060, 1.9, 0.042, 59)),
    Case("auto c=3", lambda: Auto(3.0)),
    Case("const .5 / (1 + d)", lambda: DelayAdaptive(Constant(0.5))),
    Case("1/sqrt n / (1 + d)", lambda: DelayAdaptive(InverseSqrt(1.0))),
)
BY_NAME = {case.name: case for case in CASES}
# what `auto` should choose, and the column of that at the same c
CLASS: dict[str, tuple[type[StepSize], str]] = {
    "none": (Inverse, "1/n c=3"),
    "constant": (Inverse, "1/n c=3"),
    "linear": (InverseLog, "1/(n log n) c=3"),
    "polynomial": (InverseLogLog, "1/(n log n loglog n) c=3"),
}


def objective(x: torch.Tensor, seeds: int) -> list[float]:
    """f of every seed's part."""
    return (0.5 * CURVATURE * x.double().view(seeds, -1).square()).sum(1).tolist()


def noises(seeds: Sequence[int], steps: int) -> torch.Tensor:
    """(steps, all seeds' elements): the same for every row."""
    drawn = [
        torch.randn(steps, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in seeds
    ]
    return torch.cat(drawn, 1).mul_(NOISE)


def simulate(schedule: StepSize, source: Source, noise: torch.Tensor, *, lazy: bool) -> Center:
    """Run as many updates as there is noise; the centre after them."""
    steps, numel = noise.shape
    start = torch.full((numel,), START, dtype=torch.float64)
    center = Center([("x", start)], rule=Projected(schedule, BOX, lazy=lazy))
    iterates = start.repeat(steps + 1, 1)
    curvature = CURVATURE.repeat(numel // 20)
    for n in range(1, steps + 1):
        s = source(n)
        center.apply(torch.addcmul(noise[n - 1], curvature, iterates[s]), s)
        iterates[n] = center.shown()[0]
    return center


def simulated(
    seeds: Sequence[int],
    steps: int,
    cases: Sequence[Case] = CASES,
    delays: Sequence[str] = tuple(SOURCES),
    projections: Sequence[str] = ("at once", "lazy"),
) -> Iterator[Row]:
    """The table, and the bars on it."""
    noise = noises(seeds, steps)
    for projection in projections:
        found: dict[tuple[str, str], float] = {}
        for delay in delays:
            for case in cases:
                began = time.perf_counter()
                schedule = case.make()
                center = simulate(schedule, SOURCES[delay], noise, lazy=projection == "lazy")
                values = objective(center.shown()[0], len(seeds))
                value = found[delay, case.name] = math.fsum(values) / len(values)
                published = dict(zip(SOURCES, case.published, strict=False)).get(delay)
                setting = {"seeds": len(seeds), "steps": steps, "values": values}
                setting["staleness"] = staleness(center.delays)._asdict()
                bar, passed, note = "", None, ""
                if isinstance(schedule, Auto):
                    kind, column = CLASS[delay]
                    bar, passed = f"chooses {kind.__name__}", isinstance(schedule.chosen, kind)
                    note = f"exponent {schedule.exponent:.2f}"
                    if (delay, column) in found:
                        note += f", {value / found[delay, column]:.3g} x {column}"
                yield Row(
                    projection,
                    case.name,
                    delay,
                    value,
                    None if published is None else value / published,
                    published,
                    bar,
                    passed,
                    time.perf_counter() - began,
                    note,
                    setting,
                )
        yield from bars(projection, found)


def bars(table: str, found: dict[tuple[str, str], float]) -> Iterator[Row]:
    """The orderings by class of delay, where their rows are there."""
    last = "1/(n log n loglog n)"
    for delay, name, bar in (
        ("linear", "1/sqrt n", ">= 100"),
        ("linear", "1/(n log n) c=10", "<= 0.3"),
        ("linear", f"{last} c=10", "<= 0.1"),
    ):
        if (delay, name) in found:
            value = found[delay, name]
            passed = holds(value, bar)
            yield Row(f"bars, {table}", name, delay, value, bar=bar, passed=passed)
    best = [
        min((f for (d, n), f in found.items() if d == "polynomial" and n.startswith(p)), default=0)
        for p in ("1/n c", last)
    ]
    if all(best):
        ratio = best[0] / best[1]
        what, passed = f"1/n, best c, over {last}, best c", holds(ratio, ">= 10")
        yield Row(f"bars, {table}", what, "polynomial", ratio, bar=">= 10", passed=passed)


def show(rows: Sequence[Row]) -> str:
    """Each table with its delays side by side, the published figures in brackets; then the bars."""
    texts = []
    for table in dict.fromkeys(row.table for row in rows if not row.table.startswith("bars")):
        mine = {(row.scheme, row.what): row for row in rows if row.table == table}
        delays = list(dict.fromkeys(delay for _, delay in mine))
        body = [
            [name, *(cell(mine.get((name, delay))) for delay in delays)]
            for name in dict.fromkeys(name for name, _ in mine)
        ]
        header = [f"{table}: f (published)", *delays]
        texts.append(tabulate(body, header, disable_numparse=True))
    judged = [
        [
            row.table.removeprefix("bars, "),
            row.what,
            row.scheme,
            number(row.value),
            row.bar,
            verdict(row),
            row.note,
        ]
        for row in rows
        if row.passed is not None
    ]
    header = ["table", "delays", "steps", "here", "bar", "", ""]
    return "\n\n".join([*texts, tabulate(judged, header, disable_numparse=True)])


def cell(row: Row | None) -> str:
    if row is None:
        return ""
    return number(row.value) + ("" if row.published is None else f" ({number(row.published)})")


def main(argv: Sequence[str] | None = None) -> int:
    from bench.dasgd_held import held

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", choices=("all", "simulated", "processes"), default="all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20_000, help="of the table (default 20000)")
    parser.add_argument("--held-steps", type=int, default=2000, help="of processes (default 2000)")
    parser.add_argument("--workers", type=int, default=3, help="processes (default 3)")
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS, help=f"append rows (to {RESULTS.name})"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # of vectors of 60 elements
    parts: list[Iterator[Row]] = []
    if args.table != "processes":
        parts.append(simulated(range(args.seeds), args.steps))
    if args.table != "simulated":
        parts.append(held(range(args.seeds), args.held_steps, args.workers))
    rows = []
    with tqdm(desc="runs", unit=" rows", disable=None) as progress:
        for part in parts:
            for row in part:
                rows.append(row)
                progress.set_postfix_str(f"{row.table} {row.what} {row.scheme}")
                progress.update()
    return conclude(rows, show(rows), args.json, "dasgd", argv)


if __name__ == "__main__":
    sys.exit(main())
