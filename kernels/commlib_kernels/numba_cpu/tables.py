"""Codes of a table of any 16 values.

All comparisons are made, with the table's numbers in registers: that vectorises, where a search or
a lookup would not. A table is 16 values and the 15 thresholds between them in one array.
"""

from functools import cache

import numpy as np
import numpy.typing as npt

from commlib_kernels.numba_cpu.coders import Coder, is_coded, pack_planes, unpack_planes
from commlib_kernels.numba_cpu.jit import inlined, loop
from commlib_kernels.numba_cpu.strips import U
from commlib_kernels.tables import TABLES, thresholds

u8, i32, f32 = np.uint8, np.int32, np.float32


@cache
def numbers(table: str) -> npt.NDArray[np.float32]:
    """The array that kernels get; thresholds below zero a bit lower, so that a tie goes to zero."""
    t = thresholds(TABLES[table])
    t[t < 0] = np.nextafter(t[t < 0], np.float32(-np.inf))
    return np.concatenate([np.array(TABLES[table], np.float32), t])


@inlined
def values_of(t):
    """The 16 values."""
    return (
        t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7],
        t[8], t[9], t[10], t[11], t[12], t[13], t[14], t[15],
    )  # fmt: skip


@inlined
def thresholds_of(t):
    """The 15 thresholds."""
    return (
        t[16], t[17], t[18], t[19], t[20], t[21], t[22],
        t[23], t[24], t[25], t[26], t[27], t[28], t[29], t[30],
    )  # fmt: skip


@inlined
def number(z, t):
    """The number of the value nearest to z: how many thresholds lie below it."""
    q = i32(z > t[0]) + i32(z > t[1]) + i32(z > t[2]) + i32(z > t[3]) + i32(z > t[4])
    q += i32(z > t[5]) + i32(z > t[6]) + i32(z > t[7]) + i32(z > t[8]) + i32(z > t[9])
    return q + i32(z > t[10]) + i32(z > t[11]) + i32(z > t[12]) + i32(z > t[13]) + i32(z > t[14])


@inlined
def value(code, scale, c):
    """Table value times scale."""
    q = i32(code)
    v = c[1] if q > 0 else c[0]
    v = c[2] if q > 1 else v
    v = c[3] if q > 2 else v
    v = c[4] if q > 3 else v
    v = c[5] if q > 4 else v
    v = c[6] if q > 5 else v
    v = c[7] if q > 6 else v
    v = c[8] if q > 7 else v
    v = c[9] if q > 8 else v
    v = c[10] if q > 9 else v
    v = c[11] if q > 10 else v
    v = c[12] if q > 11 else v
    v = c[13] if q > 12 else v
    v = c[14] if q > 13 else v
    v = c[15] if q > 14 else v
    return v * scale


@loop
def codes_of(v, o, width, inv, table, q):
    """Codes of ``v inv``."""
    t = thresholds_of(table)
    for i in range(width):
        q[o + i] = u8(number(v[o + i] * inv, t))


@loop
def code(v, nb, width, s, levels, stochastic, r, table, q):
    """Of v / scale."""
    for b in range(nb):
        o = b * width
        if is_coded(s[b]):
            codes_of(v, o, width, f32(1) / s[b], table, q)
        else:
            for i in range(width):
                q[o + i] = u8(0)


@loop
def pack(q, nb, width, nbits, wire, words, c):
    """Bit planes; 4 bits, which people use most, without a detour."""
    if nbits == 4:
        h = width // U(2)
        for b in range(nb):
            o = b * width
            p = c + b * h
            for i in range(h):
                wire[p + i] = u8(q[o + i] | (q[o + h + i] << u8(4)))
    else:
        pack_planes(q, nb, width, nbits, wire, c)


@loop
def unpack(wire, words, c, nb, width, nbits, q):
    """Codes from 0 on."""
    if nbits == 4:
        h = width // U(2)
        for b in range(nb):
            o = b * width
            p = c + b * h
            for i in range(h):
                q[o + i] = wire[p + i] & u8(15)
            for i in range(h):
                q[o + h + i] = wire[p + i] >> u8(4)
    else:
        unpack_planes(wire, c, nb, width, nbits, q)


CODER = Coder(code, pack, unpack, value, np.uint8, values_of)
