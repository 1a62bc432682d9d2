"""What the ranks of the FSDP2 tests run: small sharded models, seeded data, training."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from tests.integrations.ddp_cases import batch

WIDTH = 48
PATIENCE = 110.0  # seconds for one run of many trainings; pytest ends a test after 120


class Net(nn.Module):
    """Two blocks and a head; rows that 3 and 4 ranks cannot share evenly."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(WIDTH, 2 * WIDTH + 1), nn.ReLU(), nn.Linear(2 * WIDTH + 1, WIDTH)
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 30)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


def sharded(model: nn.Module | None = None, **how: Any) -> Any:
    """`fully_shard` on every block and on the whole."""
    model = Net() if model is None else model
    for block in getattr(model, "blocks", ()):
        fully_shard(block, **how)
    return fully_shard(model, **how)


def mesh(*shape: int) -> Any:
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def train(
    model: Any, steps: int, *, start: int = 0, accumulate: int = 1, clip: float = 0.0
) -> dict[str, torch.Tensor]:
    """SGD with momentum; this rank's shards of the weights it ends with."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(start, start + steps):
        for part in range(accumulate):
            model.set_requires_gradient_sync(part == accumulate - 1)
            loss(model, 100 * part + step).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return shards(model)


def loss(model: Any, step: int) -> torch.Tensor:
    x = batch(step).to(next(model.parameters()).dtype)
    return model(x).square().mean()


def shards(model: Any) -> dict[str, torch.Tensor]:
    return {name: local(p.detach()).clone() for name, p in model.named_parameters()}


def local(x: Any) -> torch.Tensor:
    """This rank's part; the tensor itself where it is no DTensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def gradients(model: Any, *, whole: bool = False) -> dict[str, torch.Tensor]:
    """This rank's shards of the gradients, or all of them."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: (g.full_tensor() if whole else g.to_local()).clone() for n, g in found.items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """|a - b| / |b| over everything that all ranks hold."""
    error, norm = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for name, want in b.items():
        error += (a[name].double() - want.double()).square().sum()
        norm += want.double().square().sum()
    both = torch.cat([error, norm])
    dist.all_reduce(both)
    return float((both[0] / both[1]).sqrt())


def modules(model: nn.Module) -> list[FSDPModule]:
    return [m for m in model.modules() if isinstance(m, FSDPModule)]
