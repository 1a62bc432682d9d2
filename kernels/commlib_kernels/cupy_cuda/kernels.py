"""Which kernels an op takes: their names in the .cu files, and the warps they need."""

from collections.abc import Iterator
from functools import cache
from typing import Literal, NamedTuple, get_args

from commlib_kernels.formats import Format
from commlib_kernels.launch import LANES, Launch, lanes_per_block

Op = Literal["quantize", "dequantize", "reduce"]

FILES = {
    "uniform": "uniform",
    "sign": "sign",
    "natural": "sign",
    "fp16": "cast",
    "bf16": "cast",
    "fp8": "cast",
    "gauss": "tables",
    "table": "tables",
    "raw": "raw",
}
"""Kind of a format -> the .cu file of its kernels, where blocks are not rotated."""

THREADS = 128
"""Of a block: four warps, each with a tile of its own."""


class Kernel(NamedTuple):
    """A kernel of a file, and how many blocks of how many threads it is launched with."""

    name: str
    blocks: int
    threads: int = THREADS


def source(fmt: Format) -> str:
    """The .cu file of a format's kernels."""
    return FILES[fmt.kind] if fmt.rotate is None or fmt.kind == "gauss" else "rotated"


def kernels(op: Op, fmt: Format, launch: Launch) -> Iterator[Kernel]:
    """The kernels of an op in their order: with one scale per segment, two to find it first."""
    if fmt.per_segment and launch.scratch:
        yield Kernel(f"measure_{op}_{fmt.kind}", _blocks(launch.pieces.runs))
        yield Kernel(f"shared_scales_{fmt.kind}", _blocks(launch.pieces.groups))
    lanes = lanes_per_block(fmt)
    if lanes > LANES:  # a block of threads for each tile
        yield Kernel(_main(op, fmt), launch.tiles, lanes)
    else:
        yield Kernel(_main(op, fmt), _blocks(launch.tiles))


def names(fmt: Format) -> list[str]:
    """All kernels that messages of a format may take."""
    found = [_main(op, fmt) for op in get_args(Op)]
    if fmt.per_segment:
        found += [f"measure_{op}_{fmt.kind}" for op in ("quantize", "reduce")]
        found.append(f"shared_scales_{fmt.kind}")
    return found


@cache
def _main(op: Op, fmt: Format) -> str:
    return f"{op}_{_coder(fmt)}"


def _coder(fmt: Format) -> str:
    if source(fmt) == "rotated":
        return f"rotated_{fmt.kind}"
    plain = fmt.scale == "absmax" and not fmt.per_segment
    if fmt.kind == "uniform" and fmt.bits in (4, 8) and plain:
        return f"uniform{fmt.bits}"
    return fmt.kind


def _blocks(warps: int) -> int:
    return -(-warps * 32 // THREADS)
