"""What the demo shows in the end: a table, JSON rows, and the loss over wall-clock time."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ..benchmark.rows import origin
from .train import NO_COMMUNICATION, PLAIN, Config, Run


@dataclass(frozen=True)
class Row:
    """One method: medians over its steps; `speedup` and `wire_ratio` compare with plain DDP.

    `seconds_to_target` is training time (without evaluation) until the held-out loss first passed
    `target`, read between two evaluations by a straight line; None where it never did.
    """

    scheme: str
    ranks: int
    link: str
    parameters: int
    steps: int
    ms_p50: float
    ms_p20: float
    ms_p80: float
    bytes_per_step: float
    wire_ratio: float | None
    loss: float | None
    target: float
    seconds_to_target: float | None
    speedup: float
    of_bound: float
    op: str = "demo"
    curve: list[tuple[float, float]] = field(default_factory=list)  # (seconds, held-out loss)
    device: str = field(default_factory=lambda: origin().device)
    versions: dict[str, str] = field(default_factory=lambda: origin().versions)
    commit: str | None = field(default_factory=lambda: origin().commit)


def rows(
    runs: Sequence[Run], config: Config, ranks: int, parameters: int, target: float | None = None
) -> list[Row]:
    """Sum up the runs. `target` None: the highest final loss, so that every method reached it."""
    trained = [run for run in runs if run.method != NO_COMMUNICATION]
    if target is None:
        target = max(run.held_out[-1][1] for run in trained)
    median = {run.method: statistics.median(run.seconds) for run in runs}
    sent = {run.method: statistics.median(run.bytes) for run in runs}
    result = []
    for run in runs:
        learns = run in trained
        p20, p80 = quantiles(run.seconds)
        curve = curve_of(run) if learns else []
        result.append(
            Row(
                scheme=run.method,
                ranks=ranks,
                link=config.link,
                parameters=parameters,
                steps=len(run.seconds),
                ms_p50=1e3 * median[run.method],
                ms_p20=1e3 * p20,
                ms_p80=1e3 * p80,
                bytes_per_step=sent[run.method],
                wire_ratio=sent[PLAIN] / sent[run.method] if learns and sent[run.method] else None,
                loss=run.held_out[-1][1] if learns else None,
                target=target,
                seconds_to_target=_passes(curve, target),
                speedup=median[PLAIN] / median[run.method],
                of_bound=median[run.method] / median[NO_COMMUNICATION],
                curve=curve,
            )
        )
    return result


def table(rows: Sequence[Row]) -> str:
    """The rows for a terminal."""
    header = [
        "method", "step ms", "p20 - p80", "MB/step", "held-out loss",
        f"s to loss {rows[0].target:.3f}", "speed-up", "x bound",
    ]  # fmt: skip
    body = [
        [
            row.scheme,
            f"{row.ms_p50:.0f}",
            f"{row.ms_p20:.0f} - {row.ms_p80:.0f}",
            f"{row.bytes_per_step / 1e6:.2f}",
            "-" if row.loss is None else f"{row.loss:.4f}",
            "-" if row.seconds_to_target is None else f"{row.seconds_to_target:.1f}",
            f"{row.speedup:.2f}x",
            f"{row.of_bound:.2f}",
        ]
        for row in rows
    ]
    return tabulate(body, header, disable_numparse=True, stralign="right")


LEGEND = """\
step: median, slowest rank from a barrier; MB/step: 1e6 bytes a rank sent, read at its interface
(headers included); s to loss: training time until the held-out loss was that low; x bound: step
time over that of the step without communication, whose ranks train each their own weights."""


def write_json(path: Path, rows: Sequence[Any]) -> None:
    """Write one JSON object per row (a dataclass) to `path`, replacing it."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(asdict(row), allow_nan=False) + "\n")


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Held-out loss over wall-clock training time, one line per method, as an image."""
    title = f"{rows[0].parameters / 1e6:.1f}M-parameter GPT, {rows[0].ranks} ranks, {rows[0].link}"
    lines = {f"{row.scheme}: {row.ms_p50:.0f} ms a step": row.curve for row in rows if row.curve}
    draw(path, title, lines, rows[0].target)


def draw(
    path: Path,
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    target: float | None = None,
) -> None:
    """Loss over training time, an image: (seconds, held-out loss) by label, a line at `target`."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for label, curve in lines.items():
        seconds, losses = zip(*curve, strict=True)
        axes.plot(seconds, losses, marker="o", markersize=4, label=label)
    if target is not None:
        axes.axhline(target, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("training time, seconds")
    axes.set_ylabel("held-out loss, nats per byte")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def check_plot(file: str) -> None:
    """Raise RuntimeError, before anything ran, where this image cannot be drawn."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise RuntimeError(
            "the plot needs matplotlib: `pip install '.[plot]'` in a checkout, or pass --plot none"
        ) from None
    kinds = FigureCanvasBase.get_supported_filetypes()
    if (kind := Path(file).suffix[1:].lower()) and kind not in kinds:
        raise RuntimeError(f"--plot {file}: no image is a .{kind}; allowed: {', '.join(kinds)}")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def quantiles(seconds: Sequence[float]) -> tuple[float, float]:
    """p20 and p80."""
    if len(seconds) < 2:
        return seconds[0], seconds[0]
    cuts = statistics.quantiles(seconds, n=5, method="inclusive")
    return cuts[0], cuts[-1]


def curve_of(run: Run) -> list[tuple[float, float]]:
    """(training seconds so far, held-out loss) at every evaluation."""
    clock = [0.0, *accumulate(run.seconds)]
    return [(clock[steps], loss) for steps, loss in run.held_out]


def _passes(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """When a straight line through the points first falls to `target`."""
    if curve and curve[0][1] <= target:
        return curve[0][0]
    for (start, above), (end, loss) in pairwise(curve):
        if loss <= target < above:
            return start + (end - start) * (above - target) / (above - loss)
    return None
