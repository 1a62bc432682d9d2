"""The randomised Hadamard transform of a strip's blocks; equations: reference/rotation.py.

The order of the sums is that of butterflies from the widest to the narrowest, in place, up to four
stages in one pass over a block (`vectors`).
"""

import numpy as np

from commlib_kernels.numba_cpu.jit import bits, floats, inlined, loop
from commlib_kernels.numba_cpu.strips import U
from commlib_kernels.numba_cpu.vectors import (
    LANES,
    apart2,
    apart4,
    apart8,
    apart16,
    last1,
    last2,
    last4,
    last8,
    last16,
)
from commlib_kernels.philox import SIGNS
from commlib_kernels.scalar import NAN

u32, f32 = np.uint32, np.float32
PERIOD = U(SIGNS)
VECTOR = U(LANES)
WHOLE = VECTOR * U(16)
"""Elements that one pass does alone."""


@loop
def flip(v, factor, signs, position, count, y):
    """y = D v factor, of `count` elements from `position` in the segment on; one NaN for all."""
    done = U(0)
    while done < count:
        first = (position + done) % PERIOD
        n = min(PERIOD - first, count - done)
        for i in range(n):
            e = floats(bits(v[done + i] * factor) ^ signs[first + i])
            y[done + i] = e if e == e else floats(NAN)
        done += n


@inlined
def exponent(n):
    """k of n = 2^k, or of the largest power of two in n."""
    k = 0
    while n >> U(k + 1):
        k += 1
    return k


@inlined
def power(k):
    """2^-k."""
    return floats(u32(127 - k) << u32(23))


@loop
def wide(x, o, n):
    """The stages of n elements after which every run of WHOLE stands alone: 32 runs at most."""
    step = WHOLE
    if n == U(2) * WHOLE:
        for i in range(o, o + step, VECTOR):
            apart2(x, i, step)
    elif n == U(4) * WHOLE:
        for i in range(o, o + step, VECTOR):
            apart4(x, i, step)
    elif n == U(8) * WHOLE:
        for i in range(o, o + step, VECTOR):
            apart8(x, i, step)
    elif n == U(16) * WHOLE:
        for i in range(o, o + step, VECTOR):
            apart16(x, i, step)
    else:
        step = n // U(4)
        for i in range(o, o + step, VECTOR):
            apart4(x, i, step)
        for first in range(o, o + n, step):
            for i in range(first, first + WHOLE, VECTOR):
                apart8(x, i, WHOLE)


@loop
def butterflies(x, o, n):
    """H x of n = 2^k elements from o on, 8 to 4096; in place."""
    if n >= WHOLE:
        if n > WHOLE:
            wide(x, o, n)
        for first in range(o, o + n, WHOLE):
            last16(x, first, VECTOR)
    elif n == U(64):
        last8(x, o, VECTOR)
    elif n == U(32):
        last4(x, o, VECTOR)
    elif n == U(16):
        last2(x, o, VECTOR)
    else:
        last1(x, o, VECTOR)


@loop
def forward(v, nb, width, position, signs, y):
    """y = H D v / 2^f."""
    if width & (width - U(1)) == U(0):
        flip(v, power(exponent(width) // 2), signs, position, nb * width, y)
        for b in range(nb):
            butterflies(y, b * width, width)
        return
    flip(v, f32(1), signs, position, width, y)  # the short last block, alone
    o, left = U(0), width
    while left:
        k = exponent(left)
        n, factor = U(1) << U(k), power(k // 2)
        for i in range(o, o + n):
            y[i] *= factor
        butterflies(y, o, n)
        o, left = o + n, left - n


@loop
def backward(y, nb, width, position, signs, v):
    """v = D H y / 2^(k - f); y is overwritten, and v another buffer."""
    if width & (width - U(1)) == U(0):
        k = exponent(width)
        for b in range(nb):
            butterflies(y, b * width, width)
        flip(y, power(k - k // 2), signs, position, nb * width, v)
        return
    o, left = U(0), width
    while left:
        k = exponent(left)
        n, factor = U(1) << U(k), power(k - k // 2)
        butterflies(y, o, n)
        for i in range(o, o + n):
            y[i] *= factor
        o, left = o + n, left - n
    flip(y, f32(1), signs, position, width, v)
