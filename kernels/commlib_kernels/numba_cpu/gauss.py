"""Codes of a table of values +- alike, and the scale that fits a block's codes best.

Only magnitudes are compared, with the 7 thresholds between them (by whole vectors: `fit`); a
shorter table is padded with thresholds that nothing exceeds. Equations: reference/blocks.py.
"""

import numpy as np
import numpy.typing as npt

from commlib_kernels.numba_cpu.coders import Coder, is_coded, nothing
from commlib_kernels.numba_cpu.fit import ROUND, RUN, fit_pairs, fit_run, fold, steps_of
from commlib_kernels.numba_cpu.jit import SCALARS, floats, inlined, loop
from commlib_kernels.numba_cpu.lookup import tree
from commlib_kernels.numba_cpu.strips import U, absmax
from commlib_kernels.numba_cpu.tables import no_value, pack, unpack
from commlib_kernels.numba_cpu.vectors import LANES
from commlib_kernels.once import once
from commlib_kernels.scalar import BAD_SCALE, HUGE, TINY
from commlib_kernels.tables import TABLES, thresholds

u8, u32, i32, f32 = np.uint8, np.uint32, np.int32, np.float32
bf16_nearest, bf16_value = SCALARS.bf16_nearest, SCALARS.bf16_value
CUTS, THRESHOLDS, HALF, GUESS = U(16), U(24), U(31), U(32)
"""Places in the array that kernels get, after the 16 values: thresholds by their cell's code and in
order; the number of magnitudes; how a code is guessed (`fit`)."""
WHOLE = U(RUN * LANES)


@once
def numbers(table: str) -> npt.NDArray[np.float32]:
    """The array that kernels get."""
    values = TABLES[table]
    half = len(values) // 2
    found = np.zeros(35, np.float32)
    found[: 2 * half] = values
    cuts = thresholds(values)[half:]
    found[[16 + (half + cell - 1) % 8 for cell in range(half)]] = [-1, *cuts]
    found[24:31] = np.inf
    found[24 : 23 + half] = cuts
    steps = steps_of(cuts.tolist())
    found[31:] = half, steps, (half - 1) / steps, ROUND + half - 1
    return found


@inlined
def thresholds_of(t):
    """The 7 thresholds."""
    return t[24], t[25], t[26], t[27], t[28], t[29], t[30]


@inlined
def number(a, t):
    """The number of the magnitude nearest to a: how many thresholds lie below it."""
    k = i32(a > t[0]) + i32(a > t[1]) + i32(a > t[2]) + i32(a > t[3])
    return k + i32(a > t[4]) + i32(a > t[5]) + i32(a > t[6])


@inlined
def code(z, k, half):
    """The code of z with magnitude k: below the middle those of negative numbers and of zero."""
    return u8(half + k if z > f32(0) else half - i32(1) - k)


@loop
def halves(x, n):
    """Sum of n = 2^k elements, the upper half to the lower; x is overwritten."""
    while n >= U(8 * LANES):
        n = n // U(8)
        for i in range(U(0), n, U(LANES)):
            fold(x, i, n)
    while n > U(LANES):
        n = n // U(2)
        for i in range(n):
            x[i] = x[i] + x[n + i]
    if n == U(LANES):
        return tree(x)
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


@inlined
def lookups(t):
    """Thresholds and magnitudes by the low bits of codes, and how these are guessed (`fit`)."""
    first = U(max(i32(t[HALF]) - i32(4), i32(0)) * 2)
    return t[CUTS:], t[first:], (t[GUESS], t[GUESS + U(1)], t[GUESS + U(2)])


@loop
def products(v, o, n, h, inv, table, x, y, q):
    """Codes of ``z = v inv``; with their values c, products c z to x and c c to y, halved once."""
    t, half = thresholds_of(table), i32(table[HALF])
    c, (cuts, by_code, guess) = table[U(half) :], lookups(table)
    whole = (n - h) & ~(WHOLE - U(1))
    for i in range(U(0), whole, WHOLE):
        fit_run(v, o + i, o + h + i, inv, guess, cuts, by_code, half, x, y, i, q, o + i)
    for i in range(whole, h):
        z = v[o + i] * inv
        a = abs(z)
        k = number(a, t)
        p = c[k]
        x[i], y[i] = p * a, p * p
        q[o + i] = code(z, k, half)
        if i < n - h:
            w = v[o + h + i] * inv
            b = abs(w)
            k = number(b, t)
            r = c[k]
            x[i], y[i] = x[i] + r * b, y[i] + r * r
            q[o + h + i] = code(w, k, half)


@loop
def pairs(v, o, h, inv, table, x, y, wire, c):
    """As `products` of 2h elements; codes of 4 bits go to the wire, those h apart together.

    h is a multiple of 16.
    """
    half, (cuts, by_code, guess) = i32(table[HALF]), lookups(table)
    for i in range(U(0), h, WHOLE):
        fit_pairs(v, o + i, o + h + i, inv, guess, cuts, by_code, half, x, y, i, wire, c + i)


@loop
def no_pairs(v, o, h, inv, table, x, y, wire, c):
    """For the kinds whose codes are packed."""


def fit(v, nb, width, n, huge, unbiased, table, x, y, s, q, paired, wire, c):
    """Code every block and find the scale that suits its codes; x and y are scratch.

    Codes go to q; where they are `paired`, to the wire, from byte c on. A template, with the
    `products`, the `pairs` and the `padding` of a kind (`ops.py`).
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
            if paired:
                pairs(v, o, h, inv, table, x, y, wire, c + b * h)
            else:
                products(v, o, last, h, inv, table, x, y, q)
                for i in range(o + last, o + width):
                    q[i] = padding(table)
            along, across = halves(x, h), halves(y, h)
            ratio = f32(last) / along if unbiased else along / across
            scale = bf16_nearest(rms * ratio * floats((m >> u32(23)) << u32(23)))
            s[b] = bf16_value(BAD_SCALE if scale >= HUGE >> u32(16) else scale)
        if not is_coded(s[b]):
            if paired:
                for i in range(h):
                    wire[c + b * h + i] = u8(0)
            else:
                for i in range(width):
                    q[o + i] = u8(0)


@inlined
def padding(table):
    """The code of 0."""
    return code(f32(0), i32(0), i32(table[HALF]))


@loop
def no_fit(v, nb, width, n, huge, unbiased, table, x, y, s, q, paired, wire, c):
    """For the other kinds, which have no such scale."""


@loop
def no_code(v, nb, width, s, levels, stochastic, r, table, q):
    """`fit` has done it."""


CODER = Coder(no_code, pack, unpack, no_value, np.uint8, nothing)
