"""Codebooks: the best for normal data, whatever the scale; ties, signs, unbiased scales."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from scipy import stats

from commlib.codecs import Eden, codec
from commlib_kernels.tables import TABLES, thresholds
from tests.codecs.measures import check_gamma, lognormal, mean_nmse, nmse, student
from tests.contract import data, round_trip

LEAST = {1: 1 - 2 / math.pi, 2: 0.117482, 3: 0.034548, 4: 0.009501}  # Lloyd-Max, normal data


def normal(numel: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_values_are_the_means_of_their_cells(bits: int) -> None:
    """Lloyd: thresholds lie in the middle, values at the mean of what they stand for."""
    values = TABLES[f"gauss{bits}"]
    edges = [-math.inf, *((a + b) / 2 for a, b in pairwise(values)), math.inf]
    for value, low, high in zip(values, edges[:-1], edges[1:], strict=True):
        mass = stats.norm.cdf(high) - stats.norm.cdf(low)
        mean = (stats.norm.pdf(low) - stats.norm.pdf(high)) / mass
        assert value == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_error_on_normal_data(bits: int) -> None:
    """That of the quantizer, within five standard deviations of a mean over 2^18 elements."""
    error = nmse(f"eden{bits}", normal(1 << 18))
    assert error == pytest.approx(LEAST[bits], rel=0.02)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_unbiased_scale(bits: int) -> None:
    """``D / (1 - D)``, DRIVE's and EDEN's figure, after a rotation, on any data."""
    want = LEAST[bits] / (1 - LEAST[bits])
    for vectors in (lognormal, student):
        text = f"rotate|eden{bits}:scale=unbiased"
        assert mean_nmse(text, vectors) == pytest.approx(want, rel=0.05)


def test_fit_is_the_least_error_for_its_codes() -> None:
    x = data("random", 1024)
    for bits in (1, 2, 3, 4):
        q = round_trip(f"eden{bits}", x).double()
        factor = float(q @ x.double()) / float(q @ q)
        assert factor == pytest.approx(1.0, abs=2.0**-8)  # the scale is kept as bf16


@pytest.mark.parametrize(
    "text", ["eden1:block=32", "eden2", "eden4:block=64", "nf4", "e2m1", "e3m0"]
)
def test_gamma_is_an_upper_bound(text: str) -> None:
    one = torch.zeros(2048)
    one[::512] = 1.0
    for x in (data("random", 2048), one, torch.ones(2048), lognormal(0), student(0)):
        check_gamma(text, x)


def test_gamma_of_nf4_is_nearly_reached() -> None:
    """All but one element in the middle of the gap beside zero."""
    values = TABLES["nf4"]
    x = torch.full((64,), (values[7] + values[8]) / 2 * 1.0001)
    x[0] = 1.0
    assert check_gamma("nf4", x) > 0.5


def test_floats_of_four_bits_are_exact() -> None:
    """Every value times a power of two comes back."""
    for text, values in (
        ("e2m1", [0, 0.5, 1, 1.5, 2, 3, 4, 6]),
        ("e3m0", [2.0**-e for e in range(7)]),
    ):
        x = torch.tensor([v * sign for v in values for sign in (1, -1)] * 4) * 2.0**-9
        assert round_trip(text, x).equal(x)


def test_ties_go_to_zero_and_zero_is_the_negative_neighbour() -> None:
    t = torch.from_numpy(thresholds(TABLES["nf4"]).copy())
    x = torch.cat([t, torch.tensor([1.0, 0.0, -0.0])])
    q = round_trip("nf4:block=64", x)
    scale = q[15] / 1.0
    nearer = [min(a, b, key=abs) for a, b in pairwise(TABLES["nf4"])]
    assert q[:15].equal(torch.tensor(nearer) * scale)
    assert q[16:].eq(0).all()
    y = torch.tensor([1.0, -1.0, 0.0, -0.0] * 8)
    q = round_trip("eden1:block=32", y)
    assert q.sign().tolist() == [1.0, -1.0, -1.0, -1.0] * 8


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_squares_neither_overflow_nor_vanish(size: float) -> None:
    x = normal(4096)
    want = nmse("eden3", x)
    assert nmse("eden3", x * size) == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Eden(5), "bits=5; allowed: 1 .. 4"),
        (lambda: codec("eden2:scale=best"), "scale='best'; allowed: fit, unbiased"),
        (lambda: codec("eden2:block=100"), "block=100; allowed: multiples of 8"),
        (lambda: codec("nf4:block=tensor"), "block='tensor'"),
        (lambda: codec("eden5"), "did you mean 'eden"),
    ],
)
def test_refusals(make: object, complaint: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=complaint):
        make()
