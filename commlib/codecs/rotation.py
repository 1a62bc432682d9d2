"""``rotate|inner``: a random rotation of every block before the inner codec, and back after it.

::

    y = H D v / sqrt(n)     D: random signs; H: the Hadamard matrix of n elements (a fast transform)

Whatever v looked like, the elements of y look normal, with the block's root mean square: one large
element no longer makes the others round to zero, and a code for the normal distribution fits any.
The rotation keeps lengths, so errors are what they were in y. (The kernels divide by powers of two
instead, before and after; an odd power's sqrt(2) goes into the scale.) Wire: the inner codec's.

Sources: Suresh et al. 2017 (arXiv 1611.00429); DRIVE, Vargaftik et al. 2021 (arXiv 2105.08339).
"""

from dataclasses import dataclass, replace

from commlib.codecs.base import Codec, Round, is_whole
from commlib_kernels import Format

ROTATED = ("uniform", "fp8", "fp4", "sign", "gauss", "grid", "table")
MIN_BLOCK = 128


@dataclass(frozen=True)
class Rotated(Codec):
    """`inner` on rotated blocks, which are those of its scales.

    Args:
        inner: with blocks of a power of two, at least 128.
        seed: of the signs; part of the format, so that whoever knows the codec can decode. The same
            for all steps and ranks: sums of ranks are taken before they are rotated back.
    """

    inner: Codec
    seed: int = 0

    def __post_init__(self) -> None:
        inner = self.inner.format
        if not self.inner.fixed_size:
            raise ValueError(
                f"rotate|({self.inner}): what is squeezed cannot be rotated; squeeze the rotation, "
                f"as in rotate|int4|entropy"
            )
        if inner.rotate is not None:
            raise ValueError(f"rotate|{self.inner}: already rotated; once is enough")
        if inner.sparse is not None:
            raise ValueError(
                f"rotate|{self.inner}: rotated values are all alike, none is worth choosing; write "
                f"{self.inner.id.partition('|')[0]}|rotate|CODEC to rotate what was chosen"
            )
        if inner.kind not in ROTATED:
            raise ValueError(
                f"rotate|{self.inner}: {self.inner.id} has no blocks with a scale that a rotation "
                "could help; allowed: codecs with blocks, such as int4, eden2, nf4"
            )
        if inner.per_segment:
            raise ValueError(
                f"rotate|{self.inner}: blocks are what is rotated; give a block size instead of "
                "block=tensor"
            )
        if inner.block < MIN_BLOCK or inner.block & (inner.block - 1):
            raise ValueError(
                f"rotate|{self.inner}: block={inner.block}; allowed: powers of two from "
                f"{MIN_BLOCK} to 4096"
            )
        if not is_whole(self.seed) or not 0 <= self.seed < 1 << 64:
            raise ValueError(f"rotate: seed={self.seed}; allowed: 0 to 2^64 - 1")

    @property
    def id(self) -> str:
        """rotate|INNER's id."""
        return f"rotate|{self.inner.id}"

    @property
    def format(self) -> Format:
        """The inner format, rotated."""
        return replace(self.inner.format, rotate=self.seed)

    @property
    def unbiased(self) -> bool:
        """Where the inner codec is: a rotation is linear."""
        return self.inner.unbiased

    def gamma(self, numel: int | None = None) -> float:
        """The inner codec's, as a rotation keeps lengths, and the rounding of its sums."""
        return self.inner.gamma(numel) + 2.0**-20

    def rounded(self, default: Round) -> "Rotated":
        """The inner codec's rounding."""
        return replace(self, inner=self.inner.rounded(default))

    def __str__(self) -> str:
        seed = f":seed={self.seed}" if self.seed else ""
        return f"rotate{seed}|{self.inner}"
