"""What the bytes of one message mean: the parameters of a wire format, as a value.

A format is all that a backend needs to know of a codec. These kinds exist:

======== ================================================= ====================== ===========
kind     code of an element                                scale of a block       value
======== ================================================= ====================== ===========
raw      its own bytes, in the dtype of the tensor          none                   itself
cast     ``fp16`` or ``bf16``                               none                   itself
uniform  integer in [-levels, levels], two's complement     absmax or l2 / levels  code * scale
fp8      e4m3 (no infinities)                               absmax / 448, e8m0     code * scale
fp4      e2m1 (no infinities, no NaN)                       e8m0                   code * scale
sign     1 if negative                                      mean of |v|            +-scale
natural  sign and exponent (9 bits)                         none                   +-2^e
gauss    number of its value in a table of 2^bits, +- alike fit, unbiased          table * scale
grid     rint(v / rms / step), at most +-levels, 8 bits     fit                    code * scale
table    the same, of any 16 values                         absmax                 table * scale
buckets  one of 256 over mean +- 6 sigma of the piece       none                   its mean
======== ================================================= ====================== ===========

A scale is bf16, 2 bytes. e8m0 is the microscaling formats': a power of two, 1 byte.

Where `rotate` is set, blocks are rotated before they are coded and back after they are decoded
(`reference/rotation.py`). Where `sparse` is set, only some elements of a piece are coded, one after
the other as if they were a piece of their own (`sparse.py`); the values of kind raw are then fp32.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from commlib_kernels.sparse import Sparse
from commlib_kernels.tables import TABLES

Kind = Literal[
    "raw", "fp16", "bf16", "uniform", "fp8", "fp4", "sign", "natural", "gauss", "grid", "table",
    "buckets",
]  # fmt: skip
ScaleRule = Literal["none", "absmax", "l2", "mean", "fit", "unbiased", "e8m0", "e8m0_up"]

PLANES = (8, 4, 2, 1)
"""Bits of the planes that a code is split into, lowest bits first (Flash Communication V2)."""

FP8_MAX = 448.0
FP4_MAX = 6.0
BUCKETS, SIGMAS = 256, 6
"""Of the kind buckets: how many there are, over how many standard deviations on both sides."""
HEAD = 16 + BUCKETS // 2
"""Of the kind buckets: bytes before the codes of a piece, which say what they stand for."""
TILE = 128
"""Elements packed together where no block size says so (casts, natural, ``block=tensor``)."""


@dataclass(frozen=True)
class Format:
    """How the elements of a block become bytes. Units: bits per code, elements per block."""

    kind: Kind
    bits: int = 32
    levels: int = 0
    block: int = TILE
    scale: ScaleRule = "none"
    per_segment: bool = False
    """One scale for a whole segment instead of one per block; blocks only group the packing."""
    stochastic: bool = False
    table: str = ""
    """Of the kinds gauss and table: its name in `tables.TABLES`."""
    step: float = 0.0
    """Of the kind grid: from one code to the next, in root mean squares of the block."""
    rotate: int | None = None
    """Seed of the signs of the rotation; None: there is none."""
    sparse: Sparse | None = None
    """Which elements travel; None: all."""

    @property
    def on_cuda(self) -> bool:
        """Whether there are CUDA kernels for it: not yet for all kinds."""
        if self.kind in ("grid", "buckets"):
            return False
        return not self.power_scale and self.sparse is None

    @property
    def power_scale(self) -> bool:
        """Whether a scale is a power of two in one byte (e8m0) instead of bf16."""
        return self.scale in ("e8m0", "e8m0_up")

    @property
    def scale_bytes(self) -> int:
        """Bytes of a scale."""
        return 1 if self.power_scale else 2

    @property
    def top(self) -> float:
        """The value of the largest code; at this one a block's absolute maximum is aimed."""
        return {"fp8": FP8_MAX, "fp4": FP4_MAX}.get(self.kind, float(self.levels))

    @property
    def is_raw(self) -> bool:
        """Whether pieces travel as their own bytes."""
        return self.kind == "raw" and self.sparse is None

    @property
    def sliceable(self) -> bool:
        """Whether pieces may be cut into slices: not where elements far apart depend on another."""
        return not self.per_segment and self.sparse is None and self.kind != "buckets"

    @property
    def draws(self) -> bool:
        """Whether the bytes depend on random numbers."""
        return self.stochastic or (self.sparse is not None and self.sparse.rule == "randk")

    @property
    def values_format(self) -> "Format":
        """Of a sparse format: the format of the values that travel."""
        return replace(self, sparse=None)

    @property
    def values(self) -> tuple[float, ...]:
        """The values of a table's codes, ascending."""
        return TABLES[self.table]

    @property
    def align(self) -> int:
        """Segments may be cut into chunks at multiples of this many elements."""
        if self.sparse is not None and self.sparse.run:
            return math.lcm(self.block, self.sparse.run)
        return 1 if self.is_raw else self.block

    @property
    def planes(self) -> tuple[int, ...]:
        """Widths of the bit planes, lowest bits first: 7 bits are 4 + 2 + 1."""
        left, widths = self.bits, []
        for width in PLANES:
            while left >= width:
                widths.append(width)
                left -= width
        return tuple(widths)

    def code_bytes(self, numel: int) -> int:
        """Bytes of the codes of `numel` elements; the last block is padded to 8 elements."""
        if self.sparse is not None:
            values = self.values_format.code_bytes(self.sparse.taken(numel))
            return self.sparse.index_bytes(numel) + values
        head = HEAD if self.kind == "buckets" and numel else 0
        return head + (numel + 7) // 8 * self.bits

    def scale_count(self, numel: int) -> int:
        """Scales (`scale_bytes` each) that go with `numel` elements of one segment."""
        if self.scale == "none" or numel == 0:
            return 0
        if self.sparse is not None:
            numel = self.sparse.taken(numel)
        return 1 if self.per_segment else -(-numel // self.block)
