"""Does a model train through compressed pipeline boundaries? Through the shipped classes alone.

An MLP 64-64-64-10 on scikit-learn's digits (`bench/problems.py`), cut after each hidden layer into
three stages. Every tensor between two stages goes through a `commlib.boundary.Boundary` at each
end; the wires are handed over in one process. Batch 32, plain SGD at 0.1, 30 epochs of 43 steps.

    boundaries   DirectQ (no memory), AQ-SGD (+delta, forward; backward without memory), Clapping
                 (+reuse both ways, lazy sampling) at 8/8, 4/8, 3/6, 2/4 bits forward/backward
    lep          the backward way alone, with and without +lep
    stores       what both ends hold: the same bytes after 1000 messages, evictions, a restart

    python -m bench.pipelines                     every bar; exit code 1 where one fails
    python -m bench.pipelines --table boundaries --seeds 1 --epochs 10

Block 64 is a row, so each sample has one scale per boundary. The loss is that of the whole training
set through the uncompressed model. All seeds travel in one message: rows, blocks, sample ids and
residuals are those of separate runs.
"""

from __future__ import annotations

import argparse
import io
import math
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from tabulate import tabulate
from tqdm import tqdm

from bench.feedback import Row, holds, number, verdict, write
from bench.problems import Digits
from commlib import LazySampler, Scheme
from commlib.boundary import Boundary
from commlib.modes import Delta
from commlib.policy import Role

RESULTS = Path(__file__).parent / "results" / "pipelines.jsonl"
BLOCK = 64
BATCH = 32
RATE = 0.1
WIDTH = 64


class Column(NamedTuple):
    """One method: texts with {} for the bits."""

    name: str
    forward: str
    backward: str
    lazy: bool = False


def column(name: str, rounding: str, forward: str = "", backward: str = "") -> Column:
    codec = f"int{{}}:block={BLOCK}:round={rounding}"
    return Column(name, codec + forward, codec + backward, lazy="+reuse" in forward)


CODED = "+reuse:first=coded"
COLUMNS = (
    column("DirectQ stochastic", "stochastic"),
    column("DirectQ nearest", "nearest"),
    column("AQ-SGD stochastic", "stochastic", "+delta"),
    column("AQ-SGD nearest", "nearest", "+delta"),
    column("Clapping-FU", "nearest", "+reuse", "+reuse"),
    column("Clapping-FC", "nearest", CODED, CODED),
)
BITS = ((8, 8), (4, 8), (3, 6), (2, 4))
PUBLISHED = {
    (8, 8): (0.0223, 0.0220, 0.0221, 0.0219, 0.0383, None),
    (4, 8): (0.0264, 0.0248, 0.0223, 0.0220, 0.0389, None),
    (3, 6): (0.0470, 0.0369, 0.0225, 0.0221, 0.0389, None),
    (2, 4): (0.5305, 0.2727, 0.0453, 0.0242, 0.0421, 0.53),
}
CONTROLS = {"fp32": 0.0220, "fp32, lazy sampling": 0.0366}
BARS = {
    ("AQ-SGD nearest", (2, 4)): "<= 1.25",
    ("DirectQ nearest", (2, 4)): ">= 5",
    ("AQ-SGD nearest", (3, 6)): "<= 1.1",
    ("Clapping-FU", (2, 4)): "<= 1.25",
}
LEP = (("sign:block=64", 0.0907, 0.0504), ("int2:block=64:round=nearest", 0.0429, 0.0287))


