"""Counters: a device counts as the host does, in places that stay where they are."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import commlib.feedback
from commlib import Communicator
from commlib.counters import Counters, DeviceCounters, HostCounters, counters
from tests.communicators import data, on_ranks, only

CPU = torch.device("cpu")
GROUPS = [("a",), ("b",), ("a", "b"), ("b", "a"), ("b", "c", "d"), ("d",), ("",)]


@pytest.mark.parametrize("seed", range(5))
def test_a_device_counts_as_the_host_does(seed: int) -> None:
    """Whatever travels together, and where a state is loaded in between."""
    choose = random.Random(seed)
    device: Counters = DeviceCounters(CPU)
    host: Counters = HostCounters()
    for _ in range(200):
        names = choose.choice(GROUPS)
        host.advance(names)
        device.advance(names)
        assert int(device.of(names)) == host.of(names)
        if choose.random() < 0.05:
            assert device.state() == host.state()
            loaded = DeviceCounters(CPU)
            loaded.load(host.state())
            device = loaded
    assert device.state() == host.state()
    assert all(type(step) is int for step in device.state().values())


def test_names_that_stay_together_keep_their_scalar() -> None:
    device = DeviceCounters(CPU)
    device.advance(("a", "b"))
    scalar = device.of(("a", "b"))
    assert isinstance(scalar, torch.Tensor)
    assert scalar.dtype == torch.int64
    device.advance(("c",))
    device.advance(("a", "b"))
    assert device.of(("a", "b")) is scalar
    assert int(scalar) == 2


def test_only_random_rounding_on_cuda_counts_on_the_device() -> None:
    cuda = torch.device("cuda", 0)
    assert isinstance(counters(CPU, stochastic=True), HostCounters)
    assert isinstance(counters(cuda, stochastic=False), HostCounters)
    assert isinstance(counters(cuda, stochastic=True), DeviceCounters)


@pytest.mark.parametrize("scheme", ["int4:round=stochastic", "int8:round=stochastic+ef", "ternary"])
def test_ranks_that_count_differently_send_the_same_bytes(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some count on a device; results, and what is saved, are those of ranks that do not."""

    def body(c: Communicator) -> list[Any]:
        outs = []
        for step in range(4):
            x, y = data(c.rank, 2000, step), data(c.rank, 500, step)
            c.all_reduce(x, "w")
            c.all_reduce_segments(y, ("a", "b"), (400, 100), (2, 2), async_op=True).wait()
            c.all_reduce(y[:400].clone(), "a")
            outs += [x, y]
        (saved,) = c.state_dict()["compressors"].values()
        return [*outs, saved["steps"]]

    monkeypatch.setenv("COMMLIB_BACKEND", "reference")  # takes a step of either kind
    expected = on_ranks(3, only(scheme), body)

    def mixed(device: torch.device, *, stochastic: bool) -> Counters:
        made.append(DeviceCounters(CPU) if stochastic and len(made) % 2 else HostCounters())
        return made[-1]

    made: list[Counters] = []
    monkeypatch.setattr(commlib.feedback, "counters", mixed)
    for got, want in zip(on_ranks(3, only(scheme), body), expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(got[:-1], want[:-1], strict=True))
        assert got[-1] == want[-1]
    assert any(isinstance(found, DeviceCounters) for found in made)
