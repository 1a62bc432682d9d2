"""What both CUDA backends tell a kernel: numbers, addresses, and a table of pieces on the device.

A warp works on a *tile*: as many whole blocks of a piece as 32 lanes hold, or 1024 elements of an
exact piece. A block of n elements is seen as eight rows of ``n / 8`` columns, element ``row * n / 8
+ column``. The eight of a column are one group of random numbers, and their bits lie in the same
bytes of every plane: so the lane that has a column codes, packs and rounds it alone, and lanes meet
only for the maximum of their block. A lane has a *unit*, four neighbouring columns, wherever memory
can be read as vectors. In formats that are `grouped` every lane has a unit, whatever memory allows:
their elements all meet, in rotations or in the sums of a fitted scale.

Pieces do not change from message to message: their table is made once per layout and stays.
"""

from functools import cache, lru_cache
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from commlib_kernels.formats import Format
from commlib_kernels.layout import Layout, pieces, stride
from commlib_kernels.memory import Memory
from commlib_kernels.once import once
from commlib_kernels.philox import seed_word, signs
from commlib_kernels.tables import TABLES, thresholds
from commlib_kernels.tag import Tag

LANES = 32
ROWS, COLUMNS = 8, 4
UNIT = ROWS * COLUMNS
EXACT_TILE = 1024
"""Elements of an exact piece that a warp copies."""
RUN = 4096
"""Elements whose norm is summed together (README, order of sums)."""

FP32, FP16, BF16, INT8, NONE = range(5)
"""Element types of tensors and residuals, as kernels are told them."""
DTYPES = {torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16, torch.int8: INT8}

RULES = {"absmax": 0, "l2": 1, "mean": 2, "none": 3, "fit": 4, "unbiased": 5}

IS_EXACT, IS_HELD = 1, 2

# Columns of the table of pieces, one int64 each.
(OFFSET, NUMEL, CODE, SCALE, BASE, KEY, FLAGS, MEMORY, MEMORY_BLOCK, GROUP, TILE) = range(11)
TABLE_COLUMNS = 12  # the last is not used: rows keep to 16 bytes

INTEGERS = (
    "pieces", "piece_count", "tiles",  # the table
    "x", "dtype", "exact_dtype", "wire",  # tensor, what exact pieces travel as, wire
    "wires", "payloads", "stride", "dense", "add",  # of reduce and dequantize
    "residual", "memory_kind", "residual_scales",
    "block", "bits", "rule", "per_segment", "stochastic", "lanes",  # the format
    "step", "step_at", "rank", "seed",  # random numbers; step_at: address of a step on the device
    "groups", "group_step", "group_pieces", "first_runs", "runs",  # one scale per segment
    "run_sums", "peaks", "scales",  # scratch of those
    "signs",  # of a rotation: 4096 bits; 0: there is none
)  # fmt: skip
NUMBERS = ("levels", "factor", "alpha", "carry", "omega", "unused")
TABLE = 32
"""Numbers of a table of values: `table_numbers`."""
STRUCT = np.dtype(
    [
        *((name, np.int64) for name in INTEGERS),
        *((name, np.float32) for name in NUMBERS),
        ("table", np.float32, (TABLE,)),
    ]
)
"""The one argument of a kernel, by value; cupy_cuda/call.cuh declares the same."""
PLACES = {name: 8 * place for place, name in enumerate(INTEGERS)}
PLACES |= {name: 8 * len(INTEGERS) + 4 * place for place, name in enumerate((*NUMBERS, "table"))}
"""Byte of the struct at which a field begins."""
BYTES = np.dtype((np.void, STRUCT.itemsize))
"""The same without its fields, whose names would cost a launch twenty microseconds."""


class Pieces(NamedTuple):
    """The table of a message on the device, and what the host must know of it."""

    table: torch.Tensor  # int64, (pieces, 12)
    tiles: int
    first_runs: torch.Tensor  # int64, (groups + 1,): with one scale per segment
    runs: int
    groups: int
    group_step: int
    group_pieces: int


def grouped(fmt: Format) -> bool:
    """Whether lanes hold a whole block at once, as its elements must meet: rotated or fitted."""
    return fmt.rotate is not None or fmt.scale in ("fit", "unbiased")