class Way:
    """One direction between two stages: a boundary at each end, and the bytes between them."""

    def __init__(self, key: str, scheme: Scheme, shape: tuple[int, ...]) -> None:
        self.sender = Boundary(key, scheme, shape, torch.float32)
        self.receiver = Boundary(key, scheme, shape, torch.float32)
        self.sent = self.raw = 0

    @property
    def ends(self) -> tuple[Boundary, Boundary]:
        return self.sender, self.receiver

    def begin(self, ids: Sequence[int], fresh: bool) -> None:
        for end in self.ends:
            memory = end.scheme.feedback
            end.begin([ids] if isinstance(memory, Delta) else None, fresh)

    def send(self, x: torch.Tensor) -> torch.Tensor:
        """What arrives of `x`."""
        wire = torch.empty(self.sender.nbytes(), dtype=torch.uint8)
        self.sender.encode(x, wire)
        out = torch.empty_like(x)
        self.receiver.decode(wire, out)
        self.sent, self.raw = self.sent + wire.nbytes, self.raw + x.nbytes
        return out

    def check(self) -> None:
        """RuntimeError where the ends hold different bytes."""
        told, held = (
            [end.history() for end in self.ends],
            [end.checksum() for end in self.ends],
        )
        if len(set(told)) > 1 or len(set(held)) > 1:
            raise RuntimeError(f"{self.sender.key}: the ends differ: {told}, {held}")


class Run(NamedTuple):
    """One training run."""

    loss: float
    losses: list[float]
    bytes: tuple[float, float, float]  # fp32's / sent: forward, backward, both
    seconds: float


@contextmanager
def one_thread() -> Iterator[None]:
    """The tensors are small: a second thread would cost more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def train(
    problem: Digits, forward: str, backward: str, epochs: int, fresh_prob: float = 1.0
) -> Run:
    """Train the three stages with these schemes between them."""
    began = time.perf_counter()
    seeds, count = len(problem.seeds), len(problem.labels)
    there, back = (
        [
            Way(f"{key}{cut}", Scheme.parse(text).resolve(role), (seeds * BATCH, WIDTH))
            for cut in range(2)
        ]
        for key, text, role in (
            ("activation", forward, Role.ACTIVATION),
            ("gradient", backward, Role.ACTIVATION_GRADIENT),
        )
    )
    weights = problem.start()
    gradient = torch.empty_like(weights)
    orders = torch.stack(  # every seed sees the samples in an order of its own
        [torch.randperm(count, generator=torch.Generator().manual_seed(s)) for s in problem.seeds]
    )
    own = count * torch.arange(seeds)[:, None]
    sampler = LazySampler(count, BATCH, fresh_prob)
    for _ in range(epochs):
        for indices, fresh in sampler:
            batch = orders[:, indices]
            ids = (batch + own).flatten().tolist()
            for way in (*there, *back):
                way.begin(ids, fresh)
            step(problem, weights, gradient, batch, there, back)
            weights.sub_(gradient, alpha=RATE)
    for way in (*there, *back):
        way.check()
    losses = problem.losses(weights)
    forward_bytes, backward_bytes, all_bytes = (
        sum(way.raw for way in ways) / sum(way.sent for way in ways)
        for ways in (there, back, [*there, *back])
    )
    return Run(
        math.fsum(losses) / seeds,
        losses,
        (forward_bytes, backward_bytes, all_bytes),
        time.perf_counter() - began,
    )


def step(
    problem: Digits,
    weights: torch.Tensor,
    gradient: torch.Tensor,
    batch: torch.Tensor,
    there: Sequence[Way],
    back: Sequence[Way],
) -> None:
    """`gradient` becomes that of the batch, as the three stages compute it."""
    layers = list(zip(problem.views(weights), problem.views(gradient), strict=True))
    inputs, made = [problem.images[batch]], []
    for layer, ((matrix, bias), _) in enumerate(layers):
        x = torch.baddbmm(bias, inputs[layer], matrix)
        if layer == len(there):
            break
        made.append(x.relu())
        inputs.append(there[layer].send(made[layer].flatten(0, 1)).view_as(x))
    delta = x.softmax(2)
    delta.scatter_add_(2, problem.labels[batch][..., None], torch.full((*batch.shape, 1), -1.0))
    delta /= batch.shape[1]
    for layer, ((matrix, _), (d_matrix, d_bias)) in reversed(list(enumerate(layers))):
        d_matrix.copy_(inputs[layer].mT @ delta)
        d_bias.copy_(delta.sum(1, keepdim=True))
        if layer:
            wanted = delta @ matrix.mT
            arrived = back[layer - 1].send(wanted.flatten(0, 1)).view_as(wanted)
            delta = arrived * (made[layer - 1] > 0)


def row(
    table: str,
    scheme: str,
    what: str,
    run: Run,
    control: float,
    published: float | None,
    setting: dict[str, object],
    bar: str = "",
) -> Row:
    """A run's row; the ratio and its bar are to `control`."""
    return Row(
        table,
        scheme,
        what,
        run.loss,
        run.loss / control,
        published,
        bar,
        holds(run.loss / control, bar) if bar else None,
        run.seconds,
        setting={
            **setting,
            "losses": run.losses,
            **dict(zip(("forward", "backward", "both"), run.bytes, strict=True)),
        },
    )


