"""Which kernels an op takes: their names in the .cu files, and the warps they need."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from commlib_kernels.formats import Format
from commlib_kernels.launch import Launch

Op = Literal["quantize", "dequantize", "reduce"]

FILES = {
    "uniform": "uniform",
    "sign": "sign",
    "natural": "sign",
    "fp16": "cast",
    "bf16": "cast",
    "fp8": "cast",
    "raw": "raw",
}
"""Kind of a format -> the .cu file of its kernels."""

THREADS = 128
"""Of a block: four warps, each with a tile of its own."""


class Kernel(NamedTuple):
    """A kernel of a file, and how many blocks of THREADS it is launched with."""

    name: str
    blocks: int


def kernels(op: Op, fmt: Format, launch: Launch) -> Iterator[Kernel]:
    """The kernels of an op in their order: with one scale per segment, two to find it first."""
    if fmt.per_segment and launch.scratch:
        yield Kernel(f"measure_{op}_{fmt.kind}", _blocks(launch.pieces.runs))
        yield Kernel(f"shared_scales_{fmt.kind}", _blocks(launch.pieces.groups))
    yield Kernel(f"{op}_{_coder(fmt)}", _blocks(launch.tiles))


def _coder(fmt: Format) -> str:
    plain = fmt.scale == "absmax" and not fmt.per_segment
    if fmt.kind == "uniform" and fmt.bits in (4, 8) and plain:
        return f"uniform{fmt.bits}"
    return fmt.kind


def _blocks(warps: int) -> int:
    return -(-warps * 32 // THREADS)
