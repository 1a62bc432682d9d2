"""The three ops as loops over pieces and strips of blocks.

The functions without a decorator are templates: `ops.py` binds a coder's `code`, `pack`, `unpack`,
`value` and `constants`, and `Q`, the dtype of its codes, and compiles them. Where blocks are
rotated, `emit` does so before coding, and sums of ranks are taken before they are rotated back.

Their arguments are four arrays, because unpacking forty costs more than a small message: `a` holds
integers and addresses, `f` numbers, `rows` the pieces (layout.py), and `segments` the random
stream and the hold mark of each segment.
"""

from typing import Any

import numpy as np

from commlib_kernels.layout import Piece
from commlib_kernels.numba_cpu import plain, rotation
from commlib_kernels.numba_cpu.draws import random_words
from commlib_kernels.numba_cpu.jit import at, floats, loop
from commlib_kernels.numba_cpu.quick import quick, spread4
from commlib_kernels.numba_cpu.strips import (
    ABSMAX,
    FP32,
    L2,
    LANES,
    NONE,
    POWER,
    RUN,
    STRIP,
    STRIP_KEEPING,
    UNBIASED,
    UNSCALED,
    U,
    absmax,
    add,
    add_and_scale,
    add_scaled,
    bf16_value,
    clear,
    find_scales,
    lane_add,
    lane_total,
    load,
    load_residual,
    multiply,
    read_powers,
    read_scales,
    renew_from,
    same_scale,
    scale_of,
    store,
    store_residual,
    write_powers,
    write_scales,
)
from commlib_kernels.scalar import HUGE, HUGE_ROTATED, NAN

u8, u16, u32, i8, i64, f32, f64 = (
    np.uint8, np.uint16, np.uint32, np.int8, np.int64, np.float32, np.float64,
)  # fmt: skip

# Columns of the table of pieces.
OFFSET, NUMEL, CODE, SCALE, BASE, SEGMENT, EXACT, MEMORY, MEMORY_BLOCK, GROUP = range(
    len(Piece._fields)
)

# Integers in `a`. PLAIN: raw pieces (of DTYPE) too. GROUPS, SCRATCH: the first of 5, 9 addresses.
(X, DTYPE, WIRE, WIRES, COUNT, STRIDE, DENSE, ADD, RESIDUAL, MEMORY_KIND, RESIDUAL_SCALES, BLOCK,
 BITS, RULE, SHARED, STOCHASTIC, STEP, RANK, SEED, ROTATED, SIGNS, TABLE, PLAIN,
 GROUP_COUNT, GROUPS,
) = range(25)  # fmt: skip
SCRATCH = GROUPS + 5
ARGUMENTS = SCRATCH + 9

# Numbers in `f`.
LEVELS, FACTOR, ALPHA, CARRY, OMEGA = range(5)

# Bound by `ops.py`; named here so that the templates read as what they are.
code: Any = None
pack: Any = None
unpack: Any = None
value: Any = None
Q: Any = None
QUICK: Any = None
FIT: Any = None
PAIRED: Any = None
TABLED: Any = None
constants: Any = None
fit: Any = None
forward, backward = rotation.forward, rotation.backward
place, copy, gain, total_of = plain.place, plain.copy, plain.gain, plain.total


# ---- one scale per segment: a first pass over all of it ---------------------------------------


