"""The three ops as loops over pieces and strips of blocks.

The functions without a decorator are templates: `ops` binds a coder's `code`, `pack`, `unpack` and
`value`, and `Q`, the dtype of its codes, and compiles them.

Their arguments are four arrays, because unpacking forty costs more than a small message: `a` holds
integers and addresses, `f` numbers, `table` the pieces (layout.py), and `segments` the random
stream and the hold mark of each segment.
"""

import threading
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from commlib_kernels.layout import Piece
from commlib_kernels.numba_cpu.coders import CODERS
from commlib_kernels.numba_cpu.jit import (
    at,
    entry,
    floats,
    inlined,
    loop,
    specialise,
)
from commlib_kernels.numba_cpu.quick import quick
from commlib_kernels.numba_cpu.strips import (
    ABSMAX,
    FP32,
    LANES,
    MAX_BLOCK,
    NONE,
    RUN,
    STRIP,
    STRIP_KEEPING,
    UNSCALED,
    U,
    absmax,
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
    random_words,
    read_scales,
    same_scale,
    scale_of,
    store,
    store_residual,
    write_scales,
)
from commlib_kernels.scalar import NAN

u8, u16, u32, i8, i64, f32, f64 = (
    np.uint8, np.uint16, np.uint32, np.int8, np.int64, np.float32, np.float64,
)  # fmt: skip

# Columns of the table of pieces.
OFFSET, NUMEL, CODE, SCALE, BASE, SEGMENT, EXACT, MEMORY, MEMORY_BLOCK, GROUP = range(
    len(Piece._fields)
)

# Integers in `a`. GROUPS and SCRATCH are the first of 5 and 7 addresses.
(X, DTYPE, WIRE, WIRES, COUNT, STRIDE, DENSE, ADD, RESIDUAL, MEMORY_KIND, RESIDUAL_SCALES, BLOCK,
 BITS, RULE, SHARED, STOCHASTIC, STEP, RANK, SEED, GROUP_COUNT, GROUPS) = range(21)  # fmt: skip
SCRATCH = GROUPS + 5
ARGUMENTS = SCRATCH + 7

# Numbers in `f`.
LEVELS, FACTOR, ALPHA, CARRY, OMEGA = range(5)

# Bound by `ops`; named here so that the templates read as what they are.
code: Any = None
pack: Any = None
unpack: Any = None
value: Any = None
Q: Any = None
QUICK: Any = None


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
        scales[g] = bf16_value(scale_of(peaks[g], total, counts[g], a[RULE], levels))


# ---- templates over a strip -------------------------------------------------------------------


def spread(q, nb, width, s, v):
    """v = decoded."""
    for b in range(nb):
        o = b * width
        if s[b] == s[b]:
            for i in range(width):
                v[o + i] = value(q[o + i], s[b])
        else:
            for i in range(width):
                v[o + i] = floats(NAN)


def accumulate(q, nb, width, s, v):
    """v += decoded."""
    for b in range(nb):
        o = b * width
        if s[b] == s[b]:
            for i in range(width):
                v[o + i] += value(q[o + i], s[b])
        else:
            for i in range(width):
                v[o + i] = floats(NAN)


def renew(q, nb, width, n, s, v, h, carry, omega, unscaled):
    """h = carry h + omega (v - decoded); 0 in zero blocks; as it was where that is not finite."""
    for b in range(nb):
        o = b * width
        last = min(o + width, n)
        if unscaled:
            for i in range(o, last):
                e = omega * (v[i] - value(q[i], s[b]))
                if carry != f32(0):
                    e = carry * h[i] + e
                h[i] = e if abs(e) <= f32(3.4028235e38) else h[i]
        elif s[b] == f32(0):
            for i in range(o, last):
                h[i] = f32(0)
        elif s[b] == s[b] and carry == f32(0):
            for i in range(o, last):
                h[i] = omega * (v[i] - value(q[i], s[b]))
        elif s[b] == s[b]:
            for i in range(o, last):
                h[i] = carry * h[i] + omega * (v[i] - value(q[i], s[b]))


