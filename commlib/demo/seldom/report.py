"""What `commlib demo --method` shows: a table, JSON rows, loss over time and over bytes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tabulate import tabulate

from ...benchmark.rows import origin
from ..report import _pyplot
from ..train import PLAIN
from .train import CODED

Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Row:
    """One method behind one line.

    steps: to plain DDP's held-out loss after `target` steps, None where --steps were not enough.
    seconds: steps times the seconds of a step. to_plain, to_coded: how many times shorter that is.
    """

    method: str
    rate: str
    model: str
    ranks: int
    period: int
    target: int
    goal: float
    steps: int | None
    ms_per_step: float
    bytes_per_step: float
    seconds: float | None
    to_plain: float | None
    to_coded: float | None
    curve: Curve = field(default_factory=list)
    op: str = "demo method"
    device: str = field(default_factory=lambda: origin().device)
    versions: dict[str, str] = field(default_factory=lambda: origin().versions)
    commit: str | None = field(default_factory=lambda: origin().commit)


def rows(
    learned: Mapping[str, Sequence[Sequence[float]]],
    clocks: Mapping[str, Mapping[str, Sequence[float]]],
    args: argparse.Namespace,
) -> list[Row]:
    """Loss by step and seconds of a step, brought together."""
    curves = {m: [(int(step), loss) for step, loss in points] for m, points in learned.items()}
    goal = curves[PLAIN][-1][1]
    found = []
    for line, times in clocks.items():
        steps = {
            method: next((step for step, loss in curve if loss <= goal), None)
            for method, curve in curves.items()
        }
        seconds = {m: None if n is None else n * times[m][0] for m, n in steps.items()}
        for method, curve in curves.items():
            mine = seconds[method]
            plain, coded = (
                other / mine if other is not None and mine else None
                for other in (seconds[PLAIN], seconds[CODED])
            )
            found.append(
                Row(
                    method=method,
                    rate=line,
                    model=args.model,
                    ranks=args.ranks,
                    period=args.period,
                    target=args.target,
                    goal=goal,
                    steps=steps[method],
                    ms_per_step=1e3 * times[method][0],
                    bytes_per_step=times[method][1],
                    seconds=mine,
                    to_plain=plain,
                    to_coded=coded,
                    curve=curve,
                )
            )
    return found


def table(found: Sequence[Row]) -> str:
    """The rows for a terminal."""
    header = ["line", "method", "steps", "ms/step", "MB/step", "seconds", "plain's / it",
              f"{CODED}'s / it"]  # fmt: skip
    body = [
        [
            row.rate,
            row.method,
            "-" if row.steps is None else row.steps,
            f"{row.ms_per_step:.0f}",
            f"{row.bytes_per_step / 1e6:.3f}",
            "-" if row.seconds is None else f"{row.seconds:.1f}",
            "-" if row.to_plain is None else f"{row.to_plain:.2f}x",
            "-" if row.to_coded is None else f"{row.to_coded:.2f}x",
        ]
        for row in found
    ]
    align = ("left", "left", *["right"] * 6)
    return tabulate(body, header, disable_numparse=True, colalign=align)


LEGEND = """\
steps: until the held-out loss was plain DDP's, counted without a line; ms/step, MB/step: on the
line, means over a whole period, slowest rank and busiest interface (1e6 bytes, headers included);
seconds: their product. Methods that exchange less often are measured at their exchanges only."""


def write_rows(path: Path, found: Sequence[Row]) -> None:
    """Write one JSON object per row to `path`, replacing it."""
    with path.open("w", encoding="utf-8") as file:
        for row in found:
            file.write(json.dumps(asdict(row), allow_nan=False) + "\n")


def plot(path: Path, found: Sequence[Row]) -> None:
    """Held-out loss over time and over bytes: a pair of pictures for each line."""
    pyplot = _pyplot()
    lines = list(dict.fromkeys(row.rate for row in found))
    figure, axes = pyplot.subplots(
        len(lines), 2, figsize=(10, 3.6 * len(lines)), layout="constrained", squeeze=False
    )
    for (left, right), line in zip(axes, lines, strict=True):
        for row in (row for row in found if row.rate == line):
            losses = [loss for _, loss in row.curve]
            for axis, unit in ((left, row.ms_per_step / 1e3), (right, row.bytes_per_step / 1e6)):
                axis.plot([step * unit for step, _ in row.curve], losses, marker="o",
                          markersize=3, label=row.method)  # fmt: skip
        for axis, label in ((left, "training time, seconds"), (right, "MB sent by a rank")):
            axis.axhline(found[0].goal, color="grey", linewidth=0.8, linestyle=":")
            axis.set_xscale("log")
            axis.set_xlabel(label)
            axis.set_ylabel("held-out loss, nats per byte")
            axis.set_title(f"{found[0].model} GPT, {found[0].ranks} ranks, {line}")
            axis.grid(alpha=0.3)
        left.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
