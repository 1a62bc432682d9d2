"""Pieces that travel as they are beside coded ones, in the kernels that code those.

By themselves they are small (biases, norms), and many: a view and a copy for each, in Python, took
as long as half of what was coded. Equations: raw.py.
"""

import numpy as np

from commlib_kernels.numba_cpu.jit import at, loop
from commlib_kernels.numba_cpu.strips import FP32, STRIP, U, add, clear, load, multiply, store

u16, u32, i64, f32 = np.uint16, np.uint32, np.int64, np.float32


@loop
def place(address, dtype, o):
    """Address of element o of a tensor."""
    return address + i64(4 if dtype == FP32 else 2) * i64(o)


@loop
def copy(source, target, dtype, n):
    """n elements from one address to another, bit by bit."""
    if dtype == FP32:
        a, b = at(source, u32), at(target, u32)
        for i in range(n):
            b[i] = a[i]
    else:
        c, d = at(source, u16), at(target, u16)
        for i in range(n):
            d[i] = c[i]


@loop
def gain(source, target, dtype, n, v, w):
    """target += source, in fp32."""
    for o in range(U(0), n, U(STRIP)):
        m = min(U(STRIP), n - o)
        x, y = place(source, dtype, o), place(target, dtype, o)
        load(at(x, f32), at(x, u16), dtype, U(0), m, v)
        load(at(y, f32), at(y, u16), dtype, U(0), m, w)
        add(v, w, m)
        store(at(y, f32), at(y, u16), dtype, U(0), m, w)


@loop
def total(source, apart, ranks, factor, target, dtype, n, v, w):
    """target = factor times the sum, in fp32 and rank order, of what lies `apart` bytes apart."""
    for o in range(U(0), n, U(STRIP)):
        m = min(U(STRIP), n - o)
        clear(w, U(0), m)
        for rank in range(ranks):
            x = place(source + i64(rank) * apart, dtype, o)
            load(at(x, f32), at(x, u16), dtype, U(0), m, v)
            add(v, w, m)
        multiply(w, m, factor)
        y = place(target, dtype, o)
        store(at(y, f32), at(y, u16), dtype, U(0), m, w)