def boundaries(
    seeds: Sequence[int],
    epochs: int,
    bits: Sequence[tuple[int, int]] = BITS,
    columns: Sequence[Column] = COLUMNS,
    bars: bool = True,
) -> Iterator[Row]:
    """The table: loss of each method at each width, beside that of fp32 with the same sampling."""
    problem = Digits(seeds)
    setting: dict[str, object] = {"seeds": len(seeds), "epochs": epochs}
    controls: dict[bool, float] = {}
    for lazy, (name, published) in enumerate(CONTROLS.items()):
        run = train(problem, "fp32", "fp32", epochs, 0.5 if lazy else 1.0)
        controls[bool(lazy)] = run.loss
        yield row("boundaries", "fp32", name, run, controls[False], published, setting)
    for place, method in enumerate(columns):
        for widths in bits:
            forward, backward = method.forward.format(widths[0]), method.backward.format(widths[1])
            run = train(problem, forward, backward, epochs, 0.5 if method.lazy else 1.0)
            figures = PUBLISHED.get(widths, (None,) * len(COLUMNS))
            yield row(
                "boundaries",
                f"{forward} | {backward}",
                f"{method.name} {widths[0]}/{widths[1]}",
                run,
                controls[method.lazy],
                figures[place] if columns is COLUMNS else None,
                setting,
                BARS.get((method.name, widths), "") if bars else "",
            )


def lep(seeds: Sequence[int], epochs: int, bars: bool = True) -> Iterator[Row]:
    """Backward alone: what the residual of the micro-batch before is worth."""
    problem = Digits(seeds)
    setting: dict[str, object] = {"seeds": len(seeds), "epochs": epochs}
    for codec, without, published in LEP:
        plain = train(problem, "fp32", codec, epochs)
        yield row("lep", codec, "backward", plain, plain.loss, without, setting)
        kept = train(problem, "fp32", f"{codec}+lep", epochs)
        bar = f"<= {1 / 1.3:.3f}" if bars else ""
        yield row("lep", f"{codec}+lep", "backward", kept, plain.loss, published, setting, bar)


def stores(messages: int = 1000) -> Iterator[Row]:
    """Both ends hold the same bytes, wherever they keep them, over evictions and a restart."""
    common: list[int] = []
    for store in ("device", "host", "disk"):
        began = time.perf_counter()
        cap = 40 * 4 * WIDTH  # 40 of the 60 samples
        scheme = Scheme.parse(f"int2:block={BLOCK}:round=nearest+delta:store={store}:cap={cap}")
        broken, whole = (Way("x", scheme, (8, WIDTH)) for _ in range(2))
        random = torch.Generator().manual_seed(0)
        sizes, same = [], True
        for message in range(messages):
            if message == messages // 2:
                broken = restarted(broken, scheme)
            ids = torch.randperm(60, generator=random)[:8].tolist()
            x = torch.randn(8, WIDTH, generator=random)
            for way in (broken, whole):
                way.begin(ids, False)
            sizes.append(whole.sender.nbytes())
            same &= broken.send(x).equal(whole.send(x))
        told = [end.checksum() for way in (broken, whole) for end in way.ends]
        common = common or told
        returned = sum(size > min(sizes) for size in sizes)
        yield Row(
            "stores",
            str(scheme),
            f"{messages} messages, {returned} with first visits, a restart",
            math.nan,
            bar="one checksum",
            passed=same and len({*told, *common}) == 1 and returned > messages // 4,
            seconds=time.perf_counter() - began,
            note=f"{told[0]:08x}",
        )


