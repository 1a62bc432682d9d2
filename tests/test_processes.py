"""The shared ranks themselves, and the c10d transport on them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from commlib.transport import TorchTransport
from tests.processes import Pool, RankError

pytestmark = pytest.mark.processes


def total(x: int) -> float:
    t = torch.tensor([float(x + dist.get_rank())])
    dist.all_reduce(t)
    return t.item()


def one_fails() -> None:
    if dist.get_rank() == 1:
        raise KeyError("mine")


def one_dies() -> int:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return dist.get_rank()


def drawn() -> tuple[float, float, bool]:
    return torch.rand(()).item(), float(np.random.rand()), "torch._dynamo" in sys.modules


def test_ranks_are_forked_with_what_they_need_and_draw_apart() -> None:
    with contextlib.closing(Pool(2)) as new:  # tests have seeded the shared ones
        ours, others = new.run(drawn)
    assert ours[2]
    assert ours[0] != others[0]
    assert ours[1] != others[1]


def test_results_errors_and_deaths(pool: Pool) -> None:
    assert pool.run(total, 10, ranks=3) == [33.0] * 3
    with pytest.raises(RankError, match="KeyError: 'mine'"):
        pool.run(one_fails, ranks=2)
    assert pool.run(total, 1) == [10.0] * 4
    assert pool.run(one_dies, ranks=2, may_die=True) == [0, None]
    with pytest.raises(RankError, match=r"died: \[1\]"):
        pool.run(one_dies, ranks=2)
    with pytest.raises(RankError, match=r"without answer after 0.2 s: \[0, 1\]"):
        pool.run(time.sleep, 30, ranks=2, timeout=0.2)


def verbs() -> None:
    t = TorchTransport(timeout=20.0)
    size = t.size
    for count in (0, 1, 5, 1000, 1 << 16):  # the last goes by sends and receives
        x = torch.arange(count * size, dtype=torch.float32) + 1e6 * t.rank
        rows = torch.arange(count * size, dtype=torch.float32).view(size, count)
        out = torch.empty_like(x)
        t.all_to_all(out, x).wait(10.0)
        assert torch.equal(
            out.view(size, -1), torch.stack([rows[t.rank] + 1e6 * r for r in range(size)])
        )
        mine = out.view(size, count)[t.rank]
        mine.copy_(x[:count])
        t.all_gather(out, mine).wait(10.0)
        assert torch.equal(
            out.view(size, -1), torch.stack([rows[0] + 1e6 * r for r in range(size)])
        )
        x.fill_(t.rank)
        t.broadcast(x, size - 1).wait(10.0)
        assert torch.equal(x, torch.full_like(x, size - 1))
        t.all_reduce(x).wait(10.0)
        assert torch.equal(x, torch.full_like(x, size * (size - 1)))
    splits = [t.rank + r for r in range(size)]
    out = torch.empty(sum(splits))
    x = torch.full((sum(splits),), float(t.rank))
    t.all_to_all(out, x, out_splits=splits, in_splits=splits).wait(10.0)
    assert out.tolist() == [float(r) for r in range(size) for _ in range(t.rank + r)]
    got = torch.empty(3)
    pending = [
        t.recv(got, (t.rank - 1) % size, 7),
        t.send(torch.full((3,), float(t.rank)), (t.rank + 1) % size, 7),
    ]
    for p in pending:
        p.wait(10.0)
    assert got[0] == (t.rank - 1) % size
    t.barrier()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_verb_moves_what_it_says(pool: Pool, ranks: int) -> None:
    pool.run(verbs, ranks=ranks)


def sub_groups() -> Any:
    t = TorchTransport(timeout=20.0)
    if t.rank == 1:
        return None
    sub = t.sub([2, 0]) if t.rank != 3 else t.sub([3])
    x = torch.tensor([float(t.rank)])
    sub.all_reduce(x).wait()
    sub.post(f"from {sub.rank}", str(t.rank))
    first = torch.tensor([float(t.rank)])
    sub.broadcast(first, 0).wait()
    return sub.rank, sub.ranks, x.item(), first.item(), sub.read("from 0", 5.0)


def test_sub_groups(pool: Pool) -> None:
    """new_group sorts its ranks, whatever the order they are given in."""
    results = pool.run(sub_groups)
    assert results[1] is None
    assert results[0] == (0, (0, 2), 2.0, 0.0, "0")
    assert results[2] == (1, (0, 2), 2.0, 0.0, "0")
    assert results[3] == (0, (3,), 3.0, 3.0, "3")


def looks() -> bool:
    """A look that is too short leaves the exchange alone."""
    t = TorchTransport(timeout=20.0)
    x = torch.ones(4)
    if t.rank == 1:
        time.sleep(0.5)
    pending = t.all_reduce(x)
    polls = 0
    while not pending.poll(0.1, 20.0):
        polls += 1
    assert x[0] == t.size
    return polls > 1 or t.rank == 1


def test_polling_does_not_break_an_exchange(pool: Pool) -> None:
    assert pool.run(looks, ranks=2) == [True, True]


def counted() -> tuple[int, int]:
    """Bytes that the ranks say they sent, and that the loopback interface counted, for one run."""
    t = TorchTransport(timeout=20.0)
    big = torch.zeros(1 << 20)
    t.all_reduce(big).wait()
    t.barrier()
    time.sleep(0.2)  # the interface counts late
    before, mine = _loopback(), t.bytes_sent
    t.barrier()
    out = torch.empty(t.size << 18)
    for _ in range(3):
        t.all_reduce(big).wait()
        t.all_to_all(torch.empty_like(big), big).wait()
        t.all_gather(out, big[: 1 << 18]).wait()
        t.broadcast(big, 1).wait()
    sent = torch.tensor([t.bytes_sent - mine])
    t.all_reduce(sent).wait()
    t.barrier()
    time.sleep(0.2)
    return int(sent), _loopback() - before


def _loopback() -> int:
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_agree_with_the_interface(pool: Pool, ranks: int) -> None:
    """Within 3%. Other traffic on this machine can only add, so the smallest of three counts."""
    ratios = []
    for _ in range(3):
        sent, seen = pool.run(counted, ranks=ranks)[0]
        ratios.append(seen / sent)
    assert 0.97 < min(ratios) < 1.03
