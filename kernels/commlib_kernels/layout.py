"""Layout: which elements a message covers, and where each byte of it lies.

This is the only place where a size or an offset is computed. A message is `ranks` payloads of equal
size (`stride` bytes); a payload is three sections, each starting at a multiple of 16 bytes::

    payload r:  | codes of piece 0 | codes of piece 1 | .. | scales of all pieces | raw pieces |
                  \\_ every piece starts at a multiple of 16 _/   1 or 2 bytes each   16-aligned

A *piece* is what payload r holds of one segment. Segments are parameters: blocks restart at each.
Where a piece begins depends on (segment size, ranks, align) alone and never on its neighbours, so
regrouping parameters into other buckets, or cutting a message into slices, changes neither the
bytes of a parameter nor the place of its residual.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from commlib_kernels.formats import Format
from commlib_kernels.philox import SIGNS

SECTION = 16
"""Bytes: sections and pieces start at multiples of this (128-bit loads on GPUs)."""


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to a section boundary."""
    return -(-nbytes // SECTION) * SECTION


@dataclass(frozen=True)
class Layout:
    """What one message covers. Agreed once, cached; the argument of every size.

    Args:
        sizes: elements per segment (one segment per parameter).
        dtype: of the tensor.
        ranks: payloads in the message.
        exact: segments that travel raw inside the payload; empty for none.
        offsets: element at which each segment starts in the tensor; empty for back to back.
        align: segments are cut into chunks at multiples of this many elements.
        stacked: False: payload r is chunk r of every segment (all_reduce). True: the tensor is
            `ranks` repetitions of the segments and payload r is repetition r (reduce_scatter).
        part: (s, S): slice s of S of every chunk. Owners, blocks and residuals stay where they are.
        chunk: the message holds this payload alone; None for all.
        dense: with `chunk`: the tensor is the owner's dense chunk (`chunk_numel` elements).
        pitch: where stacked: elements from one repetition to the next; 0: those of the segments.
    """

    sizes: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    ranks: int = 1
    exact: tuple[bool, ...] = ()
    offsets: tuple[int, ...] = ()
    align: int = 1
    stacked: bool = False
    part: tuple[int, int] = (0, 1)
    chunk: int | None = None
    dense: bool = False
    pitch: int = 0

    def __post_init__(self) -> None:
        if any(n < 0 for n in self.sizes):
            raise ValueError(f"Layout: sizes must be >= 0, got {self.sizes}")
        if self.ranks < 1 or self.align < 1:
            raise ValueError(f"Layout: ranks and align must be >= 1: {self.ranks}, {self.align}")
        if any(offset < 0 for offset in self.offsets):
            raise ValueError(f"Layout: offsets must be >= 0, got {self.offsets}")
        for name in ("exact", "offsets"):
            given = getattr(self, name)
            if given and len(given) != len(self.sizes):
                raise ValueError(
                    f"Layout: {name} has {len(given)} entries for {len(self.sizes)} segments"
                )
        if not 0 <= self.part[0] < self.part[1]:
            raise ValueError(f"Layout: part must be (s, S) with 0 <= s < S, got {self.part}")
        if self.chunk is not None and not 0 <= self.chunk < self.ranks:
            raise ValueError(f"Layout: chunk {self.chunk} is not one of {self.ranks} payloads")
        if self.dense and self.chunk is None:
            raise ValueError("Layout: dense needs a chunk")

    def only(self, rank: int, *, dense: bool = False) -> "Layout":
        """The message that holds payload `rank` alone."""
        return replace(self, chunk=rank, dense=dense)

    def slice(self, s: int, parts: int) -> "Layout":
        """Slice `s` of `parts` of every chunk."""
        return replace(self, part=(s, parts))

    @property
    def numel(self) -> int:
        """Elements of all segments (and all repetitions)."""
        return sum(self.sizes) * (self.ranks if self.stacked else 1)

    @cached_property
    def extent(self) -> int:
        """Elements that the tensor must have."""
        if self.dense:
            return self.chunk_numel(self.payloads[0])
        repetitions = self.ranks if self.stacked else 1
        starts = self.starts
        last = max((a + n for a, n in zip(starts, self.sizes, strict=True)), default=0)
        return (repetitions - 1) * self.row + last

    @property
    def row(self) -> int:
        """Elements from one repetition to the next."""
        return self.pitch or sum(self.sizes)

    @property
    def starts(self) -> tuple[int, ...]:
        """Element at which each segment starts."""
        return self.offsets or _cumulative(self.sizes)

    @property
    def payloads(self) -> tuple[int, ...]:
        """The payloads that the message holds, in wire order."""
        return tuple(range(self.ranks)) if self.chunk is None else (self.chunk,)

    def is_exact(self, segment: int) -> bool:
        """Whether the segment travels raw."""
        return bool(self.exact) and self.exact[segment]

    def cut(self, segment: int, rank: int) -> tuple[int, int]:
        """First and one past last element of the segment that payload `rank` holds."""
        n = self.sizes[segment]
        if self.stacked or self.ranks == 1:
            return 0, n
        # Raw segments need no blocks: cut them as evenly as sections of 16 bytes allow.
        unit = SECTION // 2 if self.is_exact(segment) else self.align
        units = -(-n // unit)
        return (
            min(n, rank * units // self.ranks * unit),
            min(n, (rank + 1) * units // self.ranks * unit),
        )

    def chunk_numel(self, rank: int) -> int:
        """Elements of payload `rank`, all slices together."""
        cuts = (self.cut(s, rank) for s in range(len(self.sizes)))
        return sum(b - a for a, b in cuts)


class Piece(NamedTuple):
    """What one payload holds of one segment."""

    x: int  # offset of its first element in the tensor
    numel: int
    code: int  # byte offset of its codes (or of its raw bytes)
    scale: int  # byte offset of its first scale
    base: int  # index of its first element within the segment: names its random numbers
    segment: int
    exact: int
    memory: int  # offset in the residual
    memory_block: int  # the same in blocks
    group: int  # pieces of one group share a scale where a format has one scale per segment


def _cumulative(sizes: tuple[int, ...]) -> tuple[int, ...]:
    starts, total = [], 0
    for n in sizes:
        starts.append(total)
        total += n
    return tuple(starts)


def _spans(layout: Layout, fmt: Format, rank: int) -> Iterator[tuple[int, int, int, int]]:
    """(segment, cut begin, begin of this slice, end of this slice) of every segment."""
    s, parts = layout.part
    # The same for every format of a message: what one codes of a slice another decodes.
    block = math.lcm(layout.align, fmt.align)
    for segment in range(len(layout.sizes)):
        begin, end = layout.cut(segment, rank)
        unit = SECTION // 2 if layout.is_exact(segment) else block
        units = -(-(end - begin) // unit)
        yield (
            segment,
            begin,
            min(end, begin + s * units // parts * unit),
            min(end, begin + (s + 1) * units // parts * unit),
        )


def _sections(layout: Layout, fmt: Format, rank: int) -> tuple[int, int, int]:
    """Bytes of the three sections of payload `rank`."""
    codes = scales = raw = 0
    for segment, _, a, b in _spans(layout, fmt, rank):
        if layout.is_exact(segment) or fmt.is_raw:
            raw += aligned((b - a) * layout.dtype.itemsize)
        else:
            codes += aligned(fmt.code_bytes(b - a))
            scales += fmt.scale_bytes * fmt.scale_count(b - a)
    return codes, aligned(scales), raw


@lru_cache(maxsize=4096)
def stride(layout: Layout, fmt: Format) -> int:
    """Bytes of one payload: the largest of all ranks, so that every rank posts equal splits."""
    _check(layout, fmt)
    return max(sum(_sections(layout, fmt, rank)) for rank in range(layout.ranks))


def nbytes(layout: Layout, fmt: Format) -> int:
    """Bytes of the whole message."""
    return stride(layout, fmt) * len(layout.payloads)


@lru_cache(maxsize=4096)
def pieces(layout: Layout, fmt: Format, *, owner: bool = False) -> tuple[Piece, ...]:
    """Every piece of the message, in wire order.

    Args:
        owner: residuals and dense tensors are those of a chunk's owner (`chunk_numel` elements)
            instead of those of the whole tensor. Always so where the layout is dense.
    """
    _check(layout, fmt)
    owner = owner or layout.dense
    rows = []
    numel, starts, size = sum(layout.sizes), layout.starts, stride(layout, fmt)
    dense_starts, all_blocks = _cumulative(layout.sizes), blocks(layout.sizes, fmt)
    for index, rank in enumerate(layout.payloads):
        codes, scales, _ = _sections(layout, fmt, rank)
        code = index * size
        scale, raw = code + codes, code + codes + scales
        repetition = rank if layout.stacked else 0
        # Where stacked, every repetition has random numbers and residuals of its own.
        local = local_block = segment_block = 0
        for segment, begin, a, b in _spans(layout, fmt, rank):
            end = layout.cut(segment, rank)[1]
            exact = layout.is_exact(segment) or fmt.is_raw
            n = b - a
            own = local + a - begin
            rows.append(
                Piece(
                    x=own if layout.dense else repetition * layout.row + starts[segment] + a,
                    numel=n,
                    code=raw if exact else code,
                    scale=scale,
                    base=repetition * padded(layout.sizes[segment], fmt) + a,
                    segment=segment,
                    exact=int(exact),
                    memory=own if owner else repetition * numel + dense_starts[segment] + a,
                    memory_block=(
                        local_block + (a - begin) // fmt.block
                        if owner
                        else repetition * all_blocks + segment_block + a // fmt.block
                    ),
                    # Repetitions share no scale; chunks of one segment do.
                    group=index * len(layout.sizes) + segment if layout.stacked else segment,
                )
            )
            if exact:
                raw += aligned(n * layout.dtype.itemsize)
            else:
                code += aligned(fmt.code_bytes(n))
                scale += fmt.scale_bytes * fmt.scale_count(n)
            local += end - begin
            local_block += -(-(end - begin) // fmt.block)
            segment_block += -(-layout.sizes[segment] // fmt.block)
    return tuple(rows)


def blocks(sizes: tuple[int, ...], fmt: Format) -> int:
    """Blocks of a tensor with these segments: the scales of an int8 residual."""
    return sum(-(-n // fmt.block) for n in sizes)


def padded(numel: int, fmt: Format) -> int:
    """Elements from a segment's first repetition to its next, as random numbers count them.

    Whole blocks; where these are rotated whole periods of the signs, which then are the same in all
    repetitions: who sends one alone (all_gather) does not know its number.
    """
    unit = fmt.block if fmt.rotate is None else math.lcm(fmt.block, SIGNS)
    return -(-numel // unit) * unit


@lru_cache(maxsize=4096)
def table(layout: Layout, fmt: Format, *, owner: bool = False) -> npt.NDArray[np.int64]:
    """`pieces` as the (pieces, 10) int64 array that kernels read; read-only."""
    rows = np.array(pieces(layout, fmt, owner=owner), dtype=np.int64).reshape(-1, 10)
    rows.flags.writeable = False
    return rows


def _check(layout: Layout, fmt: Format) -> None:
    if not layout.stacked and layout.ranks > 1 and layout.align % fmt.align:
        raise ValueError(
            f"Layout: chunks are cut at multiples of align={layout.align} elements, but the "
            f"format codes blocks of {fmt.align}; give a Layout whose align is a multiple of that"
        )
    if not fmt.sliceable and layout.part[1] > 1:
        why = "one scale per tensor" if fmt.per_segment else "elements chosen from whole pieces"
        why = "one codebook per piece" if fmt.kind == "buckets" else why
        raise ValueError(f"Layout: a format with {why} cannot be cut into slices")
