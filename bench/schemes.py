"""What a scheme per layer is worth: the programme of `planner.schemes` against one scheme for all.

published   8 layers, bits 2 to 8, errors 2^-b |g|: bytes of uniform 4 bit / bytes of the plan.
            Published: 1.63 on average (1.16 to 1.97); what was drawn was not, and it decides:
            of eight ways to draw that we tried, means were 1.20 to 1.65. Kept is one near the
            published figure, so only the bar says anything: sizes log-uniform from 1e3 to 1e6, |g|
            log-normal with sigma 2
exhaustive  6 layers, 7 schemes: the plan against all 117,649 assignments
gradients   the demo's GPT at step 40, measured errors, at an equal sum of squared errors
loss        the small GPT trained under the plan of its step 40 from its first step on

python -m bench.schemes                       every bar; exit code 1 where one fails
python -m bench.schemes --table gradients --models small
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tabulate import tabulate

from bench.feedback import Row, holds, write
from commlib.demo.data import Corpus, load
from commlib.demo.loss import Experiment
from commlib.demo.loss import run as train
from commlib.demo.plan import Source, measure
from commlib.planner.schemes import CANDIDATES, DEFAULT, Layer, Plan, plan, uniform

RESULTS = Path(__file__).parent / "results" / "schemes.jsonl"
TABLES = ("published", "exhaustive", "gradients", "loss")
BITS = range(2, 9)
BLOCKS = (32, 64, 128, 256, 512, 1024)
SETS = {
    "int2 to int8": CANDIDATES,
    "and blocks of 32 to 1024": tuple(
        f"int{b}{'' if k == 128 else f':block={k}'}+ef" for k in BLOCKS for b in BITS
    ),
    "int2 to int8 and sign": ("sign+ef", *CANDIDATES),
}


def gain(made: Plan) -> float:
    """Bytes of the default everywhere / bytes of the plan."""
    return uniform(made.layers).cost / made.cost


def judged(row: Row, *, bar: str, within: bool) -> Row:
    """The row with its bar, which also asks that no budget was exceeded."""
    return replace(row, bar=f"{bar}, never over", passed=within and holds(row.value, bar))


def drawn(seed: int, layers: int) -> list[Layer]:
    """Layers as the head of this file says."""
    random = np.random.default_rng(seed)
    sizes = 10 ** random.uniform(3, 6, layers)
    norms = np.exp(2 * random.normal(size=layers))
    return [
        Layer(
            f"layer {i}",
            int(size),
            CANDIDATES,
            tuple(2.0**-b * norm for b in BITS),
            tuple(float(b * int(size)) for b in BITS),
        )
        for i, (size, norm) in enumerate(zip(sizes, norms, strict=True))
    ]


def published(draws: int = 200) -> Iterator[Row]:
    """The experiment of L-GreCo's summary, on our own draws."""
    began = time.perf_counter()
    plans = [plan(drawn(seed, 8)) for seed in range(draws)]
    gains = [gain(made) for made in plans]
    within = all(made.error <= made.budget for made in plans)
    mean = statistics.fmean(gains)
    note = f"{min(gains):.2f} to {max(gains):.2f}, {draws} draws, of a kind chosen for it"
    spent = time.perf_counter() - began
    row = Row("published", "8 layers", "uniform / plan", mean, None, 1.63, note=note, seconds=spent)
    yield judged(row, bar=">= 1.1", within=within)
    began = time.perf_counter()
    plan(drawn(0, 1000))
    yield Row("published", "1000 layers", "seconds to plan", time.perf_counter() - began)


def exhaustive(draws: int = 100) -> Iterator[Row]:
    """The bytes of the plan against the least of all assignments within the budget."""
    began, layers = time.perf_counter(), 6
    places = np.array(list(itertools.product(range(len(CANDIDATES)), repeat=layers)))
    worst, equal, within = 1.0, 0, True
    for seed in range(draws):
        table = drawn(seed, layers)
        made = plan(table)
        errors = sum(np.array(la.errors)[places[:, i]] for i, la in enumerate(table))
        costs = sum(np.array(la.costs)[places[:, i]] for i, la in enumerate(table))
        least = costs[errors <= made.budget].min()
        worst, equal = max(worst, made.cost / least), equal + (made.cost == least)
        within = within and made.error <= made.budget
    note = f"equal in {equal} of {draws} draws"
    spent = time.perf_counter() - began
    row = Row("exhaustive", "6 layers", "worst plan / least", worst, note=note, seconds=spent)
    yield judged(row, bar="<= 1", within=within)


