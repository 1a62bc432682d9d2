"""Hierarchical schemes over NCCL: groups inside the group, and parts of no equal size."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from commlib import Communicator, planning
from commlib.transport import ThreadTransport, run_ranks
from tests.communicators import data, only
from tests.gpu.nccl import DEVICE, needs_gpu, on_gpu, same
from tests.gpu.posing import one_gpu
from tests.processes import Pool

pytestmark = [pytest.mark.gpu, needs_gpu]

# Rank 1 owns nothing. What ranks say to NCCL (posing.py) is another matter.
NODES = ((0, 1), (2,))


@pytest.fixture(scope="module")
def three() -> Iterator[Pool]:
    pool = Pool(3, one_gpu)
    yield pool
    pool.close()


def messages(c: Communicator) -> list[torch.Tensor]:
    outs = [data(c.rank, n).to(c.transport.device) for n in (5000, 300_000, 5000)]
    for place, x in enumerate(outs):
        c.all_reduce(x, f"k{place % 2}", factor=0.5, async_op=place == 1).wait()
    return [x.cpu() for x in outs]


def on_nccl(scheme: str) -> list[torch.Tensor]:
    planning.identity = lambda: "ab"[dist.get_rank() // 2]
    c = on_gpu(scheme)
    assert c.transport.device.type == DEVICE
    outs = messages(c)
    assert c.nodes == NODES
    c.close()
    return outs


@pytest.mark.parametrize("scheme", ["int4+ef@hierarchical", "int8@hierarchical:inner=bf16"])
def test_results_are_those_of_cpu_ranks(three: Pool, scheme: str) -> None:
    def rank(t: ThreadTransport) -> list[torch.Tensor]:
        c = Communicator(t, only(scheme))
        c.nodes = NODES
        try:
            return messages(c)
        finally:
            c.close()

    assert same(three.run(on_nccl, scheme, timeout=110.0), run_ranks(3, rank))
