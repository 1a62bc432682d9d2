"""NCCL ranks that share one GPU: each poses as a host of its own, and they talk over sockets."""

from __future__ import annotations

import datetime
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.gpu.posing import one_gpu


def run(seconds: float, ranks: int, function: Callable[..., Any], *args: Any) -> Any:
    """What `function(*args)` returns on rank 0 of `ranks`; all of them must end well, in time."""
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawned = mp.spawn(_rank, (ranks, port, results, function, args), nprocs=ranks, join=False)
    end = time.monotonic() + seconds
    while not spawned.join(timeout=1):
        if time.monotonic() > end:
            for process in spawned.processes:
                process.kill()
            raise TimeoutError(f"{ranks} ranks were not done in {seconds} s")
    return results.get()


def _rank(
    rank: int, ranks: int, port: int, results: Any, function: Callable[..., Any], args: Any
) -> None:
    backend = one_gpu(rank)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(
        backend,
        init_method=address,
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        found = function(*args)
        torch.cuda.synchronize()
        dist.barrier()
        if rank == 0:
            results.put(found)
    finally:
        dist.destroy_process_group()
