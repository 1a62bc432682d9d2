"""Ranks of NCCL that share one GPU: see tests/processes.py for how they are run.

NCCL refuses two ranks on one device of one host, so each says that it is a host of its own, and
what they exchange goes through sockets on loopback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from commlib import Communicator
from tests.communicators import data, on_ranks, only
from tests.gpu.posing import one_gpu
from tests.processes import Pool

DEVICE = "cuda"
NUMEL = 300_000
BUSY = 1_500_000_000  # cycles: about a second

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Ranks:
    """`run(function, *args)`: what it returned on each of two ranks."""

    def __init__(self) -> None:
        self._pool = Pool(2, one_gpu)

    def run(self, function: Callable[..., Any], *args: Any, ranks: int = 2) -> list[Any]:
        return self._pool.run(function, *args, ranks=ranks, timeout=110.0)

    def close(self) -> None:
        self._pool.close()


def cpu_ranks(scheme: str, body: Callable[[Communicator], Any]) -> list[Any]:
    """What `body` returns on two ranks on CPU."""
    return on_ranks(2, only(scheme), body)


def on_gpu(scheme: str) -> Communicator:
    return Communicator(policy=only(scheme), device=DEVICE)


def gpu(rank: int, numel: int = NUMEL, step: int = 0) -> torch.Tensor:
    return data(rank, numel, step).to(DEVICE)


def busy() -> torch.cuda.Event:
    """Keep the current stream busy; an event at the end of that."""
    torch.cuda._sleep(BUSY)
    event = torch.cuda.Event()
    event.record()
    return event


def remembered(c: Communicator) -> dict[str, Any]:
    """Residuals and step counters, flat."""
    return {
        f"{scheme} {kind} {name}": value.cpu() if isinstance(value, torch.Tensor) else value
        for scheme, saved in c.state_dict()["compressors"].items()
        for kind, values in saved.items()
        for name, value in values.items()
    }


def same(x: Any, y: Any) -> bool:
    """Whether two results are equal, tensors bit for bit."""
    if isinstance(x, torch.Tensor):
        return torch.equal(x, y)
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[key], y[key]) for key in x)
    if isinstance(x, list | tuple):
        return len(x) == len(y) and all(map(same, x, y))
    return bool(x == y)
