"""THC: sums of codes decode to means, and rotation with clamping makes 4 bits enough."""

from __future__ import annotations

import math

import pytest
import torch

from commlib.collectives import thc

WORKERS, NUMEL = 8, 16384


def vectors() -> list[torch.Tensor]:
    """Of eight workers: lognormal magnitudes with random signs."""
    g = torch.Generator().manual_seed(0)
    made = []
    for _ in range(WORKERS):
        x = torch.exp(torch.randn(NUMEL, generator=g))
        made.append(x * (2 * torch.randint(2, (NUMEL,), generator=g) - 1))
    return made


def nmse(*, rotated: bool, clip: float | None) -> float:
    """Error of the mean at 4 bits; clip None: the largest value of all workers."""
    xs = vectors()
    ys = [thc.rotate(x, 5) if rotated else x for x in xs]
    scale = max(float(thc.scale(y)) for y in ys)
    clip = clip or max(float(y.abs().max()) for y in ys) / scale
    total = torch.zeros(NUMEL, dtype=torch.int64)
    for rank, y in enumerate(ys):
        generator = torch.Generator().manual_seed(rank)
        total += thc.encode(y, scale, generator, clip=clip)
    mean = thc.decode(total, WORKERS, scale, clip=clip)
    mean = thc.unrotate(mean, 5, NUMEL) if rotated else mean
    exact = sum(x.double() for x in xs) / WORKERS
    return float((mean - exact).square().sum() / exact.square().sum())


def test_the_published_errors() -> None:
    """0.0197 within 20% for both, and a hundredth of neither."""
    both = nmse(rotated=True, clip=2.2)
    assert 0.8 * 0.0197 < both < 1.2 * 0.0197
    assert nmse(rotated=False, clip=None) > 100 * both
    # and as the formula has it: rounding and clamping of Gaussian values
    c, step = 2.2, 4.4 / 15
    tail = math.erfc(c / math.sqrt(2)) / 2
    density = math.exp(-c * c / 2) / math.sqrt(2 * math.pi)
    clamping = 2 * ((1 + c * c) * tail - c * density)
    assert both == pytest.approx((1 - 2 * tail) * step**2 / 6 + clamping, rel=0.1)
    assert both < nmse(rotated=True, clip=None) < nmse(rotated=False, clip=None)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_units_of_a_sum_are_the_sum_of_units(bits: int) -> None:
    ys = [thc.rotate(x, 1) for x in vectors()]
    codes = [
        thc.encode(y, 2.7, torch.Generator().manual_seed(r), bits=bits) for r, y in enumerate(ys)
    ]
    assert all(int(k.max()) <= (1 << bits) - 1 for k in codes)
    total = sum(k.to(torch.int64) for k in codes)
    assert isinstance(total, torch.Tensor)
    alone = sum(thc.units(k, bits=bits) for k in codes)
    assert torch.equal(thc.units(total, WORKERS, bits=bits), alone)
    mean = sum(thc.decode(k, 1, 2.7, bits=bits).double() for k in codes) / WORKERS
    assert (thc.decode(total, WORKERS, 2.7, bits=bits) - mean).abs().max() < 1e-5


def test_codes_are_unbiased_within_the_clip_and_its_ends_beyond() -> None:
    y = torch.tensor([-9.0, -2.2, -1.0, 0.0, 0.4, 2.2, 9.0])
    generator, count = torch.Generator().manual_seed(0), 4000
    total = sum(thc.decode(thc.encode(y, 1.0, generator), 1, 1.0) for _ in range(count))
    # a draw is at most half a step off on average: five standard deviations of the mean
    assert (total / count - y.clamp(-2.2, 2.2)).abs().max() < 5 * (4.4 / 15 / 2) / count**0.5
    ends = thc.encode(y[[0, 1, 5, 6]], 1.0, generator)
    assert ends.tolist() == [0, 0, 15, 15]


def test_hadamard_is_the_matrix_and_its_own_inverse() -> None:
    matrix = torch.tensor([[1.0]])
    for _ in range(4):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(thc.hadamard(x), x @ matrix / 4)
    torch.testing.assert_close(thc.hadamard(thc.hadamard(x)), x)
    assert torch.equal(thc.hadamard(x[:, :1]), x[:, :1])


@pytest.mark.parametrize("numel", [1, 5, 64, 1000])
def test_a_rotation_keeps_norms_and_is_undone(numel: int) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    y = thc.rotate(x, 3)
    assert y.numel() == 1 << max(0, numel - 1).bit_length()
    torch.testing.assert_close(y.norm(), x.norm())
    torch.testing.assert_close(thc.unrotate(y, 3, numel), x)
    if numel > 100:
        assert not torch.allclose(thc.unrotate(y, 4, numel), x)


def test_bad_numbers_are_refused() -> None:
    y, generator = torch.ones(4), torch.Generator()
    with pytest.raises(ValueError, match="power of two"):
        thc.hadamard(torch.ones(6))
    for bits, scale, clip in ((0, 1.0, 2.0), (9, 1.0, 2.0), (4, 0.0, 2.0), (4, math.nan, 2.0)):
        with pytest.raises(ValueError, match="thc: "):
            thc.encode(y, scale, generator, bits=bits, clip=clip)
    with pytest.raises(ValueError, match=r"clip -1\.0"):
        thc.decode(y, 1, 1.0, clip=-1.0)
