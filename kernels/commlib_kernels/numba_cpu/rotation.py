"""The randomised Hadamard transform of a strip's blocks; equations: reference/rotation.py.

Every stage reads from one buffer and writes to the other, the pairs of results beside each other:
so all stages are one loop over far and near elements alike, which vectorises (Pease 1968). Two
stages go together. The order of the sums is that of butterflies from the widest to the narrowest.
"""

import numpy as np

from commlib_kernels.numba_cpu.jit import bits, floats, inlined, loop
from commlib_kernels.numba_cpu.strips import U
from commlib_kernels.philox import SIGNS
from commlib_kernels.scalar import NAN

u32, f32 = np.uint32, np.float32
PERIOD = U(SIGNS)


@loop
def flip(v, factor, signs, position, count, y):
    """y = D v factor, of `count` elements from `position` in the segment on."""
    done = U(0)
    while done < count:
        first = (position + done) % PERIOD
        n = min(PERIOD - first, count - done)
        for i in range(n):
            y[done + i] = floats(bits(v[done + i] * factor) ^ signs[first + i])
        done += n


@loop
def stage(x, o, n, y):
    """One stage from x to y, both from element o on."""
    h = n // U(2)
    for i in range(h):
        a, b = x[o + i], x[o + h + i]
        p = o + U(2) * i
        y[p] = a + b
        y[p + U(1)] = a - b


@loop
def two_stages(x, o, n, y):
    """The same twice."""
    h = n // U(4)
    for i in range(h):
        a, b = x[o + i], x[o + h + i]
        c, d = x[o + U(2) * h + i], x[o + U(3) * h + i]
        s, t, u, w = a + c, b + d, a - c, b - d
        p = o + U(4) * i
        y[p] = s + t
        y[p + U(1)] = s - t
        y[p + U(2)] = u + w
        y[p + U(3)] = u - w


@loop
def copy(x, o, n, y):
    """y = x."""
    for i in range(o, o + n):
        y[i] = x[i]


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
def butterflies(x, o, n, y):
    """H x of n = 2^k elements from o on. It ends in y where ceil(k / 2) is odd, else in x."""
    k, here = exponent(n), True
    while k > 0:
        if k == 1:
            if here:
                stage(x, o, n, y)
            else:
                stage(y, o, n, x)
        elif here:
            two_stages(x, o, n, y)
        else:
            two_stages(y, o, n, x)
        k, here = k - 2, not here


@inlined
def ends_apart(k):
    """Whether `butterflies` end in the other buffer."""
    return ((k + 1) // 2) % 2 == 1


@loop
def forward(v, nb, width, position, signs, y, other):
    """y = H D v / 2^f."""
    if width & (width - U(1)) == U(0):
        k = exponent(width)
        if ends_apart(k):
            flip(v, power(k // 2), signs, position, nb * width, other)
            for b in range(nb):
                butterflies(other, b * width, width, y)
        else:
            flip(v, power(k // 2), signs, position, nb * width, y)
            for b in range(nb):
                butterflies(y, b * width, width, other)
        return
    flip(v, f32(1), signs, position, width, y)  # the short last block, alone
    o, left = U(0), width
    while left:
        k = exponent(left)
        n, factor = U(1) << U(k), power(k // 2)
        for i in range(o, o + n):
            y[i] *= factor
        butterflies(y, o, n, other)
        if ends_apart(k):
            copy(other, o, n, y)
        o, left = o + n, left - n


@loop
def backward_to(y, nb, width, position, signs, v, other):
    """v = D H y / 2^(k - f); y is overwritten, and v another buffer."""
    if width & (width - U(1)) == U(0):
        k = exponent(width)
        for b in range(nb):
            butterflies(y, b * width, width, other)
        if ends_apart(k):
            flip(other, power(k - k // 2), signs, position, nb * width, v)
        else:
            flip(y, power(k - k // 2), signs, position, nb * width, v)
        return
    o, left = U(0), width
    while left:
        k = exponent(left)
        n, factor = U(1) << U(k), power(k - k // 2)
        butterflies(y, o, n, other)
        if ends_apart(k):
            copy(other, o, n, y)
        for i in range(o, o + n):
            y[i] *= factor
        o, left = o + n, left - n
    flip(y, f32(1), signs, position, width, v)


@loop
def backward(y, nb, width, position, signs, other):
    """y = D H y / 2^(k - f). A loop that reads what it writes would not vectorise."""
    k = exponent(width)
    if width & (width - U(1)) == U(0) and ends_apart(k):
        backward_to(y, nb, width, position, signs, y, other)
    else:
        backward_to(y, nb, width, position, signs, other, other)
        copy(other, U(0), nb * width, y)


@loop
def one_nan(v, n):
    """One NaN for all NaNs."""
    for i in range(n):
        v[i] = v[i] if v[i] == v[i] else floats(NAN)