@loop
def gather(v, n, rule, g, a):
    """Maximum and norm of what came so far of group g."""
    peaks = at(a[GROUPS], u32)
    lanes, runs = at(a[GROUPS + 1] + 256 * i64(g), f64), at(a[GROUPS + 2] + 256 * i64(g), f64)
    counts = at(a[GROUPS + 3], U)
    peaks[g] = max(peaks[g], absmax(v, U(0), n))
    for o in range(U(0), n, U(128)):
        last = min(U(128), n - o)
        if rule != ABSMAX:
            lane_add(v, o, last, rule, lanes)
        counts[g] += last
        if counts[g] % RUN == U(0):
            runs[(counts[g] // RUN - U(1)) % LANES] += lane_total(lanes)


@loop
def finish_groups(a, levels):
    """Scales of all groups after the first pass."""
    peaks = at(a[GROUPS], u32)
    counts = at(a[GROUPS + 3], U)
    scales = at(a[GROUPS + 4], f32)
    for g in range(U(a[GROUP_COUNT])):
        lanes, runs = at(a[GROUPS + 1] + 256 * i64(g), f64), at(a[GROUPS + 2] + 256 * i64(g), f64)
        if counts[g] % RUN != U(0):
            runs[(counts[g] // RUN) % LANES] += lane_total(lanes)
        total = lane_total(runs)
        scales[g] = bf16_value(scale_of(peaks[g], HUGE, total, counts[g], a[RULE], levels))


# ---- templates over a strip -------------------------------------------------------------------


def spread(q, nb, width, s, table, v):
    """v = decoded."""
    c = constants(table)
    for b in range(nb):
        o = b * width
        if s[b] == s[b]:
            for i in range(width):
                v[o + i] = value(q[o + i], s[b], c)
        else:
            for i in range(width):
                v[o + i] = floats(NAN)


def accumulate(q, nb, width, s, table, v):
    """v += decoded."""
    c = constants(table)
    for b in range(nb):
        o = b * width
        if s[b] == s[b]:
            for i in range(width):
                v[o + i] += value(q[o + i], s[b], c)
        else:
            for i in range(width):
                v[o + i] = floats(NAN)


def renew(q, nb, width, n, s, table, v, h, carry, omega, unscaled):
    """h = carry h + omega (v - decoded); 0 in zero blocks; as it was where that is not finite."""
    c = constants(table)
    for b in range(nb):
        o = b * width
        last = min(o + width, n)
        if unscaled:
            for i in range(o, last):
                e = omega * (v[i] - value(q[i], s[b], c))
                if carry != f32(0):
                    e = carry * h[i] + e
                h[i] = e if abs(e) <= f32(3.4028235e38) else h[i]
        elif s[b] == f32(0):
            for i in range(o, last):
                h[i] = f32(0)
        elif s[b] == s[b] and carry == f32(0):
            for i in range(o, last):
                h[i] = omega * (v[i] - value(q[i], s[b], c))
        elif s[b] == s[b]:
            for i in range(o, last):
                h[i] = carry * h[i] + omega * (v[i] - value(q[i], s[b], c))


def emit(
    a, f, stage, piece, segments, start, nb, width, n, wire, words, g, ahead, v, h, r, q, s, lanes
):  # fmt: skip
    """Add the residual to strip `g`, code it into the wire, renew the residual."""
    block, nbits, rule = U(a[BLOCK]), U(a[BITS]), a[RULE]
    kind, table = a[MEMORY_KIND], at(a[TABLE], f32)
    remember = kind != NONE and segments[1, piece[SEGMENT]] == u32(0)
    place = U(piece[MEMORY]) + start
    place_block = U(piece[MEMORY_BLOCK]) + start // block
    h16 = at(a[RESIDUAL], u16)
    h8, hs = at(a[RESIDUAL], i8), at(a[RESIDUAL_SCALES], u16)
    whole = n == nb * width
    by_absmax = rule == ABSMAX or rule >= POWER
    fused = not a[ROTATED] and remember and kind == FP32 and by_absmax and whole and not a[SHARED]
    if remember:
        if kind == FP32:  # is renewed where it is; others are unpacked to scratch and back
            h = at(a[RESIDUAL] + i64(4) * i64(place), f32)
        else:
            load_residual(h16, h8, hs, kind, place, place_block, nb, width, n, h)
        if fused:
            add_and_scale(g, f[ALPHA], h, nb, width, rule, f[LEVELS], v, s)
        else:
            add_scaled(g, f[ALPHA], h, n, nb * width, v)
    else:
        v = g
    y, real, huge = v, n, HUGE  # what is coded
    signs, other = at(a[SIGNS], u32), at(a[SCRATCH + 7], f32)
    position = U(piece[BASE]) + start
    if a[ROTATED]:
        y, real = at(a[SCRATCH + 8], f32), nb * width  # padding is rotated as well
        huge = HUGE_ROTATED
        forward(v, nb, width, position, signs, y)
    if stage == 0:
        gather(v, n, rule, U(piece[GROUP]), a)
    else:
        c = U(piece[CODE]) + start * nbits // U(8)
        halving = width == block and width >= U(32) and width & (width - U(1)) == U(0)
        paired = PAIRED and nbits == U(4) and whole and halving
        if rule == UNSCALED:
            same_scale(f32(1), nb, s)
        elif FIT:
            more = at(a[SCRATCH + 2], f32)  # random words, of which these kinds have none
            fit(
                y, nb, width, real, huge, rule == UNBIASED, table, other, more, s, q,
                paired, wire, c,
            )  # fmt: skip
            write_scales(s, nb, words, U(piece[SCALE]) // U(2) + start // block)
        elif a[SHARED]:
            same_scale(at(a[GROUPS + 4], f32)[piece[GROUP]], nb, s)
            if start == U(0):
                write_scales(s, U(1), words, U(piece[SCALE]) // U(2))
        else:
            if not fused:
                find_scales(y, nb, width, real, huge, rule, f[LEVELS], lanes, s)
            if rule >= POWER:
                write_powers(s, nb, wire, U(piece[SCALE]) + start // block)
            else:
                write_scales(s, nb, words, U(piece[SCALE]) // U(2) + start // block)
        if a[STOCHASTIC]:
            key = segments[0, piece[SEGMENT]]
            stream = (position // U(8), u32(a[STEP]), u32(a[RANK]), u32(a[SEED]), key)
            random_words(r, nb, width, stream, ahead)
        simple = not remember or (not a[ROTATED] and kind == FP32 and f[CARRY] == f32(0))
        drawn = a[STOCHASTIC] != 0 and (rule == L2 or nbits == U(8))
        simple = simple and (rule == ABSMAX or drawn)
        if QUICK and simple and (nbits == U(4) or nbits == U(8)) and whole:
            quick(
                y, nb, width, s, f[LEVELS], a[STOCHASTIC] != 0, r, a[BITS], wire, c, h, remember,
                f[OMEGA], ahead,
            )  # fmt: skip
        else:
            if not FIT:
                code(y, nb, width, s, f[LEVELS], a[STOCHASTIC] != 0, r, table, q)
            if not paired:
                pack(q, nb, width, a[BITS], wire, words, c)
            elif remember:
                unpack(wire, words, c, nb, width, a[BITS], q)
            if remember:
                if a[ROTATED]:
                    spread(q, nb, width, s, table, y)
                    backward(y, nb, width, position, signs, other)
                    renew_from(nb, width, n, s, v, other, h, f[CARRY], f[OMEGA])
                elif TABLED:
                    spread(q, nb, width, s, table, other)
                    renew_from(nb, width, n, s, v, other, h, f[CARRY], f[OMEGA])
                else:
                    renew(
                        q, nb, width, n, s, table, v, h, f[CARRY], f[OMEGA], rule == UNSCALED,
                    )  # fmt: skip
                if kind != FP32:
                    store_residual(h16, h8, hs, kind, place, place_block, nb, width, n, h, s)


def collect(a, address, base, piece, start, nb, width, q, s, packed):
    """Scales and codes (in q, or where they are) of a strip of the payload at byte `base`."""
    wires, words = at(address, u8), at(address, u16)
    if a[RULE] == UNSCALED:
        same_scale(f32(1), nb, s)
    elif a[RULE] >= POWER:
        read_powers(wires, base + U(piece[SCALE]) + start // U(a[BLOCK]), nb, s)
    else:
        first = (base + U(piece[SCALE])) // U(2)
        if a[SHARED]:
            read_scales(words, first, U(0), nb, s)
        else:
            read_scales(words, first + start // U(a[BLOCK]), U(1), nb, s)
    c = base + U(piece[CODE]) + start * U(a[BITS]) // U(8)
    if QUICK and a[BITS] == 8:  # these are the numbers themselves
        q = at(address + i64(c), Q)
    elif not packed:
        unpack(wires, words, c, nb, width, a[BITS], q)
    return q, c


@loop
def strip(numel, start, block, keeping):
    """(blocks, their width, elements) of the strip at `start`; the short last block stands alone.

    Full blocks go together, as many as a strip holds. Widths are multiples of 8.
    """
    left = numel - start
    if left < block:
        return U(1), (left + U(7)) & ~U(7), left
    nb = min(left // block, max(U(1), U(STRIP_KEEPING if keeping else STRIP) // block))
    return nb, block, nb * block


# ---- the ops ----------------------------------------------------------------------------------


def quantize(a, f, rows, segments):
    """Code a tensor."""
    x32, x16 = at(a[X], f32), at(a[X], u16)
    wire, words = at(a[WIRE], u8), at(a[WIRE], u16)
    v, h = at(a[SCRATCH], f32), at(a[SCRATCH + 1], f32)
    r, q = at(a[SCRATCH + 2], u32), at(a[SCRATCH + 3], Q)
    s, lanes = at(a[SCRATCH + 4], f32), at(a[SCRATCH + 5], f64)
    keeping = a[MEMORY_KIND] != NONE and not a[ROTATED]  # whose strips come from the cache anyway
    for stage in range(0 if a[SHARED] else 1, 2):
        if stage == 1 and a[SHARED]:
            finish_groups(a, f[LEVELS])
        for row in range(rows.shape[0]):
            piece = rows[row]
            if piece[EXACT]:
                if a[PLAIN] and stage == 1:
                    source = place(a[X], a[DTYPE], piece[OFFSET])
                    copy(source, a[WIRE] + piece[CODE], a[DTYPE], U(piece[NUMEL]))
                continue
            start = U(0)
            while start < U(piece[NUMEL]):
                nb, width, n = strip(U(piece[NUMEL]), start, U(a[BLOCK]), keeping)
                o = U(piece[OFFSET]) + start
                g = v
                if a[DTYPE] == FP32 and n == nb * width:  # is read where it is
                    g = at(a[X] + i64(4) * i64(o), f32)
                else:
                    load(x32, x16, a[DTYPE], o, n, v)
                left = min(n, U(piece[NUMEL]) - start - n) * U(4 if a[DTYPE] == FP32 else 2)
                emit(
                    a, f, stage, piece, segments, start, nb, width, n, wire, words,
                    g, (place(a[X], a[DTYPE], o + n), left), v, h, r, q, s, lanes,
                )  # fmt: skip
                start += n


def reduce(a, f, rows, segments):
    """Sum the payloads of all ranks; store the sum, or code it again."""
    x32, x16 = at(a[X], f32), at(a[X], u16)
    wire, words = at(a[WIRE], u8), at(a[WIRE], u16)
    v, h = at(a[SCRATCH], f32), at(a[SCRATCH + 1], f32)
    r, q = at(a[SCRATCH + 2], u32), at(a[SCRATCH + 3], Q)
    s, lanes = at(a[SCRATCH + 4], f32), at(a[SCRATCH + 5], f64)
    total, dense = at(a[SCRATCH + 6], f32), a[DENSE]  # not in v: loops want their arrays apart
    signs, y, table = at(a[SIGNS], u32), at(a[SCRATCH + 8], f32), at(a[TABLE], f32)
    two_passes = a[SHARED] and not dense
    keeping = a[MEMORY_KIND] != NONE and not a[ROTATED]
    for stage in range(0 if two_passes else 1, 2):
        if stage == 1 and two_passes:
            finish_groups(a, f[LEVELS])
        for row in range(rows.shape[0]):
            piece = rows[row]
            if piece[EXACT]:
                if a[PLAIN] and stage == 1:
                    target = a[WIRE] + piece[CODE]
                    if dense:
                        target = place(a[X], a[DTYPE], piece[MEMORY])
                    total_of(
                        a[WIRES] + piece[CODE], a[STRIDE], a[COUNT], f[FACTOR], target, a[DTYPE],
                        U(piece[NUMEL]), v, total,
                    )  # fmt: skip
                continue
            start = U(0)
            while start < U(piece[NUMEL]):
                nb, width, n = strip(U(piece[NUMEL]), start, U(a[BLOCK]), keeping)
                sums = y if a[ROTATED] else total
                clear(sums, U(0), nb * width)
                for rank in range(a[COUNT]):
                    base = U(rank) * U(a[STRIDE])
                    codes, _ = collect(a, a[WIRES], base, piece, start, nb, width, q, s, False)
                    accumulate(codes, nb, width, s, table, sums)
                if a[ROTATED]:
                    sums = total
                    backward(y, nb, width, U(piece[BASE]) + start, signs, sums)
                multiply(sums, n, f[FACTOR])
                clear(sums, n, nb * width)
                if dense:
                    store(x32, x16, a[DTYPE], U(piece[MEMORY]) + start, n, sums)
                else:
                    emit(
                        a, f, stage, piece, segments, start, nb, width, n, wire, words,
                        sums, (i64(0), U(0)), v, h, r, q, s, lanes,
                    )  # fmt: skip
                start += n


def dequantize(a, f, rows, segments):
    """Decode into a tensor, or add to it."""
    x32, x16 = at(a[X], f32), at(a[X], u16)
    v, q = at(a[SCRATCH], f32), at(a[SCRATCH + 3], Q)
    s = at(a[SCRATCH + 4], f32)
    signs, other, y = at(a[SIGNS], u32), at(a[SCRATCH + 7], f32), at(a[SCRATCH + 8], f32)
    table = at(a[TABLE], f32)
    for row in range(rows.shape[0]):
        piece = rows[row]
        if piece[EXACT]:
            if a[PLAIN]:
                source, target = a[WIRE] + piece[CODE], place(a[X], a[DTYPE], piece[OFFSET])
                if a[ADD]:
                    gain(source, target, a[DTYPE], U(piece[NUMEL]), v, other)
                else:
                    copy(source, target, a[DTYPE], U(piece[NUMEL]))
            continue
        start = U(0)
        while start < U(piece[NUMEL]):
            nb, width, n = strip(U(piece[NUMEL]), start, U(a[BLOCK]), False)
            o = U(piece[OFFSET]) + start
            plainly = a[DTYPE] == FP32 and n == nb * width and not a[ADD] and not a[ROTATED]
            packed = QUICK and a[BITS] == 4 and plainly
            codes, c = collect(a, a[WIRE], U(0), piece, start, nb, width, q, s, packed)
            if a[ROTATED]:
                position = U(piece[BASE]) + start
                spread(codes, nb, width, s, table, y)
                if a[DTYPE] == FP32 and n == nb * width and not a[ADD]:
                    x = at(a[X] + i64(4) * i64(o), f32)
                    backward(y, nb, width, position, signs, x)
                else:
                    backward(y, nb, width, position, signs, other)
                    if a[ADD]:
                        load(x32, x16, a[DTYPE], o, n, v)
                        add(v, other, n)
                    store(x32, x16, a[DTYPE], o, n, other)
            elif a[ADD]:
                load(x32, x16, a[DTYPE], o, n, v)
                accumulate(codes, nb, width, s, table, v)
                store(x32, x16, a[DTYPE], o, n, v)
            elif packed:
                spread4(at(a[WIRE], u8), c, nb, width, s, at(a[X] + i64(4) * i64(o), f32))
            elif plainly and a[RULE] != UNSCALED:
                spread(codes, nb, width, s, table, at(a[X] + i64(4) * i64(o), f32))
            else:
                spread(codes, nb, width, s, table, v)
                store(x32, x16, a[DTYPE], o, n, v)
            start += n
