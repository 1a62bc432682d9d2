"""Time to plain DDP's loss at step 150: schemes of 1 and 2 bits beside both PowerSGDs.

    python -m bench.time_to_loss              the 10.9M GPT, 4 ranks; half an hour
    python -m bench.time_to_loss --model small --rates 20mbit --json

    time = steps to the loss x seconds per step

Steps are counted where nothing throttles: every method trains alone from the same weights on the
same batches until its held-out loss, measured every EVERY steps, is plain DDP's at step TARGET or
lower. Seconds per step are the median of the slowest rank's, on emulated hosts behind a line of
each rate, where the methods take turns step by step. Their product is what a run on that line would
have taken (no run was made there to the end). Both PowerSGDs begin after START steps of plain DDP.

No `from __future__ import annotations` here: DDP compares the hook's annotations with the classes.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from tabulate import tabulate

from bench.feedback import write
from bench.power_sgd import METHODS as POWER_SGD
from bench.power_sgd import PLAIN, START, TORCH, Trainee
from commlib.demo.data import Corpus, load
from commlib.demo.model import OPTIMIZERS, SHAPES
from commlib.demo.train import gather
from commlib.emulation import spawn
from commlib.scheme import Scheme

RESULTS = Path(__file__).parent / "results" / "time_to_loss.jsonl"
METHODS = (*POWER_SGD[:-1], "rotate|eden2", "rotate|eden1+ef:omega=0.2", "sign+ef:omega=0.2")
RATES = ("100mbit", "200mbit", "1gbit")
TARGET, EVERY, MOST = 150, 5, 300  # steps
TIMED, UNTIMED = 12, 3  # steps on the line, after those in which plans are made


@dataclass(frozen=True)
class Row:
    """One method behind one line. steps: of each seed, None where MOST were not enough."""

    method: str
    rate: str
    steps: list[int | None]
    ms: float
    seconds: float | None
    fewer_seconds: float | None  # plain DDP's over this
    setting: dict[str, object] = field(default_factory=dict)


def is_power_sgd(method: str) -> bool:
    """PyTorch's or ours."""
    return method.startswith(TORCH) or "power_sgd" in method


def steps_to(
    method: str, args: argparse.Namespace, seed: int, corpus: Corpus, target: float | None
) -> tuple[int | None, float]:
    """Steps to a held-out loss of `target` or less (None: TARGET steps), and the loss then."""
    one = Trainee(method, args, seed)
    pair = corpus.evaluation(
        args.evaluate, args.context, rank=dist.get_rank(), ranks=dist.get_world_size()
    )
    loss = float("inf")
    for step in range(args.target if target is None else args.most):
        one.step(corpus, step)
        if target is not None and (step + 1) % EVERY == 0 and step + 1 >= args.target // 2:
            loss = one.loss(pair)
            if loss <= target:
                return step + 1, loss
    return (None, loss) if target is not None else (args.target, one.loss(pair))


def count(args: argparse.Namespace) -> dict[str, list[int | None]]:
    """Steps of every method and seed, on this rank."""
    corpus, found = load(), {method: [] for method in args.methods}  # type: ignore[var-annotated]
    for seed in range(args.seeds):
        target = None
        for method in args.methods:
            steps, loss = steps_to(method, args, seed, corpus, target)
            target = loss if target is None else target
            found[method].append(steps)
            if dist.get_rank() == 0:
                print(f"seed {seed}, {method}: {steps} steps, loss {loss:.4f}", file=sys.stderr)
    return found


def clock(args: argparse.Namespace) -> dict[str, float]:
    """Median ms of a step of every method on this line, the slowest rank's; methods take turns."""
    corpus, trainees = load(), [Trainee(method, args, 0) for method in args.methods]
    ms: dict[str, list[float]] = {method: [] for method in args.methods}
    for step in range(UNTIMED + args.timed):
        shift = step % len(trainees)
        for one in trainees[shift:] + trainees[:shift]:
            one.step(corpus, step)
            slowest = float(gather([one.ms[-1]]).max())
            if step >= UNTIMED:
                ms[one.method].append(slowest)
    return {method: statistics.median(times) for method, times in ms.items()}


def rows(
    steps: dict[str, list[int | None]], ms: dict[str, dict[str, float]], setting: dict[str, object]
) -> list[Row]:
    """Every method at every rate; of several seeds the mean."""
    found = []
    for rate, times in ms.items():
        seconds = {
            method: statistics.fmean(n for n in counted if n) * times[method] / 1e3
            if all(counted)
            else None
            for method, counted in steps.items()
        }
        plain = seconds[PLAIN]
        assert plain is not None
        found += [
            Row(method, rate, counted, times[method], mine, mine and plain / mine, setting)
            for (method, counted), mine in zip(steps.items(), seconds.values(), strict=True)
        ]
    return found


