"""A unit: what a lane holds of a block, four neighbouring columns of eight rows, in registers.

A block of n elements (n a multiple of 8) has n / 8 columns; row r of unit u holds its elements
``r n / 8 + 4 u`` to ``+ 3``. Arrays of 32 are the unit's elements, row after row; indices into them
are constants once loops are unrolled, which is what keeps them in registers. A `whole` unit has all
four columns, all of them real and aligned: it moves in the widest accesses there are. Everything
else goes element by element, under a guard.
"""

import numpy as np

from commlib_kernels.launch import BF16, COLUMNS, FP32, ROWS, UNIT
from commlib_kernels.numba_cuda.jit import (
    SCALARS,
    bits,
    bytes4,
    device,
    floats,
    fp16_nearest,
    fp16_value,
    load8,
    load16,
    load32,
    load32x2,
    load32x4,
    mul,
    store8,
    store16,
    store32,
    store32x2,
    store32x4,
)
from commlib_kernels.scalar import NAN

u32, i32, f32 = np.uint32, np.int32, np.float32

bf16_nearest, bf16_value, philox = SCALARS.bf16_nearest, SCALARS.bf16_value, SCALARS.philox


@device
def real_elements(u, columns, n):
    """Bit 4 r + c is set where row r, column c of unit u is one of a block's n elements."""
    # As one word it takes one register; 32 comparisons would stay alive from load to store.
    real = u32(0)
    for r in range(ROWS):
        left = min(columns, n - r * columns) - 4 * u
        real |= u32(((1 << max(0, min(left, COLUMNS))) - 1) << (4 * r))
    return real


@device
def has(real, r, c):
    """Whether an element is real."""
    return real & u32(1 << (4 * r + c)) != u32(0)


@device
def one_nan(x):
    """The pattern of x, 0x7FC00000 for every NaN."""
    return bits(x) if x == x else NAN


@device
def load_words(p, a, u, columns, real, whole):
    """32-bit patterns of a unit of the block at address a; zeros where there is nothing."""
    for r in range(ROWS):
        if whole:
            p[4 * r], p[4 * r + 1], p[4 * r + 2], p[4 * r + 3] = load32x4(
                a + 4 * (r * columns + 4 * u)
            )
        else:
            for c in range(COLUMNS):
                p[4 * r + c] = u32(0)
                if has(real, r, c):
                    p[4 * r + c] = load32(a + 4 * (r * columns + 4 * u + c))


@device
def load_halves(p, a, u, columns, real, whole):
    """16-bit patterns."""
    for r in range(ROWS):
        if whole:
            low, high = load32x2(a + 2 * (r * columns + 4 * u))
            p[4 * r], p[4 * r + 1] = low & u32(0xFFFF), low >> u32(16)
            p[4 * r + 2], p[4 * r + 3] = high & u32(0xFFFF), high >> u32(16)
        else:
            for c in range(COLUMNS):
                p[4 * r + c] = u32(0)
                if has(real, r, c):
                    p[4 * r + c] = load16(a + 2 * (r * columns + 4 * u + c))


@device
def load_unit(v, p, a, dtype, u, columns, real, whole):
    """Elements of the block at address a, as fp32; zeros beyond its end. Overwrites p."""
    if dtype == FP32:
        load_words(p, a, u, columns, real, whole)
        for i in range(UNIT):
            v[i] = floats(p[i])
    else:
        load_halves(p, a, u, columns, real, whole)
        if dtype == BF16:
            for i in range(UNIT):
                v[i] = bf16_value(p[i])
        else:
            for i in range(UNIT):
                v[i] = fp16_value(p[i])


@device
def signed_byte(word):
    """The lowest byte as a number from -128 to 127."""
    return f32(i32((word & u32(0xFF)) ^ u32(0x80)) - i32(0x80))


@device
def load_bytes(v, a, scale, u, columns, real, whole):
    """Elements of an int8 residual."""
    for r in range(ROWS):
        if whole:
            word = load32(a + r * columns + 4 * u)
            for c in range(COLUMNS):
                v[4 * r + c] = mul(signed_byte(word >> u32(8 * c)), scale)
        else:
            for c in range(COLUMNS):
                v[4 * r + c] = f32(0)
                if has(real, r, c):
                    v[4 * r + c] = mul(signed_byte(load8(a + r * columns + 4 * u + c)), scale)


