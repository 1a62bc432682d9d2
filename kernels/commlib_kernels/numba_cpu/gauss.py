"""Codes of a table of values +- alike, and the scale that fits a block's codes best.

Only magnitudes are compared, with the table's numbers in registers: that vectorises, where a search
or a lookup would not. A table is 8 magnitudes and the 7 thresholds between them; a shorter one is
padded with thresholds that nothing exceeds. Equations: reference/blocks.py.
"""

from functools import cache

import numpy as np
import numpy.typing as npt

from commlib_kernels.numba_cpu.coders import Coder, is_coded
from commlib_kernels.numba_cpu.jit import SCALARS, bits, floats, inlined, loop
from commlib_kernels.numba_cpu.strips import U, absmax
from commlib_kernels.numba_cpu.tables import pack, unpack
from commlib_kernels.scalar import BAD_SCALE, HUGE, TINY
from commlib_kernels.tables import TABLES, thresholds

u8, u32, i32, f32 = np.uint8, np.uint32, np.int32, np.float32
bf16_nearest, bf16_value = SCALARS.bf16_nearest, SCALARS.bf16_value
HALF = 15
"""Place in the table of the number of magnitudes."""


@cache
def numbers(table: str) -> npt.NDArray[np.float32]:
    """The array that kernels get."""
    half = len(TABLES[table]) // 2
    found = np.full(16, np.inf, np.float32)
    found[:8] = 0
    found[:half] = TABLES[table][half:]
    found[8 : 7 + half] = thresholds(TABLES[table])[half:]
    found[HALF] = half
    return found


@inlined
def magnitudes_of(t):
    """The 8 magnitudes, and how many of them count."""
    return t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], i32(t[HALF])


@inlined
def thresholds_of(t):
    """The 7 thresholds."""
    return t[8], t[9], t[10], t[11], t[12], t[13], t[14]


@inlined
def nearest(a, c, t):
    """The magnitude nearest to a."""
    m = c[1] if a > t[0] else c[0]
    m = c[2] if a > t[1] else m
    m = c[3] if a > t[2] else m
    m = c[4] if a > t[3] else m
    m = c[5] if a > t[4] else m
    m = c[6] if a > t[5] else m
    return c[7] if a > t[6] else m


@inlined
def number(a, t):
    """Its number."""
    k = i32(1) if a > t[0] else i32(0)
    k = i32(2) if a > t[1] else k
    k = i32(3) if a > t[2] else k
    k = i32(4) if a > t[3] else k
    k = i32(5) if a > t[4] else k
    k = i32(6) if a > t[5] else k
    return i32(7) if a > t[6] else k


@inlined
def value(code, scale, c):
    """Table value times scale."""
    k = i32(code) - c[8]
    sign = u32(k) & u32(0x80000000)
    k = k ^ (k >> i32(31))
    odd, second, third = (k & i32(1)) != 0, (k & i32(2)) != 0, (k & i32(4)) != 0
    low = (c[3] if second else c[1]) if odd else (c[2] if second else c[0])
    high = (c[7] if second else c[5]) if odd else (c[6] if second else c[4])
    m = high if third else low
    return floats(bits(m) ^ sign) * scale


@inlined
def code(z, k, half):
    """The code of z with magnitude k: below the middle those of negative numbers and of zero."""
    return u8(half + k if z > f32(0) else half - i32(1) - k)


@loop
def halves(x, n):
    """Sum of n = 2^k elements, the upper half to the lower; x is overwritten."""
    while n > U(1):
        n = n // U(2)
        for i in range(n):
            x[i] = x[i] + x[n + i]
    return x[0]


@loop
def squares(v, o, n, h, down, x):
    """Squares of ``v down``, of which there are n, after the first halving, to h elements."""
    for i in range(n - h):
        a, b = v[o + i] * down, v[o + h + i] * down
        x[i] = a * a + b * b
    for i in range(n - h, h):
        a = v[o + i] * down
        x[i] = a * a


@loop
def products(v, o, n, h, inv, table, x, y, q):
    """Codes of ``z = v inv``; with their values c, products c z to x and c c to y, halved once."""
    c, t, half = magnitudes_of(table), thresholds_of(table), i32(table[HALF])
    for i in range(n - h):
        z, w = v[o + i] * inv, v[o + h + i] * inv
        a, b = abs(z), abs(w)
        p, r = nearest(a, c, t), nearest(b, c, t)
        x[i] = p * a + r * b
        y[i] = p * p + r * r
        q[o + i] = code(z, number(a, t), half)
        q[o + h + i] = code(w, number(b, t), half)
    for i in range(n - h, h):
        z = v[o + i] * inv
        a = abs(z)
        p = nearest(a, c, t)
        x[i] = p * a
        y[i] = p * p
        q[o + i] = code(z, number(a, t), half)


def fit(v, nb, width, n, huge, unbiased, table, x, y, s, q):
    """Code every block and find the scale that suits its codes; x and y are scratch.

    A template, with the `products` and the `padding` of a kind (`ops.py`).
    """
    for b in range(nb):
        o = b * width
        last = min(width, n - o)
        h = U(1)
        while U(2) * h < last:
            h = U(2) * h
        m = absmax(v, o, width)
        bad = m >= huge
        s[b] = bf16_value(BAD_SCALE) if bad else f32(0)
        if not bad and m >= TINY:
            down = floats((u32(254) - (m >> u32(23))) << u32(23))
            squares(v, o, last, h, down, x)
            rms = f32(np.sqrt(halves(x, h) / f32(last)))
            inv = f32(1) / rms * down
            products(v, o, last, h, inv, table, x, y, q)
            for i in range(o + last, o + width):
                q[i] = padding(table)
            along, across = halves(x, h), halves(y, h)
            ratio = f32(last) / along if unbiased else along / across
            scale = bf16_nearest(rms * ratio * floats((m >> u32(23)) << u32(23)))
            s[b] = bf16_value(BAD_SCALE if scale >= HUGE >> u32(16) else scale)
        if not is_coded(s[b]):
            for i in range(width):
                q[o + i] = u8(0)


@inlined
def padding(table):
    """The code of 0."""
    return code(f32(0), i32(0), i32(table[HALF]))


@loop
def no_fit(v, nb, width, n, huge, unbiased, table, x, y, s, q):
    """For the other kinds, which have no such scale."""


@loop
def no_code(v, nb, width, s, levels, stochastic, r, table, q):
    """`fit` has done it."""


CODER = Coder(no_code, pack, unpack, value, np.uint8, magnitudes_of)
