"""Sparse formats: choose, code what was chosen with the ops of its format, put it back."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from commlib_kernels import raw
from commlib_kernels.compact import chosen
from commlib_kernels.formats import Format
from commlib_kernels.layout import Layout, Piece, stride
from commlib_kernels.memory import Memory
from commlib_kernels.numba_cpu import pick, strips
from commlib_kernels.numba_cpu.jit import entry
from commlib_kernels.numba_cpu.topk import TILE, room
from commlib_kernels.once import once
from commlib_kernels.philox import seed_word
from commlib_kernels.tag import Tag

Rows = npt.NDArray[np.int64]
Places = npt.NDArray[np.uint32]

KINDS = {
    torch.float32: strips.FP32,
    torch.float16: strips.FP16,
    torch.bfloat16: strips.BF16,
    torch.int8: strips.INT8,
}


class Dense(NamedTuple):
    """The ops of formats that are not sparse, on pieces given as rows."""

    code: Callable[[Format, Rows, torch.Tensor, int, Layout, Tag], None]
    decode: Callable[[Format, Rows, torch.Tensor, int], None]


class _Ops(NamedTuple):
    """The compiled functions of pick.py."""

    form: Callable[..., None]
    choose: Callable[..., None]
    renew: Callable[..., None]
    place: Callable[..., None]
    copy: Callable[..., None]


@once
def _picking() -> _Ops:
    return _Ops(*(entry(op) for op in (pick.form, pick.choose, pick.renew, pick.place, pick.copy)))


class _Plan(NamedTuple):
    """What is the same for all messages of a layout."""

    rows: Rows  # columns of pick.py; SOURCE is the first element's number in the tensor
    dense: Rows  # the same of the owner's dense chunk
    inner: Rows  # the values, as pieces of a message
    values: int
    elements: int
    longest: int  # values of a piece
    room: int  # for candidates


@lru_cache(maxsize=1024)
def _plan(layout: Layout, fmt: Format, owner: bool) -> _Plan:
    sparse, found = fmt.sparse, chosen(layout, fmt, owner=owner)
    assert sparse is not None
    rows = np.zeros((len(found), pick.COLUMNS), np.int64)
    rooms = [0]
    for row, (p, values, start) in zip(rows, found, strict=True):
        run = min(sparse.run or p.numel, p.numel)
        of_run = sparse.of(run)
        row[:] = (
            p.x, 0, 0, p.numel, values.numel, values.x, p.code, start, p.segment, p.memory,
            p.memory_block, sparse.low_bits(p.numel), run, of_run, sparse.of(p.numel % run),
        )  # fmt: skip
        rooms.append(room(of_run, run))
    dense = rows.copy()
    dense[:, pick.SOURCE] = rows[:, pick.MEMORY]
    inner = np.array([c.values for c in found], np.int64).reshape(-1, len(Piece._fields))
    for array in (rows, dense, inner):
        array.flags.writeable = False
    counts = rows[:, pick.COUNT]
    longest = int(counts.max(initial=0))
    return _Plan(
        rows, dense, inner, int(counts.sum()), int(rows[:, pick.NUMEL].sum()), longest, max(rooms)
    )


def quantize(
    fmt: Format,
    x: torch.Tensor,
    wire: torch.Tensor,
    layout: Layout,
    tag: Tag,
    memory: Memory | None,
    ops: Dense,
) -> None:
    """As `numba_cpu.quantize`, of pieces that are not exact."""
    plan = _plan(layout, fmt, False)
    _code(fmt, plan, _located(plan.rows, x), wire, layout, tag, memory, ops)


def dequantize(
    fmt: Format, wire: torch.Tensor, out: torch.Tensor, layout: Layout, add: bool, ops: Dense
) -> None:
    """As `numba_cpu.dequantize`."""
    plan = _plan(layout, fmt, False)
    _decode(fmt, plan, _located(plan.rows, out), wire.data_ptr(), add, ops)


def reduce(
    fmt: Format,
    wires: torch.Tensor,
    out: torch.Tensor,
    layout: Layout,
    tag: Tag,
    factor: float,
    memory: Memory | None,
    ops: Dense,
) -> None:
    """As `numba_cpu.reduce`: every payload is added to the chunk, which is then coded again."""
    plan, size = _plan(layout, fmt, True), stride(layout, fmt)
    assert layout.chunk is not None
    total = torch.zeros(layout.chunk_numel(layout.chunk))
    rows = _located(plan.dense, total)
    for base in range(0, wires.numel(), size):
        _decode(fmt, plan, rows, wires.data_ptr() + base, True, ops)
    if factor != 1:
        total *= factor
    if out.dtype == torch.uint8:
        _code(fmt, plan, rows, out, layout, tag, memory, ops, first=wires.data_ptr())
    else:
        _store(plan, total, out)


def _located(rows: Rows, x: torch.Tensor) -> Rows:
    """Rows with the addresses of pieces in `x`."""
    rows = rows.copy()
    rows[:, pick.SOURCE] = x.data_ptr() + rows[:, pick.SOURCE] * x.itemsize
    rows[:, pick.KIND] = KINDS[x.dtype]
    return rows


def _code(
    fmt: Format,
    plan: _Plan,
    rows: Rows,
    wire: torch.Tensor,
    layout: Layout,
    tag: Tag,
    memory: Memory | None,
    ops: Dense,
    first: int = 0,
) -> None:
    sparse = fmt.sparse
    assert sparse is not None
    count, block = len(layout.sizes), fmt.block
    keys = np.zeros(count, np.uint32)
    keys[:] = tag.keys
    alpha, held = np.float32(0), np.zeros(count, np.bool_)
    scratch = np.empty(8 * TILE * 4 + strips.MAX_BLOCK, np.float32)
    kept = None
    if memory is not None:
        alpha = np.float32(memory.alpha)
        held[list(memory.hold)] = True
        kind, residual = KINDS[memory.residual.dtype], memory.residual.data_ptr()
        scales = 0 if memory.scales is None else memory.scales.data_ptr()
        if kind == strips.FP32:
            places = residual + 4 * rows[:, pick.MEMORY]
            rows[:, pick.RESIDUAL] = np.where(held[rows[:, pick.SEGMENT]], 0, places)
        else:
            kept = np.empty(plan.elements + 8, np.float32)  # loops pad
            _picking().form(
                rows, held, residual, scales, kind, block, alpha, scratch.ctypes.data,
                kept.ctypes.data,
            )  # fmt: skip
            ends = np.cumsum(rows[:, pick.NUMEL])
            rows[:, pick.SOURCE] = kept.ctypes.data + 4 * (ends - rows[:, pick.NUMEL])
            rows[:, pick.KIND] = strips.FP32
    places, values = np.empty(plan.values, np.uint32), torch.empty(plan.values)
    near, close = np.empty(plan.room, np.uint32), np.empty(plan.room, np.float32)
    _picking().choose(
        rows, keys, int(tag.step) & 0xFFFFFFFF, seed_word(tag.seed), sparse.rule == "randk",
        sparse.scaled and not first, alpha, first, wire.data_ptr(), scratch.ctypes.data,
        near.ctypes.data, close.ctypes.data, places.ctypes.data, values.data_ptr(),
    )  # fmt: skip
    inner = fmt.values_format
    if fmt.kind == "raw":
        _copy(plan, wire.data_ptr(), values, to_wire=True)
    else:
        ops.code(inner, plan.inner, values, wire.data_ptr(), layout, tag)
    if memory is not None:
        if fmt.kind != "raw":
            ops.decode(inner, plan.inner, values, wire.data_ptr())
        _picking().renew(
            rows, held, residual, scales, kind, block, alpha, np.float32(memory.carry),
            np.float32(memory.omega), places.ctypes.data, values.data_ptr(), scratch.ctypes.data,
        )  # fmt: skip


def _decode(fmt: Format, plan: _Plan, rows: Rows, wire: int, add: bool, ops: Dense) -> None:
    assert fmt.sparse is not None
    places, values = np.empty(plan.longest, np.uint32), torch.empty(plan.values)
    if fmt.kind == "raw":
        _copy(plan, wire, values, to_wire=False)
    else:
        ops.decode(fmt.values_format, plan.inner, values, wire)
    _picking().place(
        rows, fmt.sparse.rule == "randk", add, wire, places.ctypes.data, values.data_ptr()
    )  # fmt: skip


def _copy(plan: _Plan, wire: int, values: torch.Tensor, *, to_wire: bool) -> None:
    """fp32 values to the wire at an address, or from it."""
    _picking().copy(plan.rows, plan.inner[:, 2].copy(), wire, values.data_ptr(), to_wire)


def _store(plan: _Plan, total: torch.Tensor, out: torch.Tensor) -> None:
    """Round sums to the dtype of the dense chunk."""
    for row in plan.dense:
        start = row[pick.SOURCE]
        piece = slice(start, start + row[pick.NUMEL])
        raw.settle(out[piece], total[piece])
