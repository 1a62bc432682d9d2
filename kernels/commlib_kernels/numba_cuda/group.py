"""The lanes that share a block, where all its elements must meet: rotations, sums in halves.

A lane has four columns of the block in an array of 32. Up to 32 lanes are a part of a warp; 64 or
128 threads are a CUDA block of their own. Full blocks of 32 elements a lane meet by shuffles,
others in shared memory, which has a place for every element. Equations: reference/rotation.py and
blocks.py.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from commlib_kernels.formats import Format
from commlib_kernels.launch import COLUMNS, LANES, ROWS, UNIT, blocks_per_tile, lanes_per_block
from commlib_kernels.numba_cuda.jit import (
    add,
    add_f64,
    bits,
    device,
    exchange,
    exchange4,
    exponent,
    floats,
    lane,
    load32,
    mul,
    square_f64,
    sync_block,
    sync_warp,
    thread,
    warp_max,
    warp_sum,
)
from commlib_kernels.philox import SIGNS

Function = Callable[..., Any]

u32, f32, f64 = np.uint32, np.float32, np.float64


class Group(NamedTuple):
    """The functions of a format's groups. All lanes of a warp (or block of threads) must call.

    shared: the launch's array in shared memory; `base`: where the block's part of it begins;
    full: whether all blocks of the tile are.

    maximum(m, shared): of all lanes. half_sum(x, shared, base, u, columns, full): x is 0 where
    there is no element. norm(y, shared, base, u, columns, numel): for the scale rules l2 and mean.
    forward(x, other, shared, base, u, columns, full, place, signs), and backward: rotate x, and
    overwrite the array `other`.
    """

    maximum: Function
    half_sum: Function
    norm: Function
    forward: Function
    backward: Function


@device
def butterflies(x, step):
    """Elements i and i + step of every run of 2 step become their sum and their difference."""
    for k in range(UNIT // 2):
        i = k // step * 2 * step + k % step
        a, b = x[i], x[i + step]
        x[i] = add(a, b)
        x[i + step] = add(a, -b)


@device
def power(k):
    """2^-k."""
    return floats(u32(127 - k) << u32(23))


@cache
def make(fmt: Format) -> Group:
    """The functions of a format."""
    lanes = lanes_per_block(fmt)
    wide, together, room, warps = lanes > LANES, min(lanes, LANES), UNIT * lanes, lanes // LANES
    sync = sync_block if wide else sync_warp
    columns_of_full = fmt.block // ROWS
    even = fmt.block == room  # a full block fills all lanes
    blocks, block, l2 = blocks_per_tile(fmt), fmt.block, fmt.scale == "l2"
    log = fmt.block.bit_length() - 1
    there, back = f32(2.0 ** -(log // 2)), f32(2.0 ** -(log - log // 2))

    @device
    def maximum(m, shared):
        m = warp_max(m, together)
        if wide:
            sync()
            if lane() == 0:
                shared[thread() >> 5] = floats(m)
            sync()
            for w in range(warps):
                m = max(m, bits(shared[w]))
        return m

    @device
    def write(x, shared, base, u, columns):
        """To shared memory, once all have read what was there."""
        sync()
        for r in range(ROWS):
            for c in range(COLUMNS):
                if 4 * u + c < columns:
                    shared[base + r * columns + 4 * u + c] = x[4 * r + c]
        sync()

    @device
    def read(x, shared, base, u, columns):
        """The columns of lane u."""
        for r in range(ROWS):
            for c in range(COLUMNS):
                if 4 * u + c < columns:
                    x[4 * r + c] = shared[base + r * columns + 4 * u + c]

    # ---- sums -----------------------------------------------------------------------------------

    @device
    def column_sum(x, c):
        """Of the eight rows, in halves."""
        low = add(add(x[c], x[16 + c]), add(x[8 + c], x[24 + c]))
        high = add(add(x[4 + c], x[20 + c]), add(x[12 + c], x[28 + c]))
        return add(low, high)

    @device
    def full_sum(x, shared, u):
        a, b, c, d = column_sum(x, 0), column_sum(x, 1), column_sum(x, 2), column_sum(x, 3)
        k = lanes >> 1
        while k > 0:
            if wide and k >= LANES:
                sync()
                shared[4 * u], shared[4 * u + 1], shared[4 * u + 2], shared[4 * u + 3] = a, b, c, d
                sync()
                o = 4 * (u ^ k)
                a, b = add(a, shared[o]), add(b, shared[o + 1])
                c, d = add(c, shared[o + 2]), add(d, shared[o + 3])
            else:
                e, f, g, h = exchange4(a, b, c, d, k)
                a, b, c, d = add(a, e), add(b, f), add(c, g), add(d, h)
            k = k >> 1
        return add(add(a, c), add(b, d))

    @device
    def half_sum(x, shared, base, u, columns, full):
        if even and full:
            return full_sum(x, shared, u)
        sync()
        for i in range(u, room, lanes):
            shared[base + i] = f32(0)
        write(x, shared, base, u, columns)
        h = room >> 1
        while h > 0:
            for i in range(u, h, lanes):
                shared[base + i] = add(shared[base + i], shared[base + h + i])
            sync()
            h = h >> 1
        return shared[base]

    @device
    def norm(y, shared, base, u, columns, numel):
        """The norm's sum over the elements of this lane's block, the padding of rotations too.

        numel: elements left in the piece from the tile's first block on. The warp works on one
        block after the other.
        """
        write(y, shared, base, u, columns)
        mine, total = (thread() & 31) // lanes, f64(0)
        for i in range(blocks):
            n = (max(0, min(block, numel - i * block)) + 7) & -8
            part = f64(0)
            for e in range(lane(), n, LANES):
                x = f64(shared[base + (i - mine) * room + e])
                part = add_f64(part, square_f64(x) if l2 else abs(x))
            part = warp_sum(part)
            if i == mine:
                total = part
        return total

    # ---- rotations ------------------------------------------------------------------------------

    @device
    def flip_full(x, u, place, signs, factor):
        """x = D x factor."""
        for r in range(ROWS):
            e = (place + r * columns_of_full + 4 * u) & (SIGNS - 1)
            word = load32(signs + 4 * (e >> 5)) >> u32(e & 31)
            for c in range(COLUMNS):
                i = 4 * r + c
                x[i] = floats(bits(mul(x[i], factor)) ^ ((word >> u32(c)) << u32(31)))

    @device
    def flip_short(x, u, columns, place, signs, up):
        """The same in pieces, which are powers of two: 2^exponent has element e."""
        width = ROWS * columns
        for r in range(ROWS):
            for c in range(COLUMNS):
                if 4 * u + c < columns:
                    e = r * columns + 4 * u + c
                    factor = power((exponent(e ^ width) + up) >> 1)
                    p = (place + e) & (SIGNS - 1)
                    word = load32(signs + 4 * (p >> 5)) >> u32(p & 31)
                    i = 4 * r + c
                    x[i] = floats(bits(mul(x[i], factor)) ^ (word << u32(31)))

    @device
    def in_registers(x, other, shared, base, u):
        """H x of full blocks, whose rows, lanes and columns are powers of two."""
        butterflies(x, 16)
        butterflies(x, 8)
        butterflies(x, 4)
        k = lanes >> 1
        while k > 0:
            if wide and k >= LANES:
                write(x, shared, base, u, columns_of_full)
                read(other, shared, base, u ^ k, columns_of_full)
            else:
                exchange(x, other, k)
            upper = u & k != 0
            for i in range(UNIT):
                x[i] = add(other[i], -x[i] if upper else x[i])
            k = k >> 1
        butterflies(x, 2)
        butterflies(x, 1)

    @device
    def in_memory(x, shared, base, u, columns):
        """H x of any block, in as many steps as the longest takes: all blocks of a tile meet."""
        width = ROWS * columns
        write(x, shared, base, u, columns)
        h = room >> 1
        while h > 0:
            for p in range(u, width >> 1, lanes):
                e = (p & -h) * 2 + (p & (h - 1))
                if e < width and e ^ width >= 2 * h:  # both in one piece
                    a, b = shared[base + e], shared[base + e + h]
                    shared[base + e] = add(a, b)
                    shared[base + e + h] = add(a, -b)
            sync()
            h = h >> 1
        read(x, shared, base, u, columns)

    @device
    def forward(x, other, shared, base, u, columns, full, place, signs):
        if full:
            flip_full(x, u, place, signs, there)
            in_registers(x, other, shared, base, u)
        else:
            flip_short(x, u, columns, place, signs, 0)
            in_memory(x, shared, base, u, columns)

    @device
    def backward(x, other, shared, base, u, columns, full, place, signs):
        if full:
            in_registers(x, other, shared, base, u)
            flip_full(x, u, place, signs, back)
        else:
            in_memory(x, shared, base, u, columns)
            flip_short(x, u, columns, place, signs, 1)

    return Group(maximum, half_sum, norm, forward, backward)
