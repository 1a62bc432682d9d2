"""Reading and writing elements as fp32, and the small number formats."""

import numpy as np
import numpy.typing as npt
import torch

F32 = np.float32
Floats = npt.NDArray[np.float32]
Bits = npt.NDArray[np.uint32]

NAN = np.uint32(0x7FC00000).view(F32)
"""The one NaN that decoders write, whatever NaN came in."""

HALF = np.uint32(16)
"""bf16 is the upper half of fp32."""


def raw(x: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of a flat contiguous CPU tensor, shared."""
    return x.detach().view(torch.uint8).numpy()


def bits(x: Floats) -> Bits:
    """The bit patterns of fp32 values, shared."""
    return np.ascontiguousarray(x, F32).view(np.uint32)


def load(x: torch.Tensor) -> Floats:
    """Elements as fp32, exactly."""
    if x.dtype == torch.bfloat16:
        return (x.detach().view(torch.uint16).numpy().astype(np.uint32) << 16).view(F32)
    return x.detach().numpy().astype(F32)


def store(out: torch.Tensor, v: Floats) -> None:
    """Write fp32 values, rounded to nearest even where `out` is narrower; one NaN for all NaNs."""
    v = np.where(np.isnan(v), NAN, v)
    if out.dtype == torch.float32:
        out.detach().numpy()[:] = v
    else:
        half = bf16_nearest(v) if out.dtype == torch.bfloat16 else fp16_nearest(v)
        out.detach().view(torch.uint16).numpy()[:] = half.astype(np.uint16)


def bf16_nearest(v: Floats) -> Bits:
    """bf16 bits, ties to even, NaN as 0x7FC0."""
    b = bits(v)
    near = (b + np.uint32(0x7FFF) + ((b >> HALF) & np.uint32(1))) >> HALF
    return np.where(np.isnan(v), np.uint32(0x7FC0), near)


def bf16_up(v: Floats) -> Bits:
    """bf16 bits of a positive finite value, rounded up."""
    return (bits(v) + np.uint32(0xFFFF)) >> HALF


def bf16_value(b: npt.NDArray[np.integer]) -> Floats:
    """The value of bf16 bits."""
    return (b.astype(np.uint32) << 16).view(F32)


def fp16_nearest(v: Floats) -> Bits:
    """fp16 bits, ties to even, NaN as 0x7E00; too large becomes infinite."""
    with np.errstate(over="ignore"):
        half: Bits = v.astype(np.float16).view(np.uint16).astype(np.uint32)
    return np.where(np.isnan(v), np.uint32(0x7E00), half)


def fp16_value(b: npt.NDArray[np.integer]) -> Floats:
    """The value of fp16 bits."""
    return b.astype(np.uint16).view(np.float16).astype(F32)


E4M3 = np.array(
    [
        (m * 2.0**-9 if e == 0 else (8 + m) * 2.0 ** (e - 10))
        for e in range(16)
        for m in range(8)
        if (e, m) != (15, 7)
    ]
)
"""The 127 non-negative values of fp8 e4m3 (fn: no infinities, 0x7F is NaN), by code."""
E4M3_CODES = np.append(E4M3, 480.0)
"""What each code decodes to: 0x7F, which no encoder writes, goes on where the others end."""

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
"""The 8 non-negative values of fp4 e2m1, by code."""
