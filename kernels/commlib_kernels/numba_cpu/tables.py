"""Codes of a table of any 16 values.

All comparisons are made, with the thresholds in registers: that vectorises, where a search would
not. A table is 16 values and the 15 thresholds between them in one array.
"""

import numpy as np
import numpy.typing as npt

from commlib_kernels.numba_cpu.coders import Coder, is_coded, nothing
from commlib_kernels.numba_cpu.jit import floats, inlined, loop
from commlib_kernels.numba_cpu.lookup import look_up, look_up_and_add
from commlib_kernels.numba_cpu.planes import pack_planes, unpack_planes
from commlib_kernels.numba_cpu.strips import U
from commlib_kernels.numba_cpu.vectors import LANES
from commlib_kernels.once import once
from commlib_kernels.scalar import NAN
from commlib_kernels.tables import TABLES, thresholds

u8, i32, f32 = np.uint8, np.int32, np.float32


@once
def numbers(table: str) -> npt.NDArray[np.float32]:
    """The array that kernels get; thresholds below zero a bit lower, so that a tie goes to zero."""
    t = thresholds(TABLES[table])
    t[t < 0] = np.nextafter(t[t < 0], np.float32(-np.inf))
    return np.concatenate([np.array(TABLES[table], np.float32), t])


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
def no_value(code, scale, c):
    """Tables have loops of their own, by whole vectors."""
    return scale


@loop
def spread(q, nb, width, s, table, v):
    """v = decoded."""
    for b in range(nb):
        o, scale = b * width, s[b]
        if scale == scale:
            for i in range(o, o + width, U(LANES)):
                look_up(q, table, scale, v, i)
        else:
            for i in range(o, o + width):
                v[i] = floats(NAN)


@loop
def accumulate(q, nb, width, s, table, v):
    """v += decoded."""
    for b in range(nb):
        o, scale = b * width, s[b]
        if scale == scale:
            for i in range(o, o + width, U(LANES)):
                look_up_and_add(q, table, scale, v, i)
        else:
            for i in range(o, o + width):
                v[i] = floats(NAN)


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


CODER = Coder(code, pack, unpack, no_value, np.uint8, nothing)
