"""Codes of a unit to bytes of the wire and back: bit planes of 8, 4, 2 and 1 bits, lowest first.

Four codes of a row lie in one word, a byte each, and a plane takes its bits from four codes at a
time: all rows that share a byte of the wire belong to the same lane.
"""

import numpy as np

from commlib_kernels.launch import COLUMNS, ROWS, UNIT
from commlib_kernels.numba_cuda.jit import (
    bytes4,
    device,
    load8,
    load16,
    load32,
    load32x2,
    store8,
    store16,
    store32,
    store32x2,
)

u32 = np.uint32


@device
def put(a, u, columns, word, whole):
    """One byte for each of the unit's columns, in the row of bytes at address a."""
    if whole:
        store32(a + 4 * u, word)
    else:
        for c in range(COLUMNS):
            if 4 * u + c < columns:
                store8(a + 4 * u + c, word >> u32(8 * c))


@device
def get(a, u, columns, whole):
    """The inverse of `put`."""
    if whole:
        return load32(a + 4 * u)
    word = u32(0)
    for c in range(COLUMNS):
        if 4 * u + c < columns:
            word |= load8(a + 4 * u + c) << u32(8 * c)
    return word


@device
def row_bytes(q, r, shift):
    """Bits `shift` to `shift + 7` of the codes of a row."""
    i = 4 * r
    s = u32(shift)
    return bytes4(q[i] >> s, q[i + 1] >> s, q[i + 2] >> s, q[i + 3] >> s)


@device
def put_plane(q, bits, shift, keep, a, u, columns, whole):
    """One plane: `8 / bits` rows share a row of bytes."""
    rows = bits  # of bytes: n bits / 8 bytes, n / 8 to a row
    mask = u32(0x01010101 * ((1 << bits) - 1))
    for r in range(rows):
        word = u32(0)
        for j in range(8 // bits):
            word |= (row_bytes(q, r + j * rows, shift) & mask) << u32(j * bits)
        put(a + r * columns, u, columns, word & keep, whole)


@device
def put_planes(q, bits, keep, a, u, columns, whole):
    """All planes of the codes q of a block at address a; `keep` is 0 where codes shall be 0."""
    shift = 0
    if bits & 8:
        put_plane(q, 8, shift, keep, a, u, columns, whole)
        a += 8 * columns
        shift += 8
    if bits & 4:
        put_plane(q, 4, shift, keep, a, u, columns, whole)
        a += 4 * columns
        shift += 4
    if bits & 2:
        put_plane(q, 2, shift, keep, a, u, columns, whole)
        a += 2 * columns
        shift += 2
    if bits & 1:
        put_plane(q, 1, shift, keep, a, u, columns, whole)


@device
def get_plane(q, bits, shift, a, u, columns, whole):
    """Add one plane to the codes q."""
    rows = bits
    mask = u32((1 << bits) - 1)
    for r in range(rows):
        word = get(a + r * columns, u, columns, whole)
        for j in range(8 // bits):
            for c in range(COLUMNS):
                digit = (word >> u32(8 * c + j * bits)) & mask
                q[4 * (r + j * rows) + c] |= digit << u32(shift)


@device
def get_planes(q, bits, a, u, columns, whole):
    """The inverse of `put_planes`: codes from 0 to 2^bits - 1."""
    for i in range(UNIT):
        q[i] = u32(0)
    shift = 0
    if bits & 8:
        get_plane(q, 8, shift, a, u, columns, whole)
        a += 8 * columns
        shift += 8
    if bits & 4:
        get_plane(q, 4, shift, a, u, columns, whole)
        a += 4 * columns
        shift += 4
    if bits & 2:
        get_plane(q, 2, shift, a, u, columns, whole)
        a += 2 * columns
        shift += 2
    if bits & 1:
        get_plane(q, 1, shift, a, u, columns, whole)


@device
def get_code(bits, a, e, columns):
    """The code of element e of a block."""
    code = u32(0)
    shift = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            row, column = e // columns, e % columns
            at = a + (row % width) * columns + column
            digit = (load8(at) >> u32(row // width * width)) & u32((1 << width) - 1)
            code |= digit << u32(shift)
            a += width * columns
            shift += width
    return code


# ---- casts: a word of 16 bits for each element, element after element ---------------------------


@device
def put_halves(q, a, u, columns, whole):
    """16-bit codes."""
    for r in range(ROWS):
        i = 4 * r
        at = a + 2 * (r * columns + 4 * u)
        if whole:
            store32x2(at, q[i] | (q[i + 1] << u32(16)), q[i + 2] | (q[i + 3] << u32(16)))
        else:
            for c in range(COLUMNS):
                if 4 * u + c < columns:
                    store16(at + 2 * c, q[i + c])


@device
def get_halves(q, a, u, columns, whole):
    """The inverse of `put_halves`."""
    for r in range(ROWS):
        i = 4 * r
        at = a + 2 * (r * columns + 4 * u)
        if whole:
            low, high = load32x2(at)
            q[i], q[i + 1] = low & u32(0xFFFF), low >> u32(16)
            q[i + 2], q[i + 3] = high & u32(0xFFFF), high >> u32(16)
        else:
            for c in range(COLUMNS):
                q[i + c] = load16(at + 2 * c) if 4 * u + c < columns else u32(0)
