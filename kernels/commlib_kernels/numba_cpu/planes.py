"""Bit planes of codes: 8, 4, 2 and 1 bits, lowest bits first; a plane is contiguous in its block.

Every plane at every place is a loop of its own: where a width or a shift is known at run time only,
a loop takes ten times as long.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from commlib_kernels.numba_cpu.jit import loop, specialise

U = np.uintp
u8 = np.uint8

# Bound below: bits of a code in this plane, how far up they are in it, codes in a byte, the mask of
# one, and a type in which a code fits.
WIDTH: Any = None
SHIFT: Any = None
SHARE: Any = None
MASK: Any = None
CODE: Any = None


def put(q, o, n, wire, c):
    """One plane of the codes of a block to byte c: a byte is of elements n / SHARE apart."""
    h = n // U(SHARE)
    for i in range(h):
        byte = u8(0)
        for j in range(U(SHARE)):
            bits = u8(CODE(q[o + j * h + i]) >> CODE(SHIFT)) & u8(MASK)
            byte |= u8(bits << u8(j * U(WIDTH)))
        wire[c + i] = byte


def get(wire, c, n, q, o):
    """The inverse; the lowest plane clears what is above it."""
    h = n // U(SHARE)
    for j in range(U(SHARE)):
        for i in range(h):
            bits = u8(u8(wire[c + i]) >> u8(j * U(WIDTH))) & u8(MASK)
            if SHIFT == 0:
                q[o + j * h + i] = bits
            else:
                q[o + j * h + i] |= CODE(bits) << CODE(SHIFT)


def _plane(template: Callable[..., Any], width: int, shift: int) -> Any:
    bound = {
        "WIDTH": width,
        "SHIFT": shift,
        "SHARE": 8 // width,
        "MASK": (1 << width) - 1,
        "CODE": np.uint16 if shift >= 8 else u8,
    }
    return specialise(template, f"{width}_{shift}", bound)


put8, put4, put2, put2_4, put1, put1_2, put1_4, put1_6, put1_8 = (
    _plane(put, width, shift)
    for width, shift in ((8, 0), (4, 0), (2, 0), (2, 4), (1, 0), (1, 2), (1, 4), (1, 6), (1, 8))
)
get8, get4, get2, get2_4, get1, get1_2, get1_4, get1_6, get1_8 = (
    _plane(get, width, shift)
    for width, shift in ((8, 0), (4, 0), (2, 0), (2, 4), (1, 0), (1, 2), (1, 4), (1, 6), (1, 8))
)


@loop
def pack_planes(q, nb, width, nbits, wire, c):
    """All planes of all blocks, of 1 to 9 bits."""
    for b in range(nb):
        o = b * width
        if nbits & 8:
            put8(q, o, width, wire, c)
            c += width
        if nbits & 4:
            put4(q, o, width, wire, c)
            c += width // U(2)
        if nbits & 2:
            if nbits & 4:
                put2_4(q, o, width, wire, c)
            else:
                put2(q, o, width, wire, c)
            c += width // U(4)
        if nbits & 1:
            if nbits & 8:
                put1_8(q, o, width, wire, c)
            elif nbits == 7:
                put1_6(q, o, width, wire, c)
            elif nbits == 5:
                put1_4(q, o, width, wire, c)
            elif nbits == 3:
                put1_2(q, o, width, wire, c)
            else:
                put1(q, o, width, wire, c)
            c += width // U(8)


@loop
def unpack_planes(wire, c, nb, width, nbits, q):
    """The inverse: codes from 0 to 2^bits - 1."""
    for b in range(nb):
        o = b * width
        if nbits & 8:
            get8(wire, c, width, q, o)
            c += width
        if nbits & 4:
            get4(wire, c, width, q, o)
            c += width // U(2)
        if nbits & 2:
            if nbits & 4:
                get2_4(wire, c, width, q, o)
            else:
                get2(wire, c, width, q, o)
            c += width // U(4)
        if nbits & 1:
            if nbits & 8:
                get1_8(wire, c, width, q, o)
            elif nbits == 7:
                get1_6(wire, c, width, q, o)
            elif nbits == 5:
                get1_4(wire, c, width, q, o)
            elif nbits == 3:
                get1_2(wire, c, width, q, o)
            else:
                get1(wire, c, width, q, o)
            c += width // U(8)
