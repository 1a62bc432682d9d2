"""One and two bits, and powers of two: sign, TernGrad, natural compression.

::

    sign     | 1 bit: negative |  scale = mean |v|                value = +-scale
    ternary  | 2 bits: -1 0 1  |  scale = max |v|                 value = code * scale, unbiased
    natural  | 8 bits exponent | 1 bit sign |                     value = +-2^e, unbiased

Sources: Karimireddy et al. 2019 (arXiv 1901.09847); Wen et al. 2017, TernGrad (arXiv 1705.07878);
Horvath et al. 2019, natural compression (arXiv 1905.10988).
"""

from dataclasses import dataclass
from typing import ClassVar

from commlib.codecs.base import Block, Codec, Round, check_block, check_round
from commlib.codecs.uniform import nearest_gamma, stochastic_gamma
from commlib_kernels import Format


@dataclass(frozen=True)
class Sign(Codec):
    """The sign of each element times the mean magnitude of its block. Biased: wants feedback.

    Args:
        block: elements per scale, or "tensor".
    """

    block: Block = 128
    name: ClassVar[str] = "sign"

    def __post_init__(self) -> None:
        check_block(self, self.block, tensor=True)

    @property
    def format(self) -> Format:
        """One bit per element."""
        return Format(
            "sign",
            bits=1,
            block=128 if isinstance(self.block, str) else self.block,
            scale="mean",
            per_segment=self.block == "tensor",
        )

    def gamma(self, numel: int | None = None) -> float:
        """1 - 1/d: ``1 - |v|_1^2 / (d |v|_2^2)`` where one element holds everything."""
        d = (numel or 1 << 30) if isinstance(self.block, str) else self.block
        # The scale is the mean rounded to bf16: off by at most 2^-8 of itself.
        return 1 - (1 - 2.0**-16) / d


@dataclass(frozen=True)
class Ternary(Codec):
    """TernGrad: -1, 0 or 1 times the largest magnitude, at random so that the mean is right.

    Args:
        block: elements per scale, or "tensor" (the paper: per layer).
    """

    block: Block = 128
    round: Round = "stochastic"
    name: ClassVar[str] = "ternary"

    def __post_init__(self) -> None:
        check_block(self, self.block, tensor=True)
        check_round(self, self.round)

    @property
    def format(self) -> Format:
        """Two bits per element."""
        return Format(
            "uniform",
            bits=2,
            levels=1,
            block=128 if isinstance(self.block, str) else self.block,
            scale="absmax",
            per_segment=self.block == "tensor",
            stochastic=self.round == "stochastic",
        )

    def gamma(self, numel: int | None = None) -> float:
        """``max|v| |v|_1 / |v|^2 - 1`` at its worst (stochastic): about sqrt(d) / 2."""
        d = (numel or 1 << 30) if isinstance(self.block, str) else self.block
        return (stochastic_gamma if self.unbiased else nearest_gamma)(d, 1)


@dataclass(frozen=True)
class Natural(Codec):
    """The nearest powers of two, chosen at random so that the mean is right."""

    round: Round = "stochastic"
    name: ClassVar[str] = "natural"

    def __post_init__(self) -> None:
        check_round(self, self.round)

    @property
    def format(self) -> Format:
        """Nine bits per element: sign and exponent."""
        return Format("natural", bits=9, stochastic=self.round == "stochastic")

    def gamma(self, numel: int | None = None) -> float:
        """1/8 (Horvath et al., theorem 1); 1/9 nearest; of normal numbers below 2^127."""
        return 1 / 8 if self.unbiased else 1 / 9
