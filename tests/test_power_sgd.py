"""PowerSGD as a scheme: which tensors it is for, what is remembered of them, what is refused."""

from __future__ import annotations

import io
import logging
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from commlib import Communicator, Policy, Scheme
from commlib.algorithms import PowerSGD, matrix_of
from commlib.policy import Rule, TensorInfo
from commlib.reshard import redistribute
from commlib.telemetry import typical_error
from tests.communicators import data, on_ranks, only

SCHEME = "fp32+ef@power_sgd:rank=2"
N, M = 60, 40


def low(c: Communicator, steps: range, **how: Any) -> list[torch.Tensor]:
    """All-reduces of a matrix and of a tensor with four dimensions, step by step."""
    outs = []
    for step in steps:
        for key, shape in (("w", (N, M)), ("conv", (20, 8, 3, 3))):
            x = data(c.rank, 2400 if key == "w" else 1440, step).view(shape)
            c.all_reduce(x, key, factor="avg", **how)
            outs.append(x)
    return outs


def of_low_rank(c: Communicator) -> dict[str, Any]:
    (state,) = [s for text, s in c.state_dict()["compressors"].items() if "power_sgd" in text]
    return state


def test_a_tensor_is_a_matrix_by_its_first_dimension() -> None:
    assert matrix_of((20, 8, 3, 3)) == (20, 72)
    assert matrix_of((7,)) == (7, 1)
    assert matrix_of(()) == (1, 1)


@pytest.mark.parametrize(
    ("scheme", "shape", "dtype", "low"),
    [
        (SCHEME, (N, M), torch.float32, True),
        (SCHEME, (N, M), torch.bfloat16, True),
        (SCHEME, (2400,), torch.float32, False),
        (SCHEME, None, torch.float32, False),
        # (n + m) r min_rate against n m: 100 x 2 x 12 = 2400 = 60 x 40
        (SCHEME + ":min_rate=12", (N, M), torch.float32, True),
        (SCHEME + ":min_rate=13", (N, M), torch.float32, False),
        # as many bytes as raw ones: fp32 factors of a quarter of bf16 values are half of them
        ("fp32+ef@power_sgd:rank=12:min_rate=1", (N, M), torch.bfloat16, False),
        ("fp16+ef@power_sgd:rank=12:min_rate=1", (N, M), torch.bfloat16, True),
        ("fp16+ef@power_sgd:rank=23:min_rate=1", (N, M), torch.bfloat16, True),
        ("fp16+ef@power_sgd:rank=24:min_rate=1", (N, M), torch.bfloat16, False),
    ],
)
def test_what_would_not_be_small_enough_travels_raw(
    scheme: str, shape: Any, dtype: torch.dtype, low: bool
) -> None:
    info = TensorInfo("w", 2400, dtype, ndim=2, shape=shape)
    chosen, policy = Policy.parse(scheme).choose(info), Policy.parse(scheme)
    assert isinstance(chosen.algorithm, PowerSGD) == low
    assert chosen.lossless == (not low)
    assert not policy.choose(info._replace(key=None)).remembers, "no key, no memory"


def test_what_is_not_compressed_is_said_and_exact(caplog: pytest.LogCaptureFixture) -> None:
    def body(c: Communicator) -> Any:
        narrow = data(c.rank, 1500).view(500, 3)
        c.all_reduce(narrow, "narrow")
        flat = data(c.rank, 1500)
        c.all_reduce_segments(flat, ("unknown",), (1500,), (2,))
        row = torch.empty(1200)
        c.reduce_scatter(row, data(c.rank, 3600).view(60, 60), "scattered")
        nameless = data(c.rank, 2400).view(N, M)
        c.all_reduce(nameless)
        return narrow.flatten(), flat, row, nameless, c.memory_bytes()

    with caplog.at_level(logging.WARNING, "commlib"):
        results = on_ranks(3, SCHEME, body)
    for rank, (narrow, flat, row, nameless, held) in enumerate(results):
        want = data(0, 1500) + data(1, 1500) + data(2, 1500)
        assert torch.equal(narrow, want)
        assert torch.equal(flat, want)
        total = data(0, 3600) + data(1, 3600) + data(2, 3600)
        assert (row - total.view(3, -1)[rank]).abs().max() < 1e-6
        want = data(0, 2400) + data(1, 2400) + data(2, 2400)
        assert (nameless.flatten() - want).abs().max() < 1e-6
        assert held == 0
    said = " ".join(record.getMessage() for record in caplog.records)
    for name, why in (
        ("narrow", "rank 2 of a 500 x 3 matrix is 1006 values, not 2 times fewer than 1500"),
        ("unknown", "no shape is known here"),
        ("an anonymous tensor", "without a key there is nothing to start from"),
    ):
        assert f"{name} is NOT compressed: under {SCHEME}: " in said
        assert why in said


