"""PPRS as published: how many units of time it takes beside gradient descent, by pipeline depth.

f(x) = max_i |a_i . x - b_i|, 50 rows of unit norm, d = 50, b = A x*, |x*| = 1; the target is
f < 0.02 from x = 0, with one sample (m = 1). The pipeline is real: stage s holds a slice of x and
adds A[:, slice] x_slice to the running sum, stages beyond d hand it on, the last takes the maximum.
Time is counted from what the stages log.

    steps    iterations of GD, Nesterov (PPRS unsmoothed) and PPRS with and without momentum
    depth    time(GD) / time(PPRS, best K) for 1 to 1000 stages, beside the published ratios
    coded    the passes of a sample travel as differences: steps to the target, bytes

    python -m bench.pprs                      every bar; exit code 1 where one fails
    python -m bench.pprs --table depth --seeds 2

Every method has its best steps of a grid on the runs that are shown: GD's count jumps between 129
and 161 for steps from 0.32/sqrt(t) to 0.45/sqrt(t), PPRS's between seeds. "Other seeds" is the
ratio with the same gamma and eta on seeds they were not chosen on; at depth 10 the choice decides.

From 50 stages on every stage has at most one coordinate: the iterates are bitwise those of 50
stages, which is checked on the first of them, and iterations are counted there. Below 50 the slices
and with them the draws differ from depth to depth.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from tabulate import tabulate
from tqdm import tqdm

from bench.pprs_problem import D, Draws, Problem, Run, run, same_path
from commlib.benchmark.rows import origin
from commlib.optim import GD, PPRS, Nesterov, Pipeline

RESULTS = Path(__file__).parent / "results" / "pprs.jsonl"

CAP = 160  # iterations; GD needs fewer, and a PPRS that needs more is of no use at any depth
COPIES = (1, 2, 4, 8, 16, 32, 64)
# All that is tuned comes from 1, 1.5, 2, 3, 5, 7 times a power of ten.
GAMMAS = (0.005, 0.007, 0.01, 0.015, 0.02)
ETAS = (0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1)
STEPS = tuple(digit * scale for scale in (0.001, 0.01, 0.1) for digit in (1, 1.5, 2, 3, 5, 7))
# time(GD) / time(PPRS) by depth, and the bars on it: below 1 at depth 1, above the others'.
PUBLISHED = {1: 0.55, 10: 1.69, 20: 2.41, 50: 3.25, 100: 3.89, 200: 4.82, 500: 5.62, 1000: 6.06}
BARS = {1: "< 1", 10: "> 1.5", 100: "> 3"}
SCHEMES = ("fp32", "int8", "int8+reuse", "int4+reuse", "int4")
CODED = (4, 16, 0.01, 0.05)  # depth, K, gamma, eta


@dataclass(frozen=True)
class Row:
    """One figure beside the published one; `passed` is None where no bar stands."""

    table: str
    method: str
    depth: int
    iterations: float | None  # the mean over seeds; None: the target was not reached
    value: float | None = None
    published: float | str | None = None
    bar: str = ""
    passed: bool | None = None
    seconds: float = 0.0
    setting: dict[str, object] = field(default_factory=dict)


class Chosen(NamedTuple):
    """The best parameters of PPRS for one K at one depth, and the mean iterations with them."""

    copies: int
    gamma: float
    eta: float
    iterations: float

    def make(self, pipeline: Pipeline, seed: int, *, momentum: bool = True) -> PPRS:
        return PPRS(pipeline, self.copies, self.gamma, self.eta, seed, momentum=momentum)


def tuned(
    problem: Problem, draws: Sequence[Draws], copies: int, *, momentum: bool = True
) -> Chosen | None:
    """gamma and eta of the fewest iterations, the sum over all draws; None: none reach it."""
    best, chosen = (CAP + 1) * len(draws), None
    for gamma, eta in itertools.product(GAMMAS, ETAS):
        total = 0
        for one in draws:
            cap = min(CAP, best - total)
            reached = problem.plain(one, copies, gamma, eta, cap, momentum=momentum)
            total = best if reached is None else total + reached
            if total >= best:
                break
        if total < best:
            best, chosen = total, Chosen(copies, gamma, eta, total / len(draws))
    return chosen


def mean(runs: Sequence[Run]) -> float | None:
    """Mean iterations; None where a run did not reach the target."""
    reached = [one.iterations for one in runs if one.iterations is not None]
    return sum(reached) / len(reached) if reached and len(reached) == len(runs) else None


def descents(problem: Problem) -> Iterator[tuple[str, float, bool, int]]:
    """(method, step, decay, iterations) of the grids' runs that reach the target."""
    grid = [("GD", eta, False) for eta in STEPS] + [("GD", eta, True) for eta in STEPS]
    for method, eta, decay in [*grid, *(("Nesterov", eta, False) for eta in STEPS)]:
        pipeline = problem.pipeline(1)
        optimizer = GD(pipeline, eta, decay=decay) if method == "GD" else Nesterov(pipeline, eta)
        reached = run(problem, optimizer, 2 * CAP).iterations
        if reached is not None:
            yield method, eta, decay, reached


