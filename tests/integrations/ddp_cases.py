"""What the ranks of the DDP tests run: small models, seeded data, and the checks on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import commlib
from commlib.integrations.ddp import DDPState, hook
from commlib.integrations.ranked import ranked, unranked

WIDTH = 48


def mlp(seed: int = 0) -> nn.Sequential:
    """The same weights on every rank; two matrices are large enough to be compressed."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4)
    )


class Branches(nn.Module):
    """Which of two layers runs is the caller's choice: the other one is unused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.left = nn.Linear(WIDTH, WIDTH)
        self.right = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor, left: bool) -> torch.Tensor:
        return self.head((self.left if left else self.right)(x).relu())


def batch(step: int, rank: int | None = None) -> torch.Tensor:
    """This rank's inputs at `step`: different on every rank."""
    rank = dist.get_rank() if rank is None else rank
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(8, WIDTH, generator=generator)


def backward(model: nn.Module, step: int, *args: Any) -> None:
    model.zero_grad()
    model(batch(step), *args).square().mean().backward()


def train(
    model: nn.Module, steps: int, *, start: int = 0, accumulate: int = 1, lr: float = 0.1
) -> torch.Tensor:
    """Plain SGD for `steps` steps; the weights it ends with."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for step in range(start, start + steps):
        optimizer.zero_grad()
        for part in range(accumulate - 1):
            with model.no_sync():  # type: ignore[operator]
                model(batch(step + 100 * part + 100)).square().mean().backward()
        model(batch(step)).square().mean().backward()
        optimizer.step()
    return weights(model)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def assert_same_on_all_ranks(x: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
    x = x.contiguous()
    everywhere = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everywhere, x, group=group)
    for other in everywhere:
        assert torch.equal(other.view(torch.uint8), x.view(torch.uint8))


def relative(x: torch.Tensor, reference: torch.Tensor) -> float:
    return float((x - reference).norm() / reference.norm())


def raises(kind: type[Exception], *words: str) -> Callable[[Callable[[], object]], str]:
    """`raises(ValueError, "a", "b")(call)`: the call fails so, and its text has these words."""

    def run(call: Callable[[], object]) -> str:
        try:
            call()
        except kind as error:
            text = str(error)
            missing = [word for word in words if word not in text]
            assert not missing, f"{missing} not in: {text}"
            return text
        raise AssertionError(f"no {kind.__name__}")

    return run


def calls_of(model: nn.Module) -> list[tuple[str, ...]]:
    """The keys of every message from now on, in order."""
    seen: list[tuple[str, ...]] = []
    communicator = commlib.of(model).communicator
    send = communicator.all_reduce_segments

    def spy(x: torch.Tensor, keys: tuple[str, ...], *args: Any, **kwargs: Any) -> Any:
        seen.append(keys)
        return send(x, keys, *args, **kwargs)

    communicator.all_reduce_segments = spy  # type: ignore[method-assign]
    return seen


def residuals(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything this rank remembers, flattened to path -> tensor."""
    found: dict[str, torch.Tensor] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{path}/{name}", inner)
        elif isinstance(value, torch.Tensor):
            found[path] = value.clone()

    walk("", unranked(commlib.of(model).state_dict())["memory"])
    return found


__all__ = [
    "DDP",
    "DDPState",
    "commlib",
    "hook",
    "ranked",
    "unranked",
]
