"""What Python calls for sparse formats: choose what travels, renew residuals, put values in place.

The functions without a decorator are compiled by `sparse.py`.
`rows` are the pieces, one line each (columns below); addresses are of a piece's first element.
"""

import numpy as np

from commlib_kernels.numba_cpu.jit import SCALARS, at, floats, loop
from commlib_kernels.numba_cpu.kernels import strip
from commlib_kernels.numba_cpu.places import draw, read_places, write_places
from commlib_kernels.numba_cpu.strips import (
    BF16,
    FP32,
    U,
    add_scaled,
    load_residual,
    same_scale,
    store_residual,
)
from commlib_kernels.numba_cpu.topk import MARGIN, TILE, best, peak, tile, value_at
from commlib_kernels.philox import SHARED_RANK
from commlib_kernels.scalar import NAN

u8, u16, u32, i8, i64, f32 = np.uint8, np.uint16, np.uint32, np.int8, np.int64, np.float32
philox, bf16_nearest, fp16_nearest = SCALARS.philox, SCALARS.bf16_nearest, SCALARS.fp16_nearest

# Columns of a piece; the first three are those of topk.py, for its elements.
(SOURCE, KIND, RESIDUAL, NUMEL, COUNT, VALUES, CODE, START, SEGMENT, MEMORY, MEMORY_BLOCK, LOW, RUN,
 OF_RUN, OF_REST) = range(15)  # fmt: skip
COLUMNS = 15

FINITE = u32(0x7F800000)
LARGEST = f32(3.4028235e38)


def form(rows, held, memory, scales, kind, block, alpha, scratch, v):
    """g + alpha h of pieces with a narrow residual, back to back to the address `v`."""
    h16, h8, hs, h = at(memory, u16), at(memory, i8), at(scales, u16), at(scratch, f32)
    for row in range(rows.shape[0]):
        piece = rows[row]
        start, numel = U(0), U(piece[NUMEL])
        while start < numel:
            nb, width, n = strip(numel, start, U(block), False)
            here = v + i64(4) * i64(start)
            out, g = at(here, f32), at(tile(piece, f32(0), start, n, here, here), f32)
            if held[piece[SEGMENT]]:
                for i in range(n):
                    out[i] = g[i]
            else:
                place, first = U(piece[MEMORY]) + start, U(piece[MEMORY_BLOCK]) + start // U(block)
                load_residual(h16, h8, hs, kind, place, first, nb, width, n, h)
                add_scaled(g, alpha, h, n, n, out)
            start += n
        v += i64(4) * i64(numel)


@loop
def all_finite(v, n):
    """Whether none of n values is infinite or NaN."""
    return peak(v, n) < FINITE


@loop
def choose_best(piece, alpha, loaded, summed, flags, near, close, places, values):
    """The largest of every run of a piece."""
    numel, o, guess = U(piece[NUMEL]), U(0), u32(0)
    for first in range(U(0), numel, U(piece[RUN])):
        m = min(U(piece[RUN]), numel - first)
        k = U(piece[OF_RUN]) if m == U(piece[RUN]) else U(piece[OF_REST])
        low = best(piece, alpha, first, m, k, guess, loaded, summed, flags, near, close)
        guess = low - MARGIN if low > MARGIN else u32(0)
        for i in range(k):
            places[o + i] = near[i]
            values[o + i] = close[i]
        o += k


@loop
def draw_all(piece, low, high, places):
    """A random choice of every run of a piece."""
    numel, o = U(piece[NUMEL]), U(0)
    for first in range(U(0), numel, U(piece[RUN])):
        m = min(U(piece[RUN]), numel - first)
        k = U(piece[OF_RUN]) if m == U(piece[RUN]) else U(piece[OF_REST])
        draw(first, m, k, U(piece[START]) + first, low, high, places, o)
        o += k


@loop
def take(piece, alpha, scaled, loaded, summed, places, values):
    """The values at the places drawn; all NaN where one of the piece is not finite."""
    numel, top = U(piece[NUMEL]), u32(0)
    for o in range(U(0), numel, U(TILE)):
        n = min(U(TILE), numel - o)
        top = max(top, peak(at(tile(piece, alpha, o, n, loaded, summed), f32), n))
    o = U(0)
    for first in range(U(0), numel, U(piece[RUN])):
        m = min(U(piece[RUN]), numel - first)
        k = U(piece[OF_RUN]) if m == U(piece[RUN]) else U(piece[OF_REST])
        ratio = f32(np.float64(m) / np.float64(k)) if scaled else f32(1)
        for i in range(o, o + k):
            v = value_at(piece, alpha, U(places[i])) * ratio
            values[i] = v if top < FINITE else floats(NAN)
        o += k


def choose(
    rows, keys, step, seed, random, scaled, alpha, first, wire, scratch, near, close, places, values
):  # fmt: skip
    """Choose what travels, and write where it is.

    first: address of the payload whose random choices are taken over; 0: they are drawn.
    """
    w, f = at(wire, u8), at(first, u32)
    loaded, summed, flags = scratch, scratch + i64(4 * TILE), scratch + i64(8 * TILE)
    for row in range(rows.shape[0]):
        piece = rows[row]
        o = i64(4) * i64(piece[VALUES])
        p, v = at(places + o, u32), at(values + o, f32)
        if random:
            c = U(piece[CODE]) // U(4)
            if first != 0:
                low, high = f[c], f[c + U(1)]
            else:
                key = keys[piece[SEGMENT]]
                drawn = philox(u32(0), u32(0), u32(step), u32(SHARED_RANK), u32(seed), key)
                low, high = drawn[0], drawn[1]
            words = at(wire, u32)
            words[c], words[c + U(1)] = low, high
            draw_all(piece, low, high, p)
            take(piece, alpha, scaled, loaded, summed, p, v)
        else:
            choose_best(
                piece, alpha, loaded, summed, flags, at(near, u32), at(close, f32), p, v
            )  # fmt: skip
            write_places(
                p, U(0), U(piece[COUNT]), U(piece[NUMEL]), U(piece[LOW]), w, U(piece[CODE])
            )  # fmt: skip


