"""How a warp codes a tile of a piece: add the residual, find scales, write codes, renew."""

from collections.abc import Callable
from typing import Any

import numpy as np

from commlib_kernels.formats import Format
from commlib_kernels.launch import (
    BASE,
    CODE,
    GROUP,
    INT8,
    KEY,
    LANES,
    NONE,
    NUMEL,
    SCALE,
    UNIT,
    lanes_per_block,
)
from commlib_kernels.numba_cuda.coders import Coder, bf16_value
from commlib_kernels.numba_cuda.jit import (
    add,
    add_f64,
    device,
    lane,
    load16,
    load32,
    mul,
    square_f64,
    store16,
    warp_max,
    warp_sum,
)
from commlib_kernels.numba_cuda.residual import (
    add_carried,
    add_residual,
    eighth_scale,
    kind_of,
    load_residual,
    one_residual,
    residual_at,
    residual_scale_at,
    store_eighth,
    store_residual,
)
from commlib_kernels.numba_cuda.sources import Source
from commlib_kernels.numba_cuda.table import column
from commlib_kernels.numba_cuda.units import clear_padding, random_unit, real_elements, top

Function = Callable[..., Any]

u32, f32, f64 = np.uint32, np.float32, np.float64

ALL_BITS = u32(0xFFFFFFFF)


def element_of(source: Source, *, remembers: bool) -> Function:
    """A function that gives the value to code of one element, residual included."""
    one = source.one

    @device
    def element(given, memory, row, b, start, e, columns):
        v = one(given, row, b, start, e, columns)
        if remembers and kind_of(memory, row) != NONE:
            v = add(v, mul(memory[3], one_residual(memory, row, b, start, e)))
        return v

    return element


def _norm(fmt: Format, source: Source, blocks: int, *, remembers: bool) -> Function:
    block, l2 = fmt.block, fmt.scale == "l2"
    element = element_of(source, remembers=remembers)

    @device
    def norm(given, memory, row, tile, mine):
        """The norm's sum of this lane's block: the warp works on one block after the other."""
        numel, total = column(row, NUMEL), f64(0)
        for i in range(blocks):
            b = tile * blocks + i
            start = b * block
            n = min(block, numel - start)
            part = f64(0)
            for e in range(lane(), n, LANES):
                x = f64(element(given, memory, row, b, start, e, (n + 7) >> 3))
                part = add_f64(part, square_f64(x) if l2 else abs(x))
            part = warp_sum(part)
            if i == mine:
                total = part
        return total

    return norm


def _renew(fmt: Format, coder: Coder) -> Function:
    value, unscaled, full = coder.value, fmt.scale == "none", fmt.block // 8

    @device
    def renew(v, p, h, s, a, memory, kind, old, u, columns, real, whole):
        """Turn v into the new residual."""
        for i in range(UNIT):
            error = mul(memory[5], add(v[i], -value(p[i], s)))
            v[i] = f32(0) if s == f32(0) else error
        if unscaled or memory[4] != f32(0):
            load_residual(h, p, a, kind, old, u, full, columns, real, whole)
            add_carried(v, h, f32(0) if s == f32(0) else memory[4], unscaled)
        if not whole:
            clear_padding(v, real)

    return renew


def make(fmt: Format, coder: Coder, source: Source, *, remembers: bool) -> Function:
    """A function that codes a tile.

    Its arguments: four arrays of a unit, the last for grouped.py, as are signs; what the source is
    given; (address, element type, address of scales, alpha, carry, omega) of the residual; (step,
    rank, seed); wire; scales of groups; signs; row of the piece, and which of its tiles. Without a
    residual (`remembers`) it takes half as many registers.
    """
    block, width, full = fmt.block, fmt.bits, fmt.block // 8
    lanes = lanes_per_block(fmt)
    blocks = LANES // lanes  # of a tile
    turns = -(-fmt.block // (UNIT * lanes))  # units that a lane takes one after the other
    once = turns == 1
    even = fmt.block % UNIT == 0
    idle = even and fmt.block // UNIT % lanes != 0  # some lanes have no unit: block=96
    scaled, shared, stochastic = fmt.scale != "none", fmt.per_segment, fmt.stochastic
    normed = fmt.scale in ("l2", "mean") and not shared
    fill, code, put, scale_of = source.fill, coder.code, coder.put, coder.scale_of
    norm = _norm(fmt, source, blocks, remembers=remembers)
    renew = _renew(fmt, coder)

    @device
    def emit(v, p, h, y, given, memory, random, wire, scales, signs, row, tile):
        mine, unit = lane() // lanes, lane() % lanes
        b = tile * blocks + mine
        start = b * block
        n = max(0, min(block, column(row, NUMEL) - start))
        columns = (n + 7) >> 3
        whole_block = even and n == block
        codes = wire + column(row, CODE) + start * width // 8
        kind = kind_of(memory, row) if remembers else NONE
        a = residual_at(memory, row, start)
        aligned_h = a & (3 if kind == INT8 else 15) == 0
        old = f32(0)  # scale of the int8 residual
        if kind == INT8 and n > 0:
            old = bf16_value(load16(residual_scale_at(memory, row, b)))
        m, peak, scale, eighth = u32(0), u32(0), u32(0), u32(0)
        s, inv, keep = f32(1), f32(1), ALL_BITS
        # A block that does not fit into the lanes is read for its maximum, then to be coded, and
        # once more where the scale of an int8 residual needs all errors first.
        for step in range(1 if once else (3 if kind == INT8 else 2) * turns):
            u = unit if once else unit + LANES * (step % turns)
            real = real_elements(u, columns, n)
            whole = whole_block and (not idle or 4 * u < full)
            whole_h = whole and aligned_h
            fill(v, p, given, row, b, start, u, columns, real, whole)
            if kind != NONE:
                load_residual(h, p, a, kind, old, u, full, columns, real, whole_h)
                add_residual(v, h, memory[3])
            if scaled and not shared and step < turns:
                m = max(m, top(v))
            if scaled and step == turns - 1:
                if shared:
                    scale = load32(scales + 4 * column(row, GROUP))
                else:
                    m = warp_max(m, lanes)
                    total = norm(given, memory, row, tile, mine) if normed else f64(0)
                    scale = scale_of(m, total, n)
                s = bf16_value(scale)
                inv = f32(1) / s
                keep = ALL_BITS if s == s and s != f32(0) else u32(0)
                if unit == 0 and n > 0 and (b == 0 or not shared):
                    store16(wire + column(row, SCALE) + (0 if shared else 2 * b), scale)
            if once or step >= turns:
                if stochastic:
                    group = ((column(row, BASE) + start) >> 3) + 4 * u
                    key = u32(column(row, KEY))
                    random_unit(p, group, random[0], random[1], random[2], key)
                for i in range(UNIT):
                    p[i] = code(v[i], inv, p[i])
                put(p, keep, codes, u, columns, whole)
                if kind != NONE:
                    renew(v, p, h, s, a, memory, kind, old, u, columns, real, whole_h)
                    if kind != INT8 and s == s:
                        store_residual(v, p, a, kind, u, full, columns, real, whole_h)
            if kind == INT8:
                if once or turns <= step < 2 * turns:
                    peak = max(peak, top(v))
                if once or step == 2 * turns - 1:
                    eighth = eighth_scale(warp_max(peak, lanes))
                    if unit == 0 and n > 0 and s == s:
                        store16(residual_scale_at(memory, row, b), eighth)
                if (once or step >= 2 * turns) and s == s:
                    store_eighth(v, p, a, eighth, u, full, columns, real, whole_h)

    return emit
