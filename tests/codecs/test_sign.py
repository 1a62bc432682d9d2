"""sign, TernGrad and natural compression against their closed formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commlib.codecs import Natural, Sign, Ternary, codec
from tests.codecs.measures import (
    D,
    check_gamma,
    check_unbiased,
    lognormal,
    mean_nmse,
    mean_of_encodings,
    nmse,
    student,
)
from tests.contract import data, round_trip


@pytest.mark.parametrize(
    ("text", "vectors", "want", "within"),
    [  # facts of a separate implementation, d = 16384
        ("ternary:block=tensor", lognormal, 11.1, 0.15),
        ("ternary:block=tensor", student, 12.2, 0.3),  # follows the largest of 16384: see below
        ("natural", lognormal, 0.082, 0.1),
        ("natural", student, 0.083, 0.1),
        ("sign:block=tensor", lognormal, 0.633, 0.05),
        ("sign:block=tensor", student, 0.583, 0.05),
    ],
)
def test_nmse(text: str, vectors: object, want: float, within: float) -> None:
    assert mean_nmse(text, vectors, seeds=8) == pytest.approx(want, rel=within)


@pytest.mark.parametrize("vectors", [lognormal, student])
def test_sign_error_is_the_formula(vectors: object) -> None:
    """1 - |v|_1^2 / (d |v|_2^2), to the bf16 of the scale squared."""
    assert callable(vectors)
    x = vectors(0)
    v = x.double()
    want = 1 - float(v.abs().sum()) ** 2 / (D * float(v @ v))
    assert nmse("sign:block=tensor", x) == pytest.approx(want, abs=2.0**-16)


def test_sign_blocks_have_their_own_means() -> None:
    x = data("random", 1024)
    q = round_trip("sign", x).view(-1, 128)
    means = x.view(-1, 128).double().abs().mean(dim=1, keepdim=True)
    want = means.to(torch.bfloat16).float() * x.view(-1, 128).sign()
    assert q.equal(want)


def test_t24_sign_of_a_zero_is_a_sign_but_padding_is_nothing() -> None:
    """A zero inside a block decodes to the mean; zeros beyond the end do not lower it."""
    x = torch.tensor([4.0, -4.0, 0.0, 4.0, -4.0])
    q = round_trip("sign", x)
    assert q.abs().unique().numel() == 1
    assert q[0].item() == pytest.approx(16 / 5, rel=2.0**-8)
    assert torch.equal(q.sign(), torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0]))


@pytest.mark.parametrize("vectors", [lognormal, student])
def test_terngrad_error_is_the_formula(vectors: object) -> None:
    """s |v|_1 / |v|^2 - 1, with s the maximum (in bf16, rounded up)."""
    assert callable(vectors)
    x = vectors(0)
    v = x.double()
    scale = float(round_trip("ternary:block=tensor", x).abs().max())
    assert 1 <= scale / float(v.abs().max()) <= 1 + 2.0**-7
    want = scale * float(v.abs().sum()) / float(v @ v) - 1
    assert nmse("ternary:block=tensor", x) == pytest.approx(want, rel=0.1)


@pytest.mark.parametrize("text", ["ternary", "ternary:block=512", "natural"])
def test_t26_no_bias(text: str) -> None:
    check_unbiased(text, student(1, 512))


@pytest.mark.parametrize("block", [32, 128, 4096])
def test_gamma_of_ternary_is_about_half_the_root_of_the_block(block: int) -> None:
    c = Ternary(block)
    assert c.gamma() == pytest.approx(math.sqrt(block) / 2 - 0.5, rel=0.15)
    t = (math.sqrt(block) - 1) / (block - 1)
    x = torch.full((block,), t)
    x[0] = 1
    assert check_gamma(str(c), x, n=256) > 0.9


@pytest.mark.parametrize(
    "text", ["sign", "sign:block=32", "sign:block=4096", "ternary:round=nearest"]
)
def test_gamma_bounds_the_worst_case_of_biased_codecs(text: str) -> None:
    block = codec(text).format.block
    for top in (1.0, 1 + 2.0**-8, 1 + 2.0**-8 + 2.0**-20, 1.5, 1.99):
        x = torch.zeros(block)
        x[block // 2] = top
        check_gamma(text, x)
        check_gamma(text, x + 0.49 * top)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["sign:block=32", "sign:block=tensor", "natural:round=nearest"]),
    st.lists(
        st.one_of(st.floats(2.0**-60, 2.0**60, width=32), st.just(0.0)), min_size=1, max_size=70
    ).filter(any),
)
def test_gamma_bounds_any_vector(text: str, values: list[float]) -> None:
    check_gamma(text, torch.tensor(values))


def test_gamma_of_sign_over_a_whole_tensor_shrinks_with_it() -> None:
    assert Sign("tensor").gamma(10) < Sign("tensor").gamma(1000) < Sign("tensor").gamma() < 1
    assert Sign(128).gamma() == Sign(128).gamma(5)


@pytest.mark.parametrize("size", [2.0**-120, 1.0, 2.0**120])
def test_natural_error_is_at_most_an_eighth(size: float) -> None:
    """(t - 1)(2 - t) / t^2 is 1/8 at t = 4/3, and nowhere more (Horvath et al., theorem 1)."""
    worst = torch.full((128,), 4 / 3) * size
    assert mean_of_encodings(codec("natural"), worst, 400)[1] == pytest.approx(1 / 8, rel=0.02)
    for t in (1.05, 1.2, 1.5, 1.9):
        error = mean_of_encodings(codec("natural"), torch.full((128,), t) * size, 200)[1]
        assert error == pytest.approx((t - 1) * (2 - t) / t**2, rel=0.1)
        assert error < 1 / 8


def test_natural_writes_powers_of_two_and_keeps_them() -> None:
    powers = 2.0 ** torch.arange(-126, 128).float()
    assert round_trip("natural", powers).equal(powers)
    assert round_trip("natural", -powers).equal(-powers)
    x = lognormal(0, 2000)
    q = round_trip("natural", x)
    assert torch.frexp(q.abs())[0].eq(0.5).all()
    low = 2.0 ** torch.floor(torch.log2(x.abs()))
    assert ((q.abs() == low) | (q.abs() == 2 * low)).all()
    assert q.sign().equal(x.sign())


def test_natural_never_rounds_to_infinity() -> None:
    largest = torch.full((4000,), torch.finfo(torch.float32).max)
    for text in ("natural", "natural:round=nearest"):
        assert round_trip(text, largest).eq(2.0**127).all()
    assert Natural().gamma() == 1 / 8
