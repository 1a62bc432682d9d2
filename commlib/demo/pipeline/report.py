"""What the pipeline demo shows in the end: a table, the bars it must pass, JSON rows, an image."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tabulate import tabulate

from ...benchmark.rows import origin
from ..report import curve_of, draw, quantiles
from .train import ALONE, UNCOMPRESSED, Config, Method, Run

STEP_BARS = {"int4/int8": 3.0, "int4/int4+lep": 5.0}  # times shorter than uncompressed
LOSS_BAR = 0.02  # above the uncompressed run's loss after as many steps


@dataclass(frozen=True)
class Row:
    """One method: medians over its steps; `speedup` and `wire_ratio` compare with uncompressed.

    Bytes are of a step: of all stages, and in one direction at one end of the pipeline (None where
    stages share an interface, which others may use too). `run_speedup` compares the sums of all
    steps: with a memory, a sample's first visit or a fresh batch travels raw, which medians do not
    show.
    """

    method: str
    forward: str | None
    backward: str | None
    stages: int
    microbatches: int
    schedule: str
    link: str
    bits_per_second: int | None
    parameters: int
    steps: int
    ms_p50: float
    ms_p20: float
    ms_p80: float
    speedup: float
    run_speedup: float
    of_bound: float
    bytes_per_step: float | None
    forward_bytes: float | None
    backward_bytes: float | None
    wire_ratio: float | None
    loss: float | None
    loss_over_plain: float | None
    memory_bytes: float
    op: str = "demo pipeline"
    curve: list[tuple[float, float]] = field(default_factory=list)  # (seconds, held-out loss)
    device: str = field(default_factory=lambda: origin().device)
    versions: dict[str, str] = field(default_factory=lambda: origin().versions)
    commit: str | None = field(default_factory=lambda: origin().commit)


@dataclass(frozen=True)
class Bar:
    """Something the demo promises, and what it found."""

    what: str
    wanted: str
    found: str
    met: bool


def rows(
    runs: Sequence[Run],
    config: Config,
    stages: int,
    parameters: int,
    *,
    bits: int | None = None,
    apart: bool = True,
) -> list[Row]:
    """Sum up the runs; bits: line rate; apart: whether every stage has an interface of its own."""
    plain, bound = (next(r for r in runs if r.method == name) for name in (UNCOMPRESSED, ALONE))
    plain_step, plain_bytes = statistics.median(plain.seconds), statistics.median(plain.bytes)
    plain_loss = plain.held_out[-1][1]
    result = []
    for run in runs:
        method = Method.parse(run.method)
        step, sent = statistics.median(run.seconds), statistics.median(run.bytes)
        p20, p80 = quantiles(run.seconds)
        loss = run.held_out[-1][1] if run is not bound else None
        result.append(
            Row(
                method=run.method,
                forward=None if method.forward is None else str(method.forward),
                backward=None if method.backward is None else str(method.backward),
                stages=stages,
                microbatches=config.microbatches,
                schedule=config.schedule,
                link=config.link,
                bits_per_second=bits,
                parameters=parameters,
                steps=len(run.seconds),
                ms_p50=1e3 * step,
                ms_p20=1e3 * p20,
                ms_p80=1e3 * p80,
                speedup=plain_step / step,
                run_speedup=sum(plain.seconds) / sum(run.seconds),
                of_bound=step / statistics.median(bound.seconds),
                bytes_per_step=sent if apart else None,
                forward_bytes=statistics.median(run.forward) if apart else None,
                backward_bytes=statistics.median(run.backward) if apart else None,
                wire_ratio=plain_bytes / sent if apart and loss is not None else None,
                loss=loss,
                loss_over_plain=None if loss is None else loss / plain_loss - 1,
                memory_bytes=run.memory,
                curve=[] if loss is None else curve_of(run),
            )
        )
    return result


def table(rows: Sequence[Row]) -> str:
    """The rows for a terminal."""
    header = [
        "method", "step ms", "p80", "speed-up", "all steps", "x bound", "forward kB",
        "backward kB", "ratio", "held-out loss", "to plain", "memory MB",
    ]  # fmt: skip
    body = [
        [
            row.method,
            f"{row.ms_p50:.0f}",
            f"{row.ms_p80:.0f}",
            f"{row.speedup:.2f}x",
            f"{row.run_speedup:.2f}x",
            f"{row.of_bound:.2f}",
            _cell(row.forward_bytes, "{:.1f}", 1e-3),
            _cell(row.backward_bytes, "{:.1f}", 1e-3),
            _cell(row.wire_ratio, "{:.2f}"),
            _cell(row.loss, "{:.4f}"),
            _cell(row.loss_over_plain, "{:+.2f}%", 100),
            f"{row.memory_bytes / 1e6:.2f}",
        ]
        for row in rows
    ]
    return tabulate(body, header, disable_numparse=True, stralign="right")


LEGEND = """\
step: median, slowest stage from a barrier; all steps: speed-up of the whole run, in which first
visits (+delta: the first {round} steps) and fresh batches (+reuse: one step in {round}) travel raw;
x bound: step over that of compute only, whose messages are one element; kB: 1e3 bytes a step at the
interface of the first stage (forward) and of the last (backward), headers and acknowledgements
included; ratio: of the bytes of all stages; loss: nats per byte, exact activations, after as many
steps; memory: references and residuals of all stages. +reuse takes {round} steps on a batch before
the next: other data, so its loss is not comparable."""


def bars(rows: Sequence[Row]) -> list[Bar]:
    """What must hold of these rows."""
    return [*_step_bars(rows), *_loss_bars(rows)]


def _step_bars(rows: Sequence[Row]) -> Iterator[Bar]:
    for row in rows:
        if row.method in STEP_BARS and row.bits_per_second is not None:
            wanted = STEP_BARS[row.method]
            yield Bar(
                f"{row.method}: step shorter than uncompressed",
                f"at least {wanted:g}x",
                f"{row.speedup:.2f}x",
                row.speedup >= wanted,
            )


def _loss_bars(rows: Sequence[Row]) -> Iterator[Bar]:
    for row in rows:
        other = row.method == UNCOMPRESSED or Method.parse(row.method).lazy
        if row.loss_over_plain is not None and not other:
            yield Bar(
                f"{row.method}: loss after {row.steps} steps, to uncompressed",
                f"at most +{LOSS_BAR:.0%}",
                f"{row.loss_over_plain:+.2%}",
                row.loss_over_plain <= LOSS_BAR,
            )


def bar_table(bars: Sequence[Bar]) -> str:
    """The bars for a terminal."""
    body = [[bar.what, bar.wanted, bar.found, "met" if bar.met else "MISSED"] for bar in bars]
    return tabulate(body, ["bar", "wanted", "found", ""], disable_numparse=True)


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Held-out loss over wall-clock training time, one line per method, as an image."""
    title = (
        f"{rows[0].parameters / 1e6:.1f}M-parameter GPT, {rows[0].stages} stages, {rows[0].link}"
    )
    lines = {f"{row.method}: {row.ms_p50:.0f} ms a step": row.curve for row in rows if row.curve}
    draw(path, title, lines)


def _cell(value: float | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else form.format(factor * value)
