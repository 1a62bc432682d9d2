"""Rules that begin at a step: residuals go to the schemes that follow, or the rules are refused."""

from __future__ import annotations

from threading import Barrier
from typing import Any

import pytest
import torch

from commlib import Communicator, Policy
from commlib.feedback import OWNER
from commlib.plans import exact
from commlib.policy import Rule, Scheme, TensorInfo
from tests.communicators import data, on_ranks
from tests.test_set_policy import RANKS, SIZES, TENSORS, held, mean, of, owed, send

BOTH = {name + side for name in "ab" for side in ("", OWNER)}
INT4, INT8 = "int4:round=nearest+ef", "int8:round=nearest+ef"


def later(first: str, then: str, step: int = 3) -> Policy:
    """`then` from `step` on; vectors and small tensors are exact."""
    rules = (Rule(Scheme.parse(then), from_step=step), Rule(Scheme.parse(first)))
    return Policy((Rule(Scheme.parse("fp32"), key="bias"), *rules))


def test_what_is_owed_goes_along() -> None:
    """Gradients given = arrived + owed, under one scheme alone, across the step."""

    def body(c: Communicator) -> Any:
        total = send(c, range(3))
        before = held(c)
        total += send(c, range(3, 5))
        return total, before, held(c), c.state_dict()

    ranks = on_ranks(RANKS, later("int4+ef", "int8+ef"), body)
    for total, before, after, _ in ranks:
        assert torch.equal(total, ranks[0][0])
        assert before == {INT4: BOTH}
        assert after == {INT8: BOTH}
    states = [rank[3] for rank in ranks]
    assert (mean(range(5)) - ranks[0][0] - owed(states)).abs().max() < 1e-5
    assert owed(states).abs().max() > 0.001


def test_as_with_set_policy_at_that_step() -> None:
    """Whatever the call: the bits of a run whose policy was set by hand."""

    more = {n: TensorInfo(n, numel, torch.float32) for n, numel in (("x", 2000), ("rows", 900))}

    def body(c: Communicator, by_hand: bool) -> torch.Tensor:
        outs = []
        for step in range(4):
            if by_hand and step == 2:
                c.set_policy(later("int8+ef", "int8+ef"), {**TENSORS, **more})
            x, rows = data(c.rank, 2000, step), data(c.rank, 900, step)
            c.all_reduce(x, "x", factor="avg", async_op=True)
            part = torch.empty(900 // RANKS)
            c.reduce_scatter(part, rows, "rows").wait()
            outs += [x, part, send(c, range(step, step + 1))]
        return torch.cat(outs)

    by_step = on_ranks(RANKS, later("int4+ef", "int8+ef", 2), lambda c: body(c, False))
    by_hand = on_ranks(RANKS, later("int4+ef", "int4+ef"), lambda c: body(c, True))
    assert all(torch.equal(x, y) for x, y in zip(by_step, by_hand, strict=True))


def test_a_state_from_before_the_step_resumes_bitwise_where_the_step_is_past() -> None:
    def body(c: Communicator) -> None:
        send(c, range(2))
        state = c.state_dict()
        reference = send(c, range(2, 6))
        c.load_state_dict(state)
        assert held(c) == {INT4: BOTH}
        assert torch.equal(send(c, range(2, 6)), reference)
        assert held(c) == {INT8: BOTH}

    on_ranks(RANKS, later("int4+ef", "int8+ef"), body)


def test_a_step_within_an_exact_stretch() -> None:
    together = Barrier(2)  # the stretch is one for all threads

    def body(c: Communicator) -> None:
        send(c, range(2))
        together.wait()
        with exact():
            send(c, range(2, 4))
            assert held(c) == {INT4: BOTH}  # they wait
            together.wait()
        together.wait()
        send(c, range(4, 5))
        assert held(c) == {INT8: BOTH}

    on_ranks(2, later("int4+ef", "int8+ef"), body)


@pytest.mark.parametrize(
    ("first", "then", "why"),
    [
        ("int4+ef", "fp32", "no memory"),
        ("int4+ef", "int8", "no memory"),
        ("int4+ef", "int8+ef:omega=0.5", r"of \+ef, not of \+ef:omega=0.5"),
        ("int4+ef", "int8:block=64+ef", "cut at 128 elements, not at 64"),
        ("int4+ef", "int4+ef@hierarchical", "of hosts"),
        ("int4+ef:dtype=int8", "int8:block=64+ef:dtype=int8", "int8 scales"),
    ],
)
def test_rules_by_which_it_could_not_go_on_are_refused(first: str, then: str, why: str) -> None:
    """With the first call, before anything is sent; and when such a policy is set."""
    policy = later(first, then)

    def body(c: Communicator) -> None:
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"'a' goes by int4.*from step 3 on by.*{why}"):
                send(c, range(1))
        assert c.transport.bytes_sent == 0

    on_ranks(2, policy, body)


def test_what_has_no_residual_may_change_to_anything() -> None:
    def body(c: Communicator) -> None:
        send(c, range(4))

    for first, then in (("fp32", "int4+ef"), ("int4", "fp32"), ("int8", "int4:block=64+ef")):
        on_ranks(2, later(first, then), body)

    def rows(c: Communicator) -> None:  # whose owners owe nothing
        for step in range(4):
            c.reduce_scatter(torch.empty(1000), data(c.rank, 2000, step), "rows")
            c.all_gather(torch.empty(2000), torch.ones(1000), "rows")  # a step, without residuals
        assert held(c).keys() == {"int8:block=64:round=nearest+ef"}

    on_ranks(2, later("int4+ef", "int8:block=64+ef"), rows)


def test_set_policy_goes_by_the_step_of_each_key() -> None:
    """Not by the first: the residual is under the scheme of now, and goes to that of now."""
    unlike = Rule(Scheme.parse("int4+ef:omega=0.5"))

    def rules(text: str) -> Policy:
        return Policy((Rule(Scheme.parse(text), from_step=2), unlike))

    def body(c: Communicator) -> None:
        info = {"w": TensorInfo("w", 3000, torch.float32)}
        for step in range(3):
            c.all_reduce(data(c.rank, 3000, step), "w")
        c.set_policy(rules("int8+ef"), info)
        assert held(c) == {INT8: {"w", "w" + OWNER}}
        c.all_reduce(data(c.rank, 3000, 3), "w")
        # what lies ahead is looked at too
        ahead = Policy((Rule(Scheme.parse("fp32"), from_step=9), Rule(Scheme.parse("int4+ef"))))
        with pytest.raises(ValueError, match=r"from step 9 on by fp32.*no memory"):
            c.set_policy(ahead, info)
        assert held(c) == {INT8: {"w", "w" + OWNER}}
        c.all_reduce(data(c.rank, 3000, 4), "w")

    start = Policy((Rule(Scheme.parse("int4+ef"), from_step=2), Rule(Scheme.parse("fp32"))))
    on_ranks(2, start, body)


def test_ahead_are_the_steps_where_rules_change() -> None:
    policy = Policy(
        (
            Rule(Scheme.parse("int8+ef"), from_step=7, key="a"),
            Rule(Scheme.parse("int4+ef"), from_step=4),
        )
    )
    info = TensorInfo("a", sum(SIZES), torch.float32)
    assert [(s, x.codec.id) for s, x in policy.ahead(info).items()] == [
        (0, "fp32"), (4, "int4"), (7, "int8")
    ]  # fmt: skip
    assert list(policy.ahead(info._replace(step=5))) == [5, 7]
    assert list(of("int4+ef", "int4+ef").ahead(info)) == [0]
