"""A quantizer in Triton, written for the comparison: a block of 128 with one scale, int8 or fp8."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 128
ROWS = 32  # blocks per program


@triton.jit
def _kernel(x, codes, scales, count, levels, FP8: tl.constexpr, B: tl.constexpr, R: tl.constexpr):
    rows = tl.program_id(0) * R + tl.arange(0, R)
    places = rows[:, None] * B + tl.arange(0, B)[None, :]
    real = (rows < count)[:, None]
    v = tl.load(x + places, mask=real, other=0.0)
    scale = tl.max(tl.abs(v), axis=1) / levels
    y = v * (1.0 / tl.maximum(scale, 1e-30))[:, None]
    if FP8:
        tl.store(codes + places, y.to(tl.float8e4nv), mask=real)
    else:
        rounded = tl.floor(y + 0.5)
        tl.store(codes + places, rounded.to(tl.int8), mask=real)
    tl.store(scales + rows, scale, mask=rows < count)


def quantize(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Code fp32 `x` into `codes`, a scale per 128 elements into `scales`."""
    count = x.numel() // BLOCK
    fp8 = codes.dtype == torch.float8_e4m3fn
    levels = 448.0 if fp8 else 127.0
    grid = (triton.cdiv(count, ROWS),)
    _kernel[grid](x, codes, scales, count, levels, FP8=fp8, B=BLOCK, R=ROWS, num_warps=4)
