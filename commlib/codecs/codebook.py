"""Codebooks: the nearest of 2^bits fixed values, times the scale of the block.

::

    eden b   values: Lloyd-Max for the normal distribution    code = nearest of v / rms(v)
             scale = rms <c, z> / <c, c>    z = v / rms, c its values: the least squared error
             scale = rms n / <c, z>         EDEN's: unbiased over random rotations
    nf4, e2m1, e3m0    values: NormalFloat; 4-bit floats      scale = bf16_up(max|v| / largest)

    wire:    | bit planes of block 0 | block 1 | ... | scales |     value = table[code] * scale

eden expects values that look normal: ``rotate|eden2`` makes any look so. Sources: Max 1960; DRIVE,
Vargaftik et al. 2021 (arXiv 2105.08339); EDEN, Vargaftik et al. 2022 (arXiv 2108.08842); QLoRA,
Dettmers et al. 2023 (arXiv 2305.14314); OCP Microscaling Formats 1.0; Streaming DiLoCo, Douillard
et al. 2025 (arXiv 2501.18512).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from commlib.codecs.base import Codec, check_block
from commlib_kernels import Format
from commlib_kernels.tables import TABLES


@dataclass(frozen=True)
class Eden(Codec):
    """`bits`-bit codes of the normal distribution's best quantizer.

    Args:
        bits: 1 .. 4.
        block: elements per scale, a multiple of 8 from 32 to 4096.
        scale: fit (least error) or unbiased (EDEN's: larger, so that the mean over rotations is v).
    """

    bits: int = 4
    block: int = 1024
    scale: Literal["fit", "unbiased"] = "fit"

    def __post_init__(self) -> None:
        if self.bits not in range(1, 5):
            raise ValueError(f"eden: bits={self.bits!r}; allowed: 1 .. 4")
        check_block(self, self.block, tensor=False)
        if self.scale not in ("fit", "unbiased"):
            raise ValueError(f"{self.id}: scale={self.scale!r}; allowed: fit, unbiased")

    @property
    def id(self) -> str:
        """eden1 .. eden4."""
        return f"eden{self.bits}"

    @property
    def format(self) -> Format:
        """Bit planes and one scale per block."""
        table = f"gauss{self.bits}"
        return Format("gauss", bits=self.bits, block=self.block, scale=self.scale, table=table)

    def gamma(self, numel: int | None = None) -> float:
        """``1 - r``, of the unbiased scale ``1 / r - 1``, with ``r = (c1 / c2)^2 / d``.

        The squared cosine of z and its values is at least r: their signs agree, so ``<c, z>`` is at
        least ``c1 |z|_1 >= c1 |z|``, and ``<c, c>`` at most ``d c2^2``, for the smallest and the
        largest magnitude c1 and c2. Rotated vectors come nowhere near.
        """
        values = TABLES[self.format.table]
        # The scale is rounded to bf16: off by at most 2^-8 of itself.
        r = (values[len(values) // 2] / values[-1]) ** 2 / self.block * (1 - 2.0**-7)
        return 1 - r if self.scale == "fit" else 1 / r - 1

    @property
    def _named(self) -> tuple[str, ...]:
        return ("bits",)


@dataclass(frozen=True)
class Table(Codec):
    """The nearest of 16 values, scaled so that the block's absolute maximum is the largest.

    Args:
        block: elements per scale, a multiple of 8 from 32 to 4096.
    """

    block: int = 64

    def __post_init__(self) -> None:
        check_block(self, self.block, tensor=False)

    @property
    def format(self) -> Format:
        """Four bits per element and one scale per block."""
        top = int(TABLES[self.name][-1])
        return Format(
            "table", bits=4, levels=top, block=self.block, scale="absmax", table=self.name
        )

    def gamma(self, numel: int | None = None) -> float:
        """One element at the maximum, all others in the middle of the gap that costs them most."""
        values = np.array(TABLES[self.name]) / TABLES[self.name][-1]
        gaps = np.unique(values)
        half, middle = np.diff(gaps) / 2, (gaps[:-1] + gaps[1:]) / 2
        others, own = self.block - 1, 2.0**-7  # the maximum's error, as the scale is rounded up
        found = (others * half**2 + own**2) / (others * middle**2 + 1)
        return float(found.max() * (1 + 2.0**-6))


@dataclass(frozen=True)
class NF4(Table):
    """4-bit NormalFloat."""

    name: ClassVar[str] = "nf4"


@dataclass(frozen=True)
class E2M1(Table):
    """4-bit floats with one bit of mantissa, as in NVFP4 and mxfp4, but with a bf16 scale."""

    name: ClassVar[str] = "e2m1"


@dataclass(frozen=True)
class E3M0(Table):
    """4-bit floats without a mantissa: signs and powers of two over six octaves, and zero."""

    name: ClassVar[str] = "e3m0"
