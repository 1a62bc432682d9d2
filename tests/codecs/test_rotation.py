"""rotate|inner: any data becomes normal, lengths stay, nothing else changes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commlib.codecs import Eden, Int, Rotated, codec
from commlib.scheme import Scheme
from commlib_kernels.philox import SIGNS, signs
from commlib_kernels.reference import rotation
from tests.codecs.measures import lognormal, nmse, student
from tests.contract import round_trip


def dense(n: int) -> np.ndarray:
    """The Hadamard matrix by Sylvester's construction."""
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


@pytest.mark.parametrize("n", [8, 128, 1024])
def test_it_is_the_matrix(n: int) -> None:
    x = np.random.default_rng(n).standard_normal((2, n)).astype(np.float32)
    d = np.where(signs(3)[(512 + np.arange(2 * n)) % SIGNS], -1.0, 1.0).reshape(2, n)
    k = int(math.log2(n))
    want = (d * x) @ dense(n) / 2.0 ** (k // 2)
    np.testing.assert_allclose(rotation.forward(x, 3, 512), want, rtol=0, atol=1e-5 * n**0.5)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 512), st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_back_is_the_inverse(eighths: int, seed: int, block: int) -> None:
    """Of any width, within log2 n roundings of the length."""
    x = np.random.default_rng(eighths).standard_normal((1, 8 * eighths)).astype(np.float32)
    y = rotation.backward(rotation.forward(x, seed, 128 * block), seed, 128 * block)
    assert np.abs(y - x).max() <= 24 * np.finfo(np.float32).eps * np.linalg.norm(x)


def test_signs_are_fair_and_of_their_seed() -> None:
    mine, other = signs(0) != 0, signs(1) != 0
    for found in (mine, other, mine ^ other):
        assert abs(found.mean() - 0.5) < 5 / 2 / math.sqrt(SIGNS)  # five standard deviations
    assert set(np.unique(signs(0))) == {0, 0x80000000}


@pytest.mark.parametrize(("text", "gap"), [("eden4", 0.70), ("eden2", 0.50), ("eden1", 0.32)])
def test_bits_above_shannons_bound(text: str, gap: float) -> None:
    """The same on all data: a rotation makes any of it normal."""
    c = codec(f"rotate|{text}")

    def above(x: torch.Tensor) -> float:
        return c.bits_per_element - 0.5 * math.log2(1 / nmse(c, x))

    n = 1 << 18
    g = torch.Generator().manual_seed(0)
    normal = above(torch.randn(n, generator=g))
    assert normal < gap
    laplace = torch.empty(n).exponential_(generator=g) * torch.randn(n, generator=g).sign()
    for x in (laplace, student(1, n), lognormal(1, n)):
        assert above(x) < normal + 0.05
        assert nmse(text, x) > nmse(c, x)  # which is what the rotation is for


def test_unbiased_over_rotations() -> None:
    """EDEN's scale: the mean over n rotations is v, with an error of NMSE / n."""
    x, n = lognormal(0, 2048), 400

    def mean_of(scale: str) -> torch.Tensor:
        texts = (f"rotate:seed={seed}|eden2:scale={scale}" for seed in range(n))
        return torch.stack([round_trip(text, x).double() for text in texts]).mean(0)

    error = float((mean_of("unbiased") - x.double()).square().sum() / x.double().square().sum())
    assert error < 1.5 * 0.1331 / n
    shrunk = float(mean_of("fit") @ x.double()) / float(x.double() @ x.double())
    assert shrunk == pytest.approx(1 - 0.1175, abs=0.01)


def test_one_large_element_costs_the_others_nothing() -> None:
    x = torch.full((1024,), 0.01)
    x[7] = 1.0
    assert round_trip("int4:block=1024", x)[100] == 0
    assert nmse("rotate|int4:block=1024", x) < 0.05


def test_text_and_fields() -> None:
    assert codec("rotate|int4:block=256") == Rotated(Int(4, block=256))
    assert codec("rotate:seed=7|eden2") == Rotated(Eden(2), seed=7)
    assert str(codec("rotate:seed=0|eden2:scale=fit")) == "rotate|eden2"
    assert codec("rotate|int4").rounded("stochastic") == codec("rotate|int4:round=stochastic")
    assert codec("rotate|int4:round=stochastic").unbiased
    assert str(Scheme.parse("rotate:seed=7|int4:block=256+ef")) == "rotate:seed=7|int4:block=256+ef"
    assert codec("rotate|eden2").bits_per_element == codec("eden2").bits_per_element


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rotat|int4", "stage 'rotat' does not exist; allowed: rotate, topk, randk; did"),
        ("rotate:speed=3|int4", "option 'speed=3' is not known; allowed: seed"),
        ("rotate:seed=-1|int4", "seed=-1; allowed: 0 to"),
        ("rotate|rotate|int4", "already rotated"),
        ("rotate|bf16", "bf16 has no blocks"),
        ("rotate|sign:block=tensor", "give a block size"),
        ("rotate|int4:block=96", "block=96; allowed: powers of two from 128"),
        ("rotate|nf4", "block=64; allowed: powers of two from 128"),
        ("rotate|", "'' does not exist"),
        ("rotate", "rotate stands before a codec"),
    ],
)
def test_refusals(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint.replace("|", r"\|")):
        codec(text)
