"""`commlib demo --loss`: what a scheme costs in held-out loss, at equal steps and paired seeds.

No network: the ranks are threads of one process, and their gradients meet in the `Communicator`
that a real job uses. As every rank ends an all-reduce with the same bits (checked here), all ranks
share one set of weights and one optimizer, and only gradients are computed once per rank.

A scheme after ``momentum:`` codes Adam's momentum instead of the gradients, as 1-bit Adam does
(`optim.OneBitAdam`): after WARM_UP of the steps, which are plain.

Each finished run is appended to a JSONL file; a stopped table goes on from there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from ..benchmark.rows import origin
from ..communicator import Communicator
from ..optim.onebit_adam import OneBitAdam
from ..scheme import Scheme
from ..transport import ThreadTransport, run_ranks
from .data import Corpus, load
from .model import GPT, OPTIMIZERS, SHAPES, optimizer, warm_up

PLAIN = "fp32"
MOMENTUM = "momentum:"
WARM_UP = 0.2  # of all steps; the paper of 1-bit Adam has 15 to 25%
CORE = (PLAIN, "int8+ef", "int4+ef")
# LoCo takes up a fifth of each error (arXiv 2407.04480: beta 0.8, which is 1 - omega here).
HOW = (":round=nearest", ":round=stochastic", "+ef", "+ef:omega=0.2")
ALL = (
    *CORE,
    *("int4" + how for how in HOW if how != "+ef"),  # that one is in CORE
    *(codec + how for codec in ("int3", "int2") for how in HOW),
    *("sign" + how for how in ("", *HOW[2:])),  # its rounding is what it is
)
RANKS, BATCH, CONTEXT = 4, 2, 64
EVALUATION_WINDOWS = 128
_TIMEOUT = 24 * 3600.0  # seconds; of one run


@dataclass(frozen=True)
class Experiment:
    """One training run; two with the same fields give the same losses."""

    model: str
    optimizer: str
    seed: int
    scheme: str
    ranks: int = RANKS
    batch: int = BATCH
    context: int = CONTEXT
    matmul: str = "fp32"
    warm_up: int = 0  # plain steps before momentum is coded


@dataclass(frozen=True)
class Row:
    """Held-out loss (nats per byte) of an experiment after `step` steps."""

    experiment: Experiment
    step: int
    loss: float
    seconds: float
    sent: int | None = None  # bytes by rank 0 in all steps so far; None in old rows
    op: str = "demo loss"
    device: str = field(default_factory=lambda: origin().device)
    versions: dict[str, str] = field(default_factory=lambda: origin().versions)
    commit: str | None = field(default_factory=lambda: origin().commit)


@dataclass(frozen=True)
class Table:
    """What one table compares, for each optimizer."""

    model: str
    optimizers: tuple[str, ...]
    schemes: tuple[str, ...]

    def experiments(self, seeds: int, matmul: str, steps: int) -> list[Experiment]:
        """Runs of `steps` steps, seeds outermost: a stopped table is a table of fewer seeds."""
        first = max(1, round(WARM_UP * steps))
        return [
            Experiment(
                self.model,
                optimizer,
                seed,
                scheme,
                matmul=matmul,
                warm_up=first if scheme.startswith(MOMENTUM) else 0,
            )
            for seed in range(seeds)
            for optimizer in self.optimizers
            for scheme in self.schemes
        ]


# All schemes on the 10.9M model would take hours on two cores: that table uses the small model.
TABLES = (Table("10M", ("adamw",), CORE), Table("small", ("adamw", "sgd"), ALL))


def main(args: argparse.Namespace) -> int:
    """Run what is missing of the tables that were asked for, and print them."""
    tables, steps = _asked(args), max(args.steps)
    wanted = [e for asked in tables for e in asked.experiments(args.seeds, args.matmul, steps)]
    path = args.json or Path("commlib-demo-loss.jsonl")
    done = read(path)
    missing = [e for e in wanted if any((e, step) not in done for step in args.steps)]
    found = len(wanted) - len(missing)
    print(f"{len(wanted)} runs of {max(args.steps)} steps, {found} of them found in {path}")
    corpus = load()
    with tqdm(total=len(missing) * max(args.steps), unit="step", smoothing=0.05) as bar:
        for experiment in missing:
            bar.set_description(f"{experiment.model}, {experiment.optimizer}, {experiment.seed}")

            def progress(loss: float, scheme: str = experiment.scheme) -> None:
                bar.set_postfix_str(f"{scheme}: {loss:.3f}", refresh=False)
                bar.update()

            rows = run(experiment, args.steps, corpus, progress)
            append(path, rows)
            done.update({(row.experiment, row.step): row for row in rows})
    for asked in tables:
        experiments = asked.experiments(args.seeds, args.matmul, steps)
        size = sum(p.numel() for p in GPT(SHAPES[asked.model]).parameters())
        for name in asked.optimizers:
            rows = [
                done[e, step] for e in experiments if e.optimizer == name for step in args.steps
            ]
            batch = f"{RANKS} ranks x {BATCH} x {CONTEXT} bytes a step"
            print(f"\n{name}, {size / 1e6:.1f}M parameters, {batch}, {args.matmul} matmul\n")
            print(table(rows))
    print(f"\n{LEGEND}")
    return 0


def _asked(args: argparse.Namespace) -> tuple[Table, ...]:
    """The table of the command line; TABLES where it names no model, schemes or optimizers."""
    if not (args.model or args.schemes or args.optimizers):
        return TABLES
    optimizers = args.optimizers or tuple(OPTIMIZERS)
    if unknown := set(optimizers) - set(OPTIMIZERS):
        raise ValueError(f"--optimizers: {unknown} unknown; allowed: {', '.join(OPTIMIZERS)}")
    named = {"core": CORE, "all": ALL}
    texts = [text for word in args.schemes or ("core",) for text in named.get(word, (word,))]
    schemes = dict.fromkeys([PLAIN, *map(_checked, texts)])
    if any(MOMENTUM in text for text in schemes) and optimizers != ("adamw",):
        raise ValueError(f"{MOMENTUM}... is a way of AdamW alone: say --optimizers adamw")
    return (Table(args.model or "10M", optimizers, tuple(schemes)),)


def _checked(text: str) -> str:
    momentum = MOMENTUM * text.startswith(MOMENTUM)
    return momentum + str(Scheme.parse(text.removeprefix(MOMENTUM)))


def run(
    experiment: Experiment,
    steps: Sequence[int],
    corpus: Corpus,
    progress: Callable[[float], None] = lambda loss: None,
) -> list[Row]:
    """Train one model with `experiment.ranks` ranks as threads; a row for each of `steps`.

    Raises RuntimeError if an all-reduce ends with other bits on one rank than on another.
    """
    rows: list[Row] = []
    start = time.perf_counter()

    def measure(step: int, model: GPT, transport: ThreadTransport) -> None:
        held_out = _held_out(model, corpus, experiment.context)
        seconds = time.perf_counter() - start
        rows.append(Row(experiment, step, held_out, seconds, transport.bytes_sent))

    make = _of_momentum if experiment.scheme.startswith(MOMENTUM) else _of_gradients
    train = make(experiment, frozenset(steps), corpus, measure, progress)
    with _numerics(experiment.matmul):
        run_ranks(experiment.ranks, train, timeout=_TIMEOUT)
    return rows


Measure = Callable[[int, GPT, ThreadTransport], None]
Train = Callable[[ThreadTransport], None]


def _of_gradients(
    experiment: Experiment,
    steps: frozenset[int],
    corpus: Corpus,
    measure: Measure,
    progress: Callable[[float], None],
) -> Train:
    """What each rank does; all share one set of weights."""
    model = GPT(SHAPES[experiment.model], seed=experiment.seed)
    updates = optimizer(experiment.optimizer, model)
    names, parameters = zip(*model.named_parameters(), strict=True)
    sizes = tuple(parameter.numel() for parameter in parameters)
    ndims = tuple(parameter.ndim for parameter in parameters)
    shapes = tuple(tuple(parameter.shape) for parameter in parameters)
    gradients = [torch.empty(sum(sizes)) for _ in range(experiment.ranks)]
    for parameter, piece in zip(parameters, gradients[0].split(sizes), strict=True):
        parameter.grad = piece.view_as(parameter)

    def train(transport: ThreadTransport) -> None:
        rank, mine = transport.rank, gradients[transport.rank]
        communicator = Communicator(transport, experiment.scheme, seed=experiment.seed)
        for step in range(max(steps)):
            loss = _loss(model, experiment, corpus, step, rank)
            pieces = torch.autograd.grad(loss, parameters)
            torch.cat([piece.reshape(-1) for piece in pieces], out=mine)
            factor = 1.0 / experiment.ranks
            communicator.all_reduce_segments(
                mine, names, sizes, ndims, shapes=shapes, factor=factor
            ).wait()
            measured = step + 1 in steps
            if measured:
                transport.barrier()  # the others have decoded too
            if rank == 0:
                # Rank 0 has the sum, so all have sent: nobody reads the weights any more.
                warm_up(updates, step)
                updates.step()
                if measured:
                    _check_equal(gradients)
                    measure(step + 1, model, transport)
                progress(loss.item())
            transport.barrier()
        communicator.close()

    return train


def _of_momentum(
    experiment: Experiment,
    steps: frozenset[int],
    corpus: Corpus,
    measure: Measure,
    progress: Callable[[float], None],
) -> Train:
    """The same with AdamW's momentum, of which every rank has its own until it is sent."""
    weights: list[Tensor] = [torch.empty(0)] * experiment.ranks

    def train(transport: ThreadTransport) -> None:
        rank = transport.rank
        model = GPT(SHAPES[experiment.model], seed=experiment.seed)
        scheme = experiment.scheme.removeprefix(MOMENTUM)
        communicator = Communicator(transport, scheme, seed=experiment.seed)
        like = optimizer(experiment.optimizer, model).defaults
        updates = OneBitAdam(
            model.named_parameters(),
            communicator,
            **{name: like[name] for name in ("lr", "betas", "eps", "weight_decay")},
            warmup=experiment.warm_up,
            decoupled_weight_decay=True,
        )
        for step in range(max(steps)):
            loss = _loss(model, experiment, corpus, step, rank)
            updates.zero_grad()
            loss.backward()
            warm_up(updates, step)
            updates.step()
            if step + 1 in steps:
                weights[rank] = nn.utils.parameters_to_vector(model.parameters()).detach()
                transport.barrier()
                if rank == 0:
                    _check_equal(weights)
                    measure(step + 1, model, transport)
            if rank == 0:
                progress(loss.item())
        communicator.close()

    return train


