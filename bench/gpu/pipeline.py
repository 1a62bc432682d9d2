"""Steps of a pipeline over NCCL's sockets, plain and compressed, four stages on one GPU."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import commlib
from bench.gpu import ranks
from bench.gpu.record import Record
from commlib.benchmark.timing import percentile

STAGES, MICROBATCHES = 4, 8
ROWS, WIDTH = 1024, 1024
"""A micro-batch between two stages: 4 MiB of fp32."""
ROUNDS = 10
DEVICE = "cuda"
METHODS: dict[str, tuple[str, str] | None] = {
    "fp32 (torch)": None,
    "bf16": ("bf16", "bf16"),
    "int8": ("int8", "int8"),
    "int4 / int8": ("int4", "int8"),
    "int4 / int4+lep": ("int4", "int4+lep"),
}
"""Schemes of activations and of their gradients."""


def measured() -> list[dict[str, object]]:
    """Runs on every rank: seconds of a step by each method, the slowest rank's."""
    rank, size = dist.get_rank(), dist.get_world_size()
    schedules = {name: _schedule(rank, size, schemes) for name, schemes in METHODS.items()}
    x = torch.randn(MICROBATCHES * ROWS, WIDTH, device=DEVICE)
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for k in range(ROUNDS + 2):
        for name, schedule in schedules.items():
            torch.cuda.synchronize()
            dist.barrier()
            start = time.perf_counter()
            if rank == 0:
                schedule.step(x)
            else:
                schedule.step(target=x)
            torch.cuda.synchronize()
            taken = torch.tensor(time.perf_counter() - start, device=DEVICE)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            if k > 1:
                seconds[name].append(float(taken))
    plain, rows = percentile(seconds["fp32 (torch)"], 50), []
    for name, all_seconds in seconds.items():
        p50 = percentile(all_seconds, 50)
        rows.append(
            {
                "bench": "pipeline", "ranks": size, "scheme": name, "microbatches": MICROBATCHES,
                "size_bytes": 4 * ROWS * WIDTH, "ms_p50": 1e3 * p50,
                "ms_p80": 1e3 * percentile(all_seconds, 80), "speedup": plain / p50,
            }
        )  # fmt: skip
    return rows


def _schedule(rank: int, size: int, schemes: tuple[str, str] | None) -> Any:
    torch.manual_seed(rank)
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).to(DEVICE)
    stage = PipelineStage(module, rank, size, torch.device(DEVICE))
    schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn=_loss)
    if schemes is not None:
        commlib.wrap(schedule, schemes[0], backward=schemes[1])
    return schedule


def _loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x - y).square().mean()


def pipeline(record: Record) -> None:
    """Four ranks on one GPU, which they share: no bar, and the ratio is a lower limit."""
    shown = []
    for row in ranks.run(90, STAGES, measured):
        record.add(**row)
        shown.append([row["scheme"], row["ms_p50"], row["ms_p80"], row["speedup"]])
    heads = ["forward / backward", "ms p50", "ms p80", "x torch fp32"]
    record.table("1F1B, four stages as separate hosts over sockets, one GPU", heads, shown)
