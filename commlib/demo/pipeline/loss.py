"""`commlib demo --pipeline --loss`: what methods cost in loss, at equal steps and paired seeds.

All stages on loopback: nothing here is about time. A model that was trained uncompressed on other
text is fine-tuned some epochs over a fixed set of sequences, so that every sample comes back and
`+delta` has something to remember; the same methods without a memory are the control. Both losses
at the end are of exact activations.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor

from ...benchmark.rows import origin
from ..data import Corpus, Pair, load
from ..progress import bar
from .report import Bar, bar_table
from .train import UNCOMPRESSED, Config, Feed, Method, Run, Trainee

METHODS = ("int4/int4", "int2/int4", "int4+delta/int4", "int2+delta/int4")
DELTA_BAR = 0.01  # above the uncompressed run's training loss
HELD_OUT_WINDOWS = 64
FINE_TUNING = 1 / 3  # of the learning rate
_PRETRAINING_SEED = 1000  # of its text and their order


@dataclass(frozen=True)
class Row:
    """Mean losses (nats per byte) of one run after its last epoch."""

    method: str
    seed: int
    epochs: int
    sequences: int
    batch: int
    width: int
    context: int
    pretrained: int  # steps before
    loss: float  # on the sequences it trained on
    held_out: float
    memory_bytes: float
    op: str = "demo pipeline loss"
    epoch_losses: list[float] = field(default_factory=list)  # as trained on, mean of an epoch
    device: str = field(default_factory=lambda: origin().device)
    versions: dict[str, str] = field(default_factory=lambda: origin().versions)
    commit: str | None = field(default_factory=lambda: origin().commit)


def measure(
    config: Config, *, seeds: int, epochs: int, pretrain: int, path: Path | None
) -> list[Row]:
    """Train every method with every seed; print the table and write rows. All ranks.

    pretrain: steps of the uncompressed model before; 0: from scratch at the full learning rate.
    """
    torch.set_num_threads(1)
    first = dist.get_rank() == 0
    steps = epochs * config.sequences // config.batch
    corpus = load()
    held_out = corpus.evaluation(HELD_OUT_WINDOWS, config.shape.context)
    rows: list[Row] = []
    if path and first:
        path.write_text("", encoding="utf-8")
    with bar(pretrain + seeds * len(config.methods) * steps, shown=first) as progress:
        weights = _pretrained(config, corpus, pretrain, progress)
        for seed in range(seeds):
            run_config = replace(config, seed=seed, lr=FINE_TUNING if pretrain else 1.0)
            feed = Feed(corpus, run_config)
            for text in config.methods:
                trainee = Trainee(Method.parse(text), run_config, feed)
                if weights is not None:
                    trainee.module.load_state_dict(weights)
                trainee.rehearse()
                for step in range(steps):
                    trainee.step(step)
                    progress(trainee.run)
                rows.append(_row(trainee, epochs, pretrain, feed, held_out))
                if path and first:
                    with path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(rows[-1]), allow_nan=False) + "\n")
    if first:
        batch = f"batches of {config.batch} x {config.shape.context} bytes, {seeds} seeds"
        before = f"after {pretrain} steps on other text: " if pretrain else "from scratch: "
        print(
            f"\n{before}{epochs} epochs over {config.sequences} sequences, {batch}\n\n"
            f"{table(rows)}\n\n{LEGEND}\n\n{bar_table(bars(rows))}"
        )
    return rows


def _pretrained(
    config: Config, corpus: Corpus, steps: int, progress: Callable[[Run], None]
) -> dict[str, Tensor] | None:
    """This stage's weights after uncompressed steps on text that is not repeated."""
    if not steps:
        return None
    other = replace(config, seed=_PRETRAINING_SEED, sequences=steps * config.batch)
    trainee = Trainee(Method.parse(UNCOMPRESSED), other, Feed(corpus, other))
    for step in range(steps):
        trainee.step(step)
        progress(trainee.run)
    return trainee.module.state_dict()


def _row(trainee: Trainee, epochs: int, pretrain: int, feed: Feed, held_out: Pair) -> Row:
    config, losses = trainee.config, trainee.run.losses
    length = len(losses) // epochs
    parts = [losses[start : start + length] for start in range(0, len(losses), length)]
    trainee.remember()
    return Row(
        method=trainee.method.name,
        seed=config.seed,
        epochs=epochs,
        sequences=config.sequences,
        batch=config.batch,
        width=config.shape.width,
        context=config.shape.context,
        pretrained=pretrain,
        loss=trainee.loss((feed.x, feed.y)),
        held_out=trainee.loss(held_out),
        memory_bytes=trainee.run.memory,
        epoch_losses=[statistics.fmean(part) for part in parts],
    )


def table(rows: Sequence[Row]) -> str:
    """One line per method: mean losses, and what they are beside the same seed's uncompressed."""
    header = [
        "method", "training loss", "to plain", "[seeds]", "held-out", "to plain", "[seeds]",
        "memory MB",
    ]  # fmt: skip
    body = []
    for method in dict.fromkeys(row.method for row in rows):
        mine = [row for row in rows if row.method == method]
        line = [method]
        for name in ("loss", "held_out"):
            line.append(f"{statistics.fmean(getattr(row, name) for row in mine):.4f}")
            over = overs(rows, method, name)
            plain = method == UNCOMPRESSED
            line.append("" if plain else f"{100 * statistics.fmean(over):+.2f}%")
            line.append("" if plain else f"{100 * min(over):+.2f} to {100 * max(over):+.2f}")
        line.append(f"{max(row.memory_bytes for row in mine) / 1e6:.1f}")
        body.append(line)
    return tabulate(body, header, disable_numparse=True, stralign="right")


LEGEND = """\
nats per byte after the last epoch, exact activations; to plain: over the uncompressed run of the
same seed, mean and range of the seeds; memory: references and residuals of all stages."""


def overs(rows: Sequence[Row], method: str, name: str) -> list[float]:
    """What a loss is above the uncompressed one of the same seed, as a fraction."""
    plain = {row.seed: getattr(row, name) for row in rows if row.method == UNCOMPRESSED}
    return [getattr(r, name) / plain[r.seed] - 1 for r in rows if r.method == method]


def bars(rows: Sequence[Row]) -> list[Bar]:
    """What must hold of these rows: methods with a reference per sample."""
    found = []
    for method in dict.fromkeys(row.method for row in rows if Method.parse(row.method).by_sample):
        over = statistics.fmean(overs(rows, method, "loss"))
        found.append(
            Bar(
                f"{method}: training loss, to uncompressed",
                f"at most +{DELTA_BAR:.0%}",
                f"{over:+.2%}",
                over <= DELTA_BAR,
            )
        )
    return found
