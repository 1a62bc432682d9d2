"""The table of pieces on the device: one row of twelve int64 for each."""

from commlib_kernels.launch import TILE
from commlib_kernels.numba_cuda.jit import device, load64

ROW = 12 * 8
"""Bytes."""


@device
def column(row, name):
    """An entry of the row at an address."""
    return load64(row + 8 * name)


@device
def last_below(first, step, count, value):
    """The last of `count` increasing numbers, `step` bytes apart, that is not above `value`."""
    low, high = 0, count - 1
    while low < high:
        middle = (low + high + 1) >> 1
        if load64(first + middle * step) <= value:
            low = middle
        else:
            high = middle - 1
    return low


@device
def row_of(pieces, count, tile):
    """The row of the piece that a tile belongs to. Empty pieces have no tiles."""
    return pieces + ROW * last_below(pieces + 8 * TILE, ROW, count, tile)
