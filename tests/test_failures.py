"""Communicator over real gloo processes: results, and what the living say of the dead.

`bench/faults.py` does the same at random moments, many times.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from commlib import Communicator
from tests.communicators import data, only
from tests.processes import Pool

pytestmark = pytest.mark.processes

TIMEOUT = 3.0


def stream(scheme: str) -> list[torch.Tensor]:
    """Messages of many sizes in flight at once: small ones by collectives, large ones by sends."""
    c = Communicator(policy=only(scheme), timeout=30.0)
    outs, works = [], []
    for i, numel in enumerate((1, 100, 5000, 300_000, 2_000_000, 70_000, 4097)):
        outs.append(data(c.rank, numel, i))
        works.append(c.all_reduce(outs[-1], f"k{i}", factor="avg", async_op=i != 2))
    for work in works:
        work.wait()
    c.close()
    return [out[::97].clone() for out in outs]


@pytest.mark.parametrize("scheme", ["fp32", "int4+ef", "bf16@native", "int8+ef@ring"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_stream_of_messages(pool: Pool, scheme: str, ranks: int) -> None:
    results = pool.run(stream, scheme, ranks=ranks)
    for i, numel in enumerate((1, 100, 5000, 300_000, 2_000_000, 70_000, 4097)):
        mean = torch.stack([data(r, numel, i) for r in range(ranks)]).mean(0)[::97]
        assert all(torch.equal(result[i], results[0][i]) for result in results)
        error = (results[0][i] - mean).norm() / mean.norm()
        assert (
            error
            < {"fp32": 1e-6, "int4+ef": 0.3, "bf16@native": 0.02, "int8+ef@ring": 0.03}[scheme]
        )


def messages_until_it_fails(victim: int, signal_number: int) -> tuple[str, float, str, str]:
    """The error, the seconds it took, what a later call says, and what state_dict says."""
    c = Communicator(policy=only("int4+ef"), timeout=TIMEOUT)
    for step in range(3):
        c.all_reduce(data(c.rank, 1_000_000, step), "w")
    work = c.all_reduce(data(c.rank, 1_000_000, 3), "w", async_op=True)
    if c.rank == victim:
        os.kill(os.getpid(), signal_number)
    start = time.monotonic()
    try:
        work.wait()
        for step in range(100):
            c.all_reduce(data(c.rank, 1_000_000, step), "w")
    except RuntimeError as error:
        text, seconds = str(error), time.monotonic() - start
    later = state = ""
    try:
        c.all_reduce(torch.ones(10))
    except RuntimeError as error:
        later = str(error)
    try:
        c.state_dict()
    except RuntimeError as error:
        state = str(error)
    return text, seconds, later, state


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_is_named(pool: Pool, victim: int) -> None:
    results = pool.run(messages_until_it_fails, victim, signal.SIGKILL, ranks=3, may_die=True)
    assert results[victim] is None
    for rank, result in enumerate(results):
        if rank != victim:
            text, seconds, later, state = result
            assert "all_reduce of key 'w'" in text
            assert f"no answer from rank {victim} (process " in text
            assert "which has ended" in text
            assert seconds < TIMEOUT + 5.0
            assert "takes no more calls" in later
            assert "residuals of w" in state


def one_comes_with_another_size() -> str:
    c = Communicator(policy="int8+ef", timeout=TIMEOUT)
    before = c.transport.bytes_sent
    try:
        c.all_reduce(torch.ones(4000 + c.rank // 2), "w")
    except RuntimeError as error:
        assert c.transport.bytes_sent == before
        x = torch.ones(3000)
        c.all_reduce(x, "v")  # still usable
        c.close()
        return str(error)
    return ""


def test_different_sizes_raise_on_all_ranks_before_anything_is_sent(pool: Pool) -> None:
    for text in pool.run(one_comes_with_another_size, ranks=3):
        assert "key 'w'" in text
        assert "4000" in text
        assert "4001" in text
        assert "rank 2" in text


def one_stays_away() -> str:
    c = Communicator(policy="int8+ef", timeout=1.0)
    if c.rank == 1:
        time.sleep(4.0)
        return ""
    start = time.monotonic()
    try:
        c.all_reduce(torch.ones(40, 100), "w")
    except RuntimeError as error:
        assert time.monotonic() - start < 6.0
        return str(error)
    return "nothing raised"


def test_an_absent_rank_is_named(pool: Pool) -> None:
    results = pool.run(one_stays_away, ranks=3)
    for text in (results[0], results[2]):
        assert "no word from rank 1" in text
        assert "it never used this communicator" in text


def sub_group() -> Any:
    """Ranks 0 and 2 of four, by a group made with new_group."""
    group = dist.new_group([0, 2])
    if dist.get_rank() not in (0, 2):
        return None
    c = Communicator(group, only("int8+ef"), timeout=20.0)
    x = torch.full((300_000,), float(dist.get_rank() + 1))
    c.all_reduce(x, "w", factor="avg", async_op=True).wait()
    y = torch.full((1000,), float(dist.get_rank()))
    c.broadcast(y, 1)
    out = torch.empty(600_000)
    c.all_gather(out, torch.full((300_000,), float(dist.get_rank())))
    c.close()
    return c.rank, c.size, x[0].item(), y[0].item(), out[0].item(), out[-1].item()


def test_a_sub_group_of_ranks_that_are_not_neighbours(pool: Pool) -> None:
    first, second, third, fourth = pool.run(sub_group)
    assert second is None
    assert fourth is None
    near = [pytest.approx(v, rel=0.01, abs=1e-6) for v in (2.0, 2.0, 0.0, 2.0)]
    assert first == (0, 2, *near)
    assert third == (1, 2, *near)
