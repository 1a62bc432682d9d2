"""`commlib plan`: a scheme for every layer of the demo's GPT, by the gradients of one of its steps.

The model trains in this process on what the ranks would train on; at the step asked for, each
rank's own gradient is coded under every candidate, and the programme of `planner.schemes` runs on
the sums, as `commlib.of(model).replan()` does in a job. The result is a policy file.

Step time is a model: bytes that a rank sends over the line rate, plus what one core of this machine
took for coding (measured now); no latency, and nothing overlapped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm import tqdm

from ..benchmark.rows import origin
from ..benchmark.units import parse_output
from ..emulation import parse_rate
from ..planner.auto import FP32_BYTES, Speed
from ..planner.errors import Errors
from ..planner.measure import speed
from ..planner.schemes import (
    CANDIDATES,
    DEFAULT,
    Cost,
    Layer,
    Plan,
    nbytes,
    plan,
    seconds,
    uniform,
)
from ..policy import TensorInfo, raw
from ..scheme import Scheme
from ..topology import Link, Topology
from ..transport import ThreadTransport
from .data import Corpus, load
from .model import GPT, SHAPES, optimizer, warm_up
from .words import above_zero, positive, rate, words

RAW = str(raw())


@dataclass(frozen=True)
class Source:
    """Whose gradients: those of step `step` (from 1) of this training."""

    model: str = "10M"
    step: int = 40
    ranks: int = 4
    batch: int = 2  # of a rank
    context: int = 128
    seed: int = 0
    optimizer: str = "adamw"


@dataclass(frozen=True)
class Choice:
    """What a layer got. error_share: of the squared error of the plan; 0 where it has none."""

    layer: str
    numel: int
    scheme: str
    bits: float  # per element
    nbytes: int
    error: float
    error_share: float
    op: str = "plan"


@dataclass(frozen=True)
class Total:
    """One way to send all layers. step_ms: predicted, of which coding_ms on one core."""

    scheme: str  # "plan" for the plan
    nbytes: int
    error: float
    step_ms: float
    coding_ms: float
    rate: str
    source: Source
    op: str = "plan total"
    device: str = field(default_factory=lambda: origin().device)
    versions: dict[str, str] = field(default_factory=lambda: origin().versions)
    commit: str | None = field(default_factory=lambda: origin().commit)


_ABOUT = """\
Chooses a scheme for every layer of the demo's GPT: trains it in this process up to --step, codes
the gradients of that step under every candidate, and takes the fewest bytes (or seconds) whose sum
of squared errors is at most --alpha times that of --default everywhere. In a job of your own,
commlib.of(model).replan() does the same, with the gradients of your model.

  bits, bytes      on the wire, scales included; of the error: share of the plan's squared error
  ms, coding       predicted: bytes that a rank sends / line rate, and what coding takes one core of
                   this machine; no latency, nothing overlapped

examples:
  commlib plan --model small --rate 1gbit
  commlib plan --schemes sign+ef,int2+ef,int3+ef,int4+ef,int6+ef --alpha 2 --output plan.json
