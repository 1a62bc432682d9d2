"""DDP over NCCL: training goes on as on CPU, and backward does not wait for the device."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import commlib
from tests.communicators import data
from tests.gpu.nccl import DEVICE, Ranks, busy, needs_gpu

pytestmark = [pytest.mark.gpu, needs_gpu]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 16)]
    return nn.Sequential(*layers).to(DEVICE)


def train(policy: str | None, steps: int, find_unused: bool) -> tuple[list[float], torch.Tensor]:
    """Losses, and the weights at the end."""
    model = DDP(mlp(), bucket_cap_mb=0.2, find_unused_parameters=find_unused)
    if policy is not None:
        commlib.wrap(model, policy)
        transport = commlib.of(model).communicator.transport
        assert (transport.group is dist.group.WORLD) == (DEVICE == "cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    target = torch.randn(16, 256, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    losses = []
    for step in range(steps):
        x = data(dist.get_rank(), 64 * 256, step).view(64, 256).to(DEVICE)
        optimizer.zero_grad()
        loss = (model(x) - x @ target.T / 16).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    weights = torch.cat([p.detach().view(-1) for p in model.parameters()]).cpu()
    if policy is not None:
        commlib.of(model).close()
    return [float(loss) for loss in losses], weights


@pytest.mark.parametrize("find_unused", [False, True])
def test_ddp(ranks: Ranks, find_unused: bool) -> None:
    plain = ranks.run(train, None, 20, find_unused)
    (losses, x), (_, y) = ranks.run(train, "int8+ef", 20, find_unused)
    assert torch.equal(x, y)
    assert sum(losses[-5:]) / 5 < 0.9 * losses[0]
    assert (x - plain[0][1]).norm() < 0.02 * plain[0][1].norm()


def backward_while_busy() -> tuple[bool, float]:
    """Whether backward returned before the device was done, and the seconds that it took."""
    model = commlib.wrap(DDP(mlp(), bucket_cap_mb=0.2), "int8+ef")
    x = data(dist.get_rank(), 64 * 256).view(64, 256).to(DEVICE)
    for _ in range(3):
        model(x).square().mean().backward()
    torch.cuda.synchronize()
    before = busy()
    loss = model(x).square().mean()
    start = time.perf_counter()
    loss.backward()
    seconds = time.perf_counter() - start
    early = not before.query()
    torch.cuda.synchronize()
    commlib.of(model).close()
    return early, seconds


def test_backward_does_not_wait_for_the_device(ranks: Ranks) -> None:
    for early, seconds in ranks.run(backward_while_busy):
        assert early, f"backward took {seconds} s"
