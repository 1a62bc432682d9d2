"""Feedback: output plus residual is input; the equation; what is refused; texts and keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from commlib.feedback import ErrorFeedback, Plain, feedback
from commlib_kernels import Layout
from tests.compressors import made, residual, send
from tests.contract import data

CODED = ["int8", "int4", "int2", "sign", "fp8", "bf16", "natural", "sign:block=tensor"]


@pytest.mark.parametrize("text", CODED)
def test_input_is_output_plus_residual(text: str) -> None:
    """v = Q(v) + h': what arrived so far and what is held add up to what was put in."""
    c = made(text)
    sent, put = torch.zeros(1000, dtype=torch.float64), torch.zeros(1000, dtype=torch.float64)
    for step in range(20):
        x = data("random", 1000, step).clamp(-8, 8)
        held = residual(c, "w") if step else torch.zeros(1000)
        out = send(c, "w", x)
        assert torch.equal(residual(c, "w"), (x + held) - out)
        sent, put = sent + out, put + x
    error = (put - sent - residual(c, "w")).abs().max()
    assert error < 1e-3 * put.abs().max()


def test_without_a_key_or_feedback_nothing_is_held() -> None:
    x = data("random", 500)
    for c, key in ((made("int2"), None), (made("int2", ""), "w")):
        assert send(c, key, x).equal(send(c, key, x))
        assert c.nbytes() == 0
        assert c.state_dict()["residuals"] == {}


def test_feedback_recovers_what_rounding_loses() -> None:
    """A gradient below half a step never arrives alone, and arrives on average with feedback."""
    x = torch.full((128,), 0.01)
    x[0] = 1
    plain, remembering = made("int2", ""), made("int2")
    assert send(plain, "w", x)[1:].eq(0).all()
    mean = sum(send(remembering, "w", x) for _ in range(400)) / 400
    torch.testing.assert_close(mean, x, rtol=0, atol=1.1 / 400)


@pytest.mark.parametrize("rates", [(0.2, 1.0, 1.0), (0.1, 0.9, 1.0), (1, 1, 0.2), (0.8, 0.9, 0.5)])
@pytest.mark.parametrize("text", ["qsgd", "int4:round=stochastic", "int3"])
def test_the_rule_is_the_equation(text: str, rates: tuple[float, float, float]) -> None:
    """h' = beta h + omega (g - Q(g + alpha h)) in fp64, step after step (ECQ-SGD, LoCo)."""
    alpha, beta, omega = rates
    c = made(text, f"ef:alpha={alpha}:beta={beta}:omega={omega}")
    h = np.zeros(700)
    for step in range(30):
        g = data("random", 700, step).clamp(-4, 4)
        q = send(c, "w", g)
        want = beta * h + omega * (g.double().numpy() - q.double().numpy())
        h = residual(c, "w").double().numpy()  # compared step by step: rounding is not chaotic so
        np.testing.assert_allclose(h, want, rtol=0, atol=2e-6)


def test_the_residual_is_what_is_coded() -> None:
    """alpha h joins the next message: a zero gradient sends the residual itself."""
    c = made("int8", "ef:alpha=0.5:beta=1.0")
    send(c, "w", data("random", 256))
    h = residual(c, "w")
    assert send(c, "w", torch.zeros(256)).equal(send(made("int8", ""), "w", 0.5 * h))


REFUSED = [
    ("ternary", "ef", "5.21"),
    ("int2:round=stochastic", "ef", "5.21"),
    ("qsgd", "ef", "2.03"),
    ("int4", "ef:alpha=2", "2.26"),
    ("int8", "ef:beta=2", r"1\.0"),
    ("sign", "ef:beta=0.9", "1.1"),
]
ALLOWED = [
    ("int2", "ef"),
    ("sign", "ef"),
    ("sign:block=tensor", "ef"),
    ("int4:round=stochastic", "ef"),
    ("natural", "ef"),
    ("fp8", "ef"),
    ("ternary", "ef:alpha=0.2:beta=0.9"),
    ("qsgd", "ef:alpha=0.2:beta=1"),
    ("int4", "ef:omega=0.2"),
    ("int8", "ef:beta=1:dtype=int8:omega=0.2"),
    ("fp32", "ef"),
    ("ternary", ""),
]