"""


def parser() -> argparse.ArgumentParser:
    """The options of `commlib plan`."""
    top = argparse.ArgumentParser(
        prog="commlib plan",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, source = top.add_argument, Source()
    add("--model", choices=tuple(SHAPES), default=source.model, help="10.9M or 0.9M parameters "
        f"({source.model})")  # fmt: skip
    add("--step", type=positive, default=source.step, metavar="N",
        help=f"whose gradients, from 1 ({source.step})")  # fmt: skip
    add("--ranks", type=positive, default=source.ranks, metavar="N",
        help=f"with a batch of {source.batch} each ({source.ranks})")  # fmt: skip
    add("--seed", type=int, default=source.seed, metavar="N", help="of weights and data (0)")
    add("--schemes", type=words, default=CANDIDATES, metavar="LIST",
        help=f"candidates, comma-separated ({CANDIDATES[0]} to {CANDIDATES[-1]})")  # fmt: skip
    add("--default", default=DEFAULT, metavar="SCHEME", help=f"whose error is allowed ({DEFAULT})")
    add("--alpha", type=above_zero, default=1.0, metavar="X", help="times so much (1)")
    add("--objective", choices=("bytes", "seconds"), default="bytes",
        help="what to have the least of; seconds include coding (bytes)")  # fmt: skip
    add("--rate", type=rate, default="1gbit", help="line rate of every rank (1gbit)")
    add("--json", type=Path, metavar="FILE", help="write one JSON row per line")
    add("--output", type=Path, metavar="FILE", help="write the policy: plan.json")
    return top


def main(argv: Sequence[str]) -> int:
    """Run `commlib plan` with these words and return the exit code."""
    top = parser()
    args = top.parse_args(argv)
    try:
        args.schemes = tuple(dict.fromkeys(str(Scheme.parse(text)) for text in args.schemes))
        args.default = str(Scheme.parse(args.default))
        if args.default not in args.schemes:
            raise ValueError(f"--default {args.default} is not among --schemes {args.schemes}")
        if args.ranks < 2:
            raise ValueError("--ranks 1: one rank sends nothing; give at least 2")
        if args.rate is None:
            raise ValueError("--rate none: a step time needs a rate, such as 1gbit")
        for file in filter(None, (args.json, args.output)):
            parse_output(str(file))
        if args.output and args.output.suffix != ".json":
            raise ValueError(f"--output {args.output}: a policy file is called NAME.json")
    except ValueError as error:
        top.error(str(error))
    return show(args)


def show(args: argparse.Namespace) -> int:
    """Print the plan; write what was asked for."""
    source = Source(model=args.model, step=args.step, ranks=args.ranks, seed=args.seed)
    errors = measure(source, args.schemes)
    topology = Topology(args.ranks, Link(0.0, parse_rate(args.rate) / 8))
    speeds = codec_speeds((*args.schemes, args.default))
    cost = seconds(topology, speeds) if args.objective == "seconds" else nbytes
    try:
        made = plan(errors.layers(args.default, cost), args.default, alpha=args.alpha)
    except ValueError as error:  # of what was measured, not of the words
        raise RuntimeError(str(error)) from error
    policy = made.policy(args.default)
    choices = list(rows(made, errors.infos))
    same = uniform(made.layers, args.default)
    exact = uniform([_raw(layer) for layer in made.layers], RAW)
    totals = [
        total(name, p, errors.infos, topology, speeds, args.rate, source)
        for name, p in ((RAW, exact), (args.default, same), ("plan", made))
    ]
    print(
        f"gradients of step {source.step}, {source.ranks} ranks x {source.batch} x "
        f"{source.context} bytes, {source.model} model, {source.optimizer}\n\n{table(choices)}\n\n"
        f"{totals_table(totals)}\n\n{_words(totals, args.default, made)}\n"
        f"policy digest {policy.digest()}"
    )
    if args.json:
        found: list[Choice | Total] = [*choices, *totals]
        lines = [json.dumps(asdict(row), allow_nan=False) + "\n" for row in found]
        args.json.write_text("".join(lines), encoding="utf-8")
    if args.output:
        args.output.write_text(policy.to_json() + "\n", encoding="utf-8")
        print(f'{args.output}: commlib.wrap(model, "{args.output}") takes it')
    return 0


def measure(source: Source, schemes: Sequence[str], corpus: Corpus | None = None) -> Errors:
    """Train up to the step and code each rank's gradients of it; the tables summed over ranks."""
    corpus = corpus or load()
    model = GPT(SHAPES[source.model], seed=source.seed)
    updates = optimizer(source.optimizer, model)
    parameters = dict(model.named_parameters())
    infos = {n: TensorInfo(n, p.numel(), p.dtype, ndim=p.ndim) for n, p in parameters.items()}
    errors = Errors(infos, schemes)
    for step in tqdm(range(source.step), desc="training", unit="step", disable=None):
        updates.zero_grad()
        for rank in range(source.ranks):
            pair = corpus.batch(
                source.batch, source.context, seed=source.seed, step=step, rank=rank
            )
            mine = torch.autograd.grad(model(*pair), list(parameters.values()))
            for (name, parameter), gradient in zip(parameters.items(), mine, strict=True):
                if step + 1 == source.step:
                    errors.add(name, gradient)
                total = gradient / source.ranks
                parameter.grad = total if parameter.grad is None else parameter.grad + total
        warm_up(updates, step)
        updates.step()
    return errors


