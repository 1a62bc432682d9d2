"""A centre over gloo: workers come, die, stall and come again, and nobody else notices."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from commlib.optim import (
    EASGD,
    Add,
    Averaged,
    Center,
    Downpour,
    Link,
    Momentum,
    Node,
    Server,
    connect,
)
from commlib.optim.center import Kind, Message
from tests.processes import Pool

pytestmark = pytest.mark.processes

N = 500


def named(fill: float = 0.0) -> list[tuple[str, torch.Tensor]]:
    return [("x", torch.full((N,), fill))]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def served(store: Any) -> Iterator[tuple[Center, Server, Callable[..., Link]]]:
    center = Center(named(), push="int4")
    with Server(center, store, timeout=30.0) as server:
        yield (
            center,
            server,
            lambda worker, **more: connect(
                store, more.pop("params", named()), worker, timeout=20.0, **more
            ),
        )


def until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def work(port: int, steps: int, victim: int, at: int) -> float:
    """A worker in a process of its own; the victim kills itself in the middle of a push."""
    rank = dist.get_rank()
    there = dist.TCPStore("127.0.0.1", port, is_master=False)
    x = nn.Parameter(torch.zeros(N))
    link = connect(there, [("x", x)], f"w{rank}", timeout=30.0)
    worker = EASGD(torch.optim.SGD([x], lr=0.1), link, moving_rate=0.3, period=1)
    for step in range(steps):
        x.grad = x.detach() - 1
        if rank == victim and step == at:
            link._channel._group.send(  # type: ignore[attr-defined]
                [torch.tensor([Kind.PUSH, 0, 100, 0])], 0, 0x63656E
            ).wait()
            os.kill(os.getpid(), signal.SIGKILL)
        worker.step()
    link.close()
    return float(x.detach().mean())


def test_a_worker_that_is_killed_stops_nobody_and_comes_again(pool: Pool, store: Any) -> None:
    center = Center(named(), push="int4")
    with Server(center, store, timeout=30.0) as server:
        found = pool.run(work, store.port, 40, 1, 20, ranks=3, may_die=True)
        assert server.wait(["w0", "w2"], 20.0)
        assert until(lambda: "w1" not in server.workers)
        assert found[1] is None
        version = center.version
        assert version == 40 + 20 + 40
        assert center.values.isfinite().all()
        again = pool.run(work, store.port, 40, -1, 0, ranks=2)
        assert server.wait(["w0", "w1"], 20.0)
        assert center.version == version + 80
    # all are drawn to 1, from which the centre, from 0 on, holds them back
    assert all(0.5 < mean < 1.1 for mean in [found[0], found[2], *again])
    assert 0.5 < float(center.values.min()) <= float(center.values.max()) < 1.1


def test_a_worker_that_stalls_keeps_nobody_waiting(served: Any) -> None:
    center, server, join = served
    stalled, other = join("stalled"), join("other")
    # half a message: the centre waits for the rest of it, in its own time
    stalled._channel._group.send([torch.tensor([Kind.PUSH, 0, 100, 0])], 0, 0x63656E).wait()
    for _ in range(20):
        other.push(torch.ones(N))
        other.pull()
    assert center.version == 20
    assert set(server.workers) == {"stalled", "other"}


def test_one_that_says_nothing_for_too_long_is_dropped(store: Any) -> None:
    with Server(Center(named()), store, timeout=1.0) as server:
        link = connect(store, named(), "w", timeout=20.0)
        assert until(lambda: not server.workers)
        with pytest.raises(RuntimeError):
            link.pull()
        again = connect(store, named(), "w", timeout=20.0, state=link.state_dict())
        assert again.bytes_received < 4 * N  # it was in step: no values
        again.pull()


def test_one_that_comes_again_cuts_its_old_link(served: Any) -> None:
    center, server, join = served
    old = join("w")
    old.push(torch.ones(N))
    new = join("w")
    with pytest.raises(RuntimeError, match="link of worker 'w' was cut: a newer link"):
        old.pull()
    new.push(torch.ones(N))
    new.pull()
    assert center.version == 2
    assert server.workers == ("w",)


def test_other_parameters_are_refused_and_nothing_else(served: Any) -> None:
    center, _, join = served
    good = join("good")
    with pytest.raises(ValueError, match=r"worker 'bad' has sizes \[3\], the centre \[500\]"):
        join("bad", params=[("x", torch.zeros(3))])
    good.push(torch.ones(N))
    good.pull()
    assert center.version == 1


def test_a_worker_is_told_how_its_centre_adds(store: Any) -> None:
    """So it refuses, before it has sent anything, a rule by which nothing would be conserved."""
    x = nn.Parameter(torch.zeros(N))
    sgd = torch.optim.SGD([x], lr=0.1)
    centers = [Center(named(), rule=rule) for rule in (Momentum(0.9), Averaged(Add()))]
    with (
        Server(centers[0], store, name="momentum", timeout=30.0),
        Server(centers[1], store, name="added", timeout=30.0),
    ):
        link = connect(store, [("x", x)], "w", name="momentum", timeout=20.0)
        with pytest.raises(ValueError, match="EASGD: the rule of its centre does not add"):
            EASGD(sgd, link, moving_rate=0.3)
        with pytest.raises(ValueError, match="Downpour: period is 2: the rule"):
            Downpour(sgd, link, period=2)
        Downpour(sgd, link, period=1)
        again = connect(store, [("x", x)], "w", name="momentum", state=link.state_dict())
        with pytest.raises(ValueError, match="Node: the rule of its centre does not add"):
            Node(Center([("x", x)]), again, 0.5, 1)
        again.close()
        other = connect(store, [("x", x)], "w", name="added", timeout=20.0)
        EASGD(sgd, other, moving_rate=0.3)
        Downpour(sgd, other, period=2)
        other.close()
    assert [center.version for center in centers] == [0, 0]


def test_what_is_no_message_ends_the_link(served: Any) -> None:
    center, server, join = served
    link, other = join("w"), join("other")
    link._channel.tell(Message(Kind.PUSH, 0, torch.zeros(7, dtype=torch.uint8)))
    assert until(lambda: server.workers == ("other",))
    huge = torch.tensor([Kind.PUSH, 0, 1 << 50, 0])
    other._channel._group.send([huge], 0, 0x63656E).wait()
    assert until(lambda: not server.workers)
    assert center.version == 0


def test_workers_at_once_lose_no_update(served: Any) -> None:
    center, server, join = served

    def worker(place: int) -> None:
        link = join(f"w{place}")
        for _ in range(25):
            link.push(torch.full((N,), 0.25))
        link.close()

    threads = [threading.Thread(target=worker, args=(place,), daemon=True) for place in range(4)]
    for thread in threads:
        thread.start()
    assert server.wait([f"w{place}" for place in range(4)], 40.0)
    assert center.version == 100
    # rounding is unbiased: 500 elements' mean is within .02 of what was pushed, an update is 0.25
    assert float(center.values.mean()) == pytest.approx(25.0, abs=0.1)


def test_a_centre_that_closes_says_so(served: Any) -> None:
    _, server, join = served
    link = join("w")
    server.close()
    with pytest.raises(RuntimeError, match="centre 'center' has closed"):
        link.pull()


def test_nobody_serves(store: Any) -> None:
    with pytest.raises(RuntimeError):
        connect(store, named(), "w", timeout=0.5)


def test_a_centre_that_closes_says_so_after_a_push(served: Any) -> None:
    """A push has no answer; what is asked after it has."""
    _, server, join = served
    link = join("w")
    server.close()
    link.push(torch.ones(N))
    with pytest.raises(RuntimeError, match="centre 'center' has closed"):
        link.pull()
    with pytest.raises(RuntimeError, match="link of worker 'w' has ended"):  # and waits for none
        link.pull()


@pytest.mark.parametrize("error", [OSError("no space left"), KeyError("no space left")])
def test_a_save_that_fails_is_told_at_once(served: Any, error: Exception) -> None:
    """Whatever `Center.after` or a rule raises: the worker would wait until its timeout."""
    center, _, join = served

    def save(version: int) -> None:
        raise error

    link = join("w")
    center.after = save
    link.push(torch.ones(N))
    with pytest.raises(RuntimeError, match=f"{type(error).__name__}: .*no space left"):
        link.pull()
    center.after = None
    join("w", state=link.state_dict()).pull()


def test_a_worker_is_told_why_its_link_was_cut(served: Any) -> None:
    center, server, join = served
    link = join("w")
    link._channel.tell(Message(Kind.PUSH, 0, torch.zeros(7, dtype=torch.uint8)))
    assert until(lambda: not server.workers)
    with pytest.raises(RuntimeError, match="message 1 of w/push has 7 bytes"):
        link.pull()
    again = join("w", state=link.state_dict())
    again.push(torch.ones(N))
    again.pull()
    assert center.version == 1


def test_one_killed_before_it_said_its_name_keeps_nobody_out(served: Any, store: Any) -> None:
    _, _, join = served
    store.add("center/arrivals", 1)
    join("w").pull()


def test_the_newest_of_a_name_is_the_last_to_arrive(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the thread that serves an older one is late."""
    center, server, join = served
    late, serve = threading.Event(), Server._serve

    def slow(self: Server, number: int, *args: Any) -> None:
        if number == 1:
            late.wait(20.0)
        serve(self, number, *args)

    monkeypatch.setattr(Server, "_serve", slow)
    old: list[Any] = []

    def come() -> None:
        try:
            old.append(join("w"))
        except RuntimeError as error:
            old.append(error)

    thread = threading.Thread(target=come, daemon=True)
    thread.start()
    assert until(lambda: int(server._store.add("center/arrivals", 0)) == 1)
    new = join("w")
    late.set()
    thread.join(20.0)
    assert "a newer link" in str(old[0])
    new.push(torch.ones(N))
    new.pull()
    assert center.version == 1


def test_a_second_server_of_a_name_has_no_workers_of_the_first(store: Any) -> None:
    center = Center(named())
    with Server(center, store, timeout=20.0):
        link = connect(store, named(), "w", timeout=20.0)
    with Server(center, store, timeout=20.0) as server:
        new = connect(store, named(), "v", timeout=20.0, state=None)
        assert server.workers == ("v",)
        new.push(torch.ones(N))
        new.pull()
    assert center.version == 1
    del link
