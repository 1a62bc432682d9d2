"""Is 1-bit Adam as good as Adam, at a 32nd of the bytes? Trained through the shipped classes alone.

An MLP 64-64-64-10 on scikit-learn's digits (`bench/problems.py`), four ranks (threads), 16 images a
rank and step, 600 steps, a fifth of them warm-up, lr 2e-3.

    loss     Adam on exact gradients, 1-bit Adam, and what does not work: gradients under sign+ef
             that go into Adam's second moment ("naive"), and 1-bit Adam without its mask
    bytes    what rank 0's transport sent in a step, both ways and scales included: the warm-up's
             exact all-reduce over a step of compressed momentum, here and for one big parameter

    python -m bench.onebit                       every bar; exit code 1 where one fails
    python -m bench.onebit --seeds 3 --steps 300

All seeds of a row travel in one message, each a parameter (or six, by layer) with a name of its
own: blocks, moments and residuals are those of separate runs.
"""

from __future__ import annotations

import argparse
import logging
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
from bench.optimizers import Named, Steps, Trained, optimize
from bench.problems import Digits
from commlib import Communicator
from commlib.optim import OneBitAdam

RESULTS = Path(__file__).parent / "results" / "onebit.jsonl"
RATE = 2e-3
WARM = 5  # one in so many steps
PAPER = "sign:block=tensor+ef"  # one scale per chunk of a parameter
LAYERS = tuple(
    (f".{number}.{kind}", numel)
    for number, (fan_in, fan_out) in enumerate(Digits.layers)
    for kind, numel in (("weight", fan_in * fan_out), ("bias", fan_out))
)


