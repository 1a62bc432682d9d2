"""Redistribution: what results are owed is conserved, whatever the ranks, dtypes and collectives.

    delivered before + delivered after + owed at the end = all that was to be summed

holds for classic error feedback up to fp32 rounding: a wrong factor, cut, order or scale breaks it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from commlib import Communicator
from commlib.reshard import _loaded, _stored, redistribute
from commlib_kernels.layout import Layout
from tests.communicators import data, on_ranks, only

State = dict[str, Any]
SIZES = {"a": 3000, "b": 1300, "c": 77}
BLOCK = 128
ULP = 2.0**-24


def dense(memory: State, name: str) -> torch.Tensor:
    """A residual in fp64."""
    h = memory["residuals"][name].double()
    if name not in memory["scales"]:
        return h
    scales = memory["scales"][name].view(torch.bfloat16).double()
    steps = scales.view(*h.shape[:-1], -1).repeat_interleave(BLOCK, -1)
    return h * steps[..., : h.shape[-1]]


def owed(states: list[State], name: str, factor: float) -> torch.Tensor:
    """What the next result of `name` is owed (alpha 1), in fp64: senders', then owners'."""
    total, chunks = torch.zeros(()), []
    for state in states:
        for memory in state["compressors"].values():
            if name in memory["residuals"]:
                total = total + factor * dense(memory, name).flatten()
            if f"{name}|reduced" in memory["residuals"]:
                chunks.append(dense(memory, f"{name}|reduced"))
    return total + torch.cat(chunks) if chunks else total.double()


def run(c: Communicator, steps: range, factor: Any, op: str) -> tuple[State, State, State]:
    """Messages of seeded data: what arrived (all rows of it), what should have, the state."""
    got = {name: torch.zeros(n).double() for name, n in SIZES.items()}
    want = {name: torch.zeros(n).double() for name, n in SIZES.items()}
    scale = {"avg": 1 / c.size, "sum": 1.0}.get(factor, factor)
    for step in steps:
        for number, (name, n) in enumerate(SIZES.items()):
            x = data(c.rank, n, 100 * step + number)
            if op == "reduce_scatter":
                row = torch.empty(n // c.size)
                c.reduce_scatter(row, x, name, factor=factor)
                place = slice(c.rank * row.numel(), (c.rank + 1) * row.numel())
                got[name][place] += row
            else:
                c.all_reduce(x, name, factor=factor)
                got[name] += x
            for rank in range(c.size):
                want[name] += scale * data(rank, n, 100 * step + number).double()
    return got, want, c.state_dict()


def on(size: int, policy: str, states: list[State] | None, *args: Any) -> tuple[Any, Any, Any]:
    def body(c: Communicator) -> tuple[State, State, State]:
        if states is not None:
            c.load_state_dict(states[c.rank])
        return run(c, *args)

    ranks = on_ranks(size, only(policy), body)
    got, want, _ = ranks[0]
    if args[-1] == "reduce_scatter":
        got = {name: sum(rank[0][name] for rank in ranks) for name in SIZES}
    return got, want, [rank[2] for rank in ranks]


# A residual of int4 is at most half a step, a 14th of the largest value: 4.5 of this data, and the
# residual itself. Kept as bf16 or int8 it is rounded when each of 4 messages is sent and when it is
# redistributed, on both sides, by at most 2^-9 of itself or half a 127th of the largest.
HALF = 5.0 / 14
ROUNDED = {"fp32": 1e-6, "bf16": 10 * HALF * 2**-9, "int8": 10 * HALF / 254}


@pytest.mark.parametrize(("before", "after"), [(1, 3), (2, 3), (4, 2), (3, 7), (7, 4), (3, 1)])
@pytest.mark.parametrize("factor", ["avg", "sum", 0.375])
def test_nothing_is_lost_from_w_to_other_ranks(before: int, after: int, factor: Any) -> None:
    conserved("int4+ef", before, after, factor)


@pytest.mark.parametrize(
    "policy",
    [
        "int4+ef@ring",
        "int4:block=64+ef@two_phase:back=int8",
        "sign:block=tensor+ef",
        "bf16+ef",
        "int4+ef:dtype=bf16",
        "int4+ef:dtype=int8",
    ],
)
@pytest.mark.parametrize("factor", ["avg", "sum"])
def test_every_collective_and_residual(policy: str, factor: Any) -> None:
    conserved(policy, 4, 3, factor)


@pytest.mark.parametrize("policy", ["int4+ef", "int4+ef:dtype=int8"])
@pytest.mark.parametrize("factor", ["avg", "sum"])
def test_rows_of_a_reduce_scatter(
    policy: str, factor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "b", 1296)
    monkeypatch.setitem(SIZES, "c", 72)
    conserved(policy, 4, 3, factor, "reduce_scatter")


def conserved(policy: str, before: int, after: int, factor: Any, op: str = "all_reduce") -> None:
    def share(size: int) -> float:
        """What the result takes a sender's residual times; a ring's is part of the result."""
        return 1.0 if "ring" in policy else {"avg": 1 / size, "sum": 1.0}.get(factor, factor)

    got, want, states = on(before, policy, None, range(2), factor, op)
    new = redistribute(states, after)
    more, wanted, end = on(after, policy, new, range(2, 4), factor, op)
    tolerance = ROUNDED[policy.partition("dtype=")[2] or "fp32"]
    tolerance *= 1 if factor == "avg" else max(before, after)
    for name in SIZES:
        debt = owed(states, name, share(before))
        assert before == 1 or debt.abs().max() > 20 * tolerance or "dtype" in policy
        assert (owed(new, name, share(after)) - debt).abs().max() <= tolerance, name
        total = got[name] + more[name] + owed(end, name, share(after))
        assert (total - want[name] - wanted[name]).abs().max() <= tolerance, name


def synthetic(ranks: int, n: int, align: int, factor: Any, seed: int) -> list[State]:
    """States as `all_reduce` leaves them, of random residuals."""
    generator = torch.Generator().manual_seed(seed)
    cuts = Layout((n,), ranks=ranks, align=align)
    states = []
    for rank in range(ranks):
        begin, end = cuts.cut(0, rank)
        residuals = {
            "w": torch.randn(n, generator=generator),
            "w|reduced": torch.randn(end - begin, generator=generator),
        }
        memory = {
            "residuals": residuals,
            "scales": {},
            "shares": {"w": [ranks, align, factor], "w|reduced": [ranks, align, 1.0]},
            "steps": {"w": 5, "w|reduced": 5 + rank},
            "memories": {},
        }
        states.append(
            {
                "rank": rank,
                "world_size": ranks,
                "compressors": {"int4+ef": memory},
                "steps": {},
                "copies": {},
            }
        )
    return states


def share(factor: Any, ranks: int) -> float:
    return 1 / ranks if factor == "avg" else factor


RANKS = st.integers(1, 7)


@given(RANKS, RANKS, st.integers(1, 700), st.sampled_from([32, 128]), st.sampled_from(["avg", 0.3]))
def test_any_ranks_and_sizes(before: int, after: int, n: int, align: int, factor: Any) -> None:
    states = synthetic(before, n, align, factor, seed=n)
    new = redistribute(states, after)
    if before == after:
        assert all(a == b for a, b in zip(new, states, strict=True))  # the very tensors
        return
    debt = owed(states, "w", share(factor, before))
    large = owed(
        [{**s, "compressors": {"c": magnitudes(s["compressors"]["int4+ef"])}} for s in states],
        "w",
        share(factor, before),
    )
    for ranks, other in ((after, new), (before, redistribute(new, before))):
        error = (owed(other, "w", share(factor, ranks)) - debt).abs()
        assert (error <= (before + after + 4) * ULP * large).all()
        cuts = Layout((n,), ranks=ranks, align=align)
        for rank, state in enumerate(other):
            memory = state["compressors"]["int4+ef"]
            begin, end = cuts.cut(0, rank)
            assert memory["residuals"]["w|reduced"].shape == (end - begin,)
            assert memory["steps"] == {"w": 5, "w|reduced": 4 + before}
            assert (state["rank"], state["world_size"]) == (rank, ranks)
            assert memory["shares"]["w"] == [ranks, align, factor]


def magnitudes(memory: State) -> State:
    return {**memory, "residuals": {n: h.abs() for n, h in memory["residuals"].items()}}


def changed(state: State, kind: str, name: str, value: Any) -> State:
    memory = state["compressors"]["int4+ef"]
    return {
        **state,
        "compressors": {"int4+ef": {**memory, kind: {**memory[kind], name: value}}},
    }


def test_states_that_are_not_of_one_run_are_refused() -> None:
    states = synthetic(3, 500, 128, "avg", seed=0)
    four = synthetic(4, 500, 128, "avg", seed=0)
    short = changed(states[1], "residuals", "w", torch.zeros(499))
    other = changed(states[1], "shares", "w", [3, 64, "avg"])
    alone = changed(states[0], "residuals", "v", torch.zeros(1))
    alone = changed(alone, "shares", "v", [3, 128, "avg"])
    renamed = {**states[1], "compressors": {"int8+ef": states[1]["compressors"]["int4+ef"]}}
    for wrong, words in (
        ([], "no states"),
        (states[:2], "ranks 2 to 2 of 3 are missing"),
        ([states[1]], "rank 0 is next, this is rank 1 of 3"),
        ([states[0], four[1]], "rank 1 of 3 is next, this is rank 1 of 4"),
        ([states[0], short], r"\(499,\) on rank 1, \(500,\)"),
        ([states[0], other], "'w' of int4\\+ef on rank 1 fits no other"),
        ([alone, *states[1:]], "rank 1 has no residuals of v"),
        ([states[0], renamed], "int8\\+ef, the ranks before it of int4\\+ef"),
    ):
        with pytest.raises(ValueError, match=words):
            redistribute(wrong, 2)


def test_what_cannot_be_carried_on_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Loudly, with names and bytes; what can is carried on all the same."""
    states = synthetic(2, 500, 128, "avg", seed=0)
    states = [changed(s, "memories", "w|q", torch.ones(3)) for s in states]
    states = [changed(s, "residuals", "node", torch.ones(7)) for s in states]
    states = [changed(s, "shares", "node", [4, 128, "avg"]) for s in states]
    new = redistribute(states, 3)
    assert "2 ranks redistributed among 3: dropped, and starting from zero" in caplog.text
    assert "memory 'w|q' (24 bytes), residual 'node' of int4+ef (56 bytes)" in caplog.text
    assert new[0]["compressors"]["int4+ef"]["residuals"].keys() == {"w", "w|reduced"}
    caplog.clear()
    assert redistribute(states, 2) == states
    assert caplog.text == ""
    redistribute(synthetic(2, 500, 128, "avg", seed=0), 3)
    assert caplog.text == ""
    redistribute(synthetic(2, 500, 128, "avg", seed=0), 1)
    assert "one rank sends nothing" in caplog.text