def _loss(model: GPT, experiment: Experiment, corpus: Corpus, step: int, rank: int) -> Tensor:
    """Of the rank's batch of a step."""
    pair = corpus.batch(
        experiment.batch, experiment.context, seed=experiment.seed, step=step, rank=rank
    )
    loss: Tensor = model(*pair)
    return loss


def table(rows: Iterable[Row]) -> str:
    """One line per scheme; at each number of steps the mean loss and what it is beside plain's."""
    cells: dict[str, dict[int, dict[int, float]]] = {}
    sent: dict[str, int] = {}
    for row in rows:
        if row.sent:
            sent[row.experiment.scheme] = row.sent // row.step
        scheme = cells.setdefault(row.experiment.scheme, {})
        scheme.setdefault(row.step, {})[row.experiment.seed] = row.loss
    steps = list(cells[PLAIN])
    header = ["scheme", *(text for n in steps for text in (f"loss at {n}", "to plain", "[seeds]"))]
    header += ["fewer bytes"]
    body = []
    for name, losses in cells.items():
        line = ["fp32 (plain)" if name == PLAIN else name]
        for step in steps:
            plain, seeds = cells[PLAIN][step], losses[step]
            percent = [100 * (loss / plain[seed] - 1) for seed, loss in seeds.items()]
            spread = f"{min(percent):+.2f} to {max(percent):+.2f}"
            mean = sum(percent) / len(percent)
            line += [f"{sum(seeds.values()) / len(seeds):.4f}"]
            line += ["", ""] if name == PLAIN else [f"{mean:+.2f}%", spread]
        known = PLAIN in sent and name in sent
        line += [f"{sent[PLAIN] / sent[name]:.1f}x" if known else "-"]
        body.append(line)
    return tabulate(body, header, disable_numparse=True, stralign="right")


