"""The kernels of a format. A warp takes a tile at a time: whole blocks of one piece.

`make` binds one format's numbers: every branch on them, and every loop over a unit, is gone in what
the GPU runs. Element types, and whether there is a residual, are known when a kernel is launched;
they are the same for a whole warp. A kernel's arguments are the fields of `launch.STRUCT` that it
names.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from commlib_kernels import launch
from commlib_kernels.formats import Format
from commlib_kernels.launch import (
    CODE,
    FLAGS,
    IS_EXACT,
    LANES,
    MEMORY,
    NUMEL,
    OFFSET,
    TILE,
    UNIT,
    lanes_per_block,
)
from commlib_kernels.numba_cuda import coders, emit, exact, grouped, shared, sources
from commlib_kernels.numba_cuda.coders import Coder
from commlib_kernels.numba_cuda.jit import (
    add,
    block,
    blocks,
    device,
    lane,
    load64,
    thread,
    unit_of_floats,
    unit_of_words,
    warp,
    warps,
)
from commlib_kernels.numba_cuda.table import column, row_of
from commlib_kernels.numba_cuda.units import load_unit, real_elements, size_of, store_unit

Function = Callable[..., Any]

u32, f32 = np.uint32, np.float32


def _tiles(fmt: Format) -> tuple[Function, Function, Function]:
    """Functions: the first tile of a warp, the way to its next one, whether it has exact pieces.

    Where 64 or 128 threads share a block, a CUDA block has a tile, and its first warp exact ones.
    """
    if lanes_per_block(fmt) <= LANES:
        return warp, warps, always
    return block, blocks, in_first_warp


@device
def always():
    """True."""
    return True


@device
def in_first_warp():
    """Whether this thread is of its block's first warp."""
    return thread() < LANES


def _quantize(fmt: Format, coder: Coder, *, remembers: bool) -> Function:
    if launch.grouped(fmt):
        code_tile = grouped.emit(fmt, coder, grouped.tensor(fmt), remembers=remembers)
    else:
        code_tile = emit.make(fmt, coder, sources.tensor(fmt), remembers=remembers)
    coded, (first, step_of, leads) = fmt.kind != "raw", _tiles(fmt)

    def quantize(
        pieces, piece_count, tiles, x, dtype, wire,
        residual, memory_kind, residual_scales, alpha, carry, omega,
        step, step_at, rank, seed, scales, signs,
    ):  # fmt: skip
        """Code a tensor."""
        v = unit_of_floats()
        p = unit_of_words()
        h = unit_of_floats()
        y = unit_of_floats()
        memory = residual, memory_kind, residual_scales, f32(alpha), f32(carry), f32(omega)
        if step_at != 0:
            step = load64(step_at)
        random = u32(step & 0xFFFFFFFF), u32(rank), u32(seed)
        for tile in range(first(), tiles, step_of()):
            row = row_of(pieces, piece_count, tile)
            t = tile - column(row, TILE)
            if column(row, FLAGS) & IS_EXACT:
                if leads():
                    start, n = exact.place(row, t)
                    source = x + size_of(dtype) * (column(row, OFFSET) + start)
                    target = wire + column(row, CODE) + size_of(dtype) * start
                    exact.copy(source, target, dtype, n)
            elif coded:
                code_tile(v, p, h, y, (x, dtype), memory, random, wire, scales, signs, row, t)

    return quantize


def _reduce(fmt: Format, coder: Coder, *, remembers: bool) -> Function:
    if launch.grouped(fmt):
        code_tile = grouped.emit(fmt, coder, grouped.total_of(fmt, coder), remembers=remembers)
    else:
        code_tile = emit.make(fmt, coder, sources.payloads(fmt, coder), remembers=remembers)
    coded, (first, step_of, leads) = fmt.kind != "raw", _tiles(fmt)

    def reduce(
        pieces, piece_count, tiles, wires, payloads, stride, factor, wire, exact_dtype,
        residual, memory_kind, residual_scales, alpha, carry, omega,
        step, step_at, rank, seed, scales, signs,
    ):  # fmt: skip
        """Sum the payloads of all ranks, and code the sum."""
        v = unit_of_floats()
        p = unit_of_words()
        h = unit_of_floats()
        y = unit_of_floats()
        memory = residual, memory_kind, residual_scales, f32(alpha), f32(carry), f32(omega)
        if step_at != 0:
            step = load64(step_at)
        random = u32(step & 0xFFFFFFFF), u32(rank), u32(seed)
        given = wires, payloads, stride, f32(factor)
        for tile in range(first(), tiles, step_of()):
            row = row_of(pieces, piece_count, tile)
            t = tile - column(row, TILE)
            if column(row, FLAGS) & IS_EXACT:
                if leads():
                    start, n = exact.place(row, t)
                    place = column(row, CODE) + size_of(exact_dtype) * start
                    exact.total(given, place, exact_dtype, wire + place, exact_dtype, n)
            elif coded:
                code_tile(v, p, h, y, given, memory, random, wire, scales, signs, row, t)

    return reduce


