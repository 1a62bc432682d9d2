"""commlib.distributed's verbs, called in all the ways that torch's may be called."""

from __future__ import annotations

import datetime
import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

import commlib.distributed as dist
from commlib.integrations import groups
from tests.integrations.ddp_cases import raises, relative
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


def waiting_in_callbacks() -> None:
    """A callback is run by the thread that it waits for."""
    dist.set_policy("int8")
    first, second, third = (mine(64 * N) * k for k in (1, 2, 3))
    inside = [mine(N), mine(10)]
    called: Future[bool] = Future()
    parts = [torch.empty(N) for _ in range(dist.get_world_size())]

    def callback(_: object) -> None:
        try:
            works[1].wait()  # which this thread is to carry out
            dist.all_reduce(inside[0])  # finds the thread busy, or idle
            gathering = dist.all_gather(parts, inside[0], async_op=True)
            gathering.get_future().then(lambda _: dist.all_reduce(inside[1]))
            gathering.wait()
            dist.communicator()._carrier.flush()
            called.set_result(True)
        except BaseException as error:
            called.set_exception(error)

    works = [dist.all_reduce(x, async_op=True) for x in (first, second, third)]
    works[0].get_future().then(callback)
    assert called.result(timeout=30)
    for work, k, x in zip(works, (1, 2, 3), (first, second, third), strict=True):
        work.wait()
        assert relative(x, k * total(64 * N)) < 0.02
    assert relative(inside[0], total(N)) < 0.02
    assert relative(parts[1], total(N)) < 0.02
    assert relative(inside[1], total(10)) < 1e-6
    dist.all_reduce(first)  # the thread goes on
    assert relative(first, dist.get_world_size() * total(64 * N)) < 0.02


def failing_in_callbacks() -> None:
    """What a callback waits for may fail, or take too long."""
    dist.set_policy("int8")
    dist.all_reduce(mine(N))
    caught: Future[BaseException] = Future()
    if dist.get_rank() == 0:
        first, second = mine(N), mine(N)

        def callback(_: object) -> None:
            try:
                work = dist.all_reduce(second, async_op=True)
                work.wait(0.1)
            except RuntimeError as error:
                caught.set_result(error)

        work = dist.all_reduce(first, async_op=True)
        work.get_future().then(callback)
        text = str(caught.result(timeout=30))
        assert "0.1 s" in text
        raises(RuntimeError, "no more calls")(lambda: dist.all_reduce(first))
    else:
        dist.all_reduce(mine(N))
    torch.distributed.barrier()


def first_calls_from_two_threads() -> None:
    """One thread per group; each rank comes to another group first."""
    timeout = datetime.timedelta(seconds=10)
    pair = [dist.new_group([0, 1], timeout=timeout) for _ in range(2)]
    begun = threading.Event()
    connect = groups.channel.communicator

    def connecting(*args: Any, **how: Any) -> Any:
        begun.set()
        return connect(*args, **how)

    def call(group: Any) -> torch.Tensor:
        x = mine(N)
        dist.all_reduce(x, group=group)
        return x

    for group in pair:
        dist.set_policy("int8", group)
    first, second = pair if dist.get_rank() == 0 else reversed(pair)
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as threads:
        patch.setattr(groups.channel, "communicator", connecting)
        results = [threads.submit(call, first)]
        assert begun.wait(10)
        results.append(threads.submit(call, second))
        for result in results:
            assert relative(result.result(), total(N)) < 0.02


def any_strides() -> None:
    """Tensors that lie otherwise than in the order of their indices, compressed and raw."""
    rank, size = dist.get_rank(), dist.get_world_size()

    def laid_out(x: torch.Tensor) -> torch.Tensor:
        return x.to(memory_format=torch.channels_last)

    def check(got: torch.Tensor, expected: torch.Tensor) -> None:
        assert not got.is_contiguous()
        assert relative(got, expected) < (0.02 if scheme == "int8" else 1e-6)

    for scheme, async_op in itertools.product(("int8", "fp32"), (False, True)):
        dist.set_policy(scheme)

        def done(work: Any) -> None:
            assert (work is not None) is async_op  # noqa: B023
            if work is not None:
                work.wait()

        shape = (8, 4, 8, 8)
        x = laid_out(mine(*shape))
        done(dist.all_reduce(x, async_op=async_op))
        check(x, total(*shape))
        x = mine(64, 32).t()
        done(dist.all_reduce(x, async_op=async_op, key="x"))
        check(x, total(64, 32).t())
        x = laid_out(mine(*shape))
        done(dist.broadcast(x, 1, async_op=async_op))
        check(x, values(1, *shape))

        whole = (size * 8, 4, 8, 8)
        out = laid_out(torch.empty(shape))
        done(dist.reduce_scatter_single(out, laid_out(mine(*whole)), async_op=async_op))
        check(out, total(*whole).chunk(size)[rank])
        parts = [laid_out(part) for part in mine(*whole).chunk(size)]
        done(dist.reduce_scatter(out, parts, async_op=async_op, scheme=scheme))
        check(out, total(*whole).chunk(size)[rank])

        rows = torch.cat([values(r, *shape) for r in range(size)])
        out = laid_out(torch.empty(whole))
        done(dist.all_gather_single(out, laid_out(mine(*shape)), async_op=async_op))
        check(out, rows)
        parts = [laid_out(torch.empty(shape)) for _ in range(size)]
        done(dist.all_gather(parts, laid_out(mine(*shape)), async_op=async_op))
        check(parts[1], values(1, *shape))

        out = laid_out(torch.empty(whole))
        splits = None if async_op else [8] * size
        done(dist.all_to_all_single(out, laid_out(mine(*whole)), splits, splits, async_op=async_op))
        check(out, torch.cat([values(r, *whole).chunk(size)[rank] for r in range(size)]))