class Table:
    """The tables; GD's step is chosen in `steps` and used in `depths`."""

    def __init__(self, seeds: int) -> None:
        self.problem = Problem()
        self.seeds = range(seeds)
        self.others = range(seeds, 2 * seeds)
        self.gd = (0.5, True)

    def draws(self, depth: int, seeds: Sequence[int]) -> list[Draws]:
        return [Draws(depth, seed, max(COPIES)) for seed in seeds]

    def steps(self) -> Iterator[Row]:
        """Iterations to the target at depth 1."""
        published = {"GD": 152, "Nesterov": 131}
        found = list(descents(self.problem))
        for method in published:
            _, eta, decay, reached = min((f for f in found if f[0] == method), key=lambda f: f[3])
            if method == "GD":
                self.gd = (eta, decay)
            setting: dict[str, object] = {"eta": eta, "decay": decay}
            yield Row("steps", method, 1, reached, None, published[method], setting=setting)
        draws = self.draws(1, self.seeds)
        for copies in COPIES:
            yield self.smoothed(copies, draws)
        yield self.smoothed(16, draws, momentum=False)

    def smoothed(self, copies: int, draws: Sequence[Draws], *, momentum: bool = True) -> Row:
        began = time.perf_counter()
        chosen = tuned(self.problem, draws, copies, momentum=momentum)
        runs = self.measure(chosen, 1, momentum=momentum) if chosen else []
        published = {16: "34-54", 64: "21-24"} if momentum else {16: "74-85"}
        return Row(
            "steps",
            f"PPRS K={copies}" + ("" if momentum else ", no momentum"),
            1,
            mean(runs),
            published=published.get(copies),
            seconds=time.perf_counter() - began,
            setting={
                "gamma": chosen and chosen.gamma,
                "eta": chosen and chosen.eta,
                "seeds": list(self.seeds),
                "iterations": [one.iterations for one in runs],
            },
        )

    def depths(self) -> Iterator[Row]:
        """time(GD) / time(PPRS with the K that is best at the depth)."""
        before = 0.0
        choices: list[Chosen] = []
        others: list[Draws] = []
        measured: dict[Chosen, list[Run]] = {}
        for depth in PUBLISHED:
            began = time.perf_counter()
            eta, decay = self.gd
            gd = run(self.problem, GD(self.problem.pipeline(depth), eta, decay=decay), 2 * CAP)
            if depth <= D:
                draws, others = self.draws(depth, self.seeds), self.draws(depth, self.others)
                found = (tuned(self.problem, draws, copies) for copies in COPIES)
                choices, measured = [one for one in found if one], {}
            best = min(choices, key=lambda c: c.iterations * (c.copies + depth - 1))
            if best not in measured:
                measured[best] = self.measure(best, min(depth, D))
            runs, same = measured[best], True
            per_step, exact = 2 * (best.copies + depth - 1), all(one.exact for one in runs)
            ticks = [one.ticks for one in runs]
            if depth > D:
                begun = run(self.problem, best.make(self.problem.pipeline(depth), 0), 2)
                same, exact = same_path(begun, runs[0]), exact and begun.exact
                per_step = begun.ticks // 2
                ticks = [per_step * (one.iterations or 0) for one in runs]
            held_out = [
                self.problem.plain(one, best.copies, best.gamma, best.eta, CAP) for one in others
            ]
            reached = gd.iterations is not None and mean(runs) is not None
            ratio = gd.ticks * len(ticks) / sum(ticks) if reached else None
            passed = ratio is not None and holds(ratio, depth) and ratio > before
            wanted = [BARS.get(depth), f"> {before:.2f}" if before else None, "ticks exact"]
            yield Row(
                "depth",
                f"PPRS K={best.copies}",
                depth,
                mean(runs),
                ratio,
                PUBLISHED[depth],
                ", ".join(filter(None, wanted)),
                passed and gd.exact and exact and same,
                time.perf_counter() - began,
                {
                    "ticks": sum(ticks) / len(ticks),
                    "gd_ticks": gd.ticks,
                    "gd_iterations": gd.iterations,
                    "ticks_exact": gd.exact and exact,
                    "iterates_as_at_50": same if depth > D else None,
                    "bubble": self.problem.pipeline(depth).schedule(best.copies).bubble_fraction,
                    "gamma": best.gamma,
                    "eta": best.eta,
                    "iterations": [one.iterations for one in runs],
                    "iterations_of_other_seeds": held_out,
                    "ratio_of_other_seeds": over(gd.ticks, per_step, held_out),
                },
            )
            before = ratio or before

    def measure(self, chosen: Chosen, depth: int, *, momentum: bool = True) -> list[Run]:
        """A run of every seed, with the pipeline of this depth."""
        pipelines = [self.problem.pipeline(depth) for _ in self.seeds]
        made = (
            chosen.make(pipeline, seed, momentum=momentum)
            for pipeline, seed in zip(pipelines, self.seeds, strict=True)
        )
        return [run(self.problem, optimizer, CAP) for optimizer in made]

    def coded(self) -> Iterator[Row]:
        """Passes k >= 2 of a sample as differences to what the next stage holds since pass 1."""
        depth, copies, gamma, eta = CODED
        raw: tuple[float, float] | None = None
        for scheme in SCHEMES:
            began = time.perf_counter()
            runs, nbytes, steps = [], 0, 0
            for seed in self.seeds:
                pipeline = self.problem.pipeline(depth, scheme)
                optimizer = PPRS(pipeline, copies, gamma, eta, seed)
                runs.append(run(self.problem, optimizer, CAP))
                nbytes, steps = nbytes + pipeline.activation_bytes, steps + optimizer.steps
                if runs[-1].iterations is None:
                    break
            iterations, per_step = mean(runs), nbytes / steps
            if iterations is not None:
                raw = raw or (iterations, per_step)
            bar = "<= 1.25 x raw's, half the bytes" if scheme == "int4+reuse" else ""
            passed = None
            if bar:
                passed = iterations is not None and raw is not None
            if passed and iterations is not None and raw is not None:
                passed = iterations <= 1.25 * raw[0] and per_step <= raw[1] / 2
            yield Row(
                "coded",
                scheme,
                depth,
                iterations,
                per_step,
                bar=bar,
                passed=passed,
                seconds=time.perf_counter() - began,
                setting={
                    "K": copies,
                    "gamma": gamma,
                    "eta": eta,
                    "iterations": [one.iterations for one in runs],
                    "bytes_to_target": None if iterations is None else per_step * iterations,
                },
            )


