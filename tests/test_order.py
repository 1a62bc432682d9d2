"""Several communicators on one group: what has no tag of its own goes in the order of the calls."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from commlib import Communicator
from commlib.lane import COMMUNICATORS
from commlib.order import Order
from commlib.transport import ThreadTransport, Transport, run_ranks
from tests.communicators import only
from tests.processes import Pool

N = 30_000


def test_tickets_come_in_the_order_in_which_they_were_taken() -> None:
    order, woken = Order(), []
    first, second, third = (order.take("m", lambda n=n: woken.append(n)) for n in range(3))
    assert first.first
    assert not second.first
    second.give_back()  # before its turn: it had nothing to post
    second.give_back()
    assert not third.wait(0.0)
    first.give_back()
    assert third.wait(0.0)
    assert woken == [0, 2]


def test_a_message_that_was_left_out_ends_the_order() -> None:
    order, woken = Order(), []
    first, second, third = (order.take(f"m{n}", lambda n=n: woken.append(n)) for n in range(3))
    second.give_back(lost=True)
    assert woken == [0, 2]
    for later in (lambda: first.first, lambda: third.wait(1.0), lambda: order.take("m3", print)):
        with pytest.raises(
            RuntimeError, match=r"m1 ended before it was all sent.*new process group"
        ):
            later()


def call(c: Communicator, kind: str, x: torch.Tensor, key: str) -> Any:
    if kind == "broadcast":
        return c.broadcast(x, 0, scheme="int8", async_op=True)
    return c.all_reduce(x, key, scheme=kind, async_op=True)


def two_at_once(kind: str, check: str, rounds: int) -> int:
    """Two communicators of a thread each are called in turns; how many sums are wrong."""
    with mock.patch.dict(os.environ, COMMLIB_CHECK=check):
        a, b = (Communicator(policy=only("int8"), timeout=20.0) for _ in range(2))
    sums, wrong = 1 if kind == "broadcast" else a.size, 0
    for number in range(rounds):
        here, there = torch.full((N,), 1.0 + number), torch.full((N,), -1000.0 - number)
        works = [call(a, kind, here, "a"), call(b, kind, there, "b")]
        exact = torch.ones(10)
        a.all_reduce(exact, scheme="fp32")  # on the calling thread, behind what the other has
        for work in works:
            work.wait()
        wrong += abs(here.mean().item() - sums * (1.0 + number)) > 5
        wrong += abs(there.mean().item() + sums * (1000.0 + number)) > 20
        wrong += exact[0].item() != a.size
    a.close()
    b.close()
    return wrong


@pytest.mark.processes
@pytest.mark.parametrize("check", ["0", "1"])
@pytest.mark.parametrize("kind", ["fp32", "int8", "int8@ring", "broadcast"])
def test_two_communicators_of_one_group(pool: Pool, kind: str, check: str) -> None:
    assert pool.run(two_at_once, kind, check, 40, ranks=2) == [0, 0]


def calls_in_callbacks() -> list[float]:
    """A callback on one communicator's thread waits for a call on the other."""
    a, b = (Communicator(policy="fp32", timeout=20.0) for _ in range(2))
    found: list[float] = []
    done = threading.Event()

    def called(_: Any) -> None:
        y = torch.ones(100)
        b.all_reduce(y)
        found.append(y[0].item())
        done.set()

    a.all_reduce(torch.ones(N), async_op=True).get_future().then(called)
    assert done.wait(30.0)
    a.close()
    b.close()
    return found


@pytest.mark.processes
def test_calls_in_callbacks(pool: Pool) -> None:
    assert pool.run(calls_in_callbacks, ranks=2) == [[2.0]] * 2


def another_order(check: str, numels: tuple[int, int]) -> str:
    """Both plans are known; then one rank calls them the other way round."""
    with mock.patch.dict(os.environ, COMMLIB_CHECK=check):
        c = Communicator(policy=only("int8+ef"), timeout=1.5)

    def go(key: str) -> None:
        c.all_reduce(torch.ones(numels["ab".index(key)]), key)

    go("a")
    go("b")
    try:
        for key in "ab" if dist.get_rank() == 0 else "ba":
            go(key)
    except RuntimeError as error:
        return str(error)
    return "nothing was said"