def gradients(models: Sequence[str], seeds: int, corpus: Corpus) -> Iterator[Row]:
    """Bytes of int4+ef everywhere / bytes of the plan, vectors included (they stay exact)."""
    schemes = tuple(dict.fromkeys(itertools.chain.from_iterable(SETS.values())))
    for model in models:
        tables = []
        began = time.perf_counter()
        for seed in range(seeds if model == "small" else 1):
            source = Source(model=model, seed=seed)
            tables.append(measure(source, schemes, corpus).layers(DEFAULT))
        spent = time.perf_counter() - began
        for name, allowed in SETS.items():
            plans = [plan([_only(layer, allowed) for layer in layers]) for layers in tables]
            gains = [gain(made) for made in plans]
            used = max(made.error / made.budget for made in plans)
            note = f"{min(gains):.2f} to {max(gains):.2f}; {used:.3f} of the error allowed"
            what = f"{model}, step 40, {len(gains)} seeds"
            mean = statistics.fmean(gains)
            setting: dict[str, object] = {"schemes": list(allowed)}
            row = Row("gradients", name, what, mean, note=note, seconds=spent, setting=setting)
            yield judged(row, bar=">= 1.3", within=used <= 1)


def loss(seeds: int, corpus: Corpus, steps: int = 60) -> Iterator[Row]:
    """Held-out loss of the small model; the ratio is to fp32's of the same seeds."""
    found: dict[str, list[float]] = {}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            layers = measure(Source(model="small", seed=seed), CANDIDATES, corpus).layers(DEFAULT)
            path = Path(folder) / f"{seed}.json"
            path.write_text(plan(layers).policy().to_json(), encoding="utf-8")
            for name, text in (("fp32", "fp32"), (DEFAULT, DEFAULT), ("plan", str(path))):
                experiment = Experiment("small", "adamw", seed, text, context=128)
                (row,) = train(experiment, (steps,), corpus)
                found.setdefault(name, []).append(row.loss)
    spent = time.perf_counter() - began
    for name, losses in found.items():
        ratios = [mine / plain for mine, plain in zip(losses, found["fp32"], strict=True)]
        note = f"{min(ratios):.4f} to {max(ratios):.4f} of fp32's, {seeds} seeds"
        mean, ratio = statistics.fmean(losses), statistics.fmean(ratios)
        row = Row("loss", name, f"after {steps} steps", mean, ratio, note=note, seconds=spent)
        if name == "plan":
            row = replace(row, bar="<= 1.01", passed=holds(ratio, "<= 1.01"))
        yield row


def _only(layer: Layer, allowed: Sequence[str]) -> Layer:
    """The layer with those of its candidates that are allowed; exact ones as they are."""
    places = [i for i, text in enumerate(layer.schemes) if text in allowed]
    if len(layer.schemes) == 1:
        return layer
    rows = (layer.schemes, layer.errors, layer.costs)
    schemes, errors, costs = ([row[i] for i in places] for row in rows)
    return replace(layer, schemes=tuple(schemes), errors=tuple(errors), costs=tuple(costs))


def show(rows: Sequence[Row]) -> str:
    """One table of all rows."""
    body = [
        [
            row.table,
            row.scheme,
            row.what,
            f"{row.value:.4g}",
            "" if row.ratio is None else f"{row.ratio:.4f}",
            "" if row.published is None else f"{row.published:g}",
            row.note,
            row.bar,
            {True: "holds", False: "FAILS", None: ""}[row.passed],
        ]
        for row in rows
    ]
    header = ["table", "", "", "here", "/ fp32", "published", "", "bar", ""]
    return tabulate(body, header, disable_numparse=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", choices=("all", *TABLES), default="all")
    parser.add_argument("--models", default="small,10M", help="of gradients (small,10M)")
    parser.add_argument("--seeds", type=int, default=3, help="of the small model (3)")
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS, help=f"append rows (to {RESULTS.name})"
    )
    args = parser.parse_args(argv)
    logging.getLogger("commlib").setLevel(logging.ERROR)
    corpus = load()
    parts = {
        "published": published(),
        "exhaustive": exhaustive(),
        "gradients": gradients(args.models.split(","), args.seeds, corpus),
        "loss": loss(args.seeds, corpus),
    }
    asked = TABLES if args.table == "all" else (args.table,)
    rows = [row for name in asked for row in parts[name]]
    print(show(rows))
    failed = [row for row in rows if row.passed is False or math.isnan(row.value)]
    print(f"{sum(row.passed is True for row in rows)} bars hold, {len(failed)} fail")
    if args.json:
        command = shlex.join(["python", "-m", "bench.schemes", *(argv or sys.argv[1:])])
        write(args.json, rows, command, bench="schemes")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