def over(gd_ticks: int, per_step: int, iterations: Sequence[int | None]) -> float | None:
    """GD's time over the mean time of `iterations`; None where one did not reach the target."""
    reached = [one for one in iterations if one is not None]
    if len(reached) < len(iterations):
        return None
    return gd_ticks * len(reached) / (per_step * sum(reached))


def holds(ratio: float, depth: int) -> bool:
    """Whether the ratio meets the bar of its depth."""
    sign, _, bound = BARS.get(depth, "> 0").partition(" ")
    return ratio < float(bound) if sign == "<" else ratio > float(bound)


def show(rows: Sequence[Row]) -> str:
    """The rows as tables, the published figures beside the measured ones."""
    texts = []
    for table, header in HEADERS.items():
        body = [[*cells(row), row.bar, verdict(row)] for row in rows if row.table == table]
        if body:
            texts.append(tabulate(body, [*header, "bar", ""], disable_numparse=True))
    return "\n\n".join(texts)


HEADERS = {
    "steps": ("method", "gamma", "eta", "iterations", "over seeds", "published"),
    "depth": (
        "depth",
        "best",
        "iterations",
        "ticks",
        "GD's",
        "bubble",
        "ratio",
        "other seeds",
        "published",
    ),
    "coded": ("activations", "depth", "K", "iterations", "over seeds", "bytes / iteration"),
}


