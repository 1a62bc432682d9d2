"""What the next strip needs is asked for while this one is coded.

A strip is read twice, for its scales and for its codes, the second time from the cache: by itself
the processor would wait for memory, then compute, in turns. The questions go out evenly, a few
lines for every few elements: those that come in a burst have to wait for each other.

`ahead` is (address, bytes) of the next strip's elements; no bytes where they come from a cache.
"""

import numpy as np

from commlib_kernels.numba_cpu.jit import at, inlined
from commlib_kernels.numba_cpu.vectors import prefetch

U = np.uintp

LINE = U(64)
"""Bytes of a cache line."""


@inlined
def ask(ahead, o, n):
    """Ask for what is as far into the next strip as n fp32 elements from o on are in this."""
    lines = at(ahead[0], np.uint8)
    for i in range(U(4) * o, min(U(4) * (o + n), ahead[1]), LINE):
        prefetch(lines, i)


@inlined
def ask_fp32(h, o, n):
    """Ask for elements o to o + n of an array, which they may exceed."""
    for i in range(o, o + n, LINE // U(4)):
        prefetch(h, i)
