"""FSDP2 and HSDP on slow lines: a GPT sharded over 4 emulated hosts, or over 2 nodes of 2 ranks.

    python -m bench.fsdp --json bench/results/fsdp.jsonl        both layouts; about half an hour
    python -m bench.fsdp --layout hsdp --methods int4+ef --steps 10

A method is GRADIENTS[/PARAMETERS], the schemes of commlib.wrap. All of them train side by side in
the same processes and take turns; all prefetch alike (two blocks ahead, both ways). "compute only"
is the same model and schedule whose collectives copy what is there: it sends nothing. The line rate
is the one at which an uncompressed step takes TARGET times one of those.

Bytes are those that left a host's interface, headers included, per rank; the bound is the time that
they take on the line at its rate, and `of bound` the share of a step that it is. Reduced bytes are
the payloads of the reduce-scatter (of HSDP: of the all-reduce between nodes) alone; they stand
beside (W-1)/W of the gradients in fp32, the least that a reduce-scatter of these sends (gloo's own
sends twice as much).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)

import commlib
from commlib import emulation
from commlib.benchmark.rows import origin
from commlib.demo.data import Corpus, load
from commlib.demo.model import GPT, SHAPES, optimizer, warm_up
from commlib.demo.pipeline.line import Line, calibrate, dial, rate_text, turn
from commlib.demo.report import write_json
from commlib.demo.train import gather, sharers
from commlib.emulation import sent_bytes

RANKS = 4
TARGET = 13.0  # uncompressed step / compute only; the bar is 12
AHEAD = 2  # blocks whose parameters are on their way while one computes
UNCOMPRESSED, ALONE = "uncompressed", "compute only"
METHODS = {
    "fsdp": ("bf16/bf16", "int8+ef", "int4+ef", "int4+ef/int8", "int4+ef/int4+delta"),
    "hsdp": ("bf16", "int8+ef", "int4+ef"),
}
TIMEOUT = 3 * 3600.0


@dataclass(frozen=True)
class Config:
    """What every rank must be told; the same on all of them."""

    layout: str
    methods: tuple[str, ...]
    steps: int
    round: int = 5  # steps a method makes before it is the next one's turn
    model: str = "10M"
    batch: int = 2
    context: int = 128
    evaluate: int = 4  # held-out windows per rank
    seed: int = 0


@dataclass
class Row:
    """One method's figures; `passed` of its bars, by what they say."""

    layout: str
    method: str
    ms_p50: float
    bytes: float  # per step and rank, at the interface
    reduced: float  # of those, payload of the reduction of gradients
    reduced_ratio: float | None  # fp32's least over `reduced`
    bytes_ratio: float | None  # uncompressed over this
    bound_ms: float
    of_bound: float
    loss: float | None  # held out, at the end
    loss_ratio: float | None  # to uncompressed
    memory_MB: float  # what commlib remembers, of all ranks
    times_alone: float  # step over compute only
    link: str
    setting: dict[str, Any]
    bars: dict[str, bool] = field(default_factory=dict)
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None


class CopyAll(DefaultAllGather):
    """A gather that sends nothing: this rank's part stands for all."""

    def __call__(  # type: ignore[override]
        self, output_tensor: Any, input_tensor: Any, group: Any, *_: Any, **__: Any
    ) -> None:
        rows = output_tensor.view(group.size(), -1)
        rows.copy_(input_tensor.clone().expand_as(rows))


class CopyOne(DefaultReduceScatter):
    """A reduce-scatter that sends nothing: this rank's own row is the sum."""

    def __call__(  # type: ignore[override]
        self, output_tensor: Any, input_tensor: Any, group: Any, *_: Any, **__: Any
    ) -> None:
        output_tensor.copy_(input_tensor.view(group.size(), -1)[group.rank()])