@pytest.mark.parametrize(("kind", "share"), [("bf16", 2.0**-9), ("int8", 0.01)])
def test_rounding_is_told(caplog: pytest.LogCaptureFixture, kind: str, share: float) -> None:
    _, _, states = on(2, f"int4+ef:dtype={kind}", None, range(2), "avg", "all_reduce")
    caplog.clear()
    redistribute(states, 3)
    told = float(caplog.text.partition("rounding lost ")[2].split()[0])
    assert 0 < told < share


def test_an_int8_residual_is_stored_as_the_kernels_do() -> None:
    """The largest of a block is 127 steps; blocks that are all but zero are zero."""
    x = torch.cat([data(0, 300), torch.full((128,), 2.0**-110), torch.zeros(5)])
    codes, scales = _stored(x, torch.int8, BLOCK)
    assert scales is not None
    again = _loaded(codes, scales, BLOCK)
    steps = scales.view(torch.bfloat16).float()
    assert scales.numel() == 4
    assert codes[:128].abs().max() in (126, 127)
    assert ((x - again).abs() <= steps.repeat_interleave(BLOCK)[: x.numel()] / 2 + 2.0**-110).all()
    assert not again[384:].any()


def test_a_communicator_takes_its_own_rank_only() -> None:
    def body(c: Communicator) -> None:
        c.all_reduce(data(c.rank, 3000), "w")
        mine, before = c.state_dict(), c.memory_bytes()
        for wrong in ({**mine, "rank": 1 - c.rank}, {**mine, "world_size": 5}):
            with pytest.raises(ValueError, match=f"rank {wrong['rank']} of {wrong['world_size']}"):
                c.load_state_dict(wrong)
        for wrong in ({"foo": 1}, {}):
            with pytest.raises(ValueError, match="no state of a communicator"):
                c.load_state_dict(wrong)
        (text,) = mine["compressors"]
        broken = {**mine, "compressors": {text: {"residuals": {}}}}
        with pytest.raises(ValueError, match="no memories, scales, shares, steps"):
            c.load_state_dict(broken)
        assert c.memory_bytes() == before  # what was refused has changed nothing

    on_ranks(2, only("int4+ef"), body)
