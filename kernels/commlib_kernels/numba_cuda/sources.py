"""Where the values that are coded come from: a tensor, or the payloads of all ranks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from commlib_kernels.formats import Format
from commlib_kernels.launch import CODE, OFFSET, SCALE, UNIT
from commlib_kernels.numba_cuda.coders import Coder, bf16_value
from commlib_kernels.numba_cuda.jit import add, device, load16, mul
from commlib_kernels.numba_cuda.table import column
from commlib_kernels.numba_cuda.units import clear_padding, load_element, load_unit, size_of

Function = Callable[..., Any]

u32, f32 = np.uint32, np.float32


class Source(NamedTuple):
    """The functions of one source.

    fill(v, p, given, row, b, start, u, columns, real, whole): unit u of block b of a piece, which
    starts at its element `start`; `real` says which elements exist, others are +0.
    one(given, row, b, start, e, columns): element e of the block.
    """

    fill: Function
    one: Function


def tensor(fmt: Format) -> Source:
    """given: address and element type of the tensor."""
    full = fmt.block // 8

    @device
    def fill(v, p, given, row, b, start, u, columns, real, whole):
        size = size_of(given[1])
        a = given[0] + size * (column(row, OFFSET) + start)
        if whole and a & (4 * size - 1) == 0:
            load_unit(v, p, a, given[1], u, full, real, True)
        else:
            load_unit(v, p, a, given[1], u, columns, real, False)

    @device
    def one(given, row, b, start, e, columns):
        a = given[0] + size_of(given[1]) * (column(row, OFFSET) + start)
        return load_element(a, given[1], e)

    return Source(fill, one)


class Payload(NamedTuple):
    """How one payload, at address `wire`, is read; arguments as in `Source`.

    unpack(p, wire, row, b, start, u, columns, real, whole): codes of a unit to p; gives the scale.
    one(wire, row, b, start, e, columns): the value of one element.
    """

    unpack: Function
    one: Function


def payload(fmt: Format, coder: Coder) -> Payload:
    """How a payload of this format is read."""
    width, scaled, shared = fmt.bits, fmt.scale != "none", fmt.per_segment
    get, get_one, value = coder.get, coder.one, coder.value

    @device
    def codes_at(wire, row, start):
        return wire + column(row, CODE) + start * width // 8

    @device
    def scale_of(wire, row, b):
        if not scaled:
            return f32(1)
        return bf16_value(load16(wire + column(row, SCALE) + (0 if shared else 2 * b)))

    @device
    def unpack(p, wire, row, b, start, u, columns, real, whole):
        get(p, codes_at(wire, row, start), u, columns, whole)
        return scale_of(wire, row, b) if real != u32(0) else f32(0)

    @device
    def one(wire, row, b, start, e, columns):
        code = get_one(codes_at(wire, row, start), e, columns)
        return value(code, scale_of(wire, row, b))

    return Payload(unpack, one)


def total(fmt: Format, coder: Coder) -> Function:
    """A function that sums a unit of all payloads, padding too; arguments as those of `fill`."""
    unpack, value = payload(fmt, coder).unpack, coder.value

    @device
    def sum_up(v, p, given, row, b, start, u, columns, real, whole):
        # From +0, in the loop itself: clearing v before it would be a call that fills memory.
        for rank in range(given[1]):
            s = unpack(p, given[0] + rank * given[2], row, b, start, u, columns, real, whole)
            for i in range(UNIT):
                v[i] = add(v[i] if rank > 0 else f32(0), value(p[i], s))

    return sum_up


def payloads(fmt: Format, coder: Coder) -> Source:
    """given: address, number and size of the payloads, and the factor of their sum."""
    decode_one, sum_up = payload(fmt, coder).one, total(fmt, coder)

    @device
    def fill(v, p, given, row, b, start, u, columns, real, whole):
        sum_up(v, p, given, row, b, start, u, columns, real, whole)
        for i in range(UNIT):
            v[i] = mul(v[i], given[3])
        if not whole:
            clear_padding(v, real)

    @device
    def one(given, row, b, start, e, columns):
        found = f32(0)
        for rank in range(given[1]):
            wire = given[0] + rank * given[2]
            found = add(found, decode_one(wire, row, b, start, e, columns))
        return mul(found, given[3])

    return Source(fill, one)