def cells(row: Row) -> list[str]:
    setting = row.setting
    found = setting.get("iterations")
    seeds = " ".join(str(one or "-") for one in found) if isinstance(found, list) else ""
    if row.table == "steps":
        eta = f"{number(setting['eta'])}{'/sqrt(t)' if setting.get('decay') else ''}"
        gamma = number(setting.get("gamma"))
        return [row.method, gamma, eta, number(row.iterations), seeds, number(row.published)]
    if row.table == "coded":
        start = [row.method, str(row.depth), str(setting["K"]), number(row.iterations), seeds]
        return [*start, number(row.value)]
    ticks = [number(setting[name]) for name in ("ticks", "gd_ticks", "bubble")]
    ratios = [number(row.value), number(setting["ratio_of_other_seeds"]), number(row.published)]
    return [str(row.depth), row.method, number(row.iterations), *ticks, *ratios]


def number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
    return "-" if value is None else str(value)


def verdict(row: Row) -> str:
    return "" if row.passed is None else "PASS" if row.passed else "FAIL"


def write(path: Path, rows: Sequence[Row], command: str) -> None:
    """Append the rows to `path` as JSON lines, with where they come from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"bench": "pprs", "command": command, **origin()._asdict()}
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**asdict(row), **about}, allow_nan=False) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", choices=("all", "depth", "coded"), default="all")
    parser.add_argument("--seeds", type=int, default=4, help="default 4")
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS, help=f"append rows (to {RESULTS.name})"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    gc.disable()  # a step logs 100 000 operations, which the collector would look through again
    table = Table(args.seeds)
    parts: list[Iterator[Row]] = []
    if args.table != "coded":
        parts += [table.steps(), table.depths()]
    if args.table != "depth":
        parts.append(table.coded())
    rows = []
    with tqdm(desc="runs", unit=" rows", disable=None) as progress:
        for part in parts:
            for row in part:
                rows.append(row)
                progress.set_postfix_str(f"{row.table} {row.method} depth {row.depth}")
                progress.update()
    print(show(rows))
    failed = [row for row in rows if row.passed is False]
    judged = sum(row.passed is not None for row in rows)
    print(f"{judged - len(failed)} of {judged} bars hold")
    for row in failed:
        print(f"failed: {row.table} {row.method} at depth {row.depth}: {row.bar}")
    if args.json:
        command = shlex.join(["python", "-m", "bench.pprs", *(argv or sys.argv[1:])])
        write(args.json, rows, command)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
