"""Raw pieces beside coded ones: the kernels' own copies and sums, byte for byte the reference's."""

from __future__ import annotations

import pytest
import torch

from commlib.codecs import codec
from commlib_kernels import nbytes, numba_cpu, reference, stride
from commlib_kernels.layout import Layout
from commlib_kernels.tag import Tag

SIZES = (300, 7, 5000, 1, 900)  # a raw piece is longer than a strip at any number of ranks
EXACT = (False, True, True, True, False)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INT4 = codec("int4").format
TAG = Tag(keys=tuple(range(len(SIZES))), step=1, rank=0, seed=0)


def numbers(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Normal numbers, and among the raw ones NaN, infinities, zeros of both signs, tiny ones."""
    x = torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(seed)).to(dtype)
    odd = [float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-41, 3e38, -3e38]
    x[300 + seed : 308 + seed] = torch.tensor(odd).to(dtype)
    return x


def layout(dtype: torch.dtype, ranks: int, **how: bool) -> Layout:
    return Layout(SIZES, dtype, ranks=ranks, exact=EXACT, align=INT4.align, **how)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_copies_and_sums(dtype: torch.dtype, ranks: int) -> None:
    whole = layout(dtype, ranks)
    wires: dict[str, list[torch.Tensor]] = {"numba": [], "reference": []}
    for name, backend in (("numba", numba_cpu), ("reference", reference)):
        for seed in range(3):
            wire = torch.zeros(nbytes(whole, INT4), dtype=torch.uint8)
            backend.quantize(INT4, numbers(dtype, seed), wire, whole, TAG)
            out = numbers(dtype, seed + 1)
            backend.dequantize(INT4, wire, out, whole)
            added = numbers(dtype, seed + 1)
            backend.dequantize(INT4, wire, added, whole, add=True)
            wires[name] += [wire, out.view(torch.uint8), added.view(torch.uint8)]
        chunk = whole.only(ranks - 1)
        payloads = torch.cat([wire[-stride(whole, INT4) :] for wire in wires[name][::3]])
        for out in (
            torch.zeros(stride(whole, INT4), dtype=torch.uint8),
            torch.zeros(whole.chunk_numel(ranks - 1), dtype=dtype),
            torch.zeros(whole.chunk_numel(ranks - 1)),
        ):
            backend.reduce(INT4, payloads, out, chunk, TAG, factor=1 / 3)
            wires[name].append(out.view(torch.uint8))
    for ours, theirs in zip(wires["numba"], wires["reference"], strict=True):
        assert torch.equal(ours, theirs)


def test_copies_keep_every_bit() -> None:
    """A NaN's payload too, which arithmetic would not keep."""
    x = torch.zeros(sum(SIZES))
    x.view(torch.int32)[300:307] = torch.arange(7, dtype=torch.int32) + 0x7F800001
    wire = torch.zeros(nbytes(layout(x.dtype, 1), INT4), dtype=torch.uint8)
    numba_cpu.quantize(INT4, x, wire, layout(x.dtype, 1), TAG)
    out = torch.ones_like(x)
    numba_cpu.dequantize(INT4, wire, out, layout(x.dtype, 1))
    assert torch.equal(out.view(torch.int32)[300:307], x.view(torch.int32)[300:307])
