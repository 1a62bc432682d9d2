"""Codes of a grid; the scale that fits a block's codes best is `gauss.fit` with these products."""

import numpy as np
import numpy.typing as npt

from commlib_kernels.numba_cpu.coders import Coder, nothing, uniform_pack, uniform_unpack
from commlib_kernels.numba_cpu.coders import uniform_value as value
from commlib_kernels.numba_cpu.gauss import no_code, no_pairs
from commlib_kernels.numba_cpu.jit import inlined, loop
from commlib_kernels.once import once

i8, i32, f32 = np.int8, np.int32, np.float32
pairs = no_pairs


@once
def numbers(step: float, levels: int) -> npt.NDArray[np.float32]:
    """The array that kernels get: steps per root mean square, and the largest code."""
    return np.array([np.float32(1) / np.float32(step), levels], np.float32)


@loop
def products(v, o, n, h, inv, table, x, y, q):
    """Codes c of ``z = v inv``; products c z to x and c c to y, halved once."""
    steps, top = table[0], table[1]
    for i in range(n - h):
        z, w = v[o + i] * inv, v[o + h + i] * inv
        c, d = min(max(np.rint(z * steps), -top), top), min(max(np.rint(w * steps), -top), top)
        x[i] = c * z + d * w
        y[i] = c * c + d * d
        q[o + i], q[o + h + i] = i8(i32(c)), i8(i32(d))
    for i in range(n - h, h):
        z = v[o + i] * inv
        c = min(max(np.rint(z * steps), -top), top)
        x[i] = c * z
        y[i] = c * c
        q[o + i] = i8(i32(c))


@inlined
def padding(table):
    """The code of 0."""
    return i8(0)


CODER = Coder(no_code, uniform_pack, uniform_unpack, value, np.int8, nothing)
