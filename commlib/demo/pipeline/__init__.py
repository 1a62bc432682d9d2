"""`commlib demo --pipeline`: a GPT in stages over a slow network, messages raw and compressed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...benchmark.units import parse_output
from ..words import positive, rate, whole, words

if TYPE_CHECKING:
    from .line import Line
    from .train import Config, Run, Trainee

_ABOUT = """\
Trains a byte-level GPT, cut into 4 stages on 4 emulated hosts, by torch's 1F1B schedule. torch's
own messages and commlib's schemes take turns in the same processes; the same schedule with messages
of one element is the bound. Prints a table and what must hold of it, and draws the loss over time.

First it sets the line rate: to where an uncompressed step takes 8 times a step of the bound, as
with large models on 100 Mbit/s. --rate sets one instead. Where hosts cannot be emulated it says so
and runs on loopback; with RANK set (torchrun, srun) it joins that job and its network.

A method is FORWARD[/BACKWARD], such as int4/int8 or int2+delta/int4: schemes of activations and of
their gradients.

  --loss    instead: what methods cost in loss when a trained model is fine-tuned for 8 epochs over
            256 sequences; on loopback, nothing is timed

examples:
  commlib demo --pipeline --json rows.jsonl
  commlib demo --pipeline --schemes int4/int8,fp8 --schedule GPipe --rate 100mbit
  commlib demo --pipeline --loss --seeds 3 --json loss.jsonl
"""
_TIMEOUT = 2 * 3600.0  # seconds; a run takes minutes, this only ends what hangs
AUTO = "auto"


def parser() -> argparse.ArgumentParser:
    """The options of `commlib demo --pipeline`."""
    top = argparse.ArgumentParser(
        prog="commlib demo --pipeline",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = top.add_argument
    add("--schemes", type=words, metavar="LIST", help="comma-separated methods")
    add("--model", choices=("3M", "small"), default="3M", help="3.3M or 0.2M parameters (3M)")
    add("--stages", type=positive, default=4, metavar="N", help="stages, one per rank (4)")
    add("--microbatches", type=positive, metavar="N", help="of a step (12; with --loss 16)")
    add("--samples", type=positive, default=1, metavar="N", help="of a micro-batch (1)")
    add("--schedule", choices=("1F1B", "GPipe"), default="1F1B", help="(1F1B)")
    add("--json", type=Path, metavar="FILE", help="write one JSON row per line")
    network = top.add_argument_group("training over a slow network")
    add = network.add_argument
    add("--rate", type=lambda text: text if text == AUTO else rate(text), default=AUTO,
        metavar="RATE", help="line rate of every host, such as 100mbit; auto; or none: loopback "
        "(auto)")  # fmt: skip
    add("--rounds", type=positive, default=4, metavar="N", help="turns of each method (4)")
    add("--round", type=positive, default=5, metavar="N", help="steps in a turn, and in an epoch; "
        "+reuse keeps a batch for a turn (5)")  # fmt: skip
    add("--plot", metavar="FILE", default="commlib-demo-pipeline.png", help="the image, or none")
    add("--link", help=argparse.SUPPRESS)
    add("--dial", type=Path, help=argparse.SUPPRESS)
    loss = top.add_argument_group("with --loss")
    add = loss.add_argument
    add("--loss", action="store_true", help="measure loss instead of time")
    add("--seeds", type=positive, default=3, metavar="N", help="paired seeds 0 to N-1 (3)")
    add("--epochs", type=positive, default=8, metavar="N", help="of training (8)")
    add("--pretrain", type=whole, default=300, metavar="N", help="uncompressed steps on other text "
        "before; 0: from scratch, at 3 times the learning rate (300)")  # fmt: skip
    add("--sequences", type=positive, default=256, metavar="N", help="of the training text (256)")
    return top


def main(argv: Sequence[str]) -> int:
    """Run `commlib demo --pipeline` with these words and return the exit code."""
    top = parser()
    args = top.parse_args(argv)
    try:
        for output in (args.json, None if args.loss or args.plot == "none" else args.plot):
            if output:
                parse_output(str(output))
        config = _config(args)
    except ValueError as error:
        top.error(str(error))
    if "RANK" in os.environ:
        return _join(args, config)
    return _start(args, list(argv))


def _config(args: argparse.Namespace) -> Config:
    """Raises ValueError: what was asked for does not fit together."""
    from . import loss
    from .stages import SHAPES
    from .train import ALONE, METHODS, UNCOMPRESSED, Config, Method

    methods = args.schemes or (loss.METHODS if args.loss else METHODS)
    microbatches = args.microbatches or (16 if args.loss else 12)
    batch = microbatches * args.samples
    config = Config(
        methods=tuple(dict.fromkeys((UNCOMPRESSED, *methods, *(() if args.loss else (ALONE,))))),
        steps=args.rounds * args.round,
        round=args.round,
        microbatches=microbatches,
        samples=args.samples,
        sequences=args.sequences if args.loss else args.round * batch,
        shape=SHAPES[args.model],
        schedule=args.schedule,
    )
    for text in config.methods:
        Method.parse(text)
    if args.stages > config.shape.layers or args.stages < 2:
        raise ValueError(f"--stages {args.stages}: 2 to {config.shape.layers}, one block each")
    if microbatches < args.stages:
        raise ValueError(f"--microbatches {microbatches}: at least one for each stage")
    if config.sequences % batch:
        raise ValueError(f"--sequences {config.sequences}: not a multiple of a step's {batch}")
    return replace(config, link=args.link) if args.link else config


def _start(args: argparse.Namespace, given: list[str]) -> int:
    """This command again, once per stage."""
    from ... import emulation
    from .line import dial

    if args.plot != "none" and not args.loss:
        from ..report import check_plot

        check_plot(args.plot)
    wanted = emulation.rate_here(None if args.loss else args.rate)
    command = [sys.executable, "-m", "commlib.demo", "--pipeline", *given]
    if wanted is None:
        command += ["--link", args.link or "loopback", "--rate", "none"]
        return emulation.spawn(command, args.stages, timeout=_TIMEOUT)
    command += ["--link", args.link or f"{args.stages} emulated hosts"]
    if wanted != AUTO:
        return emulation.spawn(command, args.stages, rate=wanted, timeout=_TIMEOUT)
    with emulation.Network(args.stages) as network, dial(network) as folder:
        command += ["--dial", str(folder)]
        return emulation.spawn(command, args.stages, network=network, timeout=_TIMEOUT)


def _join(args: argparse.Namespace, config: Config) -> int:
    """Be one stage."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        if args.loss:
            from .loss import measure

            measure(
                config, seeds=args.seeds, epochs=args.epochs, pretrain=args.pretrain, path=args.json
            )
        else:
            _train(args, config)
    finally:
        with suppress(RuntimeError):  # the group of a failed run; its own error is on the way
            dist.destroy_process_group()
    return 0


