"""1000 steps of DDP on a GPU, plain and with int8+ef: no memory is lost, the loss is the same."""

from __future__ import annotations

import time

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import commlib
from bench.gpu import ranks
from bench.gpu.record import Record
from commlib.demo import data
from commlib.demo.model import GPT, SHAPES

STEPS, WARM = 1000, 50
BATCH = 16
LOSS_BAR = 0.01
"""Relative difference of the held-out loss."""


def trained(policy: str | None) -> dict[str, object]:
    """Runs on every rank: train the demo's small model; loss, memory, steps per second."""
    import torch.distributed as dist

    torch.manual_seed(0)
    rank, shape, corpus = dist.get_rank(), SHAPES["small"], data.load()
    model = DDP(GPT(shape, seed=0).cuda(), device_ids=[0])
    if policy is not None:
        commlib.wrap(model, policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    allocated, start = [], 0.0
    for step in range(STEPS):
        if step in (WARM, STEPS - 1):
            torch.cuda.synchronize()
            allocated.append(torch.cuda.memory_allocated())
            start = start or time.perf_counter()
        x, y = corpus.batch(BATCH, shape.context, seed=0, step=step, rank=rank)
        loss = model(x.cuda(non_blocking=True), y.cuda(non_blocking=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        x, y = corpus.evaluation(64, shape.context)
        held_out = float(model.module(x.cuda(), y.cuda()))
    return {
        "bench": "training", "scheme": policy or "plain DDP", "steps": STEPS,
        "ranks": dist.get_world_size(), "held_out_loss": held_out,
        "ms_per_step": 1e3 * seconds / (STEPS - WARM),
        "allocated_warm": allocated[0], "allocated_end": allocated[1],
    }  # fmt: skip


def training(record: Record) -> None:
    """Two ranks on one GPU."""
    plain = ranks.run(90, 2, trained, None)
    coded = ranks.run(90, 2, trained, "int8+ef")
    shown = []
    for row in (plain, coded):
        difference = row["held_out_loss"] / plain["held_out_loss"] - 1
        leaked = row["allocated_end"] - row["allocated_warm"]
        record.add(**row, loss_difference=difference, leaked_bytes=leaked, bar=LOSS_BAR)
        good = abs(difference) <= LOSS_BAR and leaked <= 0
        shown.append(
            [row["scheme"], row["held_out_loss"], 100 * difference, row["ms_per_step"], leaked,
             "holds" if good else "MISSED"]
        )  # fmt: skip
    heads = ["scheme", "held-out loss", "difference %", "ms per step", "bytes leaked", "bar"]
    record.table(f"{STEPS} steps of DDP, two ranks on one GPU", heads, shown)
