"""One stage of the pipeline demo: all methods train side by side in the same processes.

A method is a stage of its own, with its schedule and optimizer; they take turns as in the other
demo. The time of a step is the slowest stage's, from a barrier. Bytes are those that left the
interface of the first stage (activations) and of the last (their gradients).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from ...emulation import sent_bytes
from ...modes import Delta, Reuse
from ...policy import Role, Scheme, check_mode
from .. import train as ddp
from ..data import Corpus, Pair
from ..model import Shape, optimizer, warm_up
from ..train import gather, sharers
from .stages import SHAPES, Alone, Stage, loss

UNCOMPRESSED = "uncompressed"
ALONE = "compute only"
METHODS = (
    "fp32",  # the tensors themselves: what commlib's order of receives and sends gives alone
    "bf16",
    "int8",
    "int4/int8",
    "int4/int4+lep",
    "int4+delta/int4",
    "int4+reuse/int4+reuse",
)
SCHEDULES: dict[str, Callable[..., Any]] = {"1F1B": Schedule1F1B, "GPipe": ScheduleGPipe}


@dataclass(frozen=True)
class Method:
    """Schemes of activations and of their gradients; both None: torch's own messages."""

    name: str
    forward: Scheme | None = None
    backward: Scheme | None = None

    @classmethod
    def parse(cls, text: str) -> Method:
        """`FORWARD[/BACKWARD]`, one scheme for both ways where there is one.

        Raises ValueError: a scheme is wrong, or not one for that direction.
        """
        if text in (UNCOMPRESSED, ALONE):
            return cls(text)
        forward, _, backward = text.partition("/")
        there = Scheme.parse(forward)
        back = Scheme.parse(backward) if backward else there
        check_mode(there, Role.ACTIVATION)
        check_mode(back, Role.ACTIVATION_GRADIENT)
        return cls(text, there, back)

    @property
    def by_sample(self) -> bool:
        """Whether a step names its samples."""
        return any(isinstance(s.feedback, Delta) for s in (self.forward, self.backward) if s)

    @property
    def lazy(self) -> bool:
        """Whether a batch stays for several steps."""
        return any(isinstance(s.feedback, Reuse) for s in (self.forward, self.backward) if s)


@dataclass(frozen=True)
class Config:
    """What every stage must be told; the same on all of them."""

    methods: tuple[str, ...] = (UNCOMPRESSED, *METHODS, ALONE)
    steps: int = 20
    round: int = 5  # steps a method makes before it is the next one's turn; a lazy batch's stay
    microbatches: int = 12
    samples: int = 1  # of a micro-batch
    sequences: int = 60  # fixed training text; one epoch
    evaluate: int = 16  # held-out windows
    shape: Shape = SHAPES["3M"]
    schedule: str = "1F1B"
    lr: float = 1.0  # of the optimizer's learning rate
    seed: int = 0
    link: str = "the network it was started on"

    @property
    def batch(self) -> int:
        return self.microbatches * self.samples

    def message(self) -> int:
        """Bytes of one uncompressed micro-batch at a boundary."""
        return 4 * self.samples * self.shape.context * self.shape.width

    def critical_bytes(self, stages: int) -> int:
        """What an uncompressed step must send one after the other, both directions at once.

        A micro-batch's way there and back, and for each one more what a boundary exchanges; a
        boundary waits for its neighbours' exchanges.
        """
        return 2 * self.message() * (stages + self.microbatches - 2)


class Feed:
    """Which sequences a step trains on: epochs over a fixed set, each in an order of its own."""

    def __init__(self, corpus: Corpus, config: Config) -> None:
        self.config = config
        self.x, self.y = corpus.batch(
            config.sequences, config.shape.context, seed=config.seed, step=0, rank=0
        )
        if config.sequences % config.batch:
            raise ValueError(
                f"{config.sequences} sequences are not a multiple of the {config.batch} of a step"
            )

    def ids(self, step: int) -> list[int]:
        """The sequences of a step, in the order of its micro-batches."""
        config = self.config
        epoch, place = divmod(step * config.batch, config.sequences)
        generator = torch.Generator().manual_seed(1000003 * config.seed + epoch)
        order = torch.randperm(config.sequences, generator=generator).tolist()
        return order[place : place + config.batch]


@dataclass
class Run(ddp.Run):
    """What happened to one method; of `bytes`, those of all stages, per step."""

    forward: list[float] = field(default_factory=list)  # bytes that the first stage sent
    backward: list[float] = field(default_factory=list)  # and the last
    memory: float = 0.0  # bytes of all stages in the end


