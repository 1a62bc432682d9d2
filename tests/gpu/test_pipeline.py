"""Pipelines over NCCL: mixed batches of large messages, and the same bits as on CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

import commlib
from tests.gpu.nccl import DEVICE, Ranks, needs_gpu

pytestmark = [pytest.mark.gpu, needs_gpu]

WIDTH = 256
MICROBATCHES = 4
LARGE = 72 << 18
"""Values of a boundary tensor: 72 MiB of fp32, above what NCCL buffers by itself."""


def half(stage: int) -> nn.Sequential:
    torch.manual_seed(stage)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).to(DEVICE)


def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x - y).square().mean()


def train(
    schedule: Any,
    rows: int,
    policy: str,
    backward: str | None = None,
    ids: list[int] | None = None,
) -> tuple[torch.Tensor, int]:
    """The stage's gradients after two steps, and the bytes it sent."""
    rank = dist.get_rank()
    stage = PipelineStage(half(rank), rank, 2, torch.device(DEVICE))
    made = schedule(stage, MICROBATCHES, loss_fn=loss)
    if policy != "plain":
        commlib.wrap(made, policy, backward=backward)
    x, y = (torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    step = {} if ids is None else {"sample_ids": ids}
    for _ in range(2):
        if rank == 0:
            made.step(x.to(DEVICE), **step)
        else:
            made.step(target=y.to(DEVICE), **step)
    sent = 0
    if policy != "plain":
        state = commlib.of(made)
        state.verify()
        sent = state.transport.bytes_sent
    torch.cuda.synchronize()
    return torch.cat([p.grad.view(-1).cpu() for p in stage.submod.parameters()]), sent


@pytest.mark.parametrize("schedule", [ScheduleGPipe, Schedule1F1B])
def test_fp32_is_the_plain_pipeline(ranks: Ranks, schedule: Any) -> None:
    plain = ranks.run(train, schedule, 256, "plain")
    for (mine, _), (theirs, _) in zip(ranks.run(train, schedule, 256, "fp32"), plain, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("schedule", [ScheduleGPipe, Schedule1F1B])
def test_int8_is_near_and_small(ranks: Ranks, schedule: Any) -> None:
    plain = ranks.run(train, schedule, 256, "plain")
    for (mine, sent), (theirs, _) in zip(
        ranks.run(train, schedule, 256, "int8"), plain, strict=True
    ):
        assert (mine - theirs).norm() < 0.02 * theirs.norm()
        assert 3.8 * sent < 2 * 256 * WIDTH * 4


def test_modes_keep_both_ends_equal(ranks: Ranks) -> None:
    """`train` verifies the references; a repeated sample's second visit is nearly exact."""
    plain = ranks.run(train, Schedule1F1B, 256, "plain")
    ids = list(range(256))
    runs = [
        ranks.run(train, Schedule1F1B, 256, "int4+delta:store=device", "int8", ids),
        ranks.run(train, Schedule1F1B, 256, "int4+delta", "int8", ids),
        ranks.run(train, Schedule1F1B, 256, "int4", "int8+lep"),
    ]
    for run, bound in zip(runs, (0.02, 0.02, 0.2), strict=True):
        for (mine, _), (theirs, _) in zip(run, plain, strict=True):
            assert (mine - theirs).norm() < bound * theirs.norm()


@pytest.mark.parametrize("policy", ["fp32", "int8"])
def test_large_mixed_batches_do_not_deadlock(ranks: Ranks, policy: str) -> None:
    """1F1B sends and receives at once: not coalesced, this hangs above NCCL's buffers."""
    rows = MICROBATCHES * LARGE // WIDTH
    for gradients, sent in ranks.run(train, Schedule1F1B, rows, policy):
        assert gradients.isfinite().all()
        assert sent > 0
