"""Lanes: the same bytes as the library's collectives, and messages that overtake one another."""

from __future__ import annotations

import itertools
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from commlib import Communicator, worker
from commlib.lane import Lane, Together
from commlib.order import Order
from commlib.pending import Exchange
from commlib.traffic import Pending, Timeout
from commlib.transport import ThreadTransport, TorchTransport, Transport, run_ranks
from commlib.waiters import Waiters
from commlib.work import Work
from commlib.worker import Task, Worker

from .communicators import data, on_ranks, only
from .processes import Pool

SIZES = (1, 2, 3, 4, 7)
NUMEL = 80_000


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [0, 1, 5, 1000])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.int64])
def test_a_lane_moves_what_the_transport_moves(size: int, count: int, dtype: torch.dtype) -> None:
    def rank(t: Transport) -> None:
        lane = Lane(t, 0, 1)
        x = (torch.arange(count * size) % 97 + t.rank).to(dtype)
        ours, plain = torch.zeros_like(x), torch.zeros_like(x)
        before = t.bytes_sent
        lane.all_to_all(ours, x).wait()
        sent = t.bytes_sent - before
        t.all_to_all(plain, x).wait()
        assert torch.equal(ours, plain)
        assert sent == t.bytes_sent - before - sent
        mine = ours[:count]
        mine.copy_(x[:count])
        lane.all_gather(ours, mine).wait()  # the input lies inside the output
        t.all_gather(plain, x[:count].clone()).wait()
        assert torch.equal(ours, plain)

    run_ranks(size, rank)


def test_unequal_parts() -> None:
    def rank(t: Transport) -> list[float]:
        splits = [t.rank + s for s in range(3)]
        x, out = torch.full((sum(splits),), float(t.rank)), torch.empty(sum(splits))
        Lane(t, 0, 0).all_to_all(out, x, out_splits=splits, in_splits=splits).wait()
        return out.tolist()

    for r, got in enumerate(run_ranks(3, rank)):
        assert got == [float(s) for s in range(3) for _ in range(r + s)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.all_to_all(torch.zeros(5), torch.zeros(5)), "5 elements, not a multiple of 2"),
        (lambda t: t.all_gather(torch.zeros(5), torch.zeros(3)), "out must hold 2 x inp"),
    ],
)
def test_wrong_calls_are_refused_before_anything_moves(call: Any, message: str) -> None:
    t = ThreadTransport.world(2)[0]
    with pytest.raises(ValueError, match=message):
        call(Lane(t, 0, 0))
    assert t.bytes_sent == 0


def overtake(t: Transport) -> list[float]:
    """Odd ranks issue in the opposite order, and wait in it."""
    found = [0.0, 0.0, 0.0]
    order = [0, 1, 2] if t.rank % 2 == 0 else [2, 0, 1]
    pending = []
    for number in order:
        x = torch.full((t.size * 50_000,), 10.0 * number + t.rank)
        out = torch.empty_like(x)
        pending.append((number, out, Lane(t, 0, number).all_to_all(out, x)))
    for number, out, exchange in pending:
        exchange.wait(20.0)
        found[number] = out.view(t.size, -1).mean(1).sum().item()
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
def test_messages_overtake_one_another(size: int) -> None:
    expected = [sum(10.0 * number + r for r in range(size)) for number in range(3)]
    assert run_ranks(size, overtake) == [expected] * size


def gloo_overtake() -> list[float]:
    return overtake(TorchTransport())


def test_messages_overtake_one_another_on_gloo(pool: Pool) -> None:
    expected = [sum(10.0 * number + r for r in range(3)) for number in range(3)]
    assert pool.run(gloo_overtake, ranks=3) == [expected] * 3


class Held:
    """An exchange that is not done before `gate` opens."""

    def __init__(self, inner: Pending, gate: threading.Event) -> None:
        self.inner, self.gate = inner, gate

    def done(self) -> bool:
        return self.gate.is_set() and self.inner.done()

    def wait(self, timeout: float | None = None) -> None:
        assert self.gate.wait(20.0), "the second message was not issued"
        self.inner.wait(timeout)

    def poll(self, seconds: float, timeout: float) -> bool:
        self.wait(timeout)
        return True


