"""commlib.distributed's verbs, called in all the ways that torch's may be called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import commlib.distributed as dist
from tests.integrations.ddp_cases import relative
from tests.processes import Pool
from tests.test_distributed import N, mine, total, values


def in_inference_mode() -> None:
    """Its tensors take no writes outside of it, and the worker thread is outside."""
    dist.set_policy("int8")
    with torch.inference_mode():
        large, small = mine(N), mine(10)
        parts = [torch.empty(N) for _ in range(dist.get_world_size())]
        works = [
            dist.all_reduce(large, dist.ReduceOp.AVG, async_op=True),
            dist.all_reduce(small, dist.ReduceOp.AVG, async_op=True),
            dist.all_gather(parts, mine(N), async_op=True),
        ]
        behind = mine(10)  # a call that waits finds the worker busy
        dist.all_reduce(behind, dist.ReduceOp.AVG)
        for work in works:
            work.wait()
        size = dist.get_world_size()
        assert relative(large, total(N) / size) < 0.02
        assert relative(parts[1], values(1, N)) < 0.02
        for x in (small, behind):
            assert relative(x, total(10) / size) < 1e-6
    dist.all_reduce(small, dist.ReduceOp.AVG)  # outside, as torch takes it
    assert relative(small, total(10) / size) < 1e-6
    dist.all_gather(parts, mine(N))
    x = mine(N)
    dist.all_reduce(x)  # with what the calls in there have left
    assert relative(x, total(N)) < 0.02


@pytest.mark.processes
@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        (in_inference_mode, 2),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_calls(pool: Pool, case: Callable[[], None], ranks: int) -> None:
    pool.run(case, ranks=ranks)
