"""Pieces that travel as they are: a warp copies, adds or sums up to 1024 elements of one."""

import numpy as np

from commlib_kernels.launch import EXACT_TILE, FP32, LANES, NUMEL
from commlib_kernels.numba_cuda.jit import (
    add,
    device,
    lane,
    load16,
    load32,
    load32x2,
    load32x4,
    mul,
    store16,
    store32,
    store32x2,
    store32x4,
)
from commlib_kernels.numba_cuda.table import column
from commlib_kernels.numba_cuda.units import load_element, store_element

f32 = np.float32


@device
def place(row, tile):
    """(first element, elements) of a tile of a piece."""
    start = tile * EXACT_TILE
    return start, min(EXACT_TILE, column(row, NUMEL) - start)


@device
def copy(source, target, dtype, n):
    """n elements bit for bit, four to a lane where both sides allow it."""
    if n == EXACT_TILE and (source | target) & 15 == 0:
        if dtype == FP32:
            for i in range(lane(), EXACT_TILE // 4, LANES):
                a, b, c, d = load32x4(source + 16 * i)
                store32x4(target + 16 * i, a, b, c, d)
        else:
            for i in range(lane(), EXACT_TILE // 4, LANES):
                a, b = load32x2(source + 8 * i)
                store32x2(target + 8 * i, a, b)
    elif dtype == FP32:
        for i in range(lane(), n, LANES):
            store32(target + 4 * i, load32(source + 4 * i))
    else:
        for i in range(lane(), n, LANES):
            store16(target + 2 * i, load16(source + 2 * i))


@device
def accumulate(source, target, dtype, n):
    """target += source, in fp32."""
    for i in range(lane(), n, LANES):
        total = add(load_element(target, dtype, i), load_element(source, dtype, i))
        store_element(target, dtype, i, total)


@device
def total(given, offset, dtype, target, out_dtype, n):
    """target = factor times the sum of n elements of all payloads, in their order and in fp32.

    given: address, number and size of the payloads, and the factor; offset: bytes in a payload.
    """
    for i in range(lane(), n, LANES):
        value = f32(0)
        for rank in range(given[1]):
            source = given[0] + rank * given[2] + offset
            value = add(value, load_element(source, dtype, i))
        store_element(target, out_dtype, i, mul(value, given[3]))
