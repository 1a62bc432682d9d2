"""What the ranks of the pipeline tests run: stages, schedules, seeded data, and what they count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

import commlib

CPU = torch.device("cpu")
WIDTH, LENGTH = 64, 32
SAMPLES, MICRO = 4, 8  # per micro-batch; micro-batches
BATCH = SAMPLES * MICRO
SINGLE = ("GPipe", "1F1B")
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
SCHEDULES = (*SINGLE, "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", *V_SHAPED)


def block(index: int, width: int = WIDTH) -> nn.Module:
    """Stage number `index`: the same weights wherever it is made."""
    generator = torch.Generator().manual_seed(index)
    module = nn.Sequential(nn.Linear(width, width), nn.Tanh())
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator) / width**0.5
    return module


def loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (out.float() - target.float()).square().mean()


def batch(seed: int = 0, *shape: int) -> torch.Tensor:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(*(shape or (BATCH, LENGTH, WIDTH)), generator=generator)


def indices(name: str, rank: int, ranks: int) -> list[int]:
    """The stages of a rank, in its schedule."""
    if name in SINGLE:
        return [rank]
    return [rank, 2 * ranks - 1 - rank] if name in V_SHAPED else [rank, rank + ranks]


def build(
    name: str = "GPipe",
    make: Callable[[int], nn.Module] = block,
    *,
    micro: int = MICRO,
    loss_fn: Any = loss,
    group: Any = None,
    **options: Any,
) -> Any:
    """A schedule over all ranks of `group`. options: of the stages."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    mine = indices(name, rank, ranks)
    count = ranks * len(mine)
    stages = [PipelineStage(make(i), i, count, CPU, group=group, **options) for i in mine]
    given = stages[0] if name in SINGLE else stages
    return get_schedule_class(name)(given, micro, loss_fn=loss_fn)


def stages_of(schedule: Any) -> list[Any]:
    return list(schedule._stages) if hasattr(schedule, "_stages") else [schedule._stage]


def call(schedule: Any, seed: int = 0, *, evaluate: bool = False, **options: Any) -> Any:
    """One step on batch `seed`; what the last stage puts out, elsewhere None."""
    stages = stages_of(schedule)
    args = (batch(seed),) if any(stage.is_first for stage in stages) else ()
    if schedule._loss_fn is not None and any(stage.is_last for stage in stages):
        options["target"] = batch(seed + 50)
    return (schedule.eval if evaluate else schedule.step)(*args, **options)


SMALL = (BATCH, 4, WIDTH)


def small_step(schedule: Any, step: int, **options: Any) -> Any:
    """One step of small messages, without updates."""
    if dist.get_rank() == 0:
        return schedule.step(batch(step % 64, *SMALL), **options)
    return schedule.step(target=batch(step % 64 + 64, *SMALL), **options)


def train(schedule: Any, steps: int, *, lr: float = 0.1, start: int = 0, **options: Any) -> Result:
    """SGD on `steps` batches. options: of step(); a function of the step's number, or a value."""
    result = Result()
    for step in range(start, start + steps):
        now = {name: f(step) if callable(f) else f for name, f in options.items()}
        for p in parameters(schedule):
            p.grad = None
        result.outputs.append(call(schedule, step, **now))
        result.gradients = [p.grad.clone() for p in parameters(schedule) if p.grad is not None]
        with torch.no_grad():
            for p in parameters(schedule):
                if p.grad is not None:
                    p -= lr * p.grad
    result.weights = [p.detach().clone() for p in parameters(schedule)]
    return result


@dataclass
class Result:
    """What a run of some steps gave."""

    outputs: list[Any] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)  # of the last step
    weights: list[torch.Tensor] = field(default_factory=list)

    def equals(self, other: Result) -> bool:
        """Bitwise."""
        mine, theirs = self.tensors(), other.tensors()
        return len(mine) == len(theirs) and all(map(same, mine, theirs))

    def tensors(self) -> list[torch.Tensor]:
        return [x for x in self.outputs if x is not None] + self.gradients + self.weights

    def error(self, other: Result) -> float:
        """The largest relative error of a parameter's gradient."""
        pairs = zip(self.gradients, other.gradients, strict=True)
        return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def alone(count: int) -> Result:
    """The gradients of this rank's block where `count` blocks are one model on one rank."""
    blocks = [block(index) for index in range(count)]
    loss(nn.Sequential(*blocks)(batch()), batch(50)).backward()
    return Result(gradients=[p.grad for p in blocks[dist.get_rank()].parameters()])  # type: ignore[misc]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.detach().contiguous(), b.detach().contiguous()
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def parameters(schedule: Any) -> list[nn.Parameter]:
    return [p for stage in stages_of(schedule) for p in stage.submod.parameters()]


@dataclass
class Count:
    """What went to the network."""

    bytes: int = 0
    messages: list[tuple[torch.dtype, int]] = field(default_factory=list)  # dtype, bytes


@contextmanager
def counting() -> Iterator[Count]:
    """Counts every isend, alone or in a batch, where torch issues it."""
    count, isend = Count(), dist.isend

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        count.bytes += tensor.nbytes
        count.messages.append((tensor.dtype, tensor.nbytes))
        return isend(tensor, *args, **kwargs)

    dist.isend = distributed_c10d.isend = counted  # type: ignore[assignment]
    try:
        yield count
    finally:
        dist.isend = distributed_c10d.isend = isend


def rows(schedule: Any) -> dict[str, dict[str, Any]]:
    """The meter's rows by key."""
    return {row["key"]: row for row in commlib.of(schedule).meter.rows()}


def everywhere(value: Any) -> list[Any]:
    """What each rank says."""
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, value)
    return said


def ids(step: int, *, epoch: int = 2, seed: int = 0) -> list[int]:
    """The samples of a step: an epoch is `epoch` batches, shuffled anew each time."""
    turn, place = divmod(step, epoch)
    generator = torch.Generator().manual_seed(1000 * seed + turn)
    order = torch.randperm(epoch * BATCH, generator=generator).tolist()
    return order[place * BATCH : (place + 1) * BATCH]


def error_of(run: Callable[[], object], kind: type[Exception] = Exception) -> str:
    """The text of the error that `run` must raise, its notes included."""
    try:
        run()
    except kind as error:
        return "\n".join([str(error), *getattr(error, "__notes__", [])])
    raise AssertionError(f"no {kind.__name__}")


def has(text: str, words: Sequence[str]) -> None:
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in: {text}"
