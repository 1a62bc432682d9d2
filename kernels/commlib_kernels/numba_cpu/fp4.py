"""4-bit floats, e2m1: the sign in bit 3, exponent and mantissa below it."""

import numpy as np

from commlib_kernels.numba_cpu.coders import Coder, is_coded, nothing
from commlib_kernels.numba_cpu.jit import SCALARS, inlined, loop
from commlib_kernels.numba_cpu.tables import pack, unpack

u8, f32 = np.uint8, np.float32

e2m1_nearest, e2m1_value = SCALARS.e2m1_nearest, SCALARS.e2m1_value


@loop
def code(v, nb, width, s, levels, stochastic, r, table, q):
    """e2m1 of v / scale."""
    for b in range(nb):
        o = b * width
        if is_coded(s[b]):
            inv = f32(1) / s[b]
            for i in range(width):
                q[o + i] = u8(e2m1_nearest(v[o + i] * inv))
        else:
            for i in range(width):
                q[o + i] = u8(0)


@inlined
def value(code, scale, c):
    """e2m1 value times scale: exact."""
    return e2m1_value(code) * scale


CODER = Coder(code, pack, unpack, value, np.uint8, nothing)
