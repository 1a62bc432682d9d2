"""Sparse: which elements of a piece travel, as a value, and the sizes that follow from it.

``topk`` sends where they are: positions in ascending order as Elias and Fano code sorted numbers,
their low bits as they are and the rest in unary: never more than 2 bits per position beyond
log2(n / k), and a size that n and k alone decide. ``randk`` sends the number that its positions are
drawn from.

Sources: Elias 1974, Fano 1971 (quasi-succinct indices: Vigna 2013, arXiv 1206.4300).
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil
from typing import Literal

SECTION = 16
"""Bytes: positions end at a multiple of this, where the codes of the values begin."""

MAX_NUMEL = (1 << 32) - 1
"""Elements of a piece: positions are 32-bit numbers."""


@dataclass(frozen=True)
class Sparse:
    """What a sparse format sends of a piece: ``ceil(density m)`` of every run of m elements.

    Args:
        rule: topk: the largest magnitudes. randk: a random choice, the same on all ranks.
        density: above 0, at most 1; the number that its shortest decimal says.
        run: elements that are chosen from together; 0: the whole piece.
        scaled: what a sender codes is the value times m / k, so that its mean over draws is v.
    """

    rule: Literal["topk", "randk"]
    density: float
    run: int = 0
    scaled: bool = False

    def of(self, run: int) -> int:
        """Elements that travel of a run of `run` elements."""
        return _share(self.density, run)

    def taken(self, numel: int) -> int:
        """Elements that travel of a piece of `numel` elements."""
        whole, rest = divmod(numel, self.run or max(numel, 1))
        return whole * self.of(self.run or numel) + self.of(rest)

    def low_bits(self, numel: int) -> int:
        """Bits of a position that are written as they are: ``floor(log2(numel / taken))``."""
        return (numel // max(self.taken(numel), 1)).bit_length() - 1 if numel else 0

    def index_bytes(self, numel: int) -> int:
        """Bytes in front of the codes of a piece of `numel` elements."""
        if numel == 0:
            return 0
        if self.rule == "randk":
            return SECTION
        count, low = self.taken(numel), self.low_bits(numel)
        upper = count + ((numel - 1) >> low) + 1
        return -(-(-(-count * low // 8) + -(-upper // 8)) // SECTION) * SECTION


@lru_cache(maxsize=4096)
def _share(density: float, run: int) -> int:
    return ceil(Fraction(repr(density)) * run)
