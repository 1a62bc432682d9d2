"""Another policy in a running communicator: what is owed goes along, and all ranks go alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from commlib import Communicator, Policy
from commlib.feedback import OWNER
from commlib.policy import Rule, Scheme, TensorInfo
from tests.communicators import data, on_ranks

NAMES, SIZES, NDIMS = ("a", "b", "bias"), (3000, 2000, 50), (2, 2, 1)
TENSORS = {
    name: TensorInfo(name, n, torch.float32, ndim=d)
    for name, n, d in zip(NAMES, SIZES, NDIMS, strict=True)
}
RANKS = 3


def of(a: str, b: str) -> Policy:
    """Schemes for a and b; the bias stays exact, and rides with one of them."""
    return Policy((Rule(Scheme.parse(a), key="a"), Rule(Scheme.parse(b), key="b")))


def send(c: Communicator, steps: range) -> torch.Tensor:
    """The sum of the results of some steps."""
    total = torch.zeros(sum(SIZES), dtype=torch.float64)
    for step in steps:
        x = data(c.rank, sum(SIZES), step)
        c.all_reduce_segments(x, NAMES, SIZES, NDIMS, factor="avg").wait()
        total += x
    return total


def mean(steps: range) -> torch.Tensor:
    parts = [data(rank, sum(SIZES), step) for rank in range(RANKS) for step in steps]
    return torch.stack(parts).double().sum(0) / RANKS


def held(c: Communicator) -> dict[str, set[str]]:
    """By compressor, the names that have a residual other than zero, owners' too."""
    found = {}
    for text, memory in c.state_dict()["compressors"].items():
        found[text] = {name for name, h in memory["residuals"].items() if h.any()}
    return {text: names for text, names in found.items() if names}


def owed(states: list[dict[str, Any]]) -> torch.Tensor:
    """mean of senders' residuals + owners' chunks one after the other, of a, b and bias."""
    parts = []
    for name, n in zip(NAMES, SIZES, strict=True):
        total = torch.zeros(n, dtype=torch.float64)
        for memory in (m for s in states for m in s["compressors"].values()):
            if name in memory["residuals"]:
                total += memory["residuals"][name].double() / RANKS
        chunks = [
            m["residuals"][name + OWNER].double()
            for s in states
            for m in s["compressors"].values()
            if name + OWNER in m["residuals"]
        ]
        parts.append(total + (torch.cat(chunks) if chunks else 0))
    return torch.cat(parts)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("int4+ef", "int4+ef"), ("int2+ef", "int8+ef")),
        (("int2+ef", "int4+ef"), ("int4+ef", "int2+ef")),  # they change places
        (("int4+ef", "int4+ef"), ("int4+ef", "int3+ef")),  # one stays, out of an arena of both
        (("int4+ef", "int4+ef"), ("int2+ef@two_phase:back=int4", "int4+ef")),
    ],
)
def test_what_is_owed_goes_along(before: tuple[str, str], after: tuple[str, str]) -> None:
    def body(c: Communicator) -> Any:
        total = send(c, range(3))
        c.set_policy(of(*after), TENSORS)
        moved = held(c)
        total += send(c, range(3, 7))
        later, state = held(c), c.state_dict()
        c.set_policy(of(*before), TENSORS)
        back, same = held(c), c.state_dict()
        return total, moved, later, state, back, same, total + send(c, range(7, 9)), c.state_dict()

    ranks = on_ranks(RANKS, of(*before), body)
    for total, moved, later, _, back, *_ in ranks:
        # 7 steps give all of the gradients but for what is still owed: fp32 sums, each to 2^-24
        assert torch.equal(total, ranks[0][0])
        for found, schemes in ((moved, after), (later, after), (back, before)):
            homes: dict[str, set[str]] = {}
            for name, text in zip("ab", schemes, strict=True):
                scheme = Scheme.parse(text).resolve()
                second = "int4" if "back" in text else str(scheme.codec)
                homes.setdefault(f"{scheme.codec}+ef", set()).add(name)
                homes.setdefault(_text(second), set()).add(name + OWNER)
            assert found == homes
    states = [rank[3] for rank in ranks]
    error = mean(range(7)) - ranks[0][0] - owed(states)
    assert error.abs().max() < 1e-5
    assert owed(states).abs().max() > 0.05  # there was something to lose
    assert torch.equal(owed(states), owed([rank[5] for rank in ranks]))
    error = mean(range(9)) - ranks[0][6] - owed([rank[7] for rank in ranks])
    assert error.abs().max() < 1e-5