def restarted(way: Way, scheme: Scheme) -> Way:
    """New ends that go on from what the old ones saved."""
    new = Way(way.sender.key, scheme, way.sender.shape)
    for old_end, new_end in zip(way.ends, new.ends, strict=True):
        file = io.BytesIO()
        torch.save(old_end.state_dict(), file)
        file.seek(0)
        new_end.load_state_dict(torch.load(file, weights_only=True))
    return new


def buffers(samples: Sequence[int] = (64, 1024)) -> Iterator[Row]:
    """The memory of one end, after so many samples: +reuse holds a batch, +delta all of them."""
    for text, bar in (("int2:block=64+reuse", "independent"), ("int2:block=64+delta", "")):
        held = []
        for count in samples:
            way = Way("x", Scheme.parse(text).resolve(Role.ACTIVATION), (BATCH, WIDTH))
            for first in range(0, count, BATCH):
                for fresh in (True, False):
                    way.begin(range(first, first + BATCH), fresh)
                    way.send(torch.ones(BATCH, WIDTH))
            held.append(way.receiver.memory_bytes())
        one = held[0] == held[-1] == 4 * BATCH * WIDTH
        what = f"{samples[0]} samples, {samples[-1]} samples"
        note = f"{held[0]} bytes, {held[-1]} bytes"
        yield Row("buffers", text, what, math.nan, bar=bar, passed=one if bar else None, note=note)


def show(rows: Sequence[Row]) -> str:
    """The rows as tables, the published figures beside the measured ones."""
    texts = []
    for name in ("boundaries", "lep", "stores", "buffers"):
        body = [
            [r.what if name == "boundaries" else r.scheme, *cells(r), r.bar, verdict(r)]
            for r in rows
            if r.table == name
        ]
        if body:
            header = ["", *HEADERS[name], "bar", ""]
            texts.append(f"{name}\n" + tabulate(body, header, disable_numparse=True))
    return "\n\n".join(texts)


HEADERS = {
    "boundaries": ("loss", "published", "/ fp32 *", "forward", "backward", "fewer bytes"),
    "lep": ("loss", "published", "/ without", "forward", "backward", "fewer bytes"),
    "stores": ("", "held"),
    "buffers": ("after", "held"),
}


def cells(row: Row) -> list[str]:
    if row.table in ("stores", "buffers"):
        return [row.what, row.note]
    figures = [number(row.value), number(row.published), number(row.ratio)]
    return [*figures, *(f"{row.setting[way]:.1f}x" for way in ("forward", "backward", "both"))]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", choices=("all", "boundaries", "lep", "stores"), default="all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS, help=f"append rows (to {RESULTS.name})"
    )
    args = parser.parse_args(argv)
    parts: list[Iterator[Row]] = []
    if args.table in ("all", "stores"):
        parts += [stores(), buffers()]
    if args.table in ("all", "lep"):
        parts.append(lep(range(args.seeds), args.epochs))
    if args.table in ("all", "boundaries"):
        parts.append(boundaries(range(args.seeds), args.epochs))
    rows = []
    with tqdm(desc="runs", unit=" rows", disable=None) as progress:
        for part in parts:
            for each in part:
                rows.append(each)
                progress.set_postfix_str(f"{each.table} {each.what}")
                progress.update()
    print(show(rows))
    print("* with lazy sampling for Clapping: see its row above")
    failed = [each for each in rows if each.passed is False]
    judged = sum(each.passed is not None for each in rows)
    print(f"{judged - len(failed)} of {judged} bars hold")
    if args.json:
        command = shlex.join(["python", "-m", "bench.pipelines", *(argv or sys.argv[1:])])
        write(args.json, rows, command, "pipelines")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
