"""int8 .. int2 and QSGD: measured errors, gamma, bounds per element, no bias."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from commlib.codecs import QSGD, Int, codec
from commlib.codecs.uniform import BF16_UP
from tests.codecs.measures import (
    check_gamma,
    check_unbiased,
    lognormal,
    mean_nmse,
    nmse,
    student,
)
from tests.contract import data, encoded, round_trip

INTS = [f"int{bits}" for bits in range(8, 1, -1)]


@pytest.mark.parametrize(
    ("text", "vectors", "want", "within"),
    [  # facts of a separate implementation, d = 16384
        ("qsgd:block=tensor", lognormal, 18.7, 0.1),
        ("qsgd:block=tensor", student, 20.2, 0.1),
        ("qsgd:levels=7:block=512", lognormal, 1.17, 0.1),
        ("qsgd:levels=7:block=512", student, 1.27, 0.1),
        ("int4:round=stochastic", lognormal, 0.121, 0.1),
        ("int4:round=stochastic", student, 0.103, 0.1),
        ("int4:round=nearest", lognormal, 0.057, 0.1),
        ("int4:round=nearest", student, 0.049, 0.1),
        ("int8:round=stochastic", lognormal, 4e-4, 0.2),
        ("int8:round=stochastic", student, 3e-4, 0.25),  # one digit is known: .00036 here
    ],
)
def test_nmse(text: str, vectors: object, want: float, within: float) -> None:
    assert mean_nmse(text, vectors, seeds=8) == pytest.approx(want, rel=within)


def test_nearest_has_half_the_error_of_stochastic() -> None:
    x = student(3)
    for bits in (8, 6, 5, 4):
        nearest, random = (nmse(Int(bits, round=r), x) for r in ("nearest", "stochastic"))
        assert random / nearest == pytest.approx(2, rel=0.1)


def test_each_bit_quarters_the_error() -> None:
    x = student(4)
    errors = [nmse(f"int{bits}", x) for bits in (8, 7, 6, 5)]
    for small, large in itertools.pairwise(errors):
        assert large / small == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize("text", [*(f"{t}:round=stochastic" for t in INTS), "qsgd:levels=1"])
def test_t26_stochastic_rounding_has_no_bias(text: str) -> None:
    check_unbiased(text, student(1, 512))


@pytest.mark.parametrize("text", ["qsgd", "qsgd:levels=7:block=512", "qsgd:levels=127:norm=max"])
def test_t26_qsgd_has_no_bias(text: str) -> None:
    check_unbiased(text, lognormal(1, 512))


def test_t26_nearest_rounds_and_does_not_truncate() -> None:
    """No drift towards zero: truncation would give half a step."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(1 << 20, generator=g) * 2 - 1
    x.view(-1, 128)[:, 0] = 127 / 128  # the scale is 1 / 128 where nothing exceeds it
    x = x.clamp(-127 / 128, 127 / 128)
    errors = ((round_trip("int8", x) - x) * 128).double()
    assert float(errors.abs().max()) <= 0.5
    assert abs(float((errors * x.sign()).mean())) < 1e-3
    assert abs(float(errors.mean())) < 1e-3


@pytest.mark.parametrize("text", INTS)
@pytest.mark.parametrize("seed", range(3))
def test_every_element_is_within_half_a_step(text: str, seed: int) -> None:
    x = lognormal(seed, 4096)
    for rounding, steps in (("nearest", 0.5), ("stochastic", 1.0)):
        c = Int(codec(text).bits, round=rounding)  # type: ignore[attr-defined]
        top = x.view(-1, c.block).abs().amax(dim=1, keepdim=True).double()
        bound = steps * BF16_UP * top / c.levels * (1 + 1e-5)
        errors = (round_trip(c, x).view(-1, c.block).double() - x.view(-1, c.block)).abs()
        assert (errors <= bound).all()


def test_the_maximum_is_not_clipped_away() -> None:
    """Scales are rounded up: the top code times the scale reaches the maximum."""
    x = data("random", 128 * 64)
    for text in INTS:
        q = round_trip(text, x).view(-1, 128)
        x_top, q_top = x.view(-1, 128).abs().amax(dim=1), q.abs().amax(dim=1)
        step = x_top * BF16_UP / codec(text).levels  # type: ignore[attr-defined]
        assert ((q_top - x_top).abs() <= 0.5001 * step).all()


def test_ties_go_to_the_even_code() -> None:
    x = torch.zeros(128)
    x[0], x[1:6] = 7.0, torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert round_trip("int4", x)[:6].tolist() == [7, 0, 2, 2, 0, -2]