def _text(codec: str) -> str:
    return f"{Scheme.parse(codec + '+ef').resolve().codec}+ef"


def test_it_is_as_if_the_policy_had_been_the_same_all_along() -> None:
    """To the policy it has and back again: the bits of a run where nothing was set."""

    def body(c: Communicator, change: bool) -> torch.Tensor:
        first = send(c, range(2))
        if change:
            c.set_policy(of("int3+ef", "int2+ef"), TENSORS)
            c.set_policy(of("int4+ef", "int4+ef"), TENSORS)
        return torch.stack([first, send(c, range(2, 5))])

    plain = on_ranks(RANKS, of("int4+ef", "int4+ef"), lambda c: body(c, False))
    changed = on_ranks(RANKS, of("int4+ef", "int4+ef"), lambda c: body(c, True))
    assert all(torch.equal(x, plain[0]) for x in (*plain, *changed))


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ("int4+ef", "int4:block=64+ef", "owners' chunks are cut at 128 elements, not at 64"),
        ("int4+ef", "int4+ef:omega=0.5", r"of \+ef, not of \+ef:omega=0.5"),
        ("int4+ef", "int4+ef@hierarchical", "of hosts"),
        ("int4+ef", "int4", "no memory"),
        ("int4+ef", "fp32", "no memory"),
    ],
)
def test_a_residual_that_cannot_go_on_is_refused(before: str, after: str, why: str) -> None:
    def body(c: Communicator) -> None:
        first = send(c, range(2))
        was, state = c.policy, c.state_dict()
        with pytest.raises(ValueError, match=rf"residual of 'a' under int4:.*cannot.*{why}"):
            c.set_policy(of(after, "int4+ef"), TENSORS)
        # nothing has changed, and it goes on
        assert c.policy is was
        for text, memory in c.state_dict()["compressors"].items():
            for name, h in memory["residuals"].items():
                assert torch.equal(h, state["compressors"][text]["residuals"][name])
        send(c, range(2, 4))
        c.reset()
        c.set_policy(of(after, "int4+ef"), TENSORS)  # nothing is owed
        assert first.isfinite().all()
        send(c, range(4, 5))

    on_ranks(RANKS, of(before, "int4+ef"), body)


def test_int8_residuals_take_their_scales_along() -> None:
    def body(c: Communicator) -> Any:
        send(c, range(2))
        before = c.state_dict()["compressors"]["int4:round=nearest+ef:dtype=int8"]
        c.set_policy(of("int2+ef:dtype=int8", "int4+ef:dtype=int8"), TENSORS)
        after = c.state_dict()["compressors"]["int2:round=nearest+ef:dtype=int8"]
        for what in ("residuals", "scales"):
            for name in ("a", "a" + OWNER):
                assert torch.equal(after[what][name], before[what][name])
        return send(c, range(2, 4))

    first, *others = on_ranks(RANKS, of("int4+ef:dtype=int8", "int4+ef:dtype=int8"), body)
    assert all(torch.equal(first, other) for other in others)


def test_ranks_with_other_policies_raise_and_go_on_as_they_were() -> None:
    def body(c: Communicator) -> Any:
        send(c, range(1))
        mine = of("int2+ef", "int4+ef") if c.rank else of("int3+ef", "int4+ef")
        with pytest.raises(RuntimeError, match="set_policy"):
            c.set_policy(mine, TENSORS)
        assert held(c).keys() == {"int4:round=nearest+ef"}
        return send(c, range(1, 2))

    first, *others = on_ranks(RANKS, of("int4+ef", "int4+ef"), body)
    assert all(torch.equal(first, other) for other in others)


def test_gather_gives_all_ranks_the_same_rows() -> None:
    def body(c: Communicator) -> torch.Tensor:
        mine = torch.full((2, 2), c.rank + 1 / 3, dtype=torch.float64)
        return c.gather(mine, "numbers")

    exact = torch.tensor([[r + 1 / 3] * 4 for r in range(RANKS)], dtype=torch.float64)
    for rows in on_ranks(RANKS, "int8+ef", body):
        assert torch.equal(rows, exact)


def test_gather_of_other_sizes_is_refused() -> None:
    def body(c: Communicator) -> None:
        with pytest.raises(RuntimeError, match="numel"):
            c.gather(torch.zeros(1 + c.rank), "numbers")

    on_ranks(RANKS, "int8+ef", body)