def _decode(fmt: Format, coder: Coder, *, dense: bool, plus: bool) -> Function:
    """A function that decodes a tile into the tensor at address x, or adds it there."""
    if launch.grouped(fmt):
        return grouped.decode(fmt, coder, dense=dense, plus=plus)
    block, full, even = fmt.block, fmt.block // 8, fmt.block % UNIT == 0
    lanes = lanes_per_block(fmt)
    idle = even and fmt.block // UNIT % lanes != 0
    blocks, turns = LANES // lanes, -(-fmt.block // (UNIT * lanes))
    unpack, value = sources.payload(fmt, coder).unpack, coder.value
    total = sources.payloads(fmt, coder).fill
    offset = MEMORY if dense else OFFSET

    @device
    def decode(v, p, h, given, x, dtype, signs, row, tile):
        b = tile * blocks + lane() // lanes
        start = b * block
        n = max(0, min(block, column(row, NUMEL) - start))
        columns = (n + 7) >> 3
        a = x + size_of(dtype) * (column(row, offset) + start)
        aligned = a & (4 * size_of(dtype) - 1) == 0
        for turn in range(turns):
            u = lane() % lanes + turn * LANES
            real = real_elements(u, columns, n)
            whole = even and n == block and (not idle or 4 * u < full)
            whole_x = whole and aligned
            if dense:
                total(v, p, given, row, b, start, u, columns, real, whole)
            else:
                s = unpack(p, given[0], row, b, start, u, columns, real, whole)
                for i in range(UNIT):
                    v[i] = value(p[i], s)
            if plus:
                if whole_x:
                    load_unit(h, p, a, dtype, u, full, real, True)
                else:
                    load_unit(h, p, a, dtype, u, columns, real, False)
                for i in range(UNIT):
                    v[i] = add(h[i], v[i])
            if whole_x:
                store_unit(v, p, a, dtype, u, full, real, True)
            else:
                store_unit(v, p, a, dtype, u, columns, real, False)

    return decode


def _dense(fmt: Format, coder: Coder) -> Function:
    decode, coded = _decode(fmt, coder, dense=True, plus=False), fmt.kind != "raw"
    first, step_of, leads = _tiles(fmt)

    def dense(
        pieces, piece_count, tiles, wires, payloads, stride, factor, x, dtype, exact_dtype, signs
    ):  # fmt: skip
        """Sum the payloads of all ranks into the owner's chunk."""
        v = unit_of_floats()
        p = unit_of_words()
        h = unit_of_floats()
        given = wires, payloads, stride, f32(factor)
        for tile in range(first(), tiles, step_of()):
            row = row_of(pieces, piece_count, tile)
            t = tile - column(row, TILE)
            if column(row, FLAGS) & IS_EXACT:
                if leads():
                    start, n = exact.place(row, t)
                    source = column(row, CODE) + size_of(exact_dtype) * start
                    target = x + size_of(dtype) * (column(row, MEMORY) + start)
                    exact.total(given, source, exact_dtype, target, dtype, n)
            elif coded:
                decode(v, p, h, given, x, dtype, signs, row, t)

    return dense


def _dequantize(fmt: Format, coder: Coder, *, plus: bool) -> Function:
    decode, coded = _decode(fmt, coder, dense=False, plus=plus), fmt.kind != "raw"
    first, step_of, leads = _tiles(fmt)

    def dequantize(pieces, piece_count, tiles, x, dtype, wire, signs):
        """Decode into a tensor, or add to it."""
        v = unit_of_floats()
        p = unit_of_words()
        h = unit_of_floats()
        given = wire, 1, 0, f32(1)
        for tile in range(first(), tiles, step_of()):
            row = row_of(pieces, piece_count, tile)
            t = tile - column(row, TILE)
            if column(row, FLAGS) & IS_EXACT:
                if leads():
                    start, n = exact.place(row, t)
                    source = wire + column(row, CODE) + size_of(dtype) * start
                    target = x + size_of(dtype) * (column(row, OFFSET) + start)
                    if plus:
                        exact.accumulate(source, target, dtype, n)
                    else:
                        exact.copy(source, target, dtype, n)
            elif coded:
                decode(v, p, h, given, x, dtype, signs, row, t)

    return dequantize


def resident(fmt: Format, name: str) -> int:
    """Blocks of a kernel that shall fit on a multiprocessor, which bounds its registers.

    Four leave a thread 128, three 168, two 255. Kernels with more to remember would spill some of
    it to memory.
    """
    if launch.grouped(fmt) or fmt.table:
        return 3 if name == "quantize" else 2
    normed = fmt.scale in ("l2", "mean") and not fmt.per_segment
    large = name == "quantize_residual" and (normed or fmt.kind in ("natural", "fp8"))
    large = large or (name == "reduce" and fmt.kind == "fp8")
    if large or name == "reduce_residual":
        return 2
    return 4 if fmt.kind == "uniform" and fmt.scale == "absmax" and fmt.block <= 1024 else 3


def make(fmt: Format) -> dict[str, Function]:
    """The kernels of a format, by name."""
    coder = coders.make(fmt)
    found = {
        "quantize": _quantize(fmt, coder, remembers=False),
        "quantize_residual": _quantize(fmt, coder, remembers=True),
        "dequantize": _dequantize(fmt, coder, plus=False),
        "dequantize_add": _dequantize(fmt, coder, plus=True),
        "reduce": _reduce(fmt, coder, remembers=False),
        "reduce_residual": _reduce(fmt, coder, remembers=True),
        "dense": _dense(fmt, coder),
    }
    if fmt.per_segment:
        found["quantize_peaks"] = shared.quantize_peaks(fmt)
        found["reduce_peaks"] = shared.reduce_peaks(fmt, coder)
        found["combine"] = shared.combine(fmt, coder)
    return found