class Trainee:
    """One rank's stage of a model that is trained by one method."""

    def __init__(self, method: Method, config: Config, feed: Feed) -> None:
        self.method, self.config, self.feed = method, config, feed
        self.run = Run(method.name)
        index, stages = dist.get_rank(), dist.get_world_size()
        self.first, self.last = index == 0, index == stages - 1
        self.module = Stage(config.shape, index, stages, config.seed)
        module: torch.nn.Module = self.module
        if method.name == ALONE:
            size = (config.samples, config.shape.context, config.shape.width)
            module = Alone(self.module, index, stages, size)
        stage = PipelineStage(module, index, stages, torch.device("cpu"))
        self.schedule = SCHEDULES[config.schedule](stage, config.microbatches, loss_fn=loss)
        if method.forward is not None:
            from commlib import wrap

            wrap(self.schedule, method.forward, backward=method.backward, seed=config.seed)
        self.optimizer = optimizer("adamw", self.module)
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.0 if method.name == ALONE else config.lr  # those gradients are noise

    def rehearse(self) -> None:
        """Two steps without an update: stages meet, kernels compile.

        The weights stay; what modes remember of these steps is forgotten.
        """
        for fresh in (True, False):
            self.rehearsal(fresh)
        if self.method.forward is not None:
            from commlib import of

            of(self.schedule).reset()

    def rehearsal(self, fresh: bool = True) -> float:
        """Seconds of the slowest stage for a step without an update."""
        dist.barrier()
        start = time.perf_counter()
        self._forward_backward(self.feed.ids(0), fresh)
        self.optimizer.zero_grad()
        return gather([time.perf_counter() - start])[:, 0].max().item()

    def step(self, step: int) -> None:
        """Train on the batch of `step` and add to the run what it took."""
        stay = step % self.config.round if self.method.lazy else 0
        warm_up(self.optimizer, step)
        dist.barrier()
        sent, start = sent_bytes(), time.perf_counter()
        lost = self._forward_backward(self.feed.ids(step - stay), stay == 0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        took = gather([time.perf_counter() - start, lost])
        # A stage is through when the kernel has its last message: count when all have theirs.
        ranks = gather([(sent_bytes() - sent) / sharers()])[:, 0]
        self.run.seconds.append(took[:, 0].max().item())
        self.run.losses.append(took[-1, 1].item())
        self.run.bytes.append(ranks.sum().item())
        self.run.forward.append(ranks[0].item())
        self.run.backward.append(ranks[-1].item())

    def _forward_backward(self, ids: Sequence[int], fresh: bool) -> float:
        """The mean loss on the last stage, 0 on the others."""
        told: dict[str, Any] = {}
        if self.method.by_sample:
            told["sample_ids"] = ids
        if self.method.lazy:
            told["is_fresh"] = fresh
        losses: list[Tensor] = []
        if self.last:
            told |= {"target": self.feed.y[ids], "losses": losses}
        self.schedule.step(*([self.feed.x[ids]] if self.first else []), **told)
        return statistics.fmean(part.item() for part in losses) if losses else 0.0

    @torch.no_grad()
    def loss(self, pair: Pair) -> float:
        """Mean loss of the whole model on some windows; activations travel exact. All ranks."""
        x, y = pair
        config, index = self.config, dist.get_rank()
        size = (config.samples, config.shape.context, config.shape.width)
        total, sends = 0.0, []
        parts = list(zip(x.split(config.samples), y.split(config.samples), strict=True))
        for mine, target in parts:
            if not self.first:
                mine = torch.empty(size)
                dist.recv(mine, index - 1)
            out = self.module(mine)
            if self.last:
                total += loss(out, target).item()
            else:
                sends.append((dist.isend(out, index + 1), out))
        for work, _ in sends:
            if work is not None:
                work.wait()
        return gather([total / len(parts)])[-1, 0].item()

    def remember(self) -> None:
        """Note the memory of the modes."""
        mine = 0
        if self.method.forward is not None:
            from commlib import of

            mine = of(self.schedule).memory_bytes()
        self.run.memory = gather([mine])[:, 0].sum().item()


def trainees(config: Config, corpus: Corpus) -> list[Trainee]:
    """One for each method, rehearsed."""
    torch.set_num_threads(1)
    feed = Feed(corpus, config)
    made = [Trainee(Method.parse(text), config, feed) for text in config.methods]
    for trainee in made:
        trainee.rehearse()
    return made


def train(
    config: Config, made: Sequence[Trainee], corpus: Corpus, progress: Callable[[Run], None]
) -> list[Run]:
    """Train all methods, which take turns, and return what happened, on every rank."""
    evaluation = corpus.evaluation(config.evaluate, config.shape.context)
    learning = [trainee for trainee in made if trainee.method.name != ALONE]
    start = learning[0].loss(evaluation)
    for trainee in learning:
        trainee.run.held_out.append((0, start))  # equal weights: measured once
    for turn, first in enumerate(range(0, config.steps, config.round)):
        after = min(first + config.round, config.steps)
        shift = turn % len(made)
        for trainee in [*made[shift:], *made[:shift]]:
            for step in range(first, after):
                trainee.step(step)
                progress(trainee.run)
            if trainee in learning:
                trainee.run.held_out.append((after, trainee.loss(evaluation)))
    for trainee in made:
        trainee.remember()
    return [trainee.run for trainee in made]


def typical(made: Sequence[Trainee], names: Sequence[str], steps: int) -> tuple[float, ...]:
    """Median seconds of some steps of each of these methods, a turn each; they leave no trace."""
    chosen = [next(t for t in made if t.method.name == name) for name in names]
    return tuple(statistics.median(t.rehearsal() for _ in range(steps)) for t in chosen)