@pytest.mark.parametrize(("text", "rule", "number"), REFUSED)
def test_pairs_that_diverge_are_refused_with_the_numbers(text: str, rule: str, number: str) -> None:
    with pytest.raises(
        ValueError, match=rf"{text}\+ef.* diverges: .* = {number}\S* must be below 1"
    ):
        made(text, rule)


@pytest.mark.parametrize(("text", "rule"), ALLOWED)
def test_pairs_that_converge_are_allowed(text: str, rule: str) -> None:
    made(text, rule)


def test_the_refused_do_diverge_and_the_allowed_do_not() -> None:
    """QSGD with gamma 5.7: classic feedback grows without bound, ECQ's (0.2, 1) does not."""

    def growth(rates: tuple[float, float, float]) -> float:
        c = made("qsgd:block=512", "")
        c.feedback = ErrorFeedback(*rates)  # past the check
        for step in range(40):
            send(c, "w", data("random", 512, step).clamp(-2, 2))
        return float(residual(c, "w").norm())

    with pytest.raises(ValueError, match="diverges"):
        made("qsgd:block=512")
    assert growth((1, 1, 1)) > 1e4
    assert growth((0.2, 1, 1)) < 300


def test_whole_tensor_scales_are_checked_when_the_size_is_known() -> None:
    """qsgd over a tensor: gamma is sqrt(d) / s, so (.2, 1) holds for 1024 and not for 4096."""
    c = made("qsgd:block=tensor", "ef:alpha=0.2:beta=1")
    send(c, "small", data("random", 1024))
    with pytest.raises(ValueError, match=r"diverges: .* with gamma = 16\.1"):
        send(c, "large", data("random", 4096))


def test_texts() -> None:
    assert feedback("") == Plain()
    assert str(Plain()) == ""
    for text in ("ef", "ef:alpha=0.2:beta=0.9", "ef:omega=0.2:dtype=int8", "ef:beta=0.123456789"):
        assert str(feedback(text)) == text
        assert feedback(text) == eval(repr(feedback(text)))
    assert feedback("ef:alpha=1") == ErrorFeedback() == ErrorFeedback(1, 1, 1)
    assert len({ErrorFeedback(1), ErrorFeedback(1.0)}) == 1


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("eff", "'eff' does not exist; allowed: ef"),
        ("ef:bta=1", "'bta=1'; allowed: alpha, beta, omega, dtype; did you mean 'beta'"),
        ("ef:beta", "option 'beta'"),
        ("ef:beta=x", "beta='x'; allowed: a number"),
        ("ef:beta=nan", "beta=nan; allowed: a finite number"),
        ("ef:dtype=fp16", "dtype='fp16'; allowed: fp32, bf16, int8"),
    ],
)
def test_bad_texts_are_refused(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        feedback(text)


def test_keys_must_fit_the_message() -> None:
    c, x = made("int4"), data("random", 200)
    with pytest.raises(ValueError, match="2 names for 1 segments"):
        send(c, ("a", "b"), x)
    with pytest.raises(ValueError, match="names a segment twice"):
        send(c, ("a", "a"), x, Layout((100, 100)))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_rows_of_a_stacked_message_move_with_their_names(dtype: str) -> None:
    """One residual per parameter and row, whatever else is in the message."""
    sizes, rows = {"a": 60, "b": 140, "c": 33}, 3
    x = {name: data("random", n * rows).view(rows, n) for name, n in sizes.items()}

    def message(c: Any, *names: str) -> dict[str, torch.Tensor]:
        layout = Layout(tuple(sizes[n] for n in names), ranks=rows, stacked=True)
        got = send(c, names, torch.cat([x[n] for n in names], 1).view(-1), layout)
        parts = got.view(rows, -1).split([sizes[n] for n in names], 1)
        return dict(zip(names, parts, strict=True))

    apart, together = (made("int4", f"ef:dtype={dtype}") for _ in range(2))
    for group in (("a", "b"), ("b", "c"), ("c", "a", "b"), ("c",)):
        alone = {name: message(apart, name)[name] for name in group}
        for name, got in message(together, *group).items():
            assert torch.equal(got, alone[name]), (group, name)
    residuals = together.state_dict()["residuals"]
    assert {name: tuple(r.shape) for name, r in residuals.items()} == {
        name: (rows, n) for name, n in sizes.items()
    }
