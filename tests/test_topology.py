"""Links and topologies: the arithmetic, and numbers that cannot be."""

from __future__ import annotations

import math

import pytest

from commlib.topology import Link, Topology


def test_a_message_costs_latency_and_bytes() -> None:
    link = Link(latency=1e-3, bandwidth=1e6)
    assert link.seconds(5e5) == pytest.approx(0.501)
    assert link.seconds(5e5, messages=3) == pytest.approx(0.503)
    assert Link(0.0, math.inf).seconds(1e12) == 0.0


@pytest.mark.parametrize("latency", [-1e-6, math.nan, math.inf])
def test_latency_that_cannot_be(latency: float) -> None:
    with pytest.raises(ValueError, match=r"latency is .* finite seconds >= 0"):
        Link(latency, 1.0)


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, math.nan])
def test_bandwidth_that_cannot_be(bandwidth: float) -> None:
    with pytest.raises(ValueError, match=r"bandwidth is .* bytes per second > 0"):
        Link(0.0, bandwidth)


def test_hosts_are_one_per_rank() -> None:
    link = Link(0.0, 1.0)
    assert Topology(2, link, ("a", "b")).hosts == ("a", "b")
    with pytest.raises(ValueError, match="hosts names 1 ranks, size is 2"):
        Topology(2, link, ("a",))
    with pytest.raises(ValueError, match="size is 0"):
        Topology(0, link)