def codec_speeds(schemes: Sequence[str]) -> dict[str, Speed]:
    """Speeds of the schemes' codecs on one core of this machine, by scheme text."""
    transport = ThreadTransport.world(1, 60.0)[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        lossy = [text for text in dict.fromkeys(schemes) if not Scheme.parse(text).lossless]
        return {text: speed(transport, text) for text in lossy}
    finally:
        torch.set_num_threads(threads)


def rows(made: Plan, infos: Mapping[str, TensorInfo]) -> Iterator[Choice]:
    """A row per layer, in the model's order."""
    for layer, place in zip(made.layers, made.places, strict=True):
        text, error = layer.schemes[place], layer.errors[place]
        size = nbytes(infos[layer.name], Scheme.parse(text))
        share = error / made.error if made.error else 0.0
        yield Choice(layer.name, layer.numel, text, 8 * size / layer.numel, size, error, share)


def total(
    name: str,
    made: Plan,
    infos: Mapping[str, TensorInfo],
    topology: Topology,
    speeds: Mapping[str, Speed],
    rate: str,
    source: Source,
) -> Total:
    """All layers of a plan together."""

    def summed(cost: Cost) -> float:
        return sum(cost(infos[layer], Scheme.parse(s)) for layer, s in made.schemes.items())

    whole, wire = summed(seconds(topology, speeds)), summed(seconds(topology, {}))
    size = int(summed(nbytes))
    return Total(name, size, made.error, 1e3 * whole, 1e3 * (whole - wire), rate, source)


def table(choices: Sequence[Choice]) -> str:
    """A line per layer that is coded, one for all that stay exact."""
    coded = [row for row in choices if row.scheme != RAW]
    body = [
        [
            row.layer,
            f"{row.numel}",
            row.scheme,
            f"{row.bits:.2f}",
            f"{100 * row.error_share:.2f}%",
            f"{row.nbytes}",
        ]
        for row in coded
    ]
    exact = [row for row in choices if row.scheme == RAW]
    if exact:
        sums = [sum(row.numel for row in exact), sum(row.nbytes for row in exact)]
        body.append([f"{len(exact)} that stay exact", f"{sums[0]}", RAW, "", "", f"{sums[1]}"])
    header = ["layer", "elements", "scheme", "bits", "of the error", "bytes"]
    align = ("left", "right", "left", "right", "right", "right")
    return tabulate(body, header, disable_numparse=True, colalign=align)


def totals_table(totals: Sequence[Total]) -> str:
    """Bytes, error and predicted step time of each way to send all layers."""
    body = [
        [
            row.scheme,
            f"{row.nbytes / 1e6:.3f}",
            f"{row.error:.3e}",
            f"{row.step_ms:.1f}",
            f"{row.coding_ms:.1f}",
            f"{totals[0].step_ms / row.step_ms:.2f}x" if row.step_ms else "-",
        ]
        for row in totals
    ]
    header = ["", "MB", "squared error", f"ms at {totals[0].rate}", "of it coding", "speed-up"]
    return tabulate(body, header, disable_numparse=True, stralign="right")


def _words(totals: Sequence[Total], default: str, made: Plan) -> str:
    _, same, mine = totals
    used = made.error / made.budget if made.budget else 0.0
    return (
        f"plan: {same.nbytes / mine.nbytes:.2f}x fewer bytes than {default}, at {used:.3f} of the "
        "squared error allowed"
    )


def _raw(layer: Layer) -> Layer:
    return Layer(layer.name, layer.numel, (RAW,), (0.0,), (float(layer.numel * FP32_BYTES),))
