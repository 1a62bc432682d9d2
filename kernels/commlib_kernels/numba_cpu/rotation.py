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
    flip2,
    flip4,
    flip8,
    flip16,
    flip_last16,
    last1,
    last2,
    last4,
    last8,
    last16,
    last16_flip,
    prefetch,
)
from commlib_kernels.philox import SIGNS
from commlib_kernels.scalar import NAN

u32, f32 = np.uint32, np.float32
PERIOD = U(SIGNS)
VECTOR = U(LANES)
WHOLE = VECTOR * U(16)
"""Elements that one pass does alone."""
LINE = U(16)
"""Elements of a cache line."""
AHEAD = U(2048)
"""How many elements before they are needed memory is asked for them."""


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


@inlined
def fetch(v, o, n):
    """Ask for n elements from o on."""
    for i in range(o, o + n, LINE):
        prefetch(v, i)


@loop
def begin(v, factor, signs, at, y, o, n):
    """`flip` and `wide` in one: y is the first stages' of ``D v factor``, n > WHOLE elements."""
    step = n // U(4) if n > U(16) * WHOLE else WHOLE
    if n == U(2) * step:
        for i in range(U(0), step, VECTOR):
            flip2(v, factor, signs, at + i, y, o + i, step)
    elif n == U(4) * step:
        for i in range(U(0), step, VECTOR):
            flip4(v, factor, signs, at + i, y, o + i, step)
    elif n == U(8) * step:
        for i in range(U(0), step, VECTOR):
            flip8(v, factor, signs, at + i, y, o + i, step)
    else:
        for i in range(U(0), step, VECTOR):
            flip16(v, factor, signs, at + i, y, o + i, step)
    if step > WHOLE:
        for i in range(o, o + n, step):
            wide(y, i, step)


@loop
def flip_butterflies(v, factor, signs, at, y, o, n):
    """y = H D v factor of n = 2^k elements from o on, 128 to 4096; signs from `at` on.

    `begin` reads at up to 16 places at once, more than processors foresee, so memory is asked for
    what comes next: by the passes that read y, as `begin` alone would ask faster than it answers.
    """
    if n == WHOLE:
        fetch(v, o + AHEAD, WHOLE)
        flip_last16(v, factor, signs, at, y, o, VECTOR)
        return
    begin(v, factor, signs, at, y, o, n)
    for i in range(o, o + n, WHOLE):
        fetch(v, i + AHEAD, WHOLE)
        last16(y, i, VECTOR)


@loop
def butterflies_flip(y, factor, signs, at, v, o, n):
    """v = D H y factor of n = 2^k elements from o on, 128 to 4096; y is overwritten."""
    if n > WHOLE:
        wide(y, o, n)
    for i in range(U(0), n, WHOLE):
        last16_flip(y, factor, signs, at + i, v, o + i, VECTOR)


@inlined
def in_one(width, position):
    """Whether flips and butterflies go together: the signs of a block are not cut by their end."""
    return width >= WHOLE and position % width == U(0)


@loop
def forward(v, nb, width, position, signs, y):
    """y = H D v / 2^f."""
    if width & (width - U(1)) == U(0):
        factor = power(exponent(width) // 2)
        if in_one(width, position):
            for o in range(U(0), nb * width, width):
                flip_butterflies(v, factor, signs, (position + o) % PERIOD, y, o, width)
            return
        flip(v, factor, signs, position, nb * width, y)
        for o in range(U(0), nb * width, width):
            butterflies(y, o, width)
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
        factor = power(k - k // 2)
        if in_one(width, position):
            for o in range(U(0), nb * width, width):
                butterflies_flip(y, factor, signs, (position + o) % PERIOD, v, o, width)
            return
        for o in range(U(0), nb * width, width):
            butterflies(y, o, width)
        flip(y, factor, signs, position, nb * width, v)
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
