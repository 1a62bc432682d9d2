"""The residual of a block: read, and renewed once the block is coded."""

import numpy as np

from commlib_kernels.launch import (
    BF16,
    FLAGS,
    FP32,
    INT8,
    IS_HELD,
    MEMORY,
    MEMORY_BLOCK,
    NONE,
    UNIT,
)
from commlib_kernels.numba_cuda.coders import absmax_scale, bf16_value
from commlib_kernels.numba_cuda.jit import add, clamp, device, load8, load16, mul, rint_bits
from commlib_kernels.numba_cuda.table import column
from commlib_kernels.numba_cuda.units import (
    load_bytes,
    load_element,
    load_unit,
    signed_byte,
    store_bytes,
    store_unit,
)
from commlib_kernels.scalar import BAD_SCALE, HUGE, TINY

u32, f32 = np.uint32, np.float32

LARGEST = f32(3.4028235e38)


@device
def kind_of(memory, row):
    """Element type of a piece's residual; none where it is held."""
    return NONE if column(row, FLAGS) & IS_HELD else memory[1]


@device
def residual_at(memory, row, start):
    """Where the residual of the block that starts at element `start` of a piece begins."""
    size = 4 if memory[1] == FP32 else (2 if memory[1] == BF16 else 1)
    return memory[0] + size * (column(row, MEMORY) + start)


@device
def residual_scale_at(memory, row, b):
    """Where the scale of block b of a piece lies, of an int8 residual."""
    return memory[2] + 2 * (column(row, MEMORY_BLOCK) + b)


@device
def load_residual(h, p, a, kind, scale, u, full, columns, real, whole):
    """A unit of the residual as fp32; `full` are the columns of a whole block, a constant."""
    if kind == INT8:
        if whole:
            load_bytes(h, a, scale, u, full, real, True)
        else:
            load_bytes(h, a, scale, u, columns, real, False)
    elif kind == FP32:
        if whole:
            load_unit(h, p, a, FP32, u, full, real, True)
        else:
            load_unit(h, p, a, FP32, u, columns, real, False)
    elif whole:
        load_unit(h, p, a, BF16, u, full, real, True)
    else:
        load_unit(h, p, a, BF16, u, columns, real, False)


@device
def store_residual(v, p, a, kind, u, full, columns, real, whole):
    """The inverse, of an fp32 or bf16 residual."""
    if kind == FP32:
        if whole:
            store_unit(v, p, a, FP32, u, full, real, True)
        else:
            store_unit(v, p, a, FP32, u, columns, real, False)
    elif whole:
        store_unit(v, p, a, BF16, u, full, real, True)
    else:
        store_unit(v, p, a, BF16, u, columns, real, False)


@device
def store_eighth(v, p, a, scale, u, full, columns, real, whole):
    """The inverse, of an int8 residual whose scale has these bits."""
    inv = f32(1) / bf16_value(scale)
    keep = u32(0xFF) if scale != u32(0) else u32(0)
    for i in range(UNIT):
        p[i] = rint_bits(clamp(mul(v[i], inv), f32(-127), f32(127))) & keep
    if whole:
        store_bytes(p, a, u, full, real, True)
    else:
        store_bytes(p, a, u, columns, real, False)


@device
def one_residual(memory, row, b, start, e):
    """One element of block b's residual."""
    a = residual_at(memory, row, start)
    if memory[1] == INT8:
        scale = bf16_value(load16(residual_scale_at(memory, row, b)))
        return mul(signed_byte(load8(a + e)), scale)
    return load_element(a, memory[1], e)


@device
def add_residual(v, h, alpha):
    """v += alpha h."""
    for i in range(UNIT):
        v[i] = add(v[i], mul(alpha, h[i]))


@device
def add_carried(v, h, carry, unscaled):
    """v += carry h; without scales an element that would not be finite is h."""
    for i in range(UNIT):
        e = add(mul(carry, h[i]), v[i]) if carry != f32(0) else v[i]
        v[i] = h[i] if unscaled and not abs(e) <= LARGEST else e


@device
def eighth_scale(m):
    """bf16 bits of an int8 residual's scale; what int8 cannot hold is forgotten."""
    if m >= HUGE or m < TINY:
        return u32(0)
    scale = absmax_scale(m, f32(127))
    return u32(0) if scale == BAD_SCALE else scale
