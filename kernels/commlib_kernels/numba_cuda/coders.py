"""What the kinds of formats do with an element, and how scales are found.

`make` binds a format's numbers as constants: a kernel knows one format only, so that all loops over
a unit unroll. A code is a uint32 of which the format's bits count; what is above them is rubbish.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from commlib_kernels.formats import Format
from commlib_kernels.numba_cuda import tables
from commlib_kernels.numba_cuda.jit import (
    SCALARS,
    add,
    bits,
    clamp,
    device,
    floats,
    floor_bits,
    fp16_nearest,
    fp16_value,
    load16,
    mul,
    rint_bits,
)
from commlib_kernels.numba_cuda.planes import (
    get_code,
    get_halves,
    get_planes,
    put_halves,
    put_planes,
)
from commlib_kernels.scalar import BAD_SCALE, HUGE, HUGE_ROTATED, TINY

Function = Callable[..., Any]

u32, f32, f64 = np.uint32, np.float32, np.float64

EXPONENT = u32(0x4B000000)
"""2^23: an integer below it, put into the mantissa, is the number 2^23 + integer."""

bf16_nearest, bf16_up, bf16_value = SCALARS.bf16_nearest, SCALARS.bf16_up, SCALARS.bf16_value
uniform = SCALARS.uniform


class Coder(NamedTuple):
    """The functions of one format.

    code(v, inv, random): the code of a value; value(code, scale): what it means.
    put(q, keep, a, u, columns, whole), get(q, a, u, columns, whole): codes of a unit to the block's
    bytes at a, zeros where `keep` is 0, and back; one(a, e, columns): a single code.
    scale_of(m, total, n): bf16 bits of the scale, from the maximum's pattern, the norm's sum and
    the number of elements.
    """

    code: Function
    value: Function
    put: Function
    get: Function
    one: Function
    scale_of: Function


def _uniform(fmt: Format) -> tuple[Function, Function]:
    low, high = f32(-fmt.levels), f32(fmt.levels)
    mask, half = u32((1 << fmt.bits) - 1), u32(1 << (fmt.bits - 1))
    offset = f32(-(2**23) - 2 ** (fmt.bits - 1))

    # Clamped before it is rounded, to whole numbers: that gives the same.
    @device
    def nearest(v, inv, random):
        return rint_bits(clamp(mul(v, inv), low, high))

    @device
    def stochastic(v, inv, random):
        return floor_bits(clamp(add(mul(v, inv), uniform(random)), low, high))

    @device
    def value(code, scale):
        # An integer of few bits becomes a float in the mantissa: faster than a conversion.
        return mul(add(floats(((code & mask) ^ half) | EXPONENT), offset), scale)

    return stochastic if fmt.stochastic else nearest, value


def _fp8(fmt: Format) -> tuple[Function, Function]:
    e4m3_nearest, e4m3_stochastic = SCALARS.e4m3_nearest, SCALARS.e4m3_stochastic
    e4m3_value = SCALARS.e4m3_value

    @device
    def nearest(v, inv, random):
        return e4m3_nearest(mul(v, inv))

    @device
    def stochastic(v, inv, random):
        return e4m3_stochastic(mul(v, inv), random)

    @device
    def value(code, scale):
        return mul(e4m3_value(code & u32(0xFF)), scale)

    return stochastic if fmt.stochastic else nearest, value


def _sign(fmt: Format) -> tuple[Function, Function]:
    @device
    def code(v, inv, random):
        return bits(v) >> u32(31)

    @device
    def value(code, scale):
        return floats(bits(scale) ^ (code << u32(31)))

    return code, value


def _natural(fmt: Format) -> tuple[Function, Function]:
    natural_nearest, natural_stochastic = SCALARS.natural_nearest, SCALARS.natural_stochastic
    natural_value = SCALARS.natural_value

    @device
    def nearest(v, inv, random):
        return natural_nearest(v)

    @device
    def stochastic(v, inv, random):
        return natural_stochastic(v, random)

    @device
    def value(code, scale):
        return natural_value(code & u32(0x1FF))

    return stochastic if fmt.stochastic else nearest, value


def _cast(fmt: Format) -> tuple[Function, Function]:
    round_, widen = (bf16_nearest, bf16_value) if fmt.kind == "bf16" else (fp16_nearest, fp16_value)

    @device
    def code(v, inv, random):
        return round_(v)

    @device
    def value(code, scale):
        return widen(code)

    return code, value


_KINDS = {
    "uniform": _uniform,
    "fp8": _fp8,
    "sign": _sign,
    "natural": _natural,
    "gauss": tables.make,
    "table": tables.make,
    "bf16": _cast,
    "fp16": _cast,
    "raw": _cast,  # compiled as fp16, and never reached: all its pieces are exact
}


def make(fmt: Format) -> Coder:
    """The functions of a format."""
    width = fmt.bits
    code, value = _KINDS[fmt.kind](fmt)

    full = fmt.block // 8  # columns of a whole block: as a constant it is part of an instruction

    @device
    def put(q, keep, a, u, columns, whole):
        if whole:
            put_planes(q, width, keep, a, u, full, True)
        else:
            put_planes(q, width, keep, a, u, columns, False)

    @device
    def get(q, a, u, columns, whole):
        if whole:
            get_planes(q, width, a, u, full, True)
        else:
            get_planes(q, width, a, u, columns, False)

    @device
    def one(a, e, columns):
        return get_code(width, a, e, columns)

    @device
    def put_cast(q, keep, a, u, columns, whole):
        if whole:
            put_halves(q, a, u, full, True)
        else:
            put_halves(q, a, u, columns, False)

    @device
    def get_cast(q, a, u, columns, whole):
        if whole:
            get_halves(q, a, u, full, True)
        else:
            get_halves(q, a, u, columns, False)

    @device
    def one_cast(a, e, columns):
        return load16(a + 2 * e)

    scale_of = _scale_rule(fmt)
    if fmt.kind in ("fp16", "bf16", "raw"):
        return Coder(code, value, put_cast, get_cast, one_cast, scale_of)
    return Coder(code, value, put, get, one, scale_of)


def _scale_rule(fmt: Format) -> Function:
    levels = 448 if fmt.kind == "fp8" else fmt.levels
    mean, l2 = fmt.scale == "mean", fmt.scale == "l2"
    huge = HUGE if fmt.rotate is None else HUGE_ROTATED

    @device
    def scale_of(m, total, n):
        if m >= huge:
            return BAD_SCALE
        if m < TINY:
            return u32(0)
        if mean:
            return bf16_nearest(f32(total / f64(n)))
        scale = absmax_scale(m, f32(levels))
        if l2:
            scale = checked(bf16_up(f32(math.sqrt(total) / f64(levels))))
        return scale

    return scale_of


@device
def checked(scale):
    """Rounded up it may have become too large."""
    return BAD_SCALE if scale >= HUGE >> u32(16) else scale


@device
def absmax_scale(m, levels):
    """bf16 bits of maximum / levels, rounded up."""
    return checked(bf16_up(floats(m) / levels))
