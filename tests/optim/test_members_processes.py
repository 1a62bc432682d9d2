"""Workers that die, stall and come late, as processes of their own."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch.distributed as dist

from commlib.optim import ElasticDiLoCo, Members
from tests.communicators import only
from tests.optim.diloco import shared
from tests.optim.members import train, worker
from tests.optim.models import same
from tests.optim.replicas import model, weights
from tests.processes import Pool

pytestmark = pytest.mark.processes


def member(port: int, **how: Any) -> tuple[Any, ElasticDiLoCo]:
    """A worker of its own, whose store is the test's."""
    dist.destroy_process_group()  # the pool's
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    return worker(Members(store, only("sigma8"), timeout=20.0, grace=3.0), **how)


def dies_amid_an_exchange(port: int) -> Any:
    rank = int(os.environ["RANK"])
    module, one = member(port)
    one.join(at_least=3)
    if rank == 1:
        collective = one.members._try

        def dying(closed: Any, run: Any) -> Exception | None:
            if closed.number == 2:  # its exchange has begun, and it has sent nothing yet
                run = lambda c: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
            return collective(closed, run)

        one.members._try = dying  # type: ignore[method-assign]
    train(module, one, 8, rank)
    ids, theta = one.members.ids, shared(one)
    one.leave()
    return len(ids), theta


@pytest.fixture
def port() -> Any:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port
    del store


def test_the_others_repeat_an_exchange_in_which_one_was_killed(pool: Pool, port: int) -> None:
    first, dead, last = pool.run(dies_amid_an_exchange, port, ranks=3, timeout=120.0, may_die=True)
    assert dead is None
    assert first[0] == last[0] == 2
    assert same(first[1], last[1])
    assert not same(first[1], weights(model()))


def joins_late_and_stalls(port: int) -> Any:
    """Rank 1 comes when rank 0 is at it, then is stopped by rank 0 for longer than the timeout."""
    rank = int(os.environ["RANK"])
    board = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    dist.destroy_process_group()
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    module, one = worker(Members(store, only("sigma8"), timeout=3.0, grace=2.0))
    seen = []
    if rank == 1:
        while not board.check(["begun"]):
            time.sleep(0.02)
        one.join(patience=60.0)
        board.set("pid", str(os.getpid()))
        while not board.check(["end"]):
            train(module, one, one.steps + 1, rank)
            seen.append((one.steps, str(one.members.id)))
            if len({own for _, own in seen}) == 2:
                board.set("back", "1")
        theta = shared(one)
        one.leave()
        return seen, theta
    one.join()
    train(module, one, 4, rank)
    board.set("begun", "1")
    stopped = False
    pid = 0
    after = 0
    while after < 4:
        train(module, one, one.steps + 2, rank)
        time.sleep(0.05)
        seen.append(len(one.members.ids))
        if not stopped and seen[-1] == 2 and board.check(["pid"]):
            pid = int(board.get("pid"))
            os.kill(pid, signal.SIGSTOP)
            stopped = True
        elif pid and seen[-1] == 1:
            os.kill(pid, signal.SIGCONT)
            pid = 0
        if stopped and board.check(["back"]):
            after += 1
    board.set("end", "1")
    one.leave()
    return seen, shared(one)


def test_one_that_joins_late_and_stalls_comes_back(pool: Pool, port: int) -> None:
    (seen, _), (steps, _) = pool.run(joins_late_and_stalls, port, ranks=2, timeout=180.0)
    assert steps[0][0] > 4
    assert len({own for _, own in steps}) == 2
    shape = [seen[0]]
    for count in seen[1:]:
        if count != shape[-1]:
            shape.append(count)
    assert shape == [1, 2, 1, 2]