class Naive:
    """torch's Adam on gradients that travel under the communicator's policy."""

    def __init__(self, named: Named, communicator: Communicator, lr: float) -> None:
        self.parameters = [parameter for _, parameter in named]
        self.keys = tuple(name for name, _ in named)
        self.sizes = tuple(parameter.numel() for parameter in self.parameters)
        self.communicator = communicator
        self.adam = torch.optim.Adam(self.parameters, lr)

    def step(self) -> None:
        flat = torch.cat(
            [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        )
        self.communicator.all_reduce_segments(flat, self.keys, self.sizes, factor="avg").wait()
        for parameter, gradient in zip(self.parameters, flat.split(self.sizes), strict=True):
            parameter.grad = gradient
        self.adam.step()


class Case(NamedTuple):
    """A row of `loss`: a bar on the ratio to Adam's, or "RuntimeError"."""

    name: str
    scheme: str
    make: Callable[[int], Callable[[Named, Communicator], Steps]]  # of the steps of warm-up
    published: float | None
    bar: str = ""
    parts: Sequence[tuple[str, int]] = ()


def naive(lr: float) -> Callable[[int], Callable[[Named, Communicator], Steps]]:
    return lambda warmup: lambda named, communicator: Naive(named, communicator, lr)


def onebit(
    threshold: float | None = 1e-4, eps: float = 1e-8
) -> Callable[[int], Callable[[Named, Communicator], Steps]]:
    return lambda warmup: (
        lambda named, communicator: OneBitAdam(
            named, communicator, RATE, eps=eps, warmup=warmup, threshold=threshold
        )
    )


CASES = (
    Case("Adam", "fp32", naive(RATE), 0.0162),
    Case("1-bit Adam", "sign+ef", onebit(), 0.0178, "<= 1.3"),
    Case("1-bit Adam, one scale", PAPER, onebit(), 0.0178, "<= 1.3"),
    Case("1-bit Adam, by layer", "sign+ef", onebit(), 0.0178, "<= 1.3", LAYERS),
    Case("1-bit Adam, no residual", "sign", onebit(), None),
    Case("2-bit Adam", "int2+ef", onebit(), None),
    Case("naive", PAPER, naive(RATE), 0.113, ">= 4"),
    Case("naive, lr 5e-4", PAPER, naive(5e-4), 0.58, ">= 4"),
    Case("naive, a scale a block", "sign+ef", naive(RATE), None),
    Case("naive, a scale a block, lr 5e-4", "sign+ef", naive(5e-4), None),
    Case("no mask, eps 1e-4", "sign+ef", onebit(None, 1e-4), 0.0203),
    Case("no mask, eps 1e-5", "sign+ef", onebit(None, 1e-5), math.inf, "RuntimeError"),
    Case("no mask, eps 1e-8", "sign+ef", onebit(None), math.inf, "RuntimeError"),
    Case("no mask, eps 1e-8", PAPER, onebit(None), math.inf, "RuntimeError"),
    Case("no mask, eps 1e-8", "fp32", onebit(None), None, "RuntimeError"),
)


def loss(seeds: Sequence[int], steps: int, cases: Sequence[Case] = CASES) -> Iterator[Row]:
    """Final training loss, the mean over seeds, as a ratio to Adam's; then what travelled."""
    problem, base, accounts = Digits(seeds), math.nan, []
    warmup = steps // WARM
    for case in cases:
        began = time.perf_counter()
        setting: dict[str, object] = {"seeds": len(seeds), "steps": steps, "warmup": warmup}
        value, note = math.nan, ""
        try:
            trained = optimize(problem, case.scheme, case.make(warmup), steps, parts=case.parts)
        except RuntimeError as error:
            if "OneBitAdam: step" not in str(error):
                raise
            note = str(error)
        else:
            losses = problem.losses(trained.weights)
            value, setting["losses"] = math.fsum(losses) / len(losses), losses
            if case.published == 0.0178:
                accounts.append((case, trained))
        base = value if case.name == "Adam" else base
        passed = None
        if case.bar:
            passed = bool(note) if case.bar == "RuntimeError" else holds(value / base, case.bar)
        yield Row(
            "loss",
            case.scheme,
            case.name,
            value,
            value / base,
            case.published,
            case.bar,
            passed,
            time.perf_counter() - began,
            note,
            setting,
        )
    for case, trained in accounts:
        yield from fewer(trained, warmup, steps, case)


def fewer(trained: Trained, warmup: int, steps: int, case: Case) -> Iterator[Row]:
    """Bytes of the compressed phase and of the whole run, over those of exact steps."""
    # the first step also compares the ranks' parameters
    exact = trained.per_step(1, warmup)
    ratios = {"phase 2": exact / trained.per_step(warmup), "all": exact / trained.per_step(0)}
    for what, ratio in ratios.items():
        whole = what == "all"
        bar = ">= 30" if case.scheme == PAPER and not whole else ""
        yield Row(
            "bytes",
            case.scheme,
            f"{what}, {case.name}",
            trained.per_step(0 if whole else warmup),
            ratio,
            4.4 if whole else 32,
            bar,
            holds(ratio, bar) if bar else None,
            setting={"exact": exact, "steps": steps, "warmup": warmup},
        )


class Big:
    """One parameter of a million values, gradients at random: for its bytes."""

    keys: tuple[str, ...] = ("big",)
    sizes: tuple[int, ...] = (1_000_000,)
    rate = 0.0

    def start(self) -> torch.Tensor:
        return torch.zeros(self.sizes[0])

    def batches(self, rank: int, steps: int) -> Iterator[torch.Generator]:
        generator = torch.Generator().manual_seed(rank)
        return iter([generator] * steps)

    def gradient(self, weights: torch.Tensor, batch: object) -> torch.Tensor:
        assert isinstance(batch, torch.Generator)
        return torch.randn(weights.shape, generator=batch)


def big(warmup: int = 3, steps: int = 6) -> Iterator[Row]:
    """The bytes of one big parameter: what blocks leave of the 32."""
    for scheme, bar in (("sign+ef", ">= 28.4"), (PAPER, ">= 31.9")):
        trained = optimize(Big(), scheme, onebit()(warmup), steps)
        # the mask's cut travels once, in the first step of phase 2
        ratio = trained.per_step(1, warmup) / trained.per_step(warmup + 1)
        yield Row(
            "bytes",
            scheme,
            "phase 2, one parameter of 1e6",
            trained.per_step(warmup + 1),
            ratio,
            32,
            bar,
            holds(ratio, bar),
            setting={"steps": steps, "warmup": warmup},
        )


def show(rows: Sequence[Row]) -> str:
    """The rows as tables, the published figures beside the measured ones."""
    texts = []
    for table, header in HEADERS.items():
        body = [
            [row.what, row.scheme, *figures(row), row.bar, verdict(row)]
            for row in rows
            if row.table == table
        ]
        if body:
            texts.append(tabulate(body, [*header, "bar", ""], disable_numparse=True))
    notes = [f"{row.what}, {row.scheme}: {row.note}" for row in rows if row.note]
    return "\n\n".join([*texts, *notes])


HEADERS = {
    "loss": ("", "scheme", "loss", "published", "/ Adam"),
    "bytes": ("", "scheme", "bytes a step", "published", "fewer"),
}


def figures(row: Row) -> tuple[str, str, str]:
    return figure(row.value), number(row.published), figure(row.ratio)


def figure(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS, help=f"append rows (to {RESULTS.name})"
    )
    args = parser.parse_args(argv)
    logging.getLogger("commlib").setLevel(logging.ERROR)  # each run says what its mask covers
    rows = []
    with tqdm(desc="runs", unit=" rows", disable=None) as progress:
        for part in (loss(range(args.seeds), args.steps), big()):
            for row in part:
                rows.append(row)
                progress.set_postfix_str(f"{row.table} {row.what}")
                progress.update()
    return conclude(rows, show(rows), args.json, "onebit", argv)


if __name__ == "__main__":
    sys.exit(main())