@loop
def settle(v, q, h, places, o, end, start, n, carry, omega, fixed):
    """h = carry h + omega (v - decoded) of n elements; as it was where that is not finite."""
    last = o
    while last < end and U(places[last]) < start + n:
        i = U(places[last]) - start
        e = omega * (v[i] - q[last])
        if carry != f32(0):
            e = carry * h[i] + e
        fixed[last - o] = e if abs(e) <= LARGEST else h[i]
        last += U(1)
    if carry == f32(0):
        for i in range(n):
            e = omega * v[i]
            h[i] = e if abs(e) <= LARGEST else h[i]
    else:
        for i in range(n):
            e = carry * h[i] + omega * v[i]
            h[i] = e if abs(e) <= LARGEST else h[i]
    for i in range(o, last):
        h[U(places[i]) - start] = fixed[i - o]
    return last


def renew(
    rows, held, memory, scales, kind, block, alpha, carry, omega, places, decoded, scratch
):  # fmt: skip
    """Renew the residuals; that of a piece with a decoded value that is not finite stays."""
    h16, h8, hs = at(memory, u16), at(memory, i8), at(scales, u16)
    size = i64(4 * 2 * TILE)
    loaded, summed = scratch, scratch + size
    room, fixed = at(scratch + i64(2) * size, f32), at(scratch + i64(3) * size, f32)
    s = at(scratch + i64(4) * size, f32)
    for row in range(rows.shape[0]):
        piece = rows[row]
        if held[piece[SEGMENT]]:
            continue
        o = i64(4) * i64(piece[VALUES])
        p, q = at(places + o, u32), at(decoded + o, f32)
        if not all_finite(q, U(piece[COUNT])):
            continue
        start, numel, i = U(0), U(piece[NUMEL]), U(0)
        while start < numel:
            nb, width, n = strip(numel, start, U(block), False)
            v = at(tile(piece, alpha, start, n, loaded, summed), f32)
            place, first = U(piece[MEMORY]) + start, U(piece[MEMORY_BLOCK]) + start // U(block)
            if kind == FP32:
                h = at(memory + i64(4) * i64(place), f32)
            else:
                load_residual(h16, h8, hs, kind, place, first, nb, width, n, room)
                h = room
            i = settle(v, q, h, p, i, U(piece[COUNT]), start, n, carry, omega, fixed)
            if kind != FP32:
                same_scale(f32(1), nb, s)
                store_residual(h16, h8, hs, kind, place, first, nb, width, n, h, s)
            start += n


@loop
def fill(piece, value32, value16):
    """All elements of a piece."""
    if piece[KIND] == FP32:
        x = at(piece[SOURCE], u32)
        for i in range(U(piece[NUMEL])):
            x[i] = value32
    else:
        y = at(piece[SOURCE], u16)
        for i in range(U(piece[NUMEL])):
            y[i] = value16


@loop
def put(piece, add, places, values):
    """Values to their places, or added to what is there; rounded to nearest even."""
    x32, x16 = at(piece[SOURCE], f32), at(piece[SOURCE], u16)
    for i in range(U(piece[COUNT])):
        v, at_ = values[i], U(places[i])
        if add:
            v = value_at(piece, f32(0), at_) + v
        if piece[KIND] == FP32:
            x32[at_] = v if v == v else floats(NAN)
        elif piece[KIND] == BF16:
            x16[at_] = u16(bf16_nearest(v))
        else:
            x16[at_] = u16(fp16_nearest(v))


def place(rows, random, add, wire, places, values):
    """Decoded values into the tensor; NaN all over a piece that is bad."""
    w, words, p = at(wire, u8), at(wire, u32), at(places, u32)
    for row in range(rows.shape[0]):
        piece = rows[row]
        count, c = U(piece[COUNT]), U(piece[CODE])
        v = at(values + i64(4) * i64(piece[VALUES]), f32)
        good = all_finite(v, count)
        if good and random:
            draw_all(piece, words[c // U(4)], words[c // U(4) + U(1)], p)
        elif good:
            good = read_places(w, c, count, U(piece[NUMEL]), U(piece[LOW]), p, U(0))
        if not good:
            fill(piece, NAN, u16(0x7FC0) if piece[KIND] == BF16 else u16(0x7E00))
            continue
        if not add:
            fill(piece, u32(0), u16(0))
        put(piece, add, p, v)


def copy(rows, codes, wire, values, to_wire):
    """fp32 values between their buffer and the wire, where those of piece i begin at codes[i]."""
    v = at(values, u32)
    for row in range(rows.shape[0]):
        o = U(rows[row, VALUES])
        w = at(wire + codes[row], u32)
        if to_wire:
            for i in range(U(rows[row, COUNT])):
                w[i] = v[o + i]
        else:
            for i in range(U(rows[row, COUNT])):
                v[o + i] = w[i]
