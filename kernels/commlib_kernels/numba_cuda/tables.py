"""Codes of a table of up to 16 values: the nearest one's number, and what it means.

Values and thresholds are constants of a kernel, and all of them are compared: a lookup at an index
that lanes do not share would wait for each of them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from commlib_kernels.formats import Format
from commlib_kernels.launch import table_numbers
from commlib_kernels.numba_cuda.jit import device, mul

Function = Callable[..., Any]

u32, f32 = np.uint32, np.float32


def make(fmt: Format) -> tuple[Function, Function]:
    """The functions `code` and `value` of a coder."""
    numbers = [f32(x) for x in table_numbers(fmt.table)]
    v, t = tuple(numbers[:16]), tuple(numbers[16:31])
    mask = u32((1 << fmt.bits) - 1)

    @device
    def code(x, inv, random):
        y = mul(x, inv)
        low = u32(y > t[0]) + u32(y > t[1]) + u32(y > t[2]) + u32(y > t[3]) + u32(y > t[4])
        low += u32(y > t[5]) + u32(y > t[6]) + u32(y > t[7]) + u32(y > t[8]) + u32(y > t[9])
        high = u32(y > t[10]) + u32(y > t[11]) + u32(y > t[12]) + u32(y > t[13]) + u32(y > t[14])
        return u32(low + high)

    @device
    def pick(q, a, b, c, d):
        """One of four, by the two lowest bits."""
        even = c if q & u32(2) != u32(0) else a
        odd = d if q & u32(2) != u32(0) else b
        return odd if q & u32(1) != u32(0) else even

    @device
    def value(code, scale):
        q = code & mask
        low = pick(q, v[0], v[1], v[2], v[3])
        second = pick(q, v[4], v[5], v[6], v[7])
        third = pick(q, v[8], v[9], v[10], v[11])
        high = pick(q, v[12], v[13], v[14], v[15])
        return mul(pick(q >> u32(2), low, second, third, high), scale)

    return code, value
