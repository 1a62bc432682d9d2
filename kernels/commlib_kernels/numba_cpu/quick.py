"""One pass for what people use most: int4 and int8, plain or with a classic fp32 residual.

Coding, packing and renewing the residual in one loop saves three passes over the L1 cache, a third
of the time. The general path (coders.py, kernels.py) gives the same bytes for every format.
"""

from typing import Any

import numpy as np

from commlib_kernels.numba_cpu.coders import is_coded
from commlib_kernels.numba_cpu.jit import SCALARS, inlined, loop, specialise

U = np.uintp
u8, u32, i8, i32, f32 = np.uint8, np.uint32, np.int8, np.int32, np.float32

uniform = SCALARS.uniform


@inlined
def pick_nearest(y, word, low, high):
    """Ties to even."""
    return min(max(i32(np.rint(y)), low), high)


@inlined
def pick_stochastic(y, word, low, high):
    """Floor after adding a uniform number."""
    return min(max(i32(np.floor(y + uniform(word))), low), high)


@inlined
def put4(wire, p, i, half, a, d):
    """Two to a byte."""
    wire[p + i] = u8((a & i32(15)) | (d << i32(4)))


@inlined
def put8(wire, p, i, half, a, d):
    """A byte each."""
    wire[p + i] = u8(a)
    wire[p + half + i] = u8(d)


@inlined
def keep(h, i, omega, v, code, s):
    """The new residual."""
    h[i] = omega * (v - f32(code) * s)


@inlined
def keep_nothing(h, i, omega, v, code, s):
    """There is no residual."""


# Bound below.
pick: Any = None
put: Any = None
remember: Any = None
BYTES: Any = None
KEEPS: Any = None


def one_pass(v, nb, width, s, levels, r, wire, c, h, omega):
    """Code a strip of full blocks; elements i and i + width / 2 go together."""
    low, high = i32(-levels), i32(levels)
    half = width // U(2)
    for b in range(nb):
        o = b * width
        p, w = c + b * half * U(BYTES), o // U(2)
        scale = s[b]
        if is_coded(scale):
            inv = f32(1) / scale
            for i in range(half):
                word = r[w + i]
                a = pick(v[o + i] * inv, word & u32(0xFFFF), low, high)
                d = pick(v[o + half + i] * inv, word >> u32(16), low, high)
                put(wire, p, i, half, a, d)
                remember(h, o + i, omega, v[o + i], a, scale)
                remember(h, o + half + i, omega, v[o + half + i], d, scale)
        else:
            for i in range(half * U(BYTES)):
                wire[p + i] = u8(0)
            if KEEPS and scale == f32(0):
                for i in range(width):
                    h[o + i] = f32(0)


def _bind(bits: int, *, stochastic: bool, keeps: bool) -> Any:
    bound = {
        "pick": pick_stochastic if stochastic else pick_nearest,
        "put": put4 if bits == 4 else put8,
        "BYTES": bits // 4,
        "remember": keep if keeps else keep_nothing,
        "KEEPS": keeps,
    }
    return specialise(one_pass, f"{bits}_{stochastic}_{keeps}", bound)


nearest4 = _bind(4, stochastic=False, keeps=False)
nearest4_keep = _bind(4, stochastic=False, keeps=True)
nearest8 = _bind(8, stochastic=False, keeps=False)
nearest8_keep = _bind(8, stochastic=False, keeps=True)
random4 = _bind(4, stochastic=True, keeps=False)
random4_keep = _bind(4, stochastic=True, keeps=True)
random8 = _bind(8, stochastic=True, keeps=False)
random8_keep = _bind(8, stochastic=True, keeps=True)


@loop
def quick(v, nb, width, s, levels, stochastic, r, nbits, wire, c, h, keeps, omega):
    """Code, pack and renew in one pass, where there is one."""
    if nbits == 4:
        if stochastic:
            if keeps:
                random4_keep(v, nb, width, s, levels, r, wire, c, h, omega)
            else:
                random4(v, nb, width, s, levels, r, wire, c, h, omega)
        elif keeps:
            nearest4_keep(v, nb, width, s, levels, r, wire, c, h, omega)
        else:
            nearest4(v, nb, width, s, levels, r, wire, c, h, omega)
    elif stochastic:
        if keeps:
            random8_keep(v, nb, width, s, levels, r, wire, c, h, omega)
        else:
            random8(v, nb, width, s, levels, r, wire, c, h, omega)
    elif keeps:
        nearest8_keep(v, nb, width, s, levels, r, wire, c, h, omega)
    else:
        nearest8(v, nb, width, s, levels, r, wire, c, h, omega)
