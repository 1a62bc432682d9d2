"""CPU kernels compiled by Numba: one thread, no GIL, the speed of memory.

Each call marshals tensors into the flat arguments of `kernels.py`; nothing is copied. The kind
buckets, which travels once in many steps (DiLoCo), is the reference's.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from commlib_kernels import raw, reference, squeezed
from commlib_kernels.formats import Format
from commlib_kernels.layout import Layout, stride, table
from commlib_kernels.memory import Memory
from commlib_kernels.numba_cpu import entropy, gauss, grid, kernels, sparse, strips, tables
from commlib_kernels.numba_cpu.jit import cache_dir
from commlib_kernels.numba_cpu.ops import ops, scratch
from commlib_kernels.philox import seed_word, signs
from commlib_kernels.tag import Tag

__all__ = ["cache_dir", "dequantize", "expand", "name", "quantize", "reduce", "squeeze", "warmup"]

name = "numba_cpu"
warmup_squeeze = entropy.warmup

Array = npt.NDArray[Any]

_NO_SEGMENTS = np.zeros((2, 1), np.uint32)

_DTYPES = {
    torch.float32: strips.FP32,
    torch.float16: strips.FP16,
    torch.bfloat16: strips.BF16,
    torch.int8: strips.INT8,
}
_RULES = {
    "absmax": strips.ABSMAX,
    "l2": strips.L2,
    "mean": strips.MEAN,
    "none": strips.UNSCALED,
    "fit": strips.FITTED,
    "unbiased": strips.UNBIASED,
    "e8m0": strips.POWER,
    "e8m0_up": strips.POWER_UP,
}


def quantize(
    fmt: Format,
    x: torch.Tensor,
    wire: torch.Tensor,
    layout: Layout,
    tag: Tag,
    memory: Memory | None = None,
) -> None:
    """Code `x` into `wire`, adding and renewing the residual."""
    if fmt.kind == "buckets":
        reference.quantize(fmt, x, wire, layout, tag, memory)
        return
    if fmt.sparse is not None or fmt.kind == "raw":
        raw.encode(fmt, x, wire, layout)
    if fmt.sparse is not None:
        sparse.quantize(fmt, x, wire, layout, tag, memory, _DENSE)
    elif fmt.kind != "raw":
        call = _Call(fmt, table(layout, fmt), x)
        call.a[kernels.PLAIN], call.a[kernels.WIRE] = True, wire.data_ptr()
        call.code(layout, tag, memory)
        call.run(ops(fmt).quantize)


def dequantize(
    fmt: Format, wire: torch.Tensor, out: torch.Tensor, layout: Layout, *, add: bool = False
) -> None:
    """Decode `wire` into (or add it to) the elements of `out` that its payloads cover."""
    if fmt.kind == "buckets":
        reference.dequantize(fmt, wire, out, layout, add=add)
        return
    if fmt.sparse is not None or fmt.kind == "raw":
        raw.decode(fmt, wire, out, layout, add=add)
    if fmt.sparse is not None:
        sparse.dequantize(fmt, wire, out, layout, add, _DENSE)
    elif fmt.kind != "raw":
        call = _Call(fmt, table(layout, fmt), out)
        call.a[kernels.PLAIN], call.a[kernels.WIRE] = True, wire.data_ptr()
        call.a[kernels.ADD] = add
        call.run(ops(fmt).dequantize)


def reduce(
    fmt: Format,
    wires: torch.Tensor,
    out: torch.Tensor,
    layout: Layout,
    tag: Tag,
    *,
    factor: float = 1.0,
    memory: Memory | None = None,
) -> None:
    """Sum the payloads of all ranks into a wire (uint8) or a dense chunk."""
    size = stride(layout, fmt)
    if size == 0:
        return
    if fmt.kind == "buckets":
        reference.reduce(fmt, wires, out, layout, tag, factor=factor, memory=memory)
        return
    dense = out.dtype != torch.uint8
    plain = fmt.sparse is None and fmt.kind != "raw" and out.dtype in (torch.uint8, layout.dtype)
    if not plain:
        raw.reduce(fmt, wires, size, out, layout, factor)
    if fmt.sparse is not None:
        sparse.reduce(fmt, wires, out, layout, tag, factor, memory, _DENSE)
        return
    if fmt.kind == "raw":
        return
    call = _Call(fmt, table(layout, fmt, owner=True), out if dense else None)
    if plain:
        call.a[kernels.PLAIN], call.a[kernels.DTYPE] = True, _DTYPES[layout.dtype]
    call.a[kernels.WIRES : kernels.DENSE + 1] = [
        wires.data_ptr(), wires.numel() // size, size, dense
    ]  # fmt: skip
    call.f[kernels.FACTOR] = factor
    if not dense:
        call.a[kernels.WIRE] = out.data_ptr()
        call.code(layout, tag, memory)
    call.run(ops(fmt).reduce)


def squeeze(fmt: Format, wire: torch.Tensor, out: torch.Tensor, layout: Layout) -> int:
    """Code the payloads of `wire` losslessly into `out`; the bytes used."""
    return squeezed.squeeze(entropy, fmt, wire.numpy(), out.numpy(), layout)


def expand(fmt: Format, data: torch.Tensor, wire: torch.Tensor, layout: Layout) -> None:
    """The inverse of `squeeze`."""
    squeezed.expand(entropy, fmt, data.numpy(), wire.numpy(), layout)


class _Call:
    """The arguments of one kernel call; keeps alive what they point to."""

    def __init__(self, fmt: Format, rows: Array, x: torch.Tensor | None) -> None:
        self.a: list[int] = [0] * kernels.ARGUMENTS
        self.f = [0.0] * 5
        self.rows, self.fmt = rows, fmt
        self.segments = _NO_SEGMENTS
        self.groups: list[Array] = []
        if x is not None:
            self.a[kernels.X] = x.data_ptr()
            self.a[kernels.DTYPE] = _DTYPES[x.dtype]
        self.a[kernels.MEMORY_KIND] = strips.NONE
        self.a[kernels.BLOCK : kernels.STOCHASTIC + 1] = [
            fmt.block, fmt.bits, _RULES[fmt.scale], fmt.per_segment, fmt.stochastic
        ]  # fmt: skip
        self.a[kernels.SCRATCH :] = scratch()
        if fmt.rotate is not None:
            self.a[kernels.ROTATED], self.a[kernels.SIGNS] = True, signs(fmt.rotate).ctypes.data
        if fmt.table:
            numbers = (gauss if fmt.kind == "gauss" else tables).numbers(fmt.table)
            self.a[kernels.TABLE] = numbers.ctypes.data
        elif fmt.kind == "grid":
            self.a[kernels.TABLE] = grid.numbers(fmt.step, fmt.levels).ctypes.data
        self.f[kernels.LEVELS] = fmt.top

    def code(self, layout: Layout, tag: Tag, memory: Memory | None) -> None:
        """What coding needs beyond the tensor: random streams, residual, shared scales."""
        a, f, count = self.a, self.f, len(layout.sizes)
        self.segments = np.zeros((2, count), np.uint32)
        self.segments[0] = tag.keys
        a[kernels.STEP : kernels.SEED + 1] = [int(tag.step), tag.rank, seed_word(tag.seed)]
        if memory is not None:
            a[kernels.RESIDUAL] = memory.residual.data_ptr()
            a[kernels.MEMORY_KIND] = _DTYPES[memory.residual.dtype]
            if memory.scales is not None:
                a[kernels.RESIDUAL_SCALES] = memory.scales.data_ptr()
            f[kernels.ALPHA :] = [memory.alpha, memory.carry, memory.omega]
            self.segments[1, list(memory.hold)] = 1
        if self.fmt.per_segment:
            groups = int(self.rows[:, kernels.GROUP].max(initial=-1)) + 1
            a[kernels.GROUP_COUNT] = groups
            self.groups = [np.zeros((groups, 32)) for _ in range(5)]
            a[kernels.GROUPS : kernels.SCRATCH] = [g.ctypes.data for g in self.groups]

    def run(self, op: Callable[..., None]) -> None:
        """Call the kernel."""
        op(np.array(self.a, np.int64), np.array(self.f, np.float32), self.rows, self.segments)


def _code(fmt: Format, rows: Array, x: torch.Tensor, wire: int, layout: Layout, tag: Tag) -> None:
    """Code pieces of `x` into the wire at an address, without residuals."""
    call = _Call(fmt, rows, x)
    call.a[kernels.WIRE] = wire
    call.code(layout, tag, None)
    call.run(ops(fmt).quantize)


def _decode(fmt: Format, rows: Array, out: torch.Tensor, wire: int) -> None:
    """Decode pieces of the wire at an address into `out`."""
    call = _Call(fmt, rows, out)
    call.a[kernels.WIRE] = wire
    call.run(ops(fmt).dequantize)


_DENSE = sparse.Dense(_code, _decode)


def warmup(fmt: Format, device: torch.device | None = None) -> None:
    """Compile the ops of this kind of format, or load them from the cache."""
    del device  # there is one
    if fmt.is_raw:
        return
    layout = Layout((fmt.block,), align=fmt.align)
    x, wire = torch.zeros(fmt.block), torch.zeros(stride(layout, fmt), dtype=torch.uint8)
    quantize(fmt, x, wire, layout, Tag())
    dequantize(fmt, wire, x, layout)
    reduce(fmt, wire, x, layout.only(0), Tag())
    if fmt.sparse is not None:  # whose residuals have kernels of their own, narrow ones more
        scales = torch.zeros(1, dtype=torch.int16)
        for h, s in ((torch.zeros(fmt.block), None), (torch.zeros(fmt.block).char(), scales)):
            quantize(fmt, x, wire, layout, Tag(), Memory(h, s))