@device
def store_words(p, a, u, columns, real, whole):
    """The inverse of `load_words`."""
    for r in range(ROWS):
        if whole:
            store32x4(
                a + 4 * (r * columns + 4 * u), p[4 * r], p[4 * r + 1], p[4 * r + 2], p[4 * r + 3]
            )
        else:
            for c in range(COLUMNS):
                if has(real, r, c):
                    store32(a + 4 * (r * columns + 4 * u + c), p[4 * r + c])


@device
def store_halves(p, a, u, columns, real, whole):
    """The inverse of `load_halves`; what is above 16 bits must be zero."""
    for r in range(ROWS):
        if whole:
            low = p[4 * r] | (p[4 * r + 1] << u32(16))
            high = p[4 * r + 2] | (p[4 * r + 3] << u32(16))
            store32x2(a + 2 * (r * columns + 4 * u), low, high)
        else:
            for c in range(COLUMNS):
                if has(real, r, c):
                    store16(a + 2 * (r * columns + 4 * u + c), p[4 * r + c])


@device
def store_unit(v, p, a, dtype, u, columns, real, whole):
    """fp32 values to a tensor, rounded to nearest even; one NaN for all NaNs. Overwrites p."""
    if dtype == FP32:
        for i in range(UNIT):
            p[i] = one_nan(v[i])
        store_words(p, a, u, columns, real, whole)
    else:
        if dtype == BF16:
            for i in range(UNIT):
                p[i] = bf16_nearest(v[i])
        else:
            for i in range(UNIT):
                p[i] = fp16_nearest(v[i])
        store_halves(p, a, u, columns, real, whole)


@device
def store_bytes(p, a, u, columns, real, whole):
    """The lowest bytes of p, to an int8 residual."""
    for r in range(ROWS):
        if whole:
            word = bytes4(p[4 * r], p[4 * r + 1], p[4 * r + 2], p[4 * r + 3])
            store32(a + r * columns + 4 * u, word)
        else:
            for c in range(COLUMNS):
                if has(real, r, c):
                    store8(a + r * columns + 4 * u + c, p[4 * r + c])


@device
def clear_padding(v, real):
    """Padding is +0 whatever its code meant, and has no error."""
    # A choice, not a branch: a loop of conditional stores stays a loop for newer GPUs.
    for i in range(UNIT):
        v[i] = v[i] if has(real, i // COLUMNS, i % COLUMNS) else f32(0)


# ---- one element at a time: norms and exact pieces --------------------------------------------


@device
def size_of(dtype):
    """Bytes of an element."""
    return 4 if dtype == FP32 else 2


@device
def load_element(a, dtype, e):
    """Element e of the array at address a, as fp32."""
    if dtype == FP32:
        return floats(load32(a + 4 * e))
    half = load16(a + 2 * e)
    return bf16_value(half) if dtype == BF16 else fp16_value(half)


@device
def store_element(a, dtype, e, x):
    """The inverse, rounded to nearest even; one NaN for all NaNs."""
    if dtype == FP32:
        store32(a + 4 * e, one_nan(x))
    else:
        store16(a + 2 * e, bf16_nearest(x) if dtype == BF16 else fp16_nearest(x))


# ---- what all elements of a unit have in common -------------------------------------------------


@device
def top(v):
    """Maximum of the absolute bit patterns: integers have no order and show NaN."""
    m = u32(0)
    for i in range(UNIT):
        m = max(m, bits(v[i]) & u32(0x7FFFFFFF))
    return m


@device
def put_random(p, i, word):
    """A word serves two elements, four rows apart."""
    p[i] = word & u32(0xFFFF)
    p[i + UNIT // 2] = word >> u32(16)


@device
def random_unit(p, group, step, rank, seed, key):
    """16 random bits for every element; a group is a column, `group` that of the first."""
    for c in range(COLUMNS):
        g = group + c
        low, high = u32(g & 0xFFFFFFFF), u32((g >> 32) & 0xFFFFFFFF)
        w0, w1, w2, w3 = philox(low, high, step, rank, seed, key)
        put_random(p, c, u32(w0))
        put_random(p, COLUMNS + c, u32(w1))
        put_random(p, 2 * COLUMNS + c, u32(w2))
        put_random(p, 3 * COLUMNS + c, u32(w3))