def test_bad_calls_touch_nothing() -> None:
    def body(c: Communicator) -> None:
        low(c, range(2))
        before, sent = str(c.state_dict()), c.transport.bytes_sent
        x = data(c.rank, 2400)
        two: Any = {"keys": ("a", "b"), "sizes": (1200, 1200)}
        calls: list[tuple[Any, str]] = [
            (lambda: c.all_reduce(x.view(M, N), "w"), r"Q of 'w' has shape \(2, 40\).*\(2, 60\)"),
            (lambda: c.all_reduce(x.view(N, M), "v", scheme=SCHEME[:-1] + "256"), "rank 256 of a"),
            (lambda: c.all_reduce(x, "v", scheme=SCHEME), r"shape \(2400,\).*2400 x 1 matrix"),
            (lambda: c.all_reduce(x.view(N, M), scheme=SCHEME), "remembers residuals under a key"),
            (lambda: c.all_reduce_segments(x, **two, shapes=((30, 40), (30, 30))), "shapes"),
            (lambda: c.all_reduce_segments(x, **two, shapes=((30, 40),)), "shapes"),
        ]
        for call, words in calls:
            with pytest.raises(ValueError, match=words):
                call()
        assert c.transport.bytes_sent == sent
        assert str(c.state_dict()) == before
        low(c, range(2, 3))  # and goes on

    on_ranks(2, SCHEME, body)


def test_ranks_that_disagree_about_a_shape_are_told() -> None:
    def body(c: Communicator) -> str:
        shape = (N, M) if c.rank else (M, N)
        with pytest.raises(RuntimeError, match="shapes: rank") as caught:
            c.all_reduce(data(c.rank, 2400).view(shape), "w")
        assert c.transport.bytes_sent == 0
        return str(caught.value)

    for text in on_ranks(2, SCHEME, body):
        assert "[[60, 40]]" in text
        assert "[[40, 60]]" in text


