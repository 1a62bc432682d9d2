"""`commlib demo`: train a small GPT over a slow network, plain and compressed, side by side."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..benchmark.units import parse_output
from .words import above_zero, finite, numbers, positive, rate, words

if TYPE_CHECKING:
    from .train import Config, Run

_ABOUT = """\
Trains a byte-level GPT on the source text of Python's standard library with DDP: 4 ranks, each on
an emulated host with a slow line. Plain DDP, PyTorch's bf16 hook and commlib's schemes take turns
in the same processes; a step without communication is the bound. Prints a table and draws the loss
over wall-clock time.

With RANK set (torchrun, srun) it joins that job and its network. Where hosts cannot be emulated it
says so and runs on loopback.

  commlib demo --loss    instead: what the schemes cost in held-out loss at equal steps, no network
                         limit; all ranks in one process; goes on where it was stopped. Alone:
                         fp32, int8+ef, int4+ef under AdamW on the 10.9M model, then every scheme
                         under both optimizers on the small one. --model, --schemes, --optimizers
                         ask for one table instead

  commlib demo --method easgd,diloco    instead: methods that exchange once in many steps, beside
                             plain DDP; their options: commlib demo --method easgd --help

  commlib demo --pipeline    instead: a pipeline of 4 stages, activations and their gradients
                             compressed; its options: commlib demo --pipeline --help

examples:
  commlib demo --rate 1gbit
  commlib demo --schemes int8+ef,int4+ef,sign+ef --json rows.jsonl
  commlib demo --loss --seeds 3
  commlib demo --loss --schemes all --optimizers adamw --matmul bf16 --json loss.jsonl
"""
_TIMEOUT = 3600.0  # seconds; a run takes minutes, this only ends what hangs


def parser() -> argparse.ArgumentParser:
    """The options of `commlib demo`."""
    top = argparse.ArgumentParser(
        prog="commlib demo",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = top.add_argument
    add("--schemes", type=words, metavar="LIST", help="comma-separated "
        "(int8+ef,int4+ef); with --loss also core or all")  # fmt: skip
    add("--model", choices=("10M", "small"), help="10.9M or 0.9M parameters (10M)")
    add("--json", type=Path, metavar="FILE", help="write one JSON row per line")
    add("--plot", metavar="FILE", default="commlib-demo.png", help="the image, or none")
    add("--method", metavar="LIST", help="methods that exchange once in many steps; other options, "
        "see --method easgd --help")  # fmt: skip
    add("--pipeline", action="store_true", help="a pipeline of 4 stages instead of DDP; other "
        "options, see --pipeline --help")  # fmt: skip
    network = top.add_argument_group("training over a slow network")
    add = network.add_argument
    add("--rate", type=rate, default="200mbit", metavar="RATE",
        help="line rate of every host, such as 1gbit, or none: loopback (200mbit)")  # fmt: skip
    add("--ranks", type=positive, default=4, metavar="N", help="ranks to start (4)")
    add("--rounds", type=positive, default=6, metavar="N", help="turns of each method (6)")
    add("--round", type=positive, default=5, metavar="N", help="steps in a turn (5)")
    add("--bucket-mb", type=above_zero, default=3.0, metavar="MB",
        help="bucket_cap_mb of every DDP (3)")  # fmt: skip
    add("--target", type=finite, metavar="LOSS", help="time to this held-out loss (default: the "
        "highest final loss of all methods)")  # fmt: skip
    add("--link", help=argparse.SUPPRESS)
    loss = top.add_argument_group("with --loss")
    add = loss.add_argument
    add("--loss", action="store_true", help="measure held-out loss instead of time")
    add("--seeds", type=positive, default=3, metavar="N", help="paired seeds 0 to N-1 (3)")
    add("--steps", type=numbers, default=(60, 300), metavar="LIST", help="measure after (60,300)")
    add("--optimizers", type=words, metavar="LIST", help="adamw, sgd (with momentum)")
    add("--matmul", choices=("fp32", "bf16"), default="fp32", help="bf16: matmuls round their "
        "inputs to bfloat16, twice as fast where the CPU has it (fp32)")  # fmt: skip
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run `commlib demo` with these words and return the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if "--pipeline" in given:
        from .pipeline import main as pipeline

        return pipeline([word for word in given if word != "--pipeline"])
    if any(word.split("=")[0] == "--method" for word in given):
        from .seldom import main as seldom

        return seldom(given)
    top = parser()
    args = top.parse_args(given)
    try:
        if args.json:
            parse_output(str(args.json))
        if args.loss:
            from .loss import main as loss

            return loss(args)
        if args.plot != "none":
            parse_output(args.plot)
        schemes = _checked(("int8+ef", "int4+ef") if args.schemes is None else args.schemes)
    except ValueError as error:
        top.error(str(error))
    if "RANK" in os.environ:
        return _join(args, schemes)
    return _start(args, given)


def _start(args: argparse.Namespace, given: list[str]) -> int:
    """This command again, once per rank."""
    from .. import emulation

    if args.plot != "none":
        from .report import check_plot

        check_plot(args.plot)
    rate = emulation.rate_here(args.rate)
    link = args.link or (f"{args.ranks} emulated hosts, {rate}" if rate else "loopback")
    command = [sys.executable, "-m", "commlib.demo", *given, "--link", link]
    return emulation.spawn(command, args.ranks, rate=rate, timeout=_TIMEOUT)


def _join(args: argparse.Namespace, schemes: tuple[str, ...]) -> int:
    """Be one rank."""
    import torch.distributed as dist

    from .progress import bar
    from .train import Config, train

    config = Config(
        schemes=schemes,
        steps=args.rounds * args.round,
        round=args.round,
        model=args.model or "10M",
        bucket_mb=args.bucket_mb,
    )
    config = replace(config, link=args.link) if args.link else config
    first = os.environ["RANK"] == "0"
    if first:
        print(f"{config.steps} steps by each of: {', '.join(config.methods)}", flush=True)
    dist.init_process_group("gloo")
    try:
        with bar(config.steps * len(config.methods), shown=first) as progress:
            runs = train(config, progress)
        if first:
            _report(args, config, runs, dist.get_world_size())
    finally:
        with suppress(RuntimeError):  # the group of a failed run; its own error is on the way
            dist.destroy_process_group()
    return 0


def _report(args: argparse.Namespace, config: Config, runs: Sequence[Run], ranks: int) -> None:
    from .report import LEGEND, plot, rows, table, write_json
    from .train import parameters

    size = parameters(config.model)
    found = rows(runs, config, ranks, size, args.target)
    print(
        f"\n{size / 1e6:.1f}M parameters, {ranks} ranks, {config.link}, {config.steps} steps each, "
        f"bucket_cap_mb={config.bucket_mb:g}\n\n{table(found)}\n\n{LEGEND}"
    )
    if args.json:
        write_json(args.json, found)
    if args.plot != "none":
        plot(Path(args.plot), found)
        print(f"loss over time: {args.plot}")


def _checked(schemes: Sequence[str]) -> tuple[str, ...]:
    from ..policy import Scheme

    return tuple(str(Scheme.parse(text)) for text in schemes)
