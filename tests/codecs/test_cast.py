"""fp32, fp16, bf16 and fp8: equal to PyTorch's casts, bounded, and what they do at the edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commlib.codecs import BF16, FP8, FP16, FP32, codec
from commlib_kernels import Layout, Tag
from tests.codecs.measures import check_gamma, check_unbiased, lognormal, nmse, student
from tests.contract import DTYPES, KINDS, data, encoded, round_trip, same

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp32_is_the_tensors_own_bytes(dtype: torch.dtype, kind: str) -> None:
    x = data(kind, 1000).to(dtype)
    wire = encoded(FP32(), x)
    assert same(wire[: x.numel() * x.itemsize], x.view(torch.uint8))
    assert same(round_trip("fp32", x), x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", HALVES)
def test_casts_are_pytorchs(text: str, kind: str) -> None:
    x = data(kind, 3000)
    want = x.to(HALVES[text])
    want[want.isnan()] = torch.tensor(float("nan"))
    codes = encoded(codec(text), x)[:6000].view(HALVES[text])
    assert torch.equal(codes.isnan(), want.isnan())
    assert codes[~codes.isnan()].equal(want[~want.isnan()])
    nan = {"fp16": 0x7E00, "bf16": 0x7FC0}[text]
    assert (codes.view(torch.int16)[codes.isnan()] == nan).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
@pytest.mark.parametrize("text", HALVES)
def test_casts_of_any_number(text: str, values: list[float]) -> None:
    x = torch.tensor(values)
    assert round_trip(text, x).equal(x.to(HALVES[text]).float())


def e4m3_values() -> torch.Tensor:
    return torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def test_fp8_keeps_its_own_values() -> None:
    x = torch.cat([e4m3_values(), -e4m3_values()])
    for start in range(0, 127, 31):  # any block with the value 448 has the scale 1
        block = torch.cat([torch.tensor([448.0]), x[start : start + 127]])
        assert round_trip("fp8", block).equal(block)


def test_fp8_rounds_as_pytorch_does() -> None:
    """With scale 1, nearest is torch.float8_e4m3fn's own rounding, ties and subnormals included."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(128 * 50, generator=g) * torch.exp(3 * torch.randn(128 * 50, generator=g))
    ties = (e4m3_values()[1:] + e4m3_values()[:-1]) / 2
    x[: ties.numel()] = ties
    x = x.clamp(-448, 448).view(-1, 128)
    x[:, 0] = 448
    x = x.reshape(-1)
    assert round_trip("fp8", x).equal(x.to(torch.float8_e4m3fn).float())


def test_fp8_errors() -> None:
    for vectors in (lognormal, student):
        x = vectors(0)
        assert nmse("fp8", x) == pytest.approx(5e-4, rel=0.1)
        assert nmse("fp8:round=stochastic", x) == pytest.approx(2 * nmse("fp8", x), rel=0.1)


def test_t26_fp8_stochastic_has_no_bias() -> None:
    check_unbiased("fp8:round=stochastic", student(1, 512))
    # Around subnormals, where a step is as large as the number.
    small = torch.full((128,), 1.3 * 2.0**-9)
    small[0] = 448
    check_unbiased("fp8:round=stochastic", small)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(2.0**-60, 2.0**60, width=32), min_size=1, max_size=70))
def test_gamma_bounds_any_vector(values: list[float]) -> None:
    for text in ("fp8", "fp8:block=32", "bf16"):
        check_gamma(text, torch.tensor(values))
    check_gamma("fp16", torch.tensor(values).clamp(2.0**-14, 65504))


@pytest.mark.parametrize("text", ["fp8", "bf16", "fp16"])
def test_gamma_is_reached_by_a_half_step(text: str) -> None:
    digits = {"fp8": 3, "bf16": 7, "fp16": 10}[text]
    x = torch.full((128,), 1 + 2.0 ** -(digits + 1))
    if text == "fp8":
        x[0] = 448  # the scale is 1
        x[1:] *= 256
    assert check_gamma(text, x) > 0.9


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_gamma_of_fp8_where_all_are_subnormal(rounding: str) -> None:
    for steps in (0.01, 0.3, 0.5, 0.51, 3.5):
        x = torch.full((128,), steps * 2.0**-9)
        x[0] = 448 * 1.004
        check_gamma(f"fp8:round={rounding}", x, n=64)


def test_which_codecs_the_network_may_add() -> None:
    assert [c().sum_dtype for c in (FP32, FP16, BF16)] == list(DTYPES)
    for c in (FP16(), BF16(), FP32()):
        dtype = c.sum_dtype
        assert dtype is not None
        a, b = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([0.5, 0.25, 8.0])
        sum_ = encoded(c, a).view(dtype) + encoded(c, b).view(dtype)
        out = torch.empty(3)
        c.decode(sum_.view(torch.uint8), out, Layout((3,)), Tag())
        assert out.equal(a + b)
    assert FP8().sum_dtype is None
    assert not FP8().unbiased
    assert np.isclose(codec("fp8").bits_per_element, 8.125)
