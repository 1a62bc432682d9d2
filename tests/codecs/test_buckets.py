"""sigma8: buckets over six standard deviations, each decoded to the mean of what fell into it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from commlib import Scheme
from commlib.codecs import codec
from commlib_kernels import Layout, Tag
from commlib_kernels.formats import HEAD
from commlib_kernels.reference import blocks, buckets
from tests.contract import data, decoded, encoded, round_trip

SIGMA8 = codec("sigma8")


def normal(numel: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def test_error_on_normal_data() -> None:
    """step^2 / 12 of the variance (a uniform error in a bucket), whatever mean and size."""
    want = (12 / 256) ** 2 / 12
    for scale, mean in ((1.0, 0.0), (1e-6, 0.0), (1e4, 3e4)):
        x = normal(1 << 17) * scale + mean
        error = float((round_trip(SIGMA8, x) - x).double().square().mean()) / scale**2
        assert error == pytest.approx(want, rel=0.02)


def test_values_are_the_means_of_their_buckets() -> None:
    """To 1/32 of a bucket; and those of the outer buckets, where outliers are, exactly."""
    x = normal(5000)
    x[[7, 70, 700]] = torch.tensor([40.0, 50.0, -90.0])  # beyond 6 sigma, which is about 11
    q = round_trip(SIGMA8, x)
    wide = x.double()
    step = 12 * float(wide.std(correction=0)) / 256
    assert q[7] == q[70] == 45
    assert q[700] == -90
    for value in q.unique()[1:-1]:
        mean = float(wide[q == value].mean())
        assert float(value) == pytest.approx(mean, abs=step / 32 * 1.001)
    assert q.unique().numel() > 80


def test_a_constant_and_a_single_element_are_themselves() -> None:
    for x in (torch.full((100,), 3.7), torch.tensor([-2.5e-9]), torch.full((9,), 1e30)):
        assert round_trip(SIGMA8, x).equal(x)


def test_a_value_just_below_the_end_of_its_bucket_stays_there() -> None:
    """Its place rounds to 1 in fp32, which four bits do not hold: 16 would be the next code's 1."""
    ones = torch.ones(200)
    x = torch.cat([ones, -ones, torch.tensor([-1e-12])])  # alone in its bucket; the mean is 0
    q = round_trip(SIGMA8, x)
    step = 12 / 256
    assert float(q[-1]) == pytest.approx(-step / 32, rel=0.01)
    assert float((q - x).abs().max()) <= step / 32 * 1.01


def test_means_do_not_lose_the_sum() -> None:
    """The mean of decoded values is that of the values: what bucket means are for."""
    x = torch.exp(normal(1 << 14))
    q = round_trip(SIGMA8, x)
    step = 12 * float(x.std(correction=0)) / 256
    assert float(q.double().mean()) == pytest.approx(float(x.double().mean()), abs=step / 100)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.0**126])
def test_a_piece_that_is_not_finite_is_nan_everywhere(bad: float) -> None:
    """On its own: other segments of the message stay clean."""
    x = data("random", 900).clone()
    x[450] = bad
    layout = Layout((400, 500))
    wire, q = torch.zeros(SIGMA8.nbytes(layout), dtype=torch.uint8), torch.empty(900)
    SIGMA8.encode(x, wire, layout, Tag())
    SIGMA8.decode(wire, q, layout, Tag())
    assert q[:400].isfinite().all()
    assert set(q[400:].view(torch.int32).tolist()) == {0x7FC00000}


def test_below_two_to_minus_100_a_piece_is_zero() -> None:
    assert round_trip(SIGMA8, torch.full((500,), 1e-38)).eq(0).all()
    edge = torch.full((500,), 2.0**-100)
    assert round_trip(SIGMA8, edge).equal(edge)


@pytest.mark.parametrize("seed", range(20))
def test_any_bytes_decode_to_numbers_or_the_one_nan(seed: int) -> None:
    x = normal(300)
    wire = encoded(SIGMA8, x)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, wire.shape, generator=generator, dtype=torch.uint8)
    where = torch.rand(wire.shape, generator=generator) < (1.0 if seed % 2 else 0.05)
    q = decoded(SIGMA8, torch.where(where, noise, wire), x)
    bits = q[q.isnan()].view(torch.int32).tolist()
    assert set(bits) <= {0x7FC00000}
    assert not q.isinf().any()


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_head_is_nan(place: int, bad: float) -> None:
    wire = encoded(SIGMA8, normal(300))
    wire[:16].view(torch.float32)[place] = bad
    assert decoded(SIGMA8, wire, torch.empty(300)).isnan().all()


def test_sums_are_in_the_order_of_the_contract() -> None:
    for numel in (0, 1, 31, 4096, 4097, 50_000):
        v = normal(numel).double().numpy() * np.exp(normal(numel, 1).double().numpy())
        assert buckets.norm_sum(v) == blocks.norm_sum(v)


def test_one_codebook_for_a_chunk_of_a_parameter() -> None:
    """144 bytes for each rank's chunk: D = 8970 on four ranks costs 1.09 bytes a value."""
    layout = Layout((8970,), ranks=4, align=SIGMA8.align)
    chunk = 18 * 128
    assert SIGMA8.nbytes(layout) == 4 * (HEAD + chunk)
    assert 40 * 4 * 8970 / SIGMA8.nbytes(layout) >= 144
    with pytest.raises(ValueError, match="one codebook per piece cannot be cut into slices"):
        SIGMA8.nbytes(layout.slice(0, 2))


def test_a_chunk_does_not_depend_on_its_neighbours() -> None:
    x, layout = normal(8970), Layout((8970,), ranks=4, align=SIGMA8.align)
    wire = torch.zeros(SIGMA8.nbytes(layout), dtype=torch.uint8)
    SIGMA8.encode(x, wire, layout, Tag())
    begin, end = layout.cut(0, 2)
    mine = encoded(SIGMA8, x[begin:end])
    size = wire.numel() // 4
    assert wire[2 * size :][: mine.numel()].equal(mine)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("sigma8+ef", "diverges.*gamma = 1 for sigma8"),
        ("rotate|sigma8", "no blocks with a scale"),
        ("topk|sigma8", r"sigma8's buckets .* give int8"),
        ("sigma8:block=64", "'block=64' is not known; allowed: none"),
    ],
)
def test_what_does_not_go_together_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Scheme.parse(text)


def test_squeezed_it_takes_what_normal_data_needs() -> None:
    """log2(sqrt(2 pi e) 256 / 12) = 6.46 bits, and the coder's overhead."""
    want = math.log2(math.sqrt(2 * math.pi * math.e) * 256 / 12)
    assert codec("sigma8|entropy").bits_per_element == pytest.approx(want, abs=0.06)
