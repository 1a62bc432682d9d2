"""`commlib demo --method`: methods that exchange once in many steps, beside plain DDP."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ...benchmark.units import parse_output
from ..words import positive, rate, words

_ABOUT = """\
Trains a byte-level GPT on the source text of Python's standard library by methods that exchange
once in many steps, and by plain DDP and int4+ef DDP, which exchange in every one:

  easgd       elastic averaging: every worker by itself, held to a centre in rank 0's process
  diloco      once in --period steps the mean of how far ranks came, and an outer Nesterov step
  streaming   DiLoCo in four fragments, each exchanged beside the next five steps
  localsgd    once in --period steps the mean of all ranks

First every method trains alone with no limit on the line: held-out loss by step. Then methods take
turns on emulated hosts, behind a line of each rate: seconds and bytes of a step, the mean over a
whole period. Their product is the loss over time on that line; no run was made there to the end.
It starts its own ranks, on this machine: not for torchrun or srun.

examples:
  commlib demo --method easgd,diloco --model small
  commlib demo --method diloco,streaming --rate 20mbit,100mbit --period 25 --json rows.jsonl
"""
_TIMEOUT = 4 * 3600.0  # seconds; a run takes minutes, this only ends what hangs
CHOICES = ("easgd", "diloco", "streaming", "localsgd")


def parser() -> argparse.ArgumentParser:
    """The options of `commlib demo --method`."""
    top = argparse.ArgumentParser(
        prog="commlib demo",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = top.add_argument
    add("--method", type=methods, required=True, metavar="LIST", help="comma-separated")
    add("--model", choices=("10M", "small"), default="small", help="10.9M or 0.9M parameters "
        "(small)")  # fmt: skip
    add("--rate", type=rates, default=("20mbit", "100mbit"), metavar="LIST", help="of the lines "
        "(20mbit,100mbit); none: loopback")  # fmt: skip
    add("--ranks", type=positive, default=4, metavar="N", help="ranks to start (4)")
    add("--steps", type=positive, default=200, metavar="N", help="most steps of a method (200)")
    add("--target", type=positive, default=100, metavar="N", help="time to plain DDP's held-out "
        "loss after so many steps (100)")  # fmt: skip
    add("--period", type=positive, default=25, metavar="N", help="of diloco, streaming and "
        "localsgd; easgd has 5 (25)")  # fmt: skip
    add("--timed", type=positive, default=4, metavar="N", help="steps of DDP on the line (4)")
    add("--seed", type=int, default=0, metavar="N", help="of the weights and batches (0)")
    add("--json", type=Path, metavar="FILE", help="write one JSON row per line")
    add("--plot", metavar="FILE", default="commlib-demo-method.png", help="the image, or none")
    add("--part", choices=("learn", "clock"), help=argparse.SUPPRESS)
    add("--out", type=Path, help=argparse.SUPPRESS)
    return top


def methods(text: str) -> tuple[str, ...]:
    """Names of CHOICES."""
    found = words(text)
    for one in found:
        if one not in CHOICES:
            raise argparse.ArgumentTypeError(f"{one!r} is no method; allowed: {', '.join(CHOICES)}")
    return tuple(dict.fromkeys(found))


def rates(text: str) -> tuple[str | None, ...]:
    """Line rates, or None for loopback."""
    return tuple(rate(word) for word in words(text))


def main(given: Sequence[str]) -> int:
    """Run `commlib demo` with these words, of which one is --method, and return the exit code."""
    top = parser()
    args = top.parse_args(list(given))
    try:
        if args.json:
            parse_output(str(args.json))
        if args.plot != "none":
            parse_output(args.plot)
    except ValueError as error:
        top.error(str(error))
    if args.target > args.steps:
        top.error(f"--target {args.target} is above --steps {args.steps}")
    if args.part:
        return _rank(args)
    if "RANK" in os.environ:
        top.error("RANK is set, and every rank of that job would start --ranks more: run "
                  "commlib demo --method by itself, without torchrun or srun")  # fmt: skip
    if args.plot != "none":
        from ..report import check_plot

        check_plot(args.plot)
    return _lead(args, list(given))


def _lead(args: argparse.Namespace, given: list[str]) -> int:
    """Start the ranks of both parts, and show what they found."""
    from ... import emulation
    from .report import LEGEND, plot, rows, table, write_rows

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "commlib.demo", *given, "--out", str(out), "--part"]
        if code := emulation.spawn([*command, "learn"], args.ranks, timeout=_TIMEOUT):
            return code
        learned = json.loads(out.read_text(encoding="utf-8"))
        clocks = {}
        for asked in args.rate:
            line = emulation.rate_here(asked)
            name = line or "loopback"
            print(f"timing behind {name}", flush=True)
            if code := emulation.spawn(
                [*command, "clock"], args.ranks, rate=line, timeout=_TIMEOUT
            ):
                return code
            clocks[name] = json.loads(out.read_text(encoding="utf-8"))
    found = rows(learned, clocks, args)
    print(f"\n{args.model} GPT, {args.ranks} ranks, time to plain DDP's held-out loss after "
          f"{args.target} steps\n\n{table(found)}\n\n{LEGEND}")  # fmt: skip
    if args.json:
        write_rows(args.json, found)
    if args.plot != "none":
        plot(Path(args.plot), found)
        print(f"loss over time and over bytes: {args.plot}")
    return 0


def _rank(args: argparse.Namespace) -> int:
    """Be one rank of either part."""
    import torch
    import torch.distributed as dist

    from .train import clock, learn

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        found = learn(args) if args.part == "learn" else clock(args)
        dist.barrier()
    finally:
        with suppress(RuntimeError):  # the group of a failed run; its own error is on the way
            dist.destroy_process_group()
    if os.environ["RANK"] == "0":
        args.out.write_text(json.dumps(found), encoding="utf-8")
    return 0