def emit(
    a, f, stage, piece, segments, start, nb, width, n, wire, words, g, v, h, r, q, s, lanes
):  # fmt: skip
    """Add the residual to strip `g`, code it into the wire, renew the residual."""
    block, nbits, rule = U(a[BLOCK]), U(a[BITS]), a[RULE]
    kind = a[MEMORY_KIND]
    remember = kind != NONE and segments[1, piece[SEGMENT]] == u32(0)
    place = U(piece[MEMORY]) + start
    place_block = U(piece[MEMORY_BLOCK]) + start // block
    h16 = at(a[RESIDUAL], u16)
    h8, hs = at(a[RESIDUAL], i8), at(a[RESIDUAL_SCALES], u16)
    whole = n == nb * width
    fused = remember and kind == FP32 and rule == ABSMAX and whole and not a[SHARED]
    if remember:
        if kind == FP32:  # is renewed where it is; others are unpacked to scratch and back
            h = at(a[RESIDUAL] + i64(4) * i64(place), f32)
        else:
            load_residual(h16, h8, hs, kind, place, place_block, nb, width, n, h)
        if fused:
            add_and_scale(g, f[ALPHA], h, nb, width, f[LEVELS], v, s)
        else:
            add_scaled(g, f[ALPHA], h, n, nb * width, v)
    else:
        v = g
    if stage == 0:
        gather(v, n, rule, U(piece[GROUP]), a)
    else:
        if rule == UNSCALED:
            same_scale(f32(1), nb, s)
        elif a[SHARED]:
            same_scale(at(a[GROUPS + 4], f32)[piece[GROUP]], nb, s)
            if start == U(0):
                write_scales(s, U(1), words, U(piece[SCALE]) // U(2))
        else:
            if not fused:
                find_scales(v, nb, width, n, rule, f[LEVELS], lanes, s)
            write_scales(s, nb, words, U(piece[SCALE]) // U(2) + start // block)
        if a[STOCHASTIC]:
            group = (U(piece[BASE]) + start) // U(8)
            key = segments[0, piece[SEGMENT]]
            random_words(r, nb, width, group, u32(a[STEP]), u32(a[RANK]), u32(a[SEED]), key)
        c = U(piece[CODE]) + start * nbits // U(8)
        simple = not remember or (kind == FP32 and f[CARRY] == f32(0))
        if QUICK and simple and (nbits == U(4) or nbits == U(8)) and whole:
            quick(
                v, nb, width, s, f[LEVELS], a[STOCHASTIC] != 0, r, a[BITS], wire, c, h, remember,
                f[OMEGA],
            )  # fmt: skip
        else:
            code(v, nb, width, s, f[LEVELS], a[STOCHASTIC] != 0, r, q)
            pack(q, nb, width, a[BITS], wire, words, c)
            if remember:
                renew(q, nb, width, n, s, v, h, f[CARRY], f[OMEGA], rule == UNSCALED)
                if kind != FP32:
                    store_residual(h16, h8, hs, kind, place, place_block, nb, width, n, h, s)


def collect(a, address, base, piece, start, nb, width, q, s):
    """Codes (where they are, or in q) and scales of a strip of the payload at byte `base`."""
    wires, words = at(address, u8), at(address, u16)
    if a[RULE] == UNSCALED:
        same_scale(f32(1), nb, s)
    else:
        first = (base + U(piece[SCALE])) // U(2)
        if a[SHARED]:
            read_scales(words, first, U(0), nb, s)
        else:
            read_scales(words, first + start // U(a[BLOCK]), U(1), nb, s)
    c = base + U(piece[CODE]) + start * U(a[BITS]) // U(8)
    if QUICK and a[BITS] == 8:  # these are the numbers themselves
        q = at(address + i64(c), Q)
    else:
        unpack(wires, words, c, nb, width, a[BITS], q)
    return q


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


def quantize(a, f, table, segments):
    """Code a tensor."""
    x32, x16 = at(a[X], f32), at(a[X], u16)
    wire, words = at(a[WIRE], u8), at(a[WIRE], u16)
    v, h = at(a[SCRATCH], f32), at(a[SCRATCH + 1], f32)
    r, q = at(a[SCRATCH + 2], u32), at(a[SCRATCH + 3], Q)
    s, lanes = at(a[SCRATCH + 4], f32), at(a[SCRATCH + 5], f64)
    keeping = a[MEMORY_KIND] != NONE
    for stage in range(0 if a[SHARED] else 1, 2):
        if stage == 1 and a[SHARED]:
            finish_groups(a, f[LEVELS])
        for row in range(table.shape[0]):
            piece = table[row]
            if piece[EXACT]:
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
                emit(
                    a, f, stage, piece, segments, start, nb, width, n, wire, words,
                    g, v, h, r, q, s, lanes,
                )  # fmt: skip
                start += n


def reduce(a, f, table, segments):
    """Sum the payloads of all ranks; store the sum, or code it again."""
    x32, x16 = at(a[X], f32), at(a[X], u16)
    wire, words = at(a[WIRE], u8), at(a[WIRE], u16)
    v, h = at(a[SCRATCH], f32), at(a[SCRATCH + 1], f32)
    r, q = at(a[SCRATCH + 2], u32), at(a[SCRATCH + 3], Q)
    s, lanes = at(a[SCRATCH + 4], f32), at(a[SCRATCH + 5], f64)
    sums, dense = at(a[SCRATCH + 6], f32), a[DENSE]  # not in v: loops want their arrays apart
    two_passes, keeping = a[SHARED] and not dense, a[MEMORY_KIND] != NONE
    for stage in range(0 if two_passes else 1, 2):
        if stage == 1 and two_passes:
            finish_groups(a, f[LEVELS])
        for row in range(table.shape[0]):
            piece = table[row]
            if piece[EXACT]:
                continue
            start = U(0)
            while start < U(piece[NUMEL]):
                nb, width, n = strip(U(piece[NUMEL]), start, U(a[BLOCK]), keeping)
                clear(sums, U(0), nb * width)
                for rank in range(a[COUNT]):
                    base = U(rank) * U(a[STRIDE])
                    codes = collect(a, a[WIRES], base, piece, start, nb, width, q, s)
                    accumulate(codes, nb, width, s, sums)
                multiply(sums, n, f[FACTOR])
                clear(sums, n, nb * width)
                if dense:
                    store(x32, x16, a[DTYPE], U(piece[MEMORY]) + start, n, sums)
                else:
                    emit(
                        a, f, stage, piece, segments, start, nb, width, n, wire, words,
                        sums, v, h, r, q, s, lanes,
                    )  # fmt: skip
                start += n


def dequantize(a, f, table, segments):
    """Decode into a tensor, or add to it."""
    x32, x16 = at(a[X], f32), at(a[X], u16)
    v, q = at(a[SCRATCH], f32), at(a[SCRATCH + 3], Q)
    s = at(a[SCRATCH + 4], f32)
    for row in range(table.shape[0]):
        piece = table[row]
        if piece[EXACT]:
            continue
        start = U(0)
        while start < U(piece[NUMEL]):
            nb, width, n = strip(U(piece[NUMEL]), start, U(a[BLOCK]), False)
            o = U(piece[OFFSET]) + start
            codes = collect(a, a[WIRE], U(0), piece, start, nb, width, q, s)
            if a[ADD]:
                load(x32, x16, a[DTYPE], o, n, v)
                accumulate(codes, nb, width, s, v)
                store(x32, x16, a[DTYPE], o, n, v)
            elif a[DTYPE] == FP32 and n == nb * width and a[RULE] != UNSCALED:
                spread(codes, nb, width, s, at(a[X] + i64(4) * i64(o), f32))
            else:
                spread(codes, nb, width, s, v)
                store(x32, x16, a[DTYPE], o, n, v)
            start += n


class _Local(threading.local):
    """Scratch memory is a thread's own: kernels run without the GIL."""

    def __init__(self) -> None:
        longest = max(STRIP, MAX_BLOCK)
        sizes = (*(4 * longest,) * 5, 8 * int(LANES), 4 * longest)
        self.arrays = [np.zeros(size + 64, np.uint8) for size in sizes]
        self.addresses = [-(-array.ctypes.data // 64) * 64 for array in self.arrays]


_local = _Local()


def scratch() -> list[int]:
    """Addresses: values, residual, random words, codes, scales, norm lanes, sums."""
    return _local.addresses


class Ops(NamedTuple):
    """The compiled ops of one kind of format."""

    quantize: Callable[..., None]
    dequantize: Callable[..., None]
    reduce: Callable[..., None]


_making = threading.Lock()


def ops(kind: str) -> Ops:
    """The ops of a kind of format; each compiles on its first call.

    Made once: threads that made them side by side would swap Numba's cache folder under each other
    (`jit.entry`), and compile what is there.
    """
    with _making:
        return _made(kind)


@cache
def _made(kind: str) -> Ops:
    coder = CODERS[kind]
    bound: dict[str, Any] = {
        "code": coder.code,
        "pack": coder.pack,
        "unpack": coder.unpack,
        "value": coder.value,
        "Q": coder.codes,
        "QUICK": kind == "uniform",
    }
    parts: tuple[Callable[..., Any], ...] = (spread, accumulate, renew)
    for part in parts:
        bound[part.__name__] = specialise(part, kind, bound)
    parts = (collect, emit)  # so many arguments that a call costs as much as a strip
    for part in parts:
        bound[part.__name__] = specialise(part, kind, bound, inlined)
    return Ops(*(specialise(op, kind, bound, entry) for op in (quantize, dequantize, reduce)))