def _train(args: argparse.Namespace, config: Config) -> None:
    import torch.distributed as dist

    from ...emulation import parse_rate
    from ..data import load
    from ..progress import bar
    from .train import train, trainees

    first = dist.get_rank() == 0
    if first:
        print(f"{config.steps} steps by each of: {', '.join(config.methods)}", flush=True)
    corpus = load()
    with bar(config.steps * len(config.methods), shown=first) as progress:
        made = trainees(config, corpus)
        line = _calibrate(args.dial, config, made) if args.dial else None
        bits = line.bits if line else None
        if line:
            config = replace(config, link=f"{config.link}, {line.rate}")
        elif args.rate not in (None, AUTO) and args.link:
            bits = parse_rate(args.rate)
            config = replace(config, link=f"{config.link}, {args.rate}")
        runs = train(config, made, corpus, progress)
    if first:
        _report(args, config, runs, bits, dist.get_world_size())


def _calibrate(folder: Path, config: Config, made: Sequence[Trainee]) -> Line:
    """Find the line rate; all ranks, which come to the same one."""
    import torch.distributed as dist

    from .line import calibrate, rate_text, turn
    from .train import ALONE, UNCOMPRESSED, typical

    first = dist.get_rank() == 0

    def measure(bits: int) -> tuple[float, float]:
        if bits and first:
            turn(folder, rate_text(bits))
        dist.barrier()
        alone, uncompressed = typical(made, (ALONE, UNCOMPRESSED), 3)
        return alone, uncompressed

    # gloo announces a posted receive behind the data it sends to the same peer, so in 1F1B the two
    # messages of an exchange travel one after the other
    waits = 2 if config.schedule == "1F1B" else 1
    line = calibrate(measure, waits * config.critical_bytes(dist.get_world_size()))
    if first:
        print(
            f"line rate {line.rate}/s: uncompressed {1e3 * line.uncompressed:.0f} ms a step, "
            f"compute only {1e3 * line.alone:.0f} ms, {line.ratio:.2f} times",
            flush=True,
        )
    return line


def _report(
    args: argparse.Namespace, config: Config, runs: Sequence[Run], bits: int | None, stages: int
) -> None:
    from ..report import write_json
    from ..train import sharers
    from .report import LEGEND, bar_table, bars, plot, rows, table
    from .stages import parameters
    from .train import ALONE, UNCOMPRESSED

    size = parameters(config.shape)
    found = rows(runs, config, stages, size, bits=bits, apart=sharers() == 1)
    step = {row.method: row.ms_p50 for row in found}
    message = config.message()
    needs = ""
    if bits:
        least = 8e3 * config.critical_bytes(stages) / bits
        needs = f"; at this rate the line alone takes at least {least:.0f} ms of it"
    print(
        f"\n{size / 1e6:.1f}M parameters in {stages} stages, {config.schedule}, "
        f"{config.microbatches} micro-batches of {message / 1e3:.0f} kB, {config.link}, "
        f"{config.steps} steps each; uncompressed takes {step[UNCOMPRESSED] / step[ALONE]:.2f} "
        f"times compute only{needs}\n\n{table(found)}\n\n{LEGEND.format(round=config.round)}\n\n"
        f"{bar_table(bars(found))}"
    )
    if args.json:
        write_json(args.json, found)
    if args.plot != "none":
        plot(Path(args.plot), found)
        print(f"\nloss over time: {args.plot}")
