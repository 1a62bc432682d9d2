"""How a group of lanes codes and decodes a block whose elements all meet: rotated or fitted.

As in emit.py and kernels.py, but the whole block stays in registers: every lane has one unit of it.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from commlib_kernels.formats import Format
from commlib_kernels.launch import (
    BASE,
    CODE,
    INT8,
    KEY,
    MEMORY,
    NONE,
    NUMEL,
    OFFSET,
    SCALE,
    UNIT,
    blocks_per_tile,
    lanes_per_block,
)
from commlib_kernels.numba_cuda import group, sources
from commlib_kernels.numba_cuda.coders import Coder, bf16_nearest, bf16_value, checked
from commlib_kernels.numba_cuda.jit import (
    add,
    device,
    floats,
    load16,
    mul,
    shared_floats,
    store16,
    thread,
)
from commlib_kernels.numba_cuda.residual import (
    add_carried,
    add_residual,
    eighth_scale,
    kind_of,
    load_residual,
    residual_at,
    residual_scale_at,
    store_eighth,
    store_residual,
)
from commlib_kernels.numba_cuda.table import column
from commlib_kernels.numba_cuda.units import (
    clear_padding,
    load_unit,
    random_unit,
    real_elements,
    size_of,
    store_unit,
    top,
)
from commlib_kernels.scalar import BAD_SCALE, HUGE, HUGE_ROTATED, TINY

Function = Callable[..., Any]

u32, f32, f64 = np.uint32, np.float32, np.float64

ALL_BITS = u32(0xFFFFFFFF)


def _places(fmt: Format) -> Function:
    """A function that says where a lane is: block, its first element, unit, shared memory."""
    lanes = lanes_per_block(fmt)
    blocks, block = blocks_per_tile(fmt), fmt.block

    @device
    def places(row, tile):
        """(b, start, n, columns, u, base, full, left): left are the piece's from the tile on."""
        u = thread() & (lanes - 1)
        b = tile * blocks + (thread() & 31) // lanes
        start = b * block
        numel = column(row, NUMEL)
        n = max(0, min(block, numel - start))
        left = numel - tile * blocks * block
        return b, start, n, (n + 7) >> 3, u, UNIT * (thread() - u), left >= blocks * block, left

    return places


def total_of(fmt: Format, coder: Coder) -> Function:
    """A function that sums all payloads as they are coded, and rotates the sum back."""
    total, backward = sources.total(fmt, coder), group.make(fmt).backward
    rotated = fmt.rotate is not None

    @device
    def fill(v, p, h, shared, signs, given, row, b, start, u, columns, real, whole, base, full):
        total(v, p, given, row, b, start, u, columns, real, whole)
        if rotated:
            place = column(row, BASE) + start
            backward(v, h, shared, base, u, columns, full, place, signs)
        for i in range(UNIT):
            v[i] = mul(v[i], given[3])
        if not whole:
            clear_padding(v, real)

    return fill


def tensor(fmt: Format) -> Function:
    """A function that reads a tensor."""
    read = sources.tensor(fmt).fill

    @device
    def fill(v, p, h, shared, signs, given, row, b, start, u, columns, real, whole, base, full):
        read(v, p, given, row, b, start, u, columns, real, whole)

    return fill


def _codes(fmt: Format, coder: Coder) -> Function:
    """A function that finds the codes of y and their scale."""
    code, value, scale_of = coder.code, coder.value, coder.scale_of
    lanes_of = group.make(fmt)
    maximum, half_sum, norm = lanes_of.maximum, lanes_of.half_sum, lanes_of.norm
    normed, least = fmt.scale in ("l2", "mean"), fmt.scale == "fit"
    huge = HUGE if fmt.rotate is None else HUGE_ROTATED

    @device
    def by_rule(y, p, h, shared, base, u, columns, real, n, full, left):
        m = maximum(top(y), shared)
        total = norm(y, shared, base, u, columns, left) if normed else f64(0)
        scale = scale_of(m, total, n)
        inv = f32(1) / bf16_value(scale)
        for i in range(UNIT):
            p[i] = code(y[i], inv, p[i])
        return scale

    @device
    def fitted(y, p, h, shared, base, u, columns, real, n, full, left):
        m = maximum(top(y), shared)
        down = floats((u32(254) - (m >> u32(23))) << u32(23))
        for i in range(UNIT):
            z = mul(y[i], down)
            h[i] = mul(z, z)
        rms = f32(math.sqrt(half_sum(h, shared, base, u, columns, full) / f32(n)))
        inv = mul(f32(1) / rms, down)
        for i in range(UNIT):
            p[i] = code(y[i], inv, p[i])
            h[i] = mul(value(p[i], f32(1)), mul(y[i], inv))
        along = half_sum(h, shared, base, u, columns, full)
        ratio = f32(n) / along
        if least:
            for i in range(UNIT):
                c = value(p[i], f32(1))
                h[i] = mul(c, c)
            clear_padding(h, real)
            ratio = along / half_sum(h, shared, base, u, columns, full)
        up = floats((m >> u32(23)) << u32(23))
        scale = checked(bf16_nearest(mul(mul(rms, ratio), up)))
        if m >= huge:
            scale = BAD_SCALE
        return u32(0) if m < TINY else scale

    return fitted if fmt.kind == "gauss" else by_rule


