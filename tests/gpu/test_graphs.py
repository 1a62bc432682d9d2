"""CUDA graphs of whole all-reduces: what they replay, and what stays out of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from commlib import Communicator
from tests.communicators import data
from tests.gpu.nccl import NUMEL, Ranks, cpu_ranks, gpu, needs_gpu, on_gpu, remembered, same

pytestmark = [pytest.mark.gpu, needs_gpu]


def replayed(scheme: str, async_op: bool) -> tuple[list[torch.Tensor], int, dict[str, Any]]:
    """An eager step and four replays: the results, what replays allocated, what is remembered."""
    c = on_gpu(scheme)
    c.warmup()
    static = gpu(c.rank)
    c.all_reduce(static, "w", async_op=async_op).wait()
    outs = [static.cpu()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        c.all_reduce(static, "w", async_op=async_op).wait()
    allocated = 0
    for step in range(1, 5):
        static.copy_(gpu(c.rank, step=step))
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        graph.replay()
        allocated += torch.cuda.memory_stats()["allocation.all.allocated"] - before
        outs.append(static.cpu())
    state = remembered(c)
    graph.reset()  # before its communicator of NCCL goes
    c.close()
    return outs, allocated, state


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize(
    "scheme",
    ["fp32", "int4+ef", "int8:round=stochastic", "int4:round=stochastic+ef", "int4+ef@ring"],
)
def test_a_graph_replays_what_calls_would_do(ranks: Ranks, scheme: str, async_op: bool) -> None:
    def on_cpu(c: Communicator) -> tuple[list[torch.Tensor], dict[str, Any]]:
        outs = [data(c.rank, NUMEL, step) for step in range(5)]
        for out in outs:
            c.all_reduce(out, "w")
        return outs, remembered(c)

    for (outs, allocated, state), (want, expected) in zip(
        ranks.run(replayed, scheme, async_op), cpu_ranks(scheme, on_cpu), strict=True
    ):
        assert same(outs, want)
        assert allocated == 0
        for name, value in expected.items():
            # where rounding is to nearest, steps are the host's, and mean nothing
            if "stochastic" in scheme or " steps " not in name:
                assert same(state[name], value), name


def eager_beside_a_graph() -> list[bool]:
    """Messages between replays do not touch the graph's buffers, nor it theirs."""
    c, plain = (on_gpu("int4+ef") for _ in range(2))
    static = gpu(c.rank)
    for one in (c, plain):
        one.all_reduce(x := gpu(c.rank), "w")
        one.all_reduce(x.clone(), "v")
    static.copy_(gpu(c.rank, step=1))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        c.all_reduce(static, "w")
    equal = []
    for step in range(1, 6):
        static.copy_(gpu(c.rank, step=step))
        other, want, beside = (gpu(c.rank, step=step) for _ in range(3))
        graph.replay()
        c.all_reduce(other, "v")
        plain.all_reduce(want, "w")
        plain.all_reduce(beside, "v")
        equal += [torch.equal(static, want), torch.equal(other, beside)]
    graph.reset()
    return equal


def test_messages_go_on_beside_a_graph(ranks: Ranks) -> None:
    assert all(map(all, ranks.run(eager_beside_a_graph)))


def refused() -> tuple[str, bool]:
    """What capturing a call that was never made says; that the communicator still works."""
    c = on_gpu("int4+ef")
    c.all_reduce(gpu(c.rank), "w")
    x, text = gpu(c.rank, NUMEL // 2), ""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            c.all_reduce(x, "new")
    except RuntimeError as error:
        text = str(error)
    torch.cuda.synchronize()
    c.all_reduce(x, "new")
    return text, bool(x.isfinite().all())


def test_a_first_call_is_not_captured(ranks: Ranks) -> None:
    for text, works in ranks.run(refused):
        assert "Make the same call once before capturing" in text
        assert works