@pytest.mark.processes
@pytest.mark.parametrize("numels", [(1000, 1000), (1000, 30_000)], ids=["alike", "other sizes"])
@pytest.mark.parametrize("check", ["0", "1"])
def test_ranks_that_are_in_different_messages_are_told(
    pool: Pool, check: str, numels: tuple[int, int]
) -> None:
    for rank, text in enumerate(pool.run(another_order, check, numels, ranks=2)):
        assert f"failed on rank {rank} of 2" in text
        assert "key 'a'" in text
        assert "key 'b'" in text


Tried = tuple[str, float]
"""What a call raised, and what it left of a tensor of ones times something."""


def tried(call: Callable[[], object], x: torch.Tensor) -> Tried:
    try:
        call()
    except RuntimeError as error:
        return str(error), x[0].item()
    return "", x[0].item()


def two() -> tuple[Communicator, Communicator]:
    """Raw messages' communicators, whose plans are agreed on."""
    a, b = (Communicator(policy="fp32", timeout=4.0) for _ in range(2))
    for c in (a, b):
        c.all_reduce(torch.ones(N), "z", scheme="int8@ring")
        c.all_reduce(torch.ones(10))
    return a, b


def given_up() -> list[Tried]:
    """One rank waits for a message for less long than the other is late."""
    a, b = two()
    late, x, y = dist.get_rank() == 1, torch.ones(10), torch.ones(10)
    time.sleep(2.0 if late else 0.0)
    a.all_reduce(torch.ones(N), "z", scheme="int8@ring", async_op=True)
    work = a.all_reduce(x, async_op=True)
    return [
        tried(lambda: work.wait(None if late else 0.5), x),
        tried(lambda: b.all_reduce(y), y),
    ]


def interrupted() -> list[Tried]:
    """Ctrl-C while a raw call waits for its turn: nothing was posted."""
    a, b = two()
    x, y = torch.ones(10), torch.ones(10)
    if dist.get_rank() == 0:
        with mock.patch.object(Order, "wait", side_effect=KeyboardInterrupt):  # noqa: SIM117
            with pytest.raises(KeyboardInterrupt):
                a.all_reduce(x)
    return [tried(lambda: a.all_reduce(x), x), tried(lambda: b.all_reduce(y), y)]


def no_thread() -> list[Tried]:
    """Where processes are limited: one rank cannot start its thread."""
    a, b = two()
    x, y, start = torch.ones(10), torch.ones(10), threading.Thread.start

    def refused(self: threading.Thread) -> None:
        if self.name == "commlib" and dist.get_rank() == 0:
            raise RuntimeError("can't start new thread")
        start(self)

    with mock.patch.object(threading.Thread, "start", refused):
        first = tried(lambda: a.all_reduce(x, async_op=True).wait(), x)
    return [first, tried(lambda: b.all_reduce(y), y)]


@pytest.mark.processes
@pytest.mark.parametrize("case", [given_up, interrupted, no_thread])
def test_a_rank_that_leaves_a_message_out_adds_no_other(pool: Pool, case: Any) -> None:
    """Every call ends in an error, or in what it should."""
    found = pool.run(case, ranks=2, timeout=60, group_timeout=4.0)
    for text, value in itertools.chain(*found):
        assert text or value == 2.0, found
    assert any(text for text, _ in itertools.chain(*found))


def test_tags_come_round_again_only_for_communicators_that_are_done() -> None:
    def rank(t: Transport) -> list[str]:
        first, said = Communicator(t, "int8"), []
        for _ in range(COMMUNICATORS - 1):
            t.turn()
        try:
            Communicator(t, "int8")
        except RuntimeError as error:
            said.append(str(error))
        first.close()
        for _ in range(COMMUNICATORS - 1):
            t.turn()
        c = Communicator(t, "int8")
        x = torch.ones(1000)
        c.all_reduce(x)
        return [*said, f"{x.mean():.1f}"]

    for text, mean in run_ranks(2, rank):
        assert "communicator 1024 of this group would have the tags of another" in text
        assert mean == "2.0"


@pytest.mark.parametrize("start", [0, 500, 1000, 1500, 2000])
def test_what_is_gathered_may_lie_anywhere_in_the_output(start: int) -> None:
    def rank(t: ThreadTransport) -> bool:
        c, out = Communicator(t, "fp32"), torch.full((3000,), -1.0)
        x = out[start : start + 1000]
        x.copy_(torch.arange(1000.0) + 1000 * t.rank)
        c.all_gather(out, x, scheme="fp32")
        return torch.equal(out, torch.arange(3000.0))

    assert all(run_ranks(3, rank))