@pytest.mark.parametrize("scheme", [SCHEME, "fp16+ef@power_sgd", "fp32@power_sgd:rank=3"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(scheme: str) -> None:
    def interrupted(c: Communicator) -> list[torch.Tensor]:
        low(c, range(3))
        file = io.BytesIO()
        torch.save(c.state_dict(), file)
        file.seek(0)
        c.reset()
        assert c.memory_bytes() == 0
        low(c, range(9, 10))
        c.load_state_dict(torch.load(file, weights_only=True))
        return low(c, range(3, 6))

    whole = on_ranks(3, scheme, lambda c: low(c, range(6)))
    for got, want in zip(on_ranks(3, scheme, interrupted), whole, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want[6:], strict=True))


def test_memory_is_residuals_and_factors() -> None:
    def body(c: Communicator) -> None:
        low(c, range(2))
        state = of_low_rank(c)
        assert state["residuals"].keys() == {"w", "conv"}
        assert state["memories"].keys() == {"w|Q", "conv|Q"}
        assert state["memories"]["conv|Q"].shape == (2, 72)
        assert c.memory_bytes() == 4 * (2400 + 1440 + 2 * (M + 72))
        c.rescale(0.5)
        after = of_low_rank(c)
        for name, e in state["residuals"].items():
            assert e.any()
            assert torch.equal(after["residuals"][name], 0.5 * e)
        for name, q in state["memories"].items():
            assert torch.equal(after["memories"][name], q), "Q has no scale"

    on_ranks(2, SCHEME, body)


def test_a_reset_in_place_begins_anew() -> None:
    """As under a CUDA graph, which goes on with the same memory: zeros would never grow."""

    def body(c: Communicator, again: bool) -> list[torch.Tensor]:
        if again:
            low(c, range(5, 7))
            c._compressors.reset(in_place=True)
        return low(c, range(3))

    first = on_ranks(2, SCHEME, lambda c: body(c, False))
    for got, want in zip(on_ranks(2, SCHEME, lambda c: body(c, True)), first, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("factor", ["avg", "sum"])
def test_other_ranks_go_on_with_what_is_owed(factor: str) -> None:
    """Redistributed from 4 ranks to 2 and to 3: what arrives in all is what was given."""

    def run(c: Communicator, steps: range, states: Any = None) -> Any:
        if states is not None:
            c.load_state_dict(states[c.rank])
        got, want = torch.zeros(N, M).double(), torch.zeros(N, M).double()
        for step in steps:
            x = data(c.rank, N * M, step).view(N, M)
            c.all_reduce(x, "w", factor=factor)
            got += x
            scale = 1 / c.size if factor == "avg" else 1.0
            want += scale * sum(data(r, N * M, step).view(N, M).double() for r in range(c.size))
        return got, want, c.state_dict()

    before = on_ranks(4, SCHEME, lambda c: run(c, range(3)))
    for size in (2, 3):
        states = redistribute([state for *_, state in before], size)
        after = on_ranks(size, SCHEME, lambda c, s=states: run(c, range(3, 6), s))
        owed = torch.zeros(N * M).double()
        for *_, state in after:
            (memory,) = [m for m in state["compressors"].values() if m["residuals"]]
            owed += memory["residuals"]["w"].double() * (1 / size if factor == "avg" else 1.0)
        got, want = before[0][0] + after[0][0], before[0][1] + after[0][1]
        assert (want - got - owed.view(N, M)).norm() < 1e-6 * want.norm()
        q = before[0][2]["compressors"][SCHEME]["memories"]["w|Q"]
        assert all(torch.equal(s["compressors"][SCHEME]["memories"]["w|Q"], q) for s in states)
    before[1][2]["compressors"][SCHEME]["memories"]["w|Q"].mul_(2)
    with pytest.raises(ValueError, match=r"memory 'w\|Q'.*not of one moment"):
        redistribute([state for *_, state in before], 2)


def test_rules_of_two_ranks_and_a_later_start() -> None:
    """PowerSGD is switched on after some steps by `from_step`, as its authors do."""
    rules = (
        Rule(Scheme.parse("fp32+ef@power_sgd:rank=4"), key="w*", from_step=2),
        Rule(Scheme.parse("fp32"), key="w*"),
        Rule(Scheme.parse("fp32+ef@power_sgd")),
    )

    def body(c: Communicator) -> Any:
        outs, sent = low(c, range(4)), {}
        for row in c.meter.rows():
            sent[row["key"], row["scheme"]] = row["calls"], row["ratio"]
        return outs, sent

    for outs, sent in on_ranks(2, Policy(rules), body):
        want = [sum(data(r, 2400, s) for r in range(2)).view(N, M) / 2 for s in range(2)]
        assert all((outs[2 * s] - want[s]).abs().max() < 1e-6 for s in range(2))
        assert sent["w", "fp32+ef@power_sgd:rank=4"] == (2, 2400 / 400)
        assert sent["conv", "fp32+ef@power_sgd"][0] == 4


def test_stats_have_the_bytes_and_the_error_of_low_rank() -> None:
    def body(c: Communicator) -> Any:
        x, low = data(c.rank, 2400).view(N, M), data(3, N)[:, None] * data(4, M)
        noise, flat = x.clone(), low.clone()
        c.all_reduce(noise, "noise")
        c.all_reduce(flat, "low")
        sent = sum(row["wire_bytes"] for row in c.meter.rows())
        return sent, c.transport.bytes_sent, c.meter.errors(), x

    for sent, counted, errors, x in on_ranks(2, SCHEME, body):
        assert sent == counted == 2 * 4 * 2 * (N + M)
        best = float(torch.linalg.svdvals(x)[2:].norm() / x.norm())
        assert best <= errors["noise", SCHEME] < 1.1 * best
        assert errors["low", SCHEME] < 1e-5
    assert typical_error(SCHEME) == 1.0


def test_with_what_else_there_is() -> None:
    """Beside other schemes in one bucket, and inside `exact()`, which is the process's."""
    import commlib

    rules = (
        Rule(Scheme.parse("int8+ef"), key="eight"),
        Rule(Scheme.parse(SCHEME), min_ndim=2),
    )
    keys, sizes = ("eight", "w", "norm"), (2400, 2400, 100)
    shapes = ((N, M), (N, M), (100,))

    def body(c: Communicator) -> Any:
        outs = []
        for step in range(3):
            x = data(c.rank, 4900, step)
            with commlib.exact() if step == 1 else nullcontext():
                c.transport.barrier()
                c.all_reduce_segments(x, keys, sizes, (2, 2, 1), shapes=shapes)
                c.transport.barrier()
            c.transport.barrier()
            outs.append(x)
        return outs, c.meter.rows()

    for outs, rows in on_ranks(2, Policy(rules), body):
        for step, x in enumerate(outs):
            want = data(0, 4900, step) + data(1, 4900, step)
            assert torch.equal(x[4800:], want[4800:])
            assert (x[:2400] - want[:2400]).norm() < 0.03 * want[:2400].norm()
            error = (x[2400:4800] - want[2400:4800]).norm() / want[2400:4800].norm()
            assert error < 1e-6 if step == 1 else 0.3 < error < 1.5
        assert {row["scheme"] for row in rows} == {"fp32", "int8:round=nearest+ef", SCHEME}


def test_large_messages_overtake_one_another_with_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In lanes of their own (lane.py), which COMMLIB_CHECK switches off."""

    def body(c: Communicator) -> list[torch.Tensor]:
        xs = [data(c.rank, 1_800_000, step).view(2000, 900) for step in range(4)]
        works = [
            c.all_reduce(x, f"w{place % 2}", factor="avg", async_op=True)
            for place, x in enumerate(xs)
        ]
        for work in works:
            work.wait()
        (plan, *_) = c._plans.values()
        assert plan.messages[0].laned("all_reduce")
        return xs

    want = on_ranks(2, "fp32+ef@power_sgd:rank=8", body)
    monkeypatch.setenv("COMMLIB_CHECK", "1")
    for xs in on_ranks(2, "fp32+ef@power_sgd:rank=8", body):
        assert all(torch.equal(x, y) for x, y in zip(xs, want[0], strict=True))


def test_every_payload_is_checked_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    want = on_ranks(3, only(SCHEME), lambda c: low(c, range(3), async_op=True))
    monkeypatch.setenv("COMMLIB_CHECK", "1")
    for outs in on_ranks(3, only(SCHEME), lambda c: low(c, range(3))):
        assert all(torch.equal(a, b) for a, b in zip(outs, want[0], strict=True))
