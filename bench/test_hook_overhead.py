"""What commlib adds to a training step beside bytes: DDP's backward under each hook.

One process, a group of one rank, so nothing is sent and a difference is the price of the hook; and
a tensor through two ranks that are threads, so nothing waits for a network.

`make bench ARGS="-k hook"`.
"""

from __future__ import annotations

import gc
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import commlib
from commlib.communicator import Communicator
from commlib.transport import ThreadTransport

ROUNDS, WARMUP = 15, 4  # DDP rebuilds its buckets in the second step
HOOKS: dict[str, Callable[[DistributedDataParallel], object] | None] = {
    "ddp": None,
    "torch allreduce": lambda ddp: ddp.register_comm_hook(None, default_hooks.allreduce_hook),
    # torch's bf16 hook refuses gloo
    "torch fp16": lambda ddp: ddp.register_comm_hook(None, default_hooks.fp16_compress_hook),
    "commlib fp32": lambda ddp: commlib.wrap(ddp, "fp32"),
    "commlib int8+ef": lambda ddp: commlib.wrap(ddp, "int8+ef"),
    "commlib int4+ef": lambda ddp: commlib.wrap(ddp, "int4+ef"),
}


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    gc.collect()  # gloo aborts the process where its last reference lives in a cycle until exit


@pytest.mark.usefixtures("group")
@pytest.mark.benchmark(group="hook: backward of 12 layers, 25 small buckets")
@pytest.mark.parametrize("hook", HOOKS)
def test_backward(benchmark: Any, generator: torch.Generator, hook: str) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(256, 256) for _ in range(12)]
    ddp = DistributedDataParallel(torch.nn.Sequential(*layers), bucket_cap_mb=0.125)
    register = HOOKS[hook]
    if register is not None:
        register(ddp)
    x = torch.randn(8, 256, generator=generator)

    def step() -> None:
        ddp.zero_grad(set_to_none=False)
        ddp(x).square().mean().backward()

    benchmark.pedantic(step, rounds=ROUNDS, warmup_rounds=WARMUP)


@pytest.mark.benchmark(group="hook: all_reduce by two threads")
@pytest.mark.parametrize("numel", [4096, 1 << 20], ids=["16KiB", "4MiB"])
@pytest.mark.parametrize("scheme", ["fp32", "bf16", "int8+ef", "int4+ef"])
def test_all_reduce(benchmark: Any, scheme: str, numel: int) -> None:
    torch.set_num_threads(1)
    communicators = [Communicator(rank, scheme) for rank in ThreadTransport.world(2)]
    tensors = [torch.randn(8, numel // 8) for _ in communicators]

    turns: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def other() -> None:
        while turns.get():
            communicators[1].all_reduce(tensors[1], "x", factor=0.5).wait()

    def mine() -> None:
        turns.put(True)
        communicators[0].all_reduce(tensors[0], "x", factor=0.5).wait()

    thread = threading.Thread(target=other)
    thread.start()
    try:
        benchmark.pedantic(mine, rounds=ROUNDS, warmup_rounds=WARMUP)
    finally:
        turns.put(False)
        thread.join()
        for communicator in communicators:
            communicator.close()
    assert torch.equal(tensors[0], tensors[1])


@pytest.mark.usefixtures("group")
@pytest.mark.benchmark(group="raw path: all_reduce of 4 KiB, one rank")
@pytest.mark.parametrize("whose", ["torch", "commlib fp32"])
def test_raw_all_reduce(benchmark: Any, whose: str) -> None:
    x = torch.zeros(1024)
    if whose == "torch":
        benchmark(dist.all_reduce, x)
        return
    communicator = Communicator(policy="fp32")
    communicator.all_reduce(x).wait()  # ranks agree on what they do
    benchmark(lambda: communicator.all_reduce(x).wait())
    communicator.close()