def table(found: Sequence[Row]) -> str:
    """A line per method and rate."""
    body = [
        [
            row.rate,
            row.method,
            " ".join(str(n or "-") for n in row.steps),
            f"{row.ms:.0f}",
            "-" if row.seconds is None else f"{row.seconds:.1f}",
            "-" if row.fewer_seconds is None else f"{row.fewer_seconds:.2f}x",
        ]
        for row in found
    ]
    header = ["line", "method", "steps [seeds]", "ms/step", "seconds", "plain's over it"]
    align = ("left", "left", "right", "right", "right", "right")
    return tabulate(body, header, disable_numparse=True, colalign=align)


def verdicts(found: Sequence[Row]) -> list[str]:
    """At each rate, the fastest scheme against the fastest PowerSGD."""
    lines = []
    for rate in dict.fromkeys(row.rate for row in found):
        timed = [
            (row.seconds, row.method)
            for row in found
            if row.rate == rate and row.seconds and row.method != PLAIN
        ]
        ours = [one for one in timed if not is_power_sgd(one[1])]
        theirs = [one for one in timed if is_power_sgd(one[1])]
        if ours and theirs:
            (a, one), (b, other) = min(ours), min(theirs)
            verdict = "holds" if a < b else "MISSED"
            lines.append(f"{rate}: {one} {a:.1f} s, {other} {b:.1f} s ({b / a:.2f}x): {verdict}")
    return lines


def rank(args: argparse.Namespace) -> None:
    """One rank of either part."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        found = count(args) if args.part == "count" else clock(args)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    if os.environ["RANK"] == "0":
        args.out.write_text(json.dumps(found), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=METHODS, help="plain DDP is always there")
    parser.add_argument("--rates", nargs="+", default=RATES, help="of the lines")
    parser.add_argument("--ranks", type=int, default=4, help="processes (default 4)")
    parser.add_argument("--model", choices=SHAPES, default="10M")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--target", type=int, default=TARGET, help="step of plain DDP's loss")
    parser.add_argument("--most", type=int, default=MOST, help="steps a method may take")
    parser.add_argument("--timed", type=int, default=TIMED, help="steps timed on each line")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2, help="windows per rank and step")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--evaluate", type=int, default=32, help="held-out windows per rank")
    parser.add_argument("--bucket-mb", type=float, default=3.0)
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS, help=f"append rows (to {RESULTS.name})"
    )
    parser.add_argument("--counted", type=Path, metavar="FILE", help="keep the steps there, or "
                        "take them from there where it exists")  # fmt: skip
    parser.add_argument("--part", choices=("count", "clock"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(given)
    if args.target <= START or args.seeds < 1:
        parser.error(f"--target must be above {START}, --seeds at least 1")
    for method in args.methods:
        if method != PLAIN and not method.startswith(TORCH):
            Scheme.parse(method)
    args.methods = tuple(dict.fromkeys((PLAIN, *args.methods)))
    if args.part:
        rank(args)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "bench.time_to_loss", *given, "--out", str(out), "--part"]
        counted = args.counted
        if counted and counted.exists():
            steps = json.loads(counted.read_text(encoding="utf-8"))
        elif code := spawn([*command, "count"], args.ranks, timeout=4 * 3600):
            return code
        else:
            steps = json.loads(out.read_text(encoding="utf-8"))
            if counted:
                counted.write_text(json.dumps(steps), encoding="utf-8")
        ms = {}
        for rate in args.rates:
            if code := spawn([*command, "clock"], args.ranks, rate=rate, timeout=3600):
                return code
            ms[rate] = json.loads(out.read_text(encoding="utf-8"))
    names = ("model", "optimizer", "ranks", "batch", "context", "bucket_mb", "target")
    found = rows(steps, ms, {name: getattr(args, name) for name in names})
    print(f"\n{args.ranks} ranks, {args.model} GPT, {args.optimizer}, plain DDP's loss at step "
          f"{args.target}\n\n{table(found)}\n")  # fmt: skip
    print("\n".join(verdicts(found)))
    if args.json:
        write(args.json, found, shlex.join(["python", "-m", "bench.time_to_loss", *given]),
              "time_to_loss")  # type: ignore[arg-type]  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
