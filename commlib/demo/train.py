"""One rank of the demo: all methods train side by side in the same processes, taking turns.

A method is a DDP model with its own communication hook and optimizer. Rounds of a few steps go
through all methods in an order that turns by one each round, so that whatever else happens on the
machine falls on all of them. The time of a step is the slowest rank's, from a barrier; the held-out
loss is measured between rounds, outside of these times.

No `from __future__ import annotations` here: DDP compares a hook's annotations with the classes.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import debugging_hooks, default_hooks
from torch.nn.parallel import DistributedDataParallel as DDP

from ..emulation import sent_bytes
from .data import Corpus, load
from .model import GPT, SHAPES, optimizer, warm_up

PLAIN = "plain DDP"
BF16_HOOK = "bf16 hook"
NO_COMMUNICATION = "no communication"


@dataclass(frozen=True)
class Config:
    """What every rank must be told; the same on all of them."""

    schemes: tuple[str, ...] = ("int8+ef", "int4+ef")
    steps: int = 30
    round: int = 5  # steps a method makes before it is the next one's turn
    model: str = "10M"
    batch: int = 2
    context: int = 128
    bucket_mb: float = 3.0
    evaluate: int = 4  # held-out windows per rank
    seed: int = 0
    link: str = "the network it was started on"

    @property
    def methods(self) -> tuple[str, ...]:
        return (PLAIN, BF16_HOOK, *self.schemes, NO_COMMUNICATION)


@dataclass
class Run:
    """What happened to one method: per step and, for the held-out loss, per round."""

    method: str
    seconds: list[float] = field(default_factory=list)
    bytes: list[float] = field(default_factory=list)  # per rank, at the interface
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (steps made, loss)


Progress = Callable[[Run], None]


def train(config: Config, progress: Progress) -> list[Run]:
    """Train all methods on the default process group and return what happened, on every rank."""
    torch.set_num_threads(1)
    corpus = load()
    trainees = [_Trainee(method, config) for method in config.methods]
    evaluation = corpus.evaluation(
        config.evaluate, config.context, rank=dist.get_rank(), ranks=dist.get_world_size()
    )
    for trainee in trainees:
        trainee.rehearse(corpus)
    start = _mean(trainees[0].loss(evaluation))
    for trainee in trainees:
        trainee.run.held_out.append((0, start))  # equal weights: measured once
    for turn, first in enumerate(range(0, config.steps, config.round)):
        after = min(first + config.round, config.steps)
        shift = turn % len(trainees)
        for trainee in trainees[shift:] + trainees[:shift]:
            for step in range(first, after):
                trainee.step(corpus, step)
                progress(trainee.run)
            if trainee.run.method != NO_COMMUNICATION:  # its ranks have each their own weights
                trainee.run.held_out.append((after, _mean(trainee.loss(evaluation))))
    return [trainee.run for trainee in trainees]


class _Trainee:
    """A model in training by one method."""

    def __init__(self, method: str, config: Config) -> None:
        self.config = config
        self.run = Run(method)
        model = GPT(SHAPES[config.model], seed=config.seed)
        self.model = DDP(model, bucket_cap_mb=config.bucket_mb, gradient_as_bucket_view=True)
        if method == BF16_HOOK:
            self.model.register_comm_hook(dist.group.WORLD, _bf16_hook)
        elif method == NO_COMMUNICATION:
            self.model.register_comm_hook(None, debugging_hooks.noop_hook)
        elif method != PLAIN:
            from commlib import wrap

            wrap(self.model, method, seed=config.seed)
        self.optimizer = optimizer("adamw", model)

    def rehearse(self, corpus: Corpus) -> None:
        """Backward twice without an update: DDP rebuilds its buckets, kernels compile, plans are
        agreed.

        The weights stay; what error feedback remembers of them is forgotten.
        """
        for step in range(2):
            self._backward(corpus, step)
        self.optimizer.zero_grad()
        if self.run.method in self.config.schemes:
            from commlib import of

            of(self.model).reset()

    def step(self, corpus: Corpus, step: int) -> None:
        warm_up(self.optimizer, step)
        dist.barrier()
        sent, start = sent_bytes(), time.perf_counter()
        loss = self._backward(corpus, step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        mine = [time.perf_counter() - start, (sent_bytes() - sent) / sharers(), loss]
        ranks = gather(mine)
        self.run.seconds.append(ranks[:, 0].max().item())
        self.run.bytes.append(ranks[:, 1].mean().item())
        self.run.losses.append(ranks[:, 2].mean().item())

    @torch.no_grad()
    def loss(self, pair: tuple[torch.Tensor, torch.Tensor]) -> float:
        return float(self.model.module(*pair))

    def _backward(self, corpus: Corpus, step: int) -> float:
        config = self.config
        x, y = corpus.batch(
            config.batch, config.context, seed=config.seed, step=step, rank=dist.get_rank()
        )
        loss: torch.Tensor = self.model(x, y)
        loss.backward()
        return loss.item()


def _bf16_hook(
    group: dist.ProcessGroup,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # a star import hides it from mypy
) -> torch.futures.Future[torch.Tensor]:
    """PyTorch's hook by another name: by its own DDP refuses it without NCCL. gloo adds bf16."""
    return default_hooks.bf16_compress_hook(group, bucket)


def parameters(model: str) -> int:
    """Number of parameters of a model of `SHAPES`."""
    module: nn.Module = GPT(SHAPES[model])
    return sum(parameter.numel() for parameter in module.parameters())


def sharers() -> int:
    """Ranks behind one interface: on loopback its counter sees the bytes of all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def gather(numbers: Sequence[float]) -> torch.Tensor:
    """The numbers of all ranks, one row per rank."""
    mine = torch.tensor(numbers, dtype=torch.float64)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    return torch.stack(rows)


def _mean(number: float) -> float:
    return float(gather([number]).mean())