LEGEND = """\
loss: held-out, nats per byte, mean of the seeds; to plain: loss over plain's loss of the same seed,
mean and range of the seeds; fewer bytes: sent by rank 0 in all steps, plain's over the scheme's.
momentum: AdamW's momentum is coded, after a plain first fifth of the steps. Without round= a scheme
rounds by default: to nearest with feedback. Parameters of one dimension travel exact."""


def read(path: Path) -> dict[tuple[Experiment, int], Row]:
    """The rows of a file that `append` wrote (none if there is no file)."""
    found: dict[tuple[Experiment, int], Row] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            values: dict[str, Any] = json.loads(line)
            row = Row(**{**values, "experiment": Experiment(**values["experiment"])})
            found[row.experiment, row.step] = row
    return found


def append(path: Path, rows: Iterable[Row]) -> None:
    """Write one JSON object per row, all rows of a run in one go."""
    text = "".join(json.dumps(asdict(row), allow_nan=False) + "\n" for row in rows)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


@torch.no_grad()
def _held_out(model: GPT, corpus: Corpus, context: int) -> float:
    x, y = corpus.evaluation(EVALUATION_WINDOWS, context)
    parts = [model(*pair).item() for pair in zip(x.split(32), y.split(32), strict=True)]
    return float(sum(parts) / len(parts))


def _check_equal(gradients: Sequence[Tensor]) -> None:
    for rank, other in enumerate(gradients):
        if not torch.equal(gradients[0], other):
            raise RuntimeError(f"rank {rank} ended an all-reduce with other bits than rank 0")


@contextmanager
def _numerics(matmul: str) -> Iterator[None]:
    """One core per rank, as in a real job; `bf16` lets matmuls round their inputs to bfloat16."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium" if matmul == "bf16" else "highest")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
