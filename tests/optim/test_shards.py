"""A centre in shards is the centre: cut evenly, at blocks, and to the bit."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from commlib.optim import (
    EASGD,
    Center,
    Downpour,
    Link,
    Server,
    Sharded,
    connect_shards,
    local,
    shards,
)
from commlib.optim.center import flat
from tests.optim.replicas import backward, model

Named = list[tuple[str, torch.Tensor]]
ALIGN = 32


def names(owned: Sequence[Named]) -> list[list[str]]:
    return [[name for name, _ in pieces] for pieces in owned]


def test_cuts_are_even_and_at_blocks() -> None:
    named = [("a", torch.arange(4096.0).view(64, 64)), ("b", torch.arange(10.0))]
    assert names(shards(named, 1)) == [["a", "b"]]
    assert names(shards(named, 2)) == [["a[0:2048]"], ["a[2048:4096]", "b"]]
    # an even cut is at 1369 and at 2737: to the nearest 1024
    assert names(shards(named, 3)) == [["a[0:1024]"], ["a[1024:3072]"], ["a[3072:4096]", "b"]]
    # and the end of a parameter is a place to cut too
    assert names(shards([("a", torch.zeros(1500)), ("b", torch.zeros(1400))], 2)) == [["a"], ["b"]]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_pieces_are_the_parameters_in_order(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    sizes = [int(n) for n in torch.randint(0, 5000, (9,), generator=generator)]
    named = [(f"p{place}", torch.randn(n, generator=generator)) for place, n in enumerate(sizes)]
    owned = shards(named, count)
    together = flat(tensor for pieces in owned for _, tensor in pieces)
    assert torch.equal(together, flat(tensor for _, tensor in named))
    totals = [sum(tensor.numel() for _, tensor in pieces) for pieces in owned]
    # both ends of a shard are at most half a block from where they should be
    assert max(totals) - sum(sizes) / count <= 1024
    assert len({name for pieces in owned for name, _ in pieces}) == sum(map(len, owned))


def test_pieces_share_memory() -> None:
    x = nn.Parameter(torch.zeros(4096))
    (_, (_, second)) = (pieces[0] for pieces in shards([("x", x)], 2))
    second.fill_(1.0)
    assert float(x.detach().sum()) == 2048


@pytest.mark.parametrize(("count", "align", "told"), [(3, 1024, "gets none"), (0, 1, "count is 0")])
def test_cuts_that_cannot_be(count: int, align: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        shards([("x", torch.zeros(2048))], count, align=align)


def linked(centers: Sequence[Center], named: Named, worker: str, state: Any = None) -> Sharded:
    owned = shards(named, len(centers), align=ALIGN)
    states = [None] * len(centers) if state is None else state["links"]
    return Sharded([local(c, p, worker, s) for c, p, s in zip(centers, owned, states, strict=True)])


def owners(count: int, push: str) -> list[Center]:
    named = list(model().named_parameters())
    return [Center(pieces, push=push) for pieces in shards(named, count, align=ALIGN)]


def worker_of(method: str, module: nn.Module, center: Link | Sharded) -> EASGD | Downpour:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    if method == "EASGD":
        return EASGD(optimizer, center, moving_rate=0.3, period=2)
    return Downpour(optimizer, center, period=2)


@pytest.mark.parametrize("method", ["EASGD", "Downpour"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("push", ["fp32", "int4:block=32:round=nearest"])
def test_a_run_is_that_of_one_centre_bit_for_bit(push: str, count: int, method: str) -> None:
    """Workers that take turns; the rounding of a block is its own affair."""
    whole, cut = Center(model().named_parameters(), push=push), owners(count, push)
    modules: list[list[nn.Sequential]] = []
    for sharded in (False, True):
        made = []
        for rank in range(3):
            module = model()
            named = list(module.named_parameters())
            center = linked(cut, named, f"w{rank}") if sharded else local(whole, named, f"w{rank}")
            made.append((module, worker_of(method, module, center)))
        for step in range(8):
            for rank, (module, worker) in enumerate(made):
                backward(module, rank, step)
                worker.step()
        modules.append([module for module, _ in made])
    assert torch.equal(torch.cat([center.values for center in cut]), whole.values)
    # of 8 steps at period 2; DOWNPOUR has nothing to push before the first
    assert whole.version == 3 * (4 if method == "EASGD" else 3)
    for one, other in zip(*modules, strict=True):
        assert torch.equal(flat(one.parameters()), flat(other.parameters()))


def test_a_run_goes_on_bitwise() -> None:
    def run(centers: list[Center], states: Any, steps: range) -> list[Any]:
        made = []
        for rank in range(2):
            module = model()
            state = states and states[rank]
            link = linked(centers, list(module.named_parameters()), f"w{rank}", state and state[0])
            worker = worker_of("EASGD", module, link)
            if state:
                worker.load_state_dict(state[1])
            made.append((module, worker, link))
        for step in steps:
            for rank, (module, worker, _) in enumerate(made):
                backward(module, rank, step)
                worker.step()
        return [(link.state_dict(), worker.state_dict()) for _, worker, link in made]

    push = "int2"  # rounds stochastically on the way to the owners
    whole, half, again = owners(2, push), owners(2, push), owners(2, push)
    run(whole, None, range(7))
    states = run(half, None, range(3))
    for center, other in zip(again, half, strict=True):
        center.load_state_dict(other.state_dict())
    run(again, states, range(3, 7))
    for center, other in zip(again, whole, strict=True):
        assert torch.equal(center.values, other.values)


def test_workers_on_threads_lose_no_update() -> None:
    centers = owners(3, "fp32")
    start = torch.cat([center.values for center in centers])

    def work(place: int) -> None:
        link = linked(centers, list(model().named_parameters()), f"w{place}")
        for _ in range(20):
            link.push(torch.full_like(link.copy, 0.25))
            link.pull()

    threads = [threading.Thread(target=work, args=(place,), daemon=True) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    found = torch.cat([center.values for center in centers])
    # 80 additions to values below 32 round by at most 2^-20 each
    assert float((found - start - 20.0).abs().max()) < 80 * 2**-20


def test_what_is_refused() -> None:
    link = linked(owners(2, "fp32"), list(model().named_parameters()), "w")
    with pytest.raises(ValueError, match="an update of shape"):
        link.push(torch.zeros(3))
    with pytest.raises(ValueError, match="allowed: some"):
        Sharded([])
    with pytest.raises(ValueError, match="the centre"):
        linked(owners(2, "fp32")[::-1], list(model().named_parameters()), "w")


def test_all_are_asked_before_one_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    link = linked(owners(2, "fp32"), list(model().named_parameters()), "w")
    calls: list[str] = []
    for one in link.links:
        monkeypatch.setattr(one, "request", lambda: calls.append("request"))
        monkeypatch.setattr(one, "receive", lambda: calls.append("receive"))
    link.pull()
    assert calls == ["request", "request", "receive", "receive"]


class Silent:
    """A channel to an owner that is gone."""

    def tell(self, message: object) -> None:
        raise RuntimeError("gone")

    def hear(self) -> Any:
        raise AssertionError

    def close(self) -> None:
        """Nothing."""


def test_one_owner_that_is_gone_leaves_the_others_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    centers = owners(3, "int4")
    named = list(model().named_parameters())
    link, other = linked(centers, named, "w"), linked(centers, named, "other")
    alive, link.links[1]._channel = link.links[1]._channel, Silent()
    other.push(torch.ones_like(other.copy))
    with pytest.raises(RuntimeError, match="gone"):
        link.pull()
    link.links[1]._channel = alive
    link.pull()
    left = [0]
    for one in (link.links[0], link.links[2]):
        monkeypatch.setattr(one, "close", lambda: left.append(1))
    link.links[1]._channel = Silent()
    with pytest.raises(RuntimeError, match="gone"):
        link.close()
    assert sum(left) == 2
    for center, one in zip(centers, link.links, strict=True):
        there = center.session("w").copy
        assert there is not None
        assert torch.equal(there, one.copy)


@pytest.mark.processes
def test_shards_are_served_and_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    named = [("x", torch.zeros(3000))]
    centers = [Center(pieces, push="int4") for pieces in shards(named, 2)]
    servers = [
        Server(center, store, name=f"shard{place}", timeout=30.0).start()
        for place, center in enumerate(centers)
    ]
    how: dict[str, Any] = {"timeout": 20.0}
    link = connect_shards(store, named, "w", 2, **how)
    for _ in range(5):
        link.push(torch.ones(3000))
        link.pull()
    state = link.state_dict()
    link.close()
    again = connect_shards(store, named, "w", 2, **how, state=state)
    assert again.bytes_received < 4 * 3000  # in step: no values
    again.push(torch.ones(3000))
    again.pull()
    assert [center.version for center in centers] == [6, 6]
    assert torch.equal(again.copy, torch.cat([center.session("w").copy for center in centers]))  # type: ignore[misc]
    with pytest.raises(ValueError, match="the state is of 2 shards, not of 3"):
        connect_shards(store, named, "w", 3, **how, state=state)
    for server in servers:
        server.close()
    with pytest.raises(RuntimeError, match="centre 'shard0' has closed"):
        again.pull()
