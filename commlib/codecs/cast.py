"""Casts: fp32 (as it is), fp16, bf16, and fp8 with a scale per block.

::

    fp16, bf16:  | 2 bytes per element |                 value = code
    fp8:         | 1 byte per element | bf16 scale per block |   value = e4m3(code) * scale

fp8 is e4m3 without infinities (Micikevicius et al., "FP8 formats for deep learning", 2022) with
scale = absmax / 448 rounded up to bf16.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from commlib.codecs.base import Codec, Round, check_block, check_round
from commlib_kernels import Format


@dataclass(frozen=True)
class FP32(Codec):
    """The tensor's own bytes: nothing is lost. (Also for fp16 and bf16 tensors.)"""

    sum_dtype: ClassVar[torch.dtype | None] = torch.float32
    name: ClassVar[str] = "fp32"

    @property
    def format(self) -> Format:
        """Raw bytes."""
        return Format("raw")

    @property
    def unbiased(self) -> bool:
        """Exact."""
        return True

    def gamma(self, numel: int | None = None) -> float:
        """0: exact."""
        return 0.0


@dataclass(frozen=True)
class FP16(Codec):
    """IEEE half precision, ties to even; beyond 65504 becomes infinite, which GradScaler sees."""

    sum_dtype: ClassVar[torch.dtype | None] = torch.float16
    name: ClassVar[str] = "fp16"

    @property
    def format(self) -> Format:
        """Two bytes per element."""
        return Format("fp16", bits=16)

    def gamma(self, numel: int | None = None) -> float:
        """2^-22 for values in fp16's normal range."""
        return 2.0**-22


@dataclass(frozen=True)
class BF16(Codec):
    """bfloat16, ties to even: the range of fp32 with 8 bits of precision."""

    sum_dtype: ClassVar[torch.dtype | None] = torch.bfloat16
    name: ClassVar[str] = "bf16"

    @property
    def format(self) -> Format:
        """Two bytes per element."""
        return Format("bf16", bits=16)

    def gamma(self, numel: int | None = None) -> float:
        """(2^-8)^2: half a unit in the last of 8 bits."""
        return 2.0**-16


@dataclass(frozen=True)
class FP8(Codec):
    """e4m3 with one bf16 scale per block."""

    block: int = 128
    round: Round | None = None
    name: ClassVar[str] = "fp8"

    def __post_init__(self) -> None:
        check_block(self, self.block, tensor=False)
        check_round(self, self.round)

    @property
    def format(self) -> Format:
        """One byte per element."""
        stochastic = self.round == "stochastic"
        return Format("fp8", bits=8, block=self.block, scale="absmax", stochastic=stochastic)

    def gamma(self, numel: int | None = None) -> float:
        """Half a unit of 3 mantissa bits (relative), and half a subnormal step (of the absmax)."""
        step = 2.0**-9 / 448 * (1 + 2.0**-7)
        if self.unbiased:
            return 2.0**-8 + (self.block - 1) * step**2 / 4
        return (1 / 17) ** 2 + (self.block - 1) * step**2 / 4