def any_dtype() -> None:
    """What is not compressed may be of any dtype to be moved, of those that add to be summed."""
    dist.set_policy("fp32")
    rank, size = dist.get_rank(), dist.get_world_size()

    def given(r: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.arange(8 * size).add(r).to(dtype).view(size, 8)

    for dtype in (torch.int16, torch.bool, torch.complex64, torch.float64, torch.float8_e5m2):
        x = given(rank, dtype)
        out = torch.empty(size * size, 8, dtype=dtype)
        dist.all_gather_single(out, x, scheme="fp32")
        assert torch.equal(out, torch.cat([given(r, dtype) for r in range(size)]))
        out = torch.empty(size, 8, dtype=dtype)
        dist.all_to_all_single(out, x, scheme="fp32")
        assert torch.equal(out, torch.stack([given(r, dtype)[rank] for r in range(size)]))
        dist.all_to_all_single(out, x, [1] * size, [1] * size, scheme="fp32")
        assert torch.equal(out, torch.stack([given(r, dtype)[rank] for r in range(size)]))
        dist.broadcast(x, 1, scheme="fp32")
        assert torch.equal(x, given(1, dtype))
    for dtype in (torch.int16, torch.float8_e5m2):
        refused = raises(ValueError, str(dtype), "int32")
        x = given(rank, dtype)
        refused(partial(dist.all_reduce, x, scheme="fp32"))
        refused(partial(dist.reduce_scatter_single, x[0], x, scheme="fp32"))
    for dtype in (torch.int32, torch.complex64, torch.float64):
        expected = sum(given(r, dtype) for r in range(size))
        x = given(rank, dtype)
        dist.all_reduce(x, scheme="fp32")
        assert torch.equal(x, expected)
        out = torch.empty(1, 8, dtype=dtype)
        dist.reduce_scatter_single(out, given(rank, dtype), scheme="fp32")
        assert torch.equal(out[0], expected[rank])  # type: ignore[index]


@pytest.mark.processes
def one_value_and_columns() -> None:
    """A lone value has any stride and is contiguous; a column is flat and is not."""
    rank = dist.get_rank()
    for scheme, check in itertools.product(("fp32", "int8"), ("0", "1")):
        with mock.patch.dict(os.environ, COMMLIB_CHECK=check):
            group = torch.distributed.new_group()
            dist.set_policy(scheme, group)
            lone = torch.full((1, 8), float(rank))[:, 2]
            dist.broadcast(lone, 1, group=group)
            assert lone.item() == 1.0
            dist.all_reduce(lone, group=group)
            assert lone.item() == 2.0
            column = values(rank, 2048, 4)[:, 1]
            parts = [torch.empty(2048) for _ in range(2)]
            dist.all_gather(parts, column, group=group, scheme=scheme)
            for other, part in enumerate(parts):
                expected = values(other, 2048, 4)[:, 1]
                assert relative(part, expected) < (0.02 if scheme == "int8" else 1e-6)
            dist.destroy_process_group(group)


def compiled_around() -> None:
    """A graph breaks at a call, which is what it is without torch.compile."""
    dist.set_policy("int8")

    def step(x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        dist.all_reduce(x, dist.ReduceOp.AVG)
        parts = [torch.empty(N) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return parts[1] / 2

    def ring(x: torch.Tensor) -> torch.Tensor:
        rank, size = dist.get_rank(), dist.get_world_size()
        sending = dist.isend(x, (rank + 1) % size)
        got = torch.empty(N)
        dist.irecv(got, (rank - 1) % size).wait()
        sending.wait()
        return got

    mean = total(N) / dist.get_world_size()
    assert relative(torch.compile(step, backend="eager")(mine(N)), mean) < 0.02
    before = values((dist.get_rank() - 1) % dist.get_world_size(), N)
    assert relative(torch.compile(ring, backend="eager")(mine(N)), before) < 0.02
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        (in_inference_mode, 2),
        (waiting_in_callbacks, 2),
        (failing_in_callbacks, 2),
        (first_calls_from_two_threads, 2),
        (compiled_around, 2),
        (any_strides, 2),
        (one_value_and_columns, 2),
        (any_dtype, 3),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_calls(pool: Pool, case: Callable[[], None], ranks: int) -> None:
    pool.run(case, ranks=ranks)
