"""Uniform quantizers: evenly spaced levels around zero, one bf16 scale per block.

::

    int b:  L = 2^(b-1) - 1   scale = bf16_up(max|v| / L)    code = clamp(rint(v / scale), -L, L)
    qsgd:   L = levels        scale = bf16_up(norm(v) / L)   code = floor(v / scale + u), 0 < u < 1

    wire:   | bit planes of block 0 | block 1 | ... | scales |      value = code * scale

Odd widths are split into planes of 8, 4, 2 and 1 bits (bit splitting of Flash Communication V2,
arXiv 2508.03760). QSGD: Alistarh et al. 2017, arXiv 1610.02132.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from commlib.codecs.base import Block, Codec, Round, check_block, check_round, is_whole
from commlib_kernels import Format

BF16_UP = 1 + 2.0**-7
"""A scale rounded up to bf16 is at most this much larger than it had to be."""


def nearest_gamma(block: int, levels: int) -> float:
    """Worst case of nearest rounding: one element at the maximum, all others half a step off.

    ``(a + e^2) / (1 + a)`` with ``a = (block - 1) (step / 2)^2``: below 1 whatever the block, since
    zero is a level and no element moves by more than its own size. e is the error of the maximum,
    which is no level where the scale was rounded up.
    """
    half = BF16_UP / (2 * levels)
    a = (block - 1) * half**2
    return (a + min(half, BF16_UP - 1) ** 2) / (1 + a)


def stochastic_gamma(block: int, levels: int) -> float:
    """Worst case of stochastic rounding to multiples of ``step = 1 / levels`` of the maximum.

    One element at the maximum, k others at t: expected error ``k t (step - t)`` over ``1 + k t^2``,
    largest where ``k step t^2 + 2 t - step = 0``; and the maximum's own error, which is no level
    where the scale was rounded up.
    """
    k, step = block - 1, BF16_UP / levels
    own = step * min(step / 4, BF16_UP - 1)
    if k == 0:
        return own
    t = (math.sqrt(1 + k * step * step) - 1) / (k * step)
    return k * t * (step - t) / (1 + k * t * t) + own


@dataclass(frozen=True)
class Int(Codec):
    """`bits`-bit integers from 8 down to 2, scaled by the block's absolute maximum.

    Args:
        bits: 2 .. 8; levels are -L .. L with L = 2^(bits-1) - 1.
        block: elements per scale, a multiple of 8 from 32 to 4096.
        round: nearest (biased, half the error) or stochastic (unbiased); None: the scheme decides.
    """

    bits: int = 8
    block: int = 128
    round: Round | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.bits) or self.bits not in range(2, 9):
            raise ValueError(f"int: bits={self.bits!r}; allowed: 2 .. 8")
        check_block(self, self.block, tensor=False)
        check_round(self, self.round)

    @property
    def id(self) -> str:
        """int2 .. int8."""
        return f"int{self.bits}"

    @property
    def levels(self) -> int:
        """Levels on each side of zero."""
        return (1 << (self.bits - 1)) - 1

    @property
    def format(self) -> Format:
        """Bit planes and one scale per block."""
        return Format(
            "uniform",
            bits=self.bits,
            levels=self.levels,
            block=self.block,
            scale="absmax",
            stochastic=self.round == "stochastic",
        )

    def gamma(self, numel: int | None = None) -> float:
        """See `nearest_gamma` and `stochastic_gamma`."""
        bound = stochastic_gamma if self.unbiased else nearest_gamma
        return bound(self.block, self.levels)

    @property
    def _named(self) -> tuple[str, ...]:
        return ("bits",)


@dataclass(frozen=True)
class QSGD(Codec):
    """Stochastic rounding to `levels` levels of the block's norm: unbiased.

    Args:
        levels: on each side of zero, 1 .. 127.
        norm: l2 (the paper's) or max.
        block: elements per norm, or "tensor".
    """

    levels: int = 4
    norm: Literal["l2", "max"] = "l2"
    block: Block = 128
    name: ClassVar[str] = "qsgd"

    def __post_init__(self) -> None:
        if not is_whole(self.levels) or self.levels not in range(1, 128):
            raise ValueError(f"qsgd: levels={self.levels!r}; allowed: 1 .. 127")
        if self.norm not in ("l2", "max"):
            raise ValueError(f"qsgd: norm={self.norm!r}; allowed: l2, max")
        check_block(self, self.block, tensor=True)

    @property
    def format(self) -> Format:
        """ceil(log2(2 levels + 1)) bits per element."""
        tensor = self.block == "tensor"
        return Format(
            "uniform",
            bits=max(2, math.ceil(math.log2(2 * self.levels + 1))),
            levels=self.levels,
            block=128 if isinstance(self.block, str) else self.block,
            scale="l2" if self.norm == "l2" else "absmax",
            per_segment=tensor,
            stochastic=True,
        )

    @property
    def unbiased(self) -> bool:
        """Always."""
        return True

    def gamma(self, numel: int | None = None) -> float:
        """min(d / 4 s^2, sqrt(d) / s) for the l2 norm (QSGD, lemma 3.1), the norm rounded up."""
        d = numel if isinstance(self.block, str) else self.block
        if d is None:
            return math.inf
        if self.norm == "max":
            return stochastic_gamma(d, self.levels)
        step = BF16_UP / self.levels
        return min(d * step**2 / 4, math.sqrt(d) * step)
