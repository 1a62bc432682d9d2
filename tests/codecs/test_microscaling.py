"""mxfp8 and mxfp4: the bytes mean what OCP's specification and torch's dtypes say, and are its."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commlib.codecs import MXFP4, MXFP8, codec
from commlib_kernels import Layout, Tag, nbytes, reference
from tests.codecs.measures import check_gamma, check_unbiased, lognormal, nmse, student
from tests.contract import KINDS, data, encoded, require, round_trip, same

BLOCK = 32
LARGEST = {"mxfp8": 448.0, "mxfp4": 6.0}
EMAX = {"mxfp8": 8, "mxfp4": 2}


def e2m1(code: int) -> float:
    """Sign, two bits of exponent with a bias of 1, one of mantissa: section 5.3.3."""
    exponent, mantissa = code >> 1 & 3, code & 1
    magnitude = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
    return math.copysign(magnitude, -1 if code & 8 else 1)


E2M1 = torch.tensor([e2m1(code) for code in range(16)])


def parts(text: str, wire: torch.Tensor, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(elements, scales) of whole blocks of 32, read by torch and by the definition above."""
    if text.startswith("mxfp8"):
        size = BLOCK * blocks
        found = wire[:size].view(torch.float8_e4m3fn).float()
    else:
        size = BLOCK * blocks // 2
        pairs = wire[:size].view(blocks, BLOCK // 2).int()
        found = E2M1[torch.cat([pairs & 15, pairs >> 4], dim=1)]
    scales = wire[size : size + blocks].view(torch.float8_e8m0fnu).float()
    return found.view(blocks, BLOCK), scales


def ocp(text: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(elements, scales) of section 6.3 of the specification, in fp64, of finite normal blocks."""
    v = x.view(-1, BLOCK).double()
    scales = torch.exp2(torch.floor(torch.log2(v.abs().amax(1))) - EMAX[text])
    y = (v / scales[:, None]).clamp(-LARGEST[text], LARGEST[text]).float()
    if text == "mxfp8":
        return y.to(torch.float8_e4m3fn).float(), scales.float()
    # Ties to even: among the nearest the code with mantissa 0.
    distance = (y[..., None].double() - E2M1.double()).abs()
    odd = torch.arange(16) & 1
    negative = torch.arange(16) >> 3 != torch.signbit(y)[..., None].int()
    best = (distance * 4 + odd * 1e-9 + negative * 1e-12).argmin(-1)
    return E2M1[best], scales.float()


@pytest.mark.parametrize("text", LARGEST)
@pytest.mark.parametrize("kind", KINDS)
def test_an_independent_decoder_reads_the_same_values(text: str, kind: str) -> None:
    x = data(kind, 100 * BLOCK)
    elements, scales = parts(text, encoded(codec(text), x), 100)
    want = elements * scales[:, None]
    torch.testing.assert_close(
        round_trip(text, x).view(-1, BLOCK), want, rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("text", LARGEST)
def test_an_independent_encoder_writes_the_same_codes(text: str) -> None:
    """The floor of the logarithm, saturation and ties to even; signs of zeros as well."""
    x = data("random", 4096 * BLOCK).view(-1, BLOCK).clone()
    halves = torch.arange(BLOCK) / 4 * 2.0 ** (EMAX[text] - 2)  # ties of mxfp4, and of mxfp8 some
    x[:64] = torch.cat([halves[16:], -halves[:16]]) * torch.exp2(torch.arange(-32.0, 32))[:, None]
    x[64] = 2.0**-9 * torch.arange(BLOCK) / 2 * 256  # subnormals of mxfp8
    x[65] = 1.9999999
    elements, scales = parts(text, encoded(codec(text), x.view(-1)), len(x))
    want, want_scales = ocp(text, x)
    assert scales.equal(want_scales)
    assert same(elements.flatten(), want.flatten())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=70), st.integers(-120, 120))
@pytest.mark.parametrize("text", LARGEST)
def test_any_numbers_at_all(text: str, values: list[float], power: int) -> None:
    """Both backends write one thing, and torch reads from it what they read."""
    x = torch.zeros(96)
    x[: len(values)] = torch.tensor(values) * 2.0**power
    c = codec(text)
    wire, oracle = encoded(c, x), torch.zeros(c.nbytes(Layout((96,))), dtype=torch.uint8)
    reference.quantize(c.format, x, oracle, Layout((96,)), Tag())
    assert same(wire, oracle)
    elements, scales = parts(text, wire, 3)
    want, q = (elements * scales[:, None]).flatten(), round_trip(text, x)
    assert q.isnan().equal(want.isnan())
    assert q[~q.isnan()].equal(want[~want.isnan()])
    for block, mine in zip(x.view(3, BLOCK), q.view(3, BLOCK), strict=True):
        top = float(block.abs().max())
        if not top < 2.0**126:
            assert mine.isnan().all()
        elif top < 2.0**-100:
            assert mine.eq(0).all()
        else:
            assert float(mine.abs().max()) <= 1.2 * top  # 5 and a bit becomes 6


@pytest.mark.parametrize("text", LARGEST)
@pytest.mark.parametrize("backend", ["reference", "numba_cpu"])
def test_every_scale_and_every_code(text: str, backend: str) -> None:
    """Torch's value, but for the byte 0, which is zero: 448 * 2^-127 is a zero block's maximum."""
    fmt = codec(text).format
    codes = torch.arange(256, dtype=torch.uint8).view(-1, BLOCK)
    if text == "mxfp8":
        codes = torch.where(codes & 0x7F == 0x7F, 0, codes)  # e4m3's NaN is never written
    else:
        codes = torch.cat([codes[:, :16], codes[:, 16:]]).contiguous()  # two to a byte
    layout = Layout((256 * codes.numel() * 8 // fmt.bits,))
    wire = torch.zeros(nbytes(layout, fmt), dtype=torch.uint8)
    blocks = 256 * len(codes)
    wire[: 256 * codes.numel()] = codes.flatten().repeat(256)
    bytes_ = torch.arange(256).repeat_interleave(len(codes)).to(torch.uint8)
    wire[256 * codes.numel() :][:blocks] = bytes_
    elements, scales = parts(text, wire, blocks)
    want = torch.where(bytes_[:, None] == 0, 0, elements * scales[:, None]).flatten()
    out = torch.full((layout.numel,), 7.0)
    require(backend).dequantize(fmt, wire, out, layout, add=False)
    torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)
    assert out.isnan().equal((bytes_ == 255).repeat_interleave(BLOCK))


@pytest.mark.parametrize("text", LARGEST)
def test_scales_of_zero_and_bad_blocks(text: str) -> None:
    x = torch.ones(6, BLOCK)
    x[1] = 0
    x[2] = 2.0**-100 * (1 - 2.0**-24)
    x[3, 5] = 2.0**126
    x[4, 31] = float("nan")
    x[5] = -(2.0**-100)
    wire = encoded(codec(text), x.view(-1))
    size = 6 * BLOCK * codec(text).format.bits // 8
    one = 127 - EMAX[text]
    assert wire[size : size + 6].tolist() == [one, 0, 0, 255, 255, one - 100]
    codes = wire[:size].view(6, -1)
    assert codes[1:5].eq(0).all()
    assert codes[5].ne(0).all()
    q = round_trip(text, x.view(-1)).view(6, BLOCK)
    assert q[[0, 1, 5]].equal(x[[0, 1, 5]])
    assert q[2].eq(0).all()
    assert q[3:5].isnan().all()


@pytest.mark.parametrize(("text", "cut"), [("mxfp8", 448 / 512), ("mxfp4", 6 / 8)])
def test_the_largest_code_cuts_the_maximum(text: str, cut: float) -> None:
    """Just below a power of two: as the specification has it."""
    x = torch.full((BLOCK,), 1.0 - 2.0**-24)
    assert round_trip(text, x).equal(torch.full((BLOCK,), cut))
    assert round_trip(text, torch.ones(BLOCK)).equal(torch.ones(BLOCK))


def test_stochastic_rounding_has_no_bias() -> None:
    """At maxima that nearest would cut as well: their scale is twice as large."""
    check_unbiased("mxfp8:round=stochastic", data("random", 512))
    for top in (448.0, 449.0, 511.0):
        x = torch.linspace(0.1, top, BLOCK)
        check_unbiased("mxfp8:round=stochastic", x)
    wire = encoded(
        codec("mxfp8:round=stochastic"), torch.tensor([448.0, 449.0]).repeat_interleave(32)
    )
    assert wire[64:66].tolist() == [127, 128]
    assert not codec("mxfp8").unbiased
    assert codec("mxfp8").rounded("stochastic").unbiased


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(2.0**-60, 2.0**60, width=32), min_size=1, max_size=70))
def test_gamma_bounds_any_vector(values: list[float]) -> None:
    for text in ("mxfp8", "mxfp4", "mxfp4:block=64", "mxfp8:block=4096"):
        check_gamma(text, torch.tensor(values))


def test_gamma_is_reached() -> None:
    """All are cut; or all but the maximum lie on the tie that becomes zero."""
    assert check_gamma("mxfp8", torch.full((BLOCK,), 512 * (1 - 2.0**-24))) > 0.9999
    for top, part in ((4.0, 0.98), (5.0, 0.9999)):
        x = torch.full((BLOCK,), 0.25)
        x[0] = top
        assert check_gamma("mxfp4", x) > part
    x = torch.full((64,), 0.25)
    x[0] = 4.0
    assert check_gamma("mxfp4:block=64", x) > 0.99
    for steps in (0.3, 0.5, 0.51):
        x = torch.full((BLOCK,), steps * 2.0**-9)
        x[0] = 224 * 1.001
        check_gamma("mxfp8:round=stochastic", x, n=200)


def test_errors_on_normal_data() -> None:
    """An independent encoder's, and what a power of two costs beside a bf16 scale."""
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(1 << 18).astype(np.float32))
    for text, other in (("mxfp4", "e2m1:block=32"), ("mxfp8", "fp8:block=32")):
        elements, scales = ocp(text, x)
        error = (elements * scales[:, None]).flatten().double() - x.double()
        want = float(error @ error) / float(x.double() @ x.double())
        assert nmse(text, x) == pytest.approx(want, rel=1e-6)
        assert 1.2 < want / nmse(other, x) < 1.6
    assert nmse("mxfp4", x) == pytest.approx(1.32e-2, rel=0.01)
    assert nmse("mxfp8", x) == pytest.approx(8.6e-4, rel=0.01)
    assert codec("mxfp4").bits_per_element == 4.25
    assert codec("mxfp8").bits_per_element == 8.25


def test_a_rotation_helps_them_too() -> None:
    for x in (lognormal(0), student(0)):
        assert nmse("rotate|mxfp4:block=128", x) < nmse("mxfp4:block=128", x) / 1.5


def test_text_and_refusals() -> None:
    assert codec("mxfp4") == MXFP4(32)
    assert codec("mxfp8:block=64:round=nearest") == MXFP8(64, "nearest")
    for text, complaint in (
        ("mxfp4:block=16", "block=16; allowed: multiples of 8 from 32"),
        ("mxfp4:round=stochastic", "option 'round=stochastic' is not known; allowed: block"),
        ("mxfp8:round=up", "round='up'; allowed: nearest, stochastic"),
        ("mxfp6", "did you mean 'mxfp"),
        ("rotate|mxfp4", "block=32; allowed: powers of two from 128"),
    ):
        with pytest.raises(ValueError, match=complaint.replace("|", r"\|")):
            codec(text)