class Trainee:
    """One rank's part of a model that is trained by one method."""

    def __init__(self, method: str, config: Config, mesh: DeviceMesh) -> None:
        self.method, self.config = method, config
        self.seconds: list[float] = []
        self.bytes: list[float] = []
        self.reduced: list[float] = []
        self.held_out: list[float] = []
        if method == ALONE and mesh.ndim == 2:
            mesh = mesh["shard"]  # nothing is averaged between nodes either
        self.model: Any = GPT(SHAPES[config.model], seed=config.seed)
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self._prefetch()
        if method == ALONE:
            for module in (*self.model.blocks, self.model):
                module.set_custom_all_gather(CopyAll())
                module.set_custom_reduce_scatter(CopyOne())
        elif method != UNCOMPRESSED:
            gradients, _, parameters = method.partition("/")
            commlib.wrap(self.model, gradients, parameters=parameters or None, seed=config.seed)
        self.optimizer = optimizer("adamw", self.model)
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.0 if method == ALONE else 1.0  # those gradients are noise

    @property
    def wrapped(self) -> bool:
        return self.method not in (UNCOMPRESSED, ALONE)

    def rehearse(self, corpus: Corpus) -> None:
        """Two steps without an update: kernels compile, plans are agreed."""
        for step in range(2):
            self._backward(corpus, step)
        self.optimizer.zero_grad()
        if self.wrapped:
            commlib.of(self.model).reset()

    def trial(self, corpus: Corpus) -> float:
        """Seconds of the slowest rank for a step without an update."""
        dist.barrier()
        start = time.perf_counter()
        self._backward(corpus, 0)
        self.optimizer.zero_grad()
        return gather([time.perf_counter() - start])[:, 0].max().item()

    def step(self, corpus: Corpus, step: int) -> None:
        """Train on the batch of `step`, and note what it took."""
        warm_up(self.optimizer, step)
        before = self._reduced()
        dist.barrier()
        sent, start = sent_bytes(), time.perf_counter()
        self._backward(corpus, step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        took = gather([time.perf_counter() - start])[:, 0].max().item()
        # a rank is through when it has its own results: count when all have theirs
        ranks = gather([(sent_bytes() - sent) / sharers(), self._reduced() - before])
        self.seconds.append(took)
        self.bytes.append(ranks[:, 0].mean().item())
        self.reduced.append(ranks[:, 1].mean().item())

    @torch.no_grad()
    def loss(self, pair: tuple[torch.Tensor, torch.Tensor]) -> float:
        """On the held-out windows, with the weights as this method gathers them."""
        return float(gather([float(self.model(*pair))])[:, 0].mean())

    def memory(self) -> float:
        mine = commlib.of(self.model).memory_bytes() if self.wrapped else 0
        return gather([mine])[:, 0].sum().item()

    def _backward(self, corpus: Corpus, step: int) -> None:
        config = self.config
        x, y = corpus.batch(
            config.batch, config.context, seed=config.seed, step=step, rank=dist.get_rank()
        )
        self.model(x, y).backward()

    def _reduced(self) -> float:
        """Payload bytes of the reduction of gradients so far."""
        if not self.wrapped:
            return 0.0
        reduces = ("gradients", "replicas")
        made = commlib.of(self.model).communicators
        return sum(float(made[name].transport.bytes_sent) for name in reduces if name in made)

    def _prefetch(self) -> None:
        blocks = list(self.model.blocks)
        self.model.set_modules_to_forward_prefetch(blocks[:AHEAD])
        self.model.set_modules_to_backward_prefetch(blocks[: -AHEAD - 1 : -1])
        for place, block in enumerate(blocks):
            block.set_modules_to_forward_prefetch(blocks[place + 1 : place + 1 + AHEAD])
            block.set_modules_to_backward_prefetch(blocks[max(0, place - AHEAD) : place][::-1])


def exactness(config: Config, mesh: DeviceMesh, corpus: Corpus) -> bool:
    """Whether scheme fp32, gathers included, is bitwise the unwrapped run after 3 steps."""
    ends = []
    for method in (UNCOMPRESSED, "fp32", "fp32/fp32"):
        trainee = Trainee(method, config, mesh)
        for step in range(3):
            trainee.step(corpus, step)
        ends.append([p.to_local().detach() for p in trainee.model.parameters()])
    same = all(torch.equal(a, b) for end in ends[1:] for a, b in zip(end, ends[0], strict=True))
    return bool(gather([same])[:, 0].min().item())


def find_line(folder: Path, config: Config, made: Sequence[Trainee], corpus: Corpus) -> Line:
    """The line rate at which an uncompressed step takes TARGET times the compute-only one."""
    chosen = [next(t for t in made if t.method == name) for name in (ALONE, UNCOMPRESSED)]

    def measure(bits: int) -> tuple[float, float]:
        if bits and dist.get_rank() == 0:
            turn(folder, rate_text(bits))
        dist.barrier()
        alone, uncompressed = (
            statistics.median(trainee.trial(corpus) for _ in range(3)) for trainee in chosen
        )
        return alone, uncompressed

    numel = sum(p.numel() for p in made[0].model.parameters())
    critical = {
        "hsdp": 2 * 4 * numel / 2,  # both ranks of a node average their half with the other node's
        "fsdp": 4 * 4 * numel * (RANKS - 1) / RANKS,  # two gathers; gloo reduces by an all-reduce
    }
    return calibrate(measure, critical[config.layout], target=TARGET)


def train(
    config: Config, made: Sequence[Trainee], corpus: Corpus, told: Callable[[], None]
) -> None:
    """All methods in turns."""
    pair = corpus.evaluation(
        config.evaluate, config.context, rank=dist.get_rank(), ranks=dist.get_world_size()
    )
    for number, first in enumerate(range(0, config.steps, config.round)):
        shift = number % len(made)
        for trainee in [*made[shift:], *made[:shift]]:
            for step in range(first, min(first + config.round, config.steps)):
                trainee.step(corpus, step)
                told()
            if trainee.method != ALONE:
                trainee.held_out.append(trainee.loss(pair))


def rows(config: Config, made: Sequence[Trainee], line: Line, exact: bool) -> list[Row]:
    """The figures of all methods, with their bars."""
    step = {t.method: 1e3 * statistics.median(t.seconds) for t in made}
    sent = {t.method: statistics.median(t.bytes) for t in made}
    numel = sum(p.numel() for p in made[0].model.parameters())
    share = 2 if config.layout == "hsdp" else RANKS
    least = 4 * numel * (RANKS - 1) / RANKS if share == RANKS else 4 * numel / share
    uncompressed = next(t for t in made if t.method == UNCOMPRESSED)
    found = []
    for t in made:
        bound = 8e3 * sent[t.method] * sharers() / line.bits  # the ranks of a host share its line
        reduced = statistics.median(t.reduced)
        row = Row(
            layout=config.layout,
            method=t.method,
            ms_p50=step[t.method],
            bytes=sent[t.method],
            reduced=reduced,
            reduced_ratio=least / reduced if reduced else None,
            bytes_ratio=sent[UNCOMPRESSED] / sent[t.method] if t.method != ALONE else None,
            bound_ms=bound,
            of_bound=bound / step[t.method],
            loss=t.held_out[-1] if t.held_out else None,
            loss_ratio=t.held_out[-1] / uncompressed.held_out[-1] if t.held_out else None,
            memory_MB=t.memory() / 1e6,
            times_alone=step[t.method] / step[ALONE],
            link=f"{config.layout}, {line.rate}",
            setting={"steps": config.steps, "model": config.model, "batch": config.batch,
                     "context": config.context, "parameters": numel},
            **origin()._asdict(),
        )  # fmt: skip
        if t.method == UNCOMPRESSED:
            row.bars["uncompressed / compute only >= 12"] = row.times_alone >= 12
            row.bars["scheme fp32 bitwise unwrapped"] = exact
        if row.loss_ratio is not None:
            row.bars["loss within 1%"] = abs(row.loss_ratio - 1) <= 0.01
        if t.method == "int4+ef" and config.layout == "fsdp":
            row.bars["reduce-scatter >= 7.5x fewer"] = (row.reduced_ratio or 0) >= 7.5
        if t.method == "int4+ef" and config.layout == "hsdp":
            row.bars["inter-node bytes >= 7x fewer"] = (row.bytes_ratio or 0) >= 7
        if t.method == "int4+ef/int8":
            row.bars["step >= 0.85 of bound"] = row.of_bound >= 0.85
        found.append(row)
    return found


HEADERS = (
    "method", "step ms", "MB/step", "fewer", "reduced MB", "fewer", "bound ms", "of bound",
    "x compute", "loss", "memory MB",
)  # fmt: skip


def table(found: Sequence[Row]) -> str:
    """The figures, and what must hold of them."""

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    def line(r: Row) -> list[str]:
        sent = [number(r.bytes / 1e6, 3), number(r.bytes_ratio, 2)]
        reduced = [number(r.reduced / 1e6 if r.reduced else None, 3), number(r.reduced_ratio, 2)]
        bound = [number(r.bound_ms, 0), number(r.of_bound, 3), number(r.times_alone, 2)]
        ends = [number(r.loss, 4), number(r.memory_MB, 0)]
        return [r.method, number(r.ms_p50, 0), *sent, *reduced, *bound, *ends]

    verdicts = {True: "ok", False: "FAILED"}
    bars = [(r.method, bar, verdicts[held]) for r in found for bar, held in r.bars.items()]
    figures = tabulate([line(r) for r in found], HEADERS, disable_numparse=True)
    return f"{figures}\n\n{tabulate(bars)}"


def rank(args: argparse.Namespace) -> int:
    """Be one rank; the exit code says whether all bars hold."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    first = dist.get_rank() == 0
    names = args.methods or METHODS[args.layout]
    config = Config(args.layout, (UNCOMPRESSED, *names, ALONE), args.steps, model=args.model)
    shape, dims = ((2, 2), ("replicate", "shard")) if args.layout == "hsdp" else ((4,), ("shard",))
    mesh, corpus = init_device_mesh("cpu", shape, mesh_dim_names=dims), load()
    exact = exactness(config, mesh, corpus)
    made = [Trainee(method, config, mesh) for method in config.methods]
    for trainee in made:
        trainee.rehearse(corpus)
    line = find_line(args.dial, config, made, corpus)
    if first:
        print(
            f"{args.layout}: line rate {line.rate}/s: uncompressed {1e3 * line.uncompressed:.0f} "
            f"ms, compute only {1e3 * line.alone:.0f} ms",
            flush=True,
        )
    start, done = time.monotonic(), 0

    def told() -> None:
        nonlocal done
        done += 1
        if first and done % 20 == 0:
            seconds = time.monotonic() - start
            print(f"{done} of {config.steps * len(made)} steps, {seconds:.0f} s", file=sys.stderr)

    train(config, made, corpus, told)
    found = rows(config, made, line, exact)
    if first:
        print(table(found), flush=True)
        if args.json:
            write_json(args.json, found)
    dist.barrier()
    dist.destroy_process_group()
    return 0 if all(all(row.bars.values()) for row in found) else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--layout", choices=tuple(METHODS), help="one of the two; both by default")
    add("--methods", type=lambda text: tuple(text.split(",")), help="comma-separated")
    add("--steps", type=int, default=30)
    add("--model", choices=tuple(SHAPES), default="10M")
    add("--json", type=Path)
    add("--dial", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "RANK" in os.environ:
        return rank(args)
    codes, texts = [], []
    for layout in [args.layout] if args.layout else list(METHODS):
        hosts = 2 if layout == "hsdp" else RANKS
        command = [sys.executable, "-m", "bench.fsdp", *sys.argv[1:], "--layout", layout]
        part = args.json.with_suffix(f".{layout}.part") if args.json else None
        with emulation.Network(hosts) as network, dial(network) as folder:
            command += ["--dial", str(folder), *(["--json", str(part)] if part else [])]
            codes.append(
                emulation.spawn(command, RANKS, hosts=hosts, network=network, timeout=TIMEOUT)
            )
        if part and part.exists():
            texts.append(part.read_text(encoding="utf-8"))
            part.unlink()
    if args.json and texts:
        args.json.write_text("".join(texts), encoding="utf-8")
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
