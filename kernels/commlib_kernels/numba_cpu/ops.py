"""The compiled ops of every kind of format, and the memory that they work in."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from commlib_kernels.formats import Format, Kind
from commlib_kernels.numba_cpu import coders, fp4, gauss, grid, kernels, tables
from commlib_kernels.numba_cpu.jit import entry, inlined, specialise
from commlib_kernels.numba_cpu.strips import LANES, MAX_BLOCK, STRIP
from commlib_kernels.once import once


class Ops(NamedTuple):
    """The compiled ops of one kind of format."""

    quantize: Callable[..., None]
    dequantize: Callable[..., None]
    reduce: Callable[..., None]


class _Local(threading.local):
    """Scratch memory is a thread's own: kernels run without the GIL."""

    def __init__(self) -> None:
        longest = max(STRIP, MAX_BLOCK)
        sizes = (*(4 * longest,) * 5, 8 * int(LANES), *(4 * longest,) * 3)
        self.arrays = [np.zeros(size + 64, np.uint8) for size in sizes]
        self.addresses = [-(-array.ctypes.data // 64) * 64 for array in self.arrays]


_local = _Local()


def scratch() -> list[int]:
    """Addresses: values, residual, random words, codes, scales, norm lanes, sums; and of rotations:
    the other buffer, what is coded."""
    return _local.addresses


CODERS = coders.CODERS | {
    "fp4": fp4.CODER,
    "gauss": gauss.CODER,
    "grid": grid.CODER,
    "table": tables.CODER,
}
FITTED = {"gauss": gauss, "grid": grid}
"""Kinds whose scale suits their codes; modules with their `products`, `pairs` and `padding`."""


def ops(fmt: Format) -> Ops:
    """The ops of a kind of format; each compiles on its first call."""
    return _made(fmt.kind)


@once
def _made(kind: Kind) -> Ops:
    coder, fit = CODERS[kind], gauss.no_fit
    if kind in FITTED:
        module = FITTED[kind]
        own = {name: getattr(module, name) for name in ("products", "pairs", "padding")}
        fit = specialise(gauss.fit, kind, own)
    bound: dict[str, Any] = {
        "code": coder.code,
        "pack": coder.pack,
        "unpack": coder.unpack,
        "value": coder.value,
        "constants": coder.constants,
        "Q": coder.codes,
        "QUICK": kind == "uniform",
        "FIT": kind in FITTED,
        "PAIRED": kind == "gauss",
        "TABLED": kind in ("gauss", "table"),
        "fit": fit,
    }
    parts: tuple[Callable[..., Any], ...] = (kernels.spread, kernels.accumulate, kernels.renew)
    for part in parts:
        bound[part.__name__] = specialise(part, kind, bound)
    if bound["TABLED"]:
        bound |= {"spread": tables.spread, "accumulate": tables.accumulate}
    parts = (
        kernels.collect,
        kernels.emit,
    )  # a call with so many arguments costs as much as a strip
    for part in parts:
        bound[part.__name__] = specialise(part, kind, bound, inlined)
    made = (kernels.quantize, kernels.dequantize, kernels.reduce)
    return Ops(*(specialise(op, kind, bound, entry) for op in made))