def worst_nearest(block: int, levels: int, up: float) -> torch.Tensor:
    """A maximum whose scale is rounded up, and all others just past half a step.

    Args:
        up: the maximum over the largest one with the next lower scale, from 1 to 1 + 2^-7.
    """
    top = levels * up
    scale = np.float32(top) / np.float32(levels)
    bits = (scale.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)
    x = torch.full((block,), float(bits.view(np.float32)) * 0.49999)
    x[0] = top
    return x


@pytest.mark.parametrize("text", [*INTS, "int8:block=32", "int4:block=4096", "int2:block=40"])
def test_gamma_bounds_the_worst_case_of_nearest_and_is_reached(text: str) -> None:
    c = codec(text)
    ratios = [
        check_gamma(text, worst_nearest(c.block, c.levels, 1 + share * 2.0**-7))  # type: ignore[attr-defined]
        for share in (0.0, 1e-3, 0.2, 0.5, 0.505, 0.9, 1.0)
    ]
    assert max(ratios) > 0.95


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([*INTS, "int8:block=32", "int3:block=32"]),
    st.lists(st.floats(2.0**-60, 2.0**60, width=32), min_size=1, max_size=130),
    st.integers(0, 2**32 - 1),
)
@example("int8:block=32", [126.5 * 1.003937] + [0.49999] * 31, 0)
def test_gamma_bounds_any_vector(text: str, values: list[float], signs: int) -> None:
    x = torch.tensor(values) * (
        1 - 2 * torch.tensor([signs >> i % 32 & 1 for i in range(len(values))])
    )
    check_gamma(text, x)


@pytest.mark.parametrize("text", ["int8", "int5", "int4", "int3", "int2", "qsgd:norm=max"])
def test_gamma_bounds_the_worst_case_of_stochastic_and_is_reached(text: str) -> None:
    text = text if text.startswith("qsgd") else f"{text}:round=stochastic"
    c = codec(text)
    levels, k = c.format.levels, c.block - 1  # type: ignore[attr-defined]
    step = 1 / levels
    t = ((1 + k * step * step) ** 0.5 - 1) / (k * step)
    ratios = []
    for top in (1.0, 1.0001, 1.004, 1.0078):
        x = torch.full((c.block,), t)  # type: ignore[attr-defined]
        x[0] = top
        ratios.append(check_gamma(text, x * levels, n=256))
    assert max(ratios) > 0.9


def test_gamma_of_the_l2_norm() -> None:
    """QSGD, lemma 3.1: min(d / s^2, sqrt(d) / s); the scale is rounded up by at most 2^-7."""
    assert QSGD(levels=4, block="tensor").gamma(16384) == pytest.approx(32, rel=0.01)
    assert QSGD(levels=4, block="tensor").gamma(256) == pytest.approx(4, rel=0.02)
    assert QSGD(levels=4, block="tensor").gamma() == float("inf")
    for text in ("qsgd", "qsgd:levels=1", "qsgd:levels=7:block=512", "qsgd:levels=127"):
        d = codec(text).block  # type: ignore[attr-defined]
        check_gamma(text, torch.ones(d), n=64)
        check_gamma(text, lognormal(2, d), n=64)
        spike = torch.full((d,), 1e-3)
        spike[0] = 1
        check_gamma(text, spike, n=64)


def test_qsgd_variance_is_the_formula() -> None:
    """E|Q - v|^2 = sum of s^2 f (1 - f), f the fraction of v / s, with the scale on the wire."""
    x = lognormal(5, 512)
    c = codec("qsgd:levels=7:block=512")
    wire = encoded(c, x)
    scale = float(wire[-16:-14].view(torch.bfloat16)[0])
    assert scale == pytest.approx(float(x.norm()) / 7, rel=2.0**-7)
    fraction = (x.double() / scale).frac().abs()
    want = float((scale**2 * fraction * (1 - fraction)).sum() / x.double().square().sum())
    got = sum(nmse(c, x, step) for step in range(400)) / 400
    assert got == pytest.approx(want, rel=0.05)


def test_widths() -> None:
    assert [codec(t).bits_per_element for t in INTS] == pytest.approx(
        [b + 0.125 for b in range(8, 1, -1)], abs=1e-3
    )
    bits = {levels: QSGD(levels).format.bits for levels in (1, 2, 3, 4, 7, 8, 63, 64, 127)}
    assert bits == {1: 2, 2: 3, 3: 3, 4: 4, 7: 4, 8: 5, 63: 7, 64: 8, 127: 8}
