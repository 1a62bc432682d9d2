"""All-reduce over NCCL's sockets, plain and compressed; ranks must end bitwise equal."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from bench.gpu import ranks
from bench.gpu.record import Record
from commlib import Communicator
from commlib.benchmark.timing import percentile

SIZES = (4 << 10, 1 << 20, 16 << 20, 64 << 20)
"""Bytes of fp32. The smallest shows what an exchange costs by itself: ranks take turns on a GPU."""
SCHEMES = ("bf16@native", "int8+ef", "int4+ef", "int4+ef@two_phase:slices=1")
ROUNDS = 12
BAR = 3.0
"""int4+ef at 64 MiB against NCCL's fp32."""


def measured() -> list[dict[str, object]]:
    """Runs on every rank: seconds of every contestant and size, the slowest rank's."""
    size, rows = dist.get_world_size(), []
    torch.manual_seed(dist.get_rank())
    comms = {scheme: Communicator(policy=scheme, device="cuda") for scheme in SCHEMES}
    for nbytes in SIZES:
        x = torch.randn(nbytes // 4, device="cuda")
        runs: dict[str, Callable[[torch.Tensor], object]] = {"fp32 (NCCL)": dist.all_reduce}
        for scheme, comm in comms.items():
            runs[scheme] = partial(comm.all_reduce, key=f"x{nbytes}")
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        equal = {}
        for k in range(ROUNDS + 2):
            for name, run in runs.items():
                y = x.clone()
                torch.cuda.synchronize()
                dist.barrier()
                start = time.perf_counter()
                run(y)
                torch.cuda.synchronize()
                taken = torch.tensor(time.perf_counter() - start, device="cuda")
                dist.all_reduce(taken, dist.ReduceOp.MAX)
                if k > 1:
                    seconds[name].append(float(taken))
                if k == 1:
                    equal[name] = _same(y)
        plain = percentile(seconds["fp32 (NCCL)"], 50)
        for name, all_seconds in seconds.items():
            p50 = percentile(all_seconds, 50)
            rows.append(
                {
                    "bench": "all_reduce", "ranks": size, "size_bytes": nbytes, "scheme": name,
                    "ms_p50": 1e3 * p50, "ms_p80": 1e3 * percentile(all_seconds, 80),
                    "speedup": plain / p50, "ranks_equal": equal[name],
                }
            )  # fmt: skip
    return rows


def _same(y: torch.Tensor) -> bool:
    """Whether all ranks hold the same bits."""
    first = y.clone()
    dist.broadcast(first, 0)
    different = (first.view(torch.int32) != y.view(torch.int32)).any().int()
    dist.all_reduce(different)
    return not int(different)


def all_reduce(record: Record) -> None:
    """2 and 4 ranks on one GPU."""
    shown = []
    for count in (2, 4):
        for row in ranks.run(90, count, measured):
            held = row["scheme"] == "int4+ef" and row["size_bytes"] == SIZES[-1]
            record.add(**row, bar=BAR if held else None)
            verdict = "" if not held else "holds" if row["speedup"] >= BAR else f"MISSED ({BAR})"
            if not row["ranks_equal"]:
                verdict = "RANKS DIFFER"
            mib = row["size_bytes"] / 2**20
            shown.append(
                [count, mib, row["scheme"], row["ms_p50"], row["ms_p80"], row["speedup"], verdict]
            )
    heads = ["ranks", "MiB", "scheme", "ms p50", "ms p80", "x NCCL fp32", "bar"]
    record.table("All-reduce, ranks as separate hosts over sockets, one GPU", heads, shown)
