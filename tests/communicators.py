"""What the tests of the communicator share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from commlib import Communicator, Policy, Scheme
from commlib.policy import Rule
from commlib.transport import ThreadTransport, run_ranks


def only(scheme: str) -> Policy:
    """`scheme` for every tensor, vectors and small ones too."""
    return Policy((Rule(Scheme.parse(scheme)),))


def data(rank: int, numel: int, step: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(1000 * step + rank))


def everything(c: Communicator) -> list[torch.Tensor]:
    """One of each collective, some asynchronous, on the communicator's device; the results."""
    w, n, outs = c.size, 1500, []

    def mine(numel: int, step: int = 0) -> torch.Tensor:
        return data(c.rank, numel, step).to(c.transport.device)

    for step in range(3):
        x, y = mine(n, step), mine(n, step)
        c.all_reduce(x, "w", factor="avg", async_op=step == 1).wait()
        c.all_reduce_segments(y, ("a", "b"), (1000, 500), (2, 2), async_op=True).wait()
        outs += [x, y]
    row, rows, even, parts = (mine(count) for count in (n, n * w, n * w, n * w))
    c.reduce_scatter(row, mine(n * w), "r").wait()
    c.all_gather(rows, mine(n), "g", async_op=True).wait()
    c.all_to_all(even, mine(n * w)).wait()
    c.all_to_all(parts, mine(n * w), out_splits=[n] * w, in_splits=[n] * w).wait()
    part, shares, two = mine(n), mine(n * w), {"keys": ("s", "t"), "sizes": (1000, 500)}
    c.reduce_scatter_segments(part, mine(n * w), ndims=(2, 1), async_op=True, **two).wait()
    c.all_gather_segments(shares, part, ndims=(2, 1), **two).wait()
    z, integers = mine(n), torch.full((8,), c.rank, device=c.transport.device)
    c.broadcast(z, w - 1).wait()
    c.all_reduce(integers)
    return [out.cpu() for out in (*outs, row, rows, even, parts, part, shares, z, integers)]


def on_ranks(size: int, policy: Any, body: Callable[[Communicator], Any], **how: Any) -> list[Any]:
    def rank(t: ThreadTransport) -> Any:
        communicator = Communicator(t, policy, **how)
        try:
            return body(communicator)
        finally:
            communicator.close()

    return run_ranks(size, rank)