def test_a_slow_message_does_not_keep_the_next_one_off_the_wire(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first message's exchange ends after the second was issued: by turns it never would."""
    gates = [threading.Event() for _ in range(2)]
    held: list[int] = []
    all_to_all = Lane.all_to_all

    def hold_the_first(self: Lane, *args: Any, **kwargs: Any) -> Any:
        exchange = all_to_all(self, *args, **kwargs)
        if self.rank in held:
            gates[self.rank].set()
            return exchange
        held.append(self.rank)
        return Held(exchange, gates[self.rank])

    monkeypatch.setattr(Lane, "all_to_all", hold_the_first)

    def body(c: Communicator) -> list[torch.Tensor]:
        outs = [data(c.rank, NUMEL, 1), data(c.rank, NUMEL, 2)]
        works = [c.all_reduce(x, k, async_op=True) for k, x in zip("ab", outs, strict=True)]
        for work in works:
            work.wait(30.0)
        return outs

    results = on_ranks(2, only("int8+ef"), body)
    assert sorted(held) == [0, 1]
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_laned_and_ordered_messages_mix() -> None:
    """Two-phase ones overtake, rings keep their order; ranks are delayed at random."""

    def body(c: Communicator) -> list[torch.Tensor]:
        delays = torch.rand(24, generator=torch.Generator().manual_seed(c.rank)).tolist()
        outs, works = [], []
        for i, delay in enumerate(delays):
            x = data(c.rank, NUMEL if i % 3 else 1000, i)
            scheme = "int8+ef" if i % 3 else "int8@ring"
            how = {"factor": "avg", "scheme": scheme, "async_op": i % 5 != 0}
            outs.append(x)
            works.append(c.all_reduce(x, f"k{i % 9}", **how))
            time.sleep(0.004 * delay)
        for work in works:
            work.wait(30.0)
        return outs

    results = on_ranks(4, {"rules": [{"scheme": "int8+ef"}]}, body)
    for i, outs in enumerate(zip(*results, strict=True)):
        assert all(torch.equal(out, outs[0]) for out in outs)
        mean = torch.stack([data(r, outs[0].numel(), i) for r in range(4)]).mean(0)
        assert (outs[0] - mean).norm() < 0.05 * mean.norm()


def test_what_goes_by_other_verbs_has_no_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    init = Lane.__init__

    def counted(self: Lane, *args: Any) -> None:
        made.append(args[-1])
        init(self, *args)

    monkeypatch.setattr(Lane, "__init__", counted)

    def body(c: Communicator) -> None:
        c.all_reduce(data(c.rank, NUMEL), scheme="int8@ring")
        c.all_reduce(data(c.rank, NUMEL), scheme="fp32")
        c.broadcast(data(c.rank, NUMEL), 0, scheme="int8")

    on_ranks(4, only("int8+ef"), body)
    assert made == []
    for numel in (100, NUMEL):
        on_ranks(4, only("int8+ef"), lambda c, n=numel: c.all_reduce(data(c.rank, n), "x"))
    assert len(made) == 8


def test_tags_are_numbers_that_gloo_takes() -> None:
    class Recorder:
        rank, size, ranks, timeout = 0, 2, (0, 1), 1.0
        device, tagged, bytes_sent, order = torch.device("cpu"), True, 0, Order()

        def __init__(self) -> None:
            self.tags: list[int] = []

        def send(self, x: torch.Tensor, dst: int, tag: int = 0) -> Any:
            self.tags.append(tag)

        def recv(self, x: torch.Tensor, src: int, tag: int = 0) -> Any:
            assert src == 1

        def posting(self) -> AbstractContextManager[None]:
            return nullcontext()

    recorder: Any = Recorder()
    x = torch.zeros(2)
    for communicator, message, mark in itertools.product((0, 1023), (0, 1, 63), (0, 511)):
        lane = Lane(recorder, communicator, message, mark)
        for _ in range(2):
            lane.all_to_all(torch.zeros(2), x)
    tags = recorder.tags
    assert len(set(tags)) == len(tags)
    assert min(tags) > 1 << 28  # apart from the small numbers of plain sends
    assert max(tags) < 2**31 - (1 << 24)


class Slow:
    """An exchange that is done when told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.event, self.error = threading.Event(), error

    def done(self) -> bool:
        return False

    def wait(self, timeout: float | None = None) -> None:
        if not self.event.wait(timeout):
            raise Timeout(timeout or 0.0, "gone")
        if self.error is not None:
            raise self.error

    def poll(self, seconds: float, timeout: float) -> bool:
        self.wait(timeout)
        return True


def test_a_timeout_names_the_whole_time() -> None:
    first, second = Slow(), Slow()
    threading.Timer(0.05, first.event.set).start()
    with pytest.raises(Timeout, match=r"timed out after 0\.2 s"):
        Together([first, second]).wait(0.2)


def test_waiters_wait_beside_one_another_and_pass_errors_on() -> None:
    woken = threading.Semaphore(0)
    waiters = Waiters(3, woken.release)
    exchanges = [Slow(), Slow(RuntimeError("lost")), Slow()]
    found = [waiters.watch(exchange, 20.0) for exchange in exchanges]
    exchanges[2].event.set()
    assert woken.acquire(timeout=10.0)
    assert [future.done() for future in found] == [False, False, True]
    exchanges[1].event.set()
    assert woken.acquire(timeout=10.0)
    with pytest.raises(RuntimeError, match="lost"):
        found[1].result(0)
    exchanges[0].event.set()
    assert found[0].result(10.0) is None
    waiters.stop()
    assert not any(thread.is_alive() for thread in waiters._threads)


def test_a_stop_leaves_what_waits_for_the_lost() -> None:
    waiters, lost = Waiters(8, lambda: None), Slow()
    for _ in range(8):
        waiters.watch(lost, 20.0)
    start = time.monotonic()
    waiters.stop(1.0)  # for all of them together, not for each
    assert time.monotonic() - start < 6.0
    lost.event.set()


def test_a_slow_look_holds_up_nobody() -> None:
    """The group's store may take its time to answer; calls are queued meanwhile."""
    looking, answered = threading.Event(), threading.Event()

    def look() -> None:
        looking.set()
        assert answered.wait(20.0)

    def steps(pending: Slow) -> Any:
        yield pending

    worker = Worker(20.0, lambda error, tasks: error, look, Order())
    first, second = Slow(), Slow()
    works = [Work(None), Work(None)]
    worker.submit(Task(steps(first), works[0], "first"))
    assert looking.wait(10.0)
    submit = threading.Thread(
        target=worker.submit, args=(Task(steps(second), works[1], "second"),), daemon=True
    )
    submit.start()
    submit.join(10.0)
    queued = not submit.is_alive()
    for event in (answered, first.event, second.event):
        event.set()
    assert queued
    for work in works:
        assert work.wait(10.0)
    worker.stop()


@pytest.mark.parametrize("scheme", ["int8@ring", "int8+ef"])
@pytest.mark.parametrize("async_op", [False, True])
def test_a_rank_learns_of_another_ranks_failure_before_its_own_timeout(
    scheme: str, async_op: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "PATIENCE", 0.1)  # nobody waits for what the waiters wait for

    def body(c: Communicator) -> float:
        c.all_reduce(data(c.rank, NUMEL), "x")  # the plan is agreed on
        start = time.monotonic()
        if c.rank == 1:
            c._carrier.give_up(0.0)
            return 0.0
        with pytest.raises(RuntimeError, match=r"rank 1 .*not done after 0 s"):
            c.all_reduce(data(c.rank, NUMEL), "x", async_op=async_op).wait()
        return time.monotonic() - start

    assert max(on_ranks(2, only(scheme), body, timeout=25.0)) < 20.0


def test_checks_on_one_rank_only_are_found_before_anything_moves() -> None:
    def rank(t: ThreadTransport) -> str:
        c = Communicator(t, only("int8"))
        c._carrier.checking = t.rank == 1
        with pytest.raises(RuntimeError) as caught:
            c.all_reduce(data(t.rank, NUMEL))
        assert t.bytes_sent == 0
        return str(caught.value)

    for text in run_ranks(2, rank):
        assert "COMMLIB_CHECK: rank" in text


class LateWork:
    """A c10d work that is done just after a look at it has timed out."""

    def __init__(self) -> None:
        self.looks = 0

    def is_completed(self) -> bool:
        return self.looks > 0

    def wait(self, timeout: Any) -> None:
        self.looks += 1
        if self.looks == 1:
            time.sleep(timeout.total_seconds())
            raise RuntimeError("Timed out waiting 10ms for recv operation to complete")


def test_a_look_that_just_misses_the_end_is_no_failure() -> None:
    work = LateWork()
    assert Exchange(work, None).poll(0.01, 5.0)
    assert work.looks == 2


def gloo_timeout() -> str:
    t = TorchTransport(timeout=20.0)
    if t.rank == 0:
        x = torch.zeros(1 << 15)
        with pytest.raises(Timeout) as caught:
            Lane(t, 0, 0).all_to_all(torch.zeros_like(x), x).wait(0.5)
        t.post("given up", "")
        return str(caught.value)
    t.read("given up", 20.0)
    return ""


def test_gloo_says_timeouts_in_one_way(pool: Pool) -> None:
    text = pool.run(gloo_timeout, ranks=2)[0]
    assert text.startswith("timed out after 0.5 s: ")