def emit(fmt: Format, coder: Coder, fill: Function, *, remembers: bool) -> Function:
    """A function that codes a tile; arguments as those of `emit.make`, and the address of signs.

    y: one more array of a unit; without a residual, it may be v.
    """
    width, full_columns, block = fmt.bits, fmt.block // 8, fmt.block
    even = fmt.block % UNIT == 0
    idle = even and fmt.block // UNIT % lanes_per_block(fmt) != 0
    rotated, stochastic = fmt.rotate is not None, fmt.stochastic
    places, find_codes, put, value = _places(fmt), _codes(fmt, coder), coder.put, coder.value
    lanes_of = group.make(fmt)
    maximum, forward, backward = lanes_of.maximum, lanes_of.forward, lanes_of.backward

    @device
    def code_tile(v, p, h, y, given, memory, random, wire, scales, signs, row, tile):
        shared = shared_floats()
        b, start, n, columns, u, base, full, left = places(row, tile)
        whole = even and n == block and (not idle or 4 * u < full_columns)
        real = real_elements(u, columns, n)
        fill(v, p, h, shared, signs, given, row, b, start, u, columns, real, whole, base, full)
        kind = kind_of(memory, row) if remembers else NONE
        a = residual_at(memory, row, start)
        whole_h = whole and a & (3 if kind == INT8 else 15) == 0
        old = f32(0)  # scale of the int8 residual
        if kind == INT8 and n > 0:
            old = bf16_value(load16(residual_scale_at(memory, row, b)))
        if kind != NONE:
            load_residual(h, p, a, kind, old, u, full_columns, columns, real, whole_h)
            add_residual(v, h, memory[3])
        for i in range(UNIT):
            y[i] = v[i]
        place = column(row, BASE) + start
        coded, coded_n = real, n
        if rotated:
            forward(y, h, shared, base, u, columns, full, place, signs)
            coded, coded_n = real_elements(u, columns, 8 * columns), 8 * columns
        if stochastic:
            key = u32(column(row, KEY))
            random_unit(p, (place >> 3) + 4 * u, random[0], random[1], random[2], key)
        scale = find_codes(y, p, h, shared, base, u, columns, coded, coded_n, full, left)
        s = bf16_value(scale)
        keep = ALL_BITS if s == s and s != f32(0) else u32(0)
        if u == 0 and n > 0:
            store16(wire + column(row, SCALE) + 2 * b, scale)
        put(p, keep, wire + column(row, CODE) + start * width // 8, u, columns, whole)
        if kind != NONE:
            for i in range(UNIT):
                y[i] = value(p[i], s)
            if rotated:
                backward(y, h, shared, base, u, columns, full, place, signs)
            for i in range(UNIT):
                error = mul(memory[5], add(v[i], -y[i]))
                v[i] = f32(0) if s == f32(0) else error
            if memory[4] != f32(0):
                load_residual(h, p, a, kind, old, u, full_columns, columns, real, whole_h)
                add_carried(v, h, f32(0) if s == f32(0) else memory[4], False)
            if not whole:
                clear_padding(v, real)
            if kind != INT8:
                if s == s:
                    store_residual(v, p, a, kind, u, full_columns, columns, real, whole_h)
            else:
                eighth = eighth_scale(maximum(top(v), shared))
                if s == s:
                    if u == 0 and n > 0:
                        store16(residual_scale_at(memory, row, b), eighth)
                    store_eighth(v, p, a, eighth, u, full_columns, columns, real, whole_h)

    return code_tile


def decode(fmt: Format, coder: Coder, *, dense: bool, plus: bool) -> Function:
    """A function that decodes a tile into the tensor at address x, or adds it there."""
    full_columns, block, even = fmt.block // 8, fmt.block, fmt.block % UNIT == 0
    idle = even and fmt.block // UNIT % lanes_per_block(fmt) != 0
    rotated, places = fmt.rotate is not None, _places(fmt)
    unpack, value = sources.payload(fmt, coder).unpack, coder.value
    total, backward = total_of(fmt, coder), group.make(fmt).backward
    offset = MEMORY if dense else OFFSET

    @device
    def decode_tile(v, p, h, given, x, dtype, signs, row, tile):
        shared = shared_floats()
        b, start, n, columns, u, base, full, _ = places(row, tile)
        whole = even and n == block and (not idle or 4 * u < full_columns)
        real = real_elements(u, columns, n)
        a = x + size_of(dtype) * (column(row, offset) + start)
        whole_x = whole and a & (4 * size_of(dtype) - 1) == 0
        if dense:
            total(v, p, h, shared, signs, given, row, b, start, u, columns, real, whole, base, full)
        else:
            s = unpack(p, given[0], row, b, start, u, columns, real, whole)
            for i in range(UNIT):
                v[i] = value(p[i], s)
            if rotated:
                place = column(row, BASE) + start
                backward(v, h, shared, base, u, columns, full, place, signs)
        if plus:
            if whole_x:
                load_unit(h, p, a, dtype, u, full_columns, real, True)
            else:
                load_unit(h, p, a, dtype, u, columns, real, False)
            for i in range(UNIT):
                v[i] = add(h[i], v[i])
        if whole_x:
            store_unit(v, p, a, dtype, u, full_columns, real, True)
        else:
            store_unit(v, p, a, dtype, u, columns, real, False)

    return decode_tile
