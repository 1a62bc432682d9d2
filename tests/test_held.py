"""What a rank has no gradient of: which residuals stay behind, and which go along all the same."""

from __future__ import annotations

import pytest
import torch

from commlib import Communicator
from tests.communicators import data, on_ranks, only
from tests.test_hierarchical import on_hosts

SCHEMES = (
    "int4+ef",
    "int8+ef:omega=0.2",
    "int2+ef:dtype=bf16",
    "rotate|eden2+ef",
    "topk:density=0.1|int8+ef",
    "int4|entropy+ef",
    "int4+ef@two_phase:back=int8",
    "int4+ef@two_phase:slices=3",
    "int4+ef@ring",
)
SIZES = (5000, 3000)


def sums(c: Communicator, steps: int, *, idle: tuple[int, ...], hold: bool) -> torch.Tensor:
    """The sums of some steps of which the ranks `idle` have nothing of "b", and hold it or not."""
    total = torch.zeros(sum(SIZES))
    for step in range(steps):
        x = data(c.rank, sum(SIZES), step)
        held: tuple[int, ...] = ()
        if c.rank in idle:
            x[SIZES[0] :] = 0
            held = (1,) if hold else ()
        c.all_reduce_segments(x, ("a", "b"), SIZES, (2, 2), hold=held)
        total += x
    return total


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_others_have_takes_the_residual_along(scheme: str) -> None:
    """A rank that owes nothing and has nothing holds nothing back: its mark changes no bit."""
    want, got = (
        on_ranks(3, only(scheme), lambda c, hold=hold: sums(c, 6, idle=(0, 2), hold=hold))
        for hold in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_of_a_host_too(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = only("int4+ef@hierarchical")
    want, got = (
        on_hosts(monkeypatch, "aabb", scheme, lambda c, h=hold: sums(c, 6, idle=(1, 3), hold=h))
        for hold in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def residuals(c: Communicator) -> dict[str, torch.Tensor]:
    """What is owed of "b", also as an owner."""
    found: dict[str, torch.Tensor] = {}
    for state in c.state_dict()["compressors"].values():
        found |= {key: part for key, part in state["residuals"].items() if key[0] == "b"}
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_nobody_has_stays_zero_and_its_residual_waits(scheme: str) -> None:
    def body(c: Communicator) -> None:
        sums(c, 2, idle=(), hold=False)
        before = residuals(c)
        assert any(part.any() for part in before.values())
        x = data(c.rank, sum(SIZES))
        x[SIZES[0] :] = 0
        c.all_reduce_segments(x, ("a", "b"), SIZES, (2, 2), hold=(1,))
        assert x[: SIZES[0]].any()
        assert not x[SIZES[0] :].any()
        after = residuals(c)
        assert all(torch.equal(part, after[key]) for key, part in before.items())

    on_ranks(3, only(scheme), body)


def test_the_sender_holds_back_what_it_is_told_to() -> None:
    """Its own residual whatever it has; the owner's goes along, as there is a sum."""

    def body(c: Communicator) -> None:
        sums(c, 1, idle=(), hold=False)
        before = residuals(c)
        x = data(c.rank, sum(SIZES), 1)
        c.all_reduce_segments(x, ("a", "b"), SIZES, (2, 2), hold=(1,))
        same = {key: torch.equal(part, before[key]) for key, part in residuals(c).items()}
        assert same == {"b": True, "b|reduced": False}

    on_ranks(3, only("int4+ef"), body)