def lanes_per_block(fmt: Format) -> int:
    """Lanes that share a block: a power of two.

    More than 32 units go to 32 lanes in turns, or, where the format is `grouped`, to 64 or 128
    threads, which are then a CUDA block of their own.
    """
    units = -(-fmt.block // UNIT)
    return min(4 * LANES if grouped(fmt) else LANES, 1 << (units - 1).bit_length())


def blocks_per_tile(fmt: Format) -> int:
    """Whole blocks of a format that are a tile."""
    return max(1, LANES // lanes_per_block(fmt))


@cache
def table_numbers(table: str) -> npt.NDArray[np.float32]:
    """16 values, then the 15 thresholds between them; a shorter table has +inf, which none exceeds.

    Kernels ask how many thresholds lie below a number: those below zero are a bit lower, so that
    what lies on one goes to the value nearer to zero.
    """
    found = np.full(TABLE, np.inf, np.float32)
    values, between = TABLES[table], thresholds(TABLES[table])
    between[between < 0] = np.nextafter(between[between < 0], np.float32(-np.inf))
    found[:16] = 0
    found[: len(values)] = values
    found[16 : 16 + len(between)] = between
    return found


@once
def _signs(seed: int, device: torch.device) -> torch.Tensor:
    """The signs of a rotation, one bit for each of 4096 elements, on a device."""
    packed = np.packbits(signs(seed) >> np.uint32(31), bitorder="little")
    found = torch.from_numpy(packed).to(device)
    if device.type == "cuda":  # once per seed: other streams will read it
        torch.cuda.current_stream(device).synchronize()
    return found


def check(fmt: Format) -> None:
    """Refuse a format without CUDA kernels. Backends ask in `warmup`: before ranks meet."""
    if not fmt.on_cuda:
        what = "grids (grid2 to grid6)" if fmt.kind == "grid" else "buckets (sigma8)"
        if fmt.power_scale:
            what = "microscaling formats (mxfp8, mxfp4)"
        if fmt.sparse is not None:
            what = f"sparse formats ({fmt.sparse.rule}|)"
        raise ValueError(
            f"there are no CUDA kernels for {what} yet: take int2 to int8, fp8 or sign on GPUs"
        )


def _on_device(
    layout: Layout,
    fmt: Format,
    owner: bool,
    keys: tuple[int, ...],
    hold: tuple[int, ...],
    device: torch.device,
) -> Pieces:
    """The pieces of a message, moved to `device` once."""
    rows = pieces(layout, fmt, owner=owner)
    in_tile = blocks_per_tile(fmt)
    table = np.zeros((len(rows), TABLE_COLUMNS), np.int64)
    tiles = 0
    for row, p in zip(table, rows, strict=True):
        key = keys[p.segment] if len(keys) > 1 else keys[0]
        flags = IS_EXACT * p.exact | IS_HELD * (p.segment in hold)
        row[:] = (
            p.x, p.numel, p.code, p.scale, p.base, key & 0xFFFFFFFF, flags,
            p.memory, p.memory_block, p.group, tiles, 0,
        )  # fmt: skip
        tile = EXACT_TILE if p.exact else in_tile * fmt.block
        tiles += -(-p.numel // tile)
    count = len(layout.sizes)
    groups = len(rows) if layout.stacked else count
    sizes = np.zeros(groups, np.int64)
    for p in rows:
        sizes[p.group] += 0 if p.exact else p.numel
    first_runs = np.zeros(groups + 1, np.int64)
    np.cumsum(-(-sizes // RUN), out=first_runs[1:])
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph captures a message of a layout that was never coded before; code it once "
            "before the capture"
        )
    on_device = torch.from_numpy(table).to(device), torch.from_numpy(first_runs).to(device)
    if device.type == "cuda":  # once per layout: other streams will read it
        torch.cuda.current_stream(device).synchronize()
    parts = 1 if layout.stacked else len(layout.payloads)
    return Pieces(on_device[0], tiles, on_device[1], int(first_runs[-1]), groups, count, parts)


class Launch(NamedTuple):
    """Arguments of one kernel, and what must stay alive until it is queued."""

    words: npt.NDArray[np.int64]  # one STRUCT, as it lies in memory
    tiles: int
    pieces: Pieces
    scratch: tuple[torch.Tensor, ...] = ()

    @property
    def arguments(self) -> npt.NDArray[np.void]:
        """The words by their names."""
        return self.words.view(STRUCT)


# Places in the words: a message has a few microseconds of the host, fields by name would cost ten.
_at = SimpleNamespace(**{name: place for place, name in enumerate(INTEGERS)})
_NUMBERS = len(INTEGERS)
_FACTOR = NUMBERS.index("factor")


def quantize(
    fmt: Format,
    x: torch.Tensor,
    wire: torch.Tensor,
    layout: Layout,
    tag: Tag,
    memory: Memory | None,
) -> Launch:
    """The arguments of `quantize`."""
    words, found = _find(layout, fmt, False, x.device, *_coding(fmt, tag, memory))
    words[_at.x], words[_at.wire] = x.data_ptr(), wire.data_ptr()
    scratch = _code(words, fmt, found, tag, memory, x.device)
    return Launch(words, found.tiles, found, scratch)


def dequantize(
    fmt: Format, wire: torch.Tensor, out: torch.Tensor, layout: Layout, *, add: bool
) -> Launch:
    """The arguments of `dequantize`."""
    words, found = _find(layout, fmt, False, out.device)
    words[_at.x], words[_at.wire], words[_at.add] = out.data_ptr(), wire.data_ptr(), add
    return Launch(words, found.tiles, found)


def reduce(
    fmt: Format,
    wires: torch.Tensor,
    out: torch.Tensor,
    layout: Layout,
    tag: Tag,
    factor: float,
    memory: Memory | None,
) -> Launch:
    """The arguments of `reduce`."""
    size, dense = stride(layout, fmt), out.dtype != torch.uint8
    coding = () if dense else _coding(fmt, tag, memory)
    words, found = _find(layout, fmt, True, out.device, *coding)
    words[_at.wires], words[_at.payloads] = wires.data_ptr(), wires.numel() // size if size else 0
    words[_NUMBERS:].view(np.float32)[_FACTOR] = factor
    if dense:
        words[_at.dense], words[_at.dtype], words[_at.x] = True, DTYPES[out.dtype], out.data_ptr()
        return Launch(words, found.tiles, found)
    words[_at.wire] = out.data_ptr()
    scratch = _code(words, fmt, found, tag, memory, out.device)
    return Launch(words, found.tiles, found, scratch)


Coding = tuple[tuple[int, ...], tuple[int, ...], tuple[float, float, float]]
_PLAIN = (1.0, 0.0, 1.0)


def _coding(fmt: Format, tag: Tag, memory: Memory | None) -> Coding:
    """Keys of the random streams, held segments and rates, as far as they matter."""
    keys = tag.keys if fmt.stochastic else (0,)
    if memory is None:
        return keys, (), _PLAIN
    return keys, memory.hold, (memory.alpha, memory.carry, memory.omega)


def _find(
    layout: Layout,
    fmt: Format,
    owner: bool,
    device: torch.device,
    keys: tuple[int, ...] = (0,),
    hold: tuple[int, ...] = (),
    rates: tuple[float, float, float] = _PLAIN,
) -> tuple[npt.NDArray[np.int64], Pieces]:
    """A copy of the words that stay the same from message to message, and the pieces.

    Tables are kept for good, as plans are: a captured graph may read one at any time. Only those of
    held segments, which may differ from step to step, make room for others.
    """
    if not hold:
        words, found = _kept(layout, fmt, owner, device, keys, hold, rates)
    else:
        words, found = _passing(layout, fmt, owner, device, keys, hold, rates)
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                _captured.append(found)
            for tensor in (found.table, found.first_runs):
                tensor.record_stream(torch.cuda.current_stream(device))
    return words.copy(), found


def _template(
    layout: Layout,
    fmt: Format,
    owner: bool,
    device: torch.device,
    keys: tuple[int, ...],
    hold: tuple[int, ...],
    rates: tuple[float, float, float],
) -> tuple[npt.NDArray[np.int64], Pieces]:
    check(fmt)
    found = _on_device(layout, fmt, owner, keys, hold, device)
    call = np.zeros(1, STRUCT)
    call["pieces"], call["piece_count"] = found.table.data_ptr(), len(found.table)
    call["tiles"], call["stride"] = found.tiles, stride(layout, fmt)
    call["dtype"] = call["exact_dtype"] = DTYPES[layout.dtype]
    call["block"], call["bits"], call["rule"] = fmt.block, fmt.bits, RULES[fmt.scale]
    call["per_segment"], call["stochastic"] = fmt.per_segment, fmt.stochastic
    call["lanes"], call["memory_kind"] = lanes_per_block(fmt), NONE
    call["levels"] = 448 if fmt.kind == "fp8" else fmt.levels
    call["groups"], call["runs"] = found.groups, found.runs
    call["group_step"], call["group_pieces"] = found.group_step, found.group_pieces
    call["first_runs"] = found.first_runs.data_ptr()
    call["alpha"], call["carry"], call["omega"] = rates
    if fmt.table:
        call["table"] = table_numbers(fmt.table)
    if fmt.rotate is not None:
        call["signs"] = _signs(fmt.rotate, device).data_ptr()
    return call.view(np.int64), found


_captured: list[Pieces] = []  # read by graphs
_kept = once(_template)
_passing = lru_cache(maxsize=256)(_template)


def _code(
    words: npt.NDArray[np.int64],
    fmt: Format,
    found: Pieces,
    tag: Tag,
    memory: Memory | None,
    device: torch.device,
) -> tuple[torch.Tensor, ...]:
    """What coding needs beyond the tensor: random streams, residual, scratch for shared scales."""
    if fmt.stochastic:
        if isinstance(tag.step, torch.Tensor):
            words[_at.step_at] = tag.step.data_ptr()
        else:
            words[_at.step] = tag.step & 0xFFFFFFFF
        words[_at.rank], words[_at.seed] = tag.rank & 0xFFFFFFFF, seed_word(tag.seed)
    if memory is not None:
        words[_at.residual] = memory.residual.data_ptr()
        words[_at.memory_kind] = DTYPES[memory.residual.dtype]
        if memory.scales is not None:
            words[_at.residual_scales] = memory.scales.data_ptr()
    if not fmt.per_segment:
        return ()
    # Of this call alone, from the stream's allocator: two messages may be under way.
    sums = torch.empty(max(1, found.runs), dtype=torch.float64, device=device)
    peaks = torch.empty(max(1, found.runs), dtype=torch.int32, device=device)
    scales = torch.empty(max(1, found.groups), dtype=torch.int32, device=device)
    words[_at.run_sums], words[_at.peaks] = sums.data_ptr(), peaks.data_ptr()
    words[_at.scales] = scales.data_ptr()
    return sums, peaks, scales
