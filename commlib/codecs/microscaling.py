"""Microscaling: 8-bit and 4-bit floats with one power of two per block, in one byte.

::

    mxfp8    elements e4m3, up to 448
    mxfp4    elements e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives
             scale = 2^(floor(log2 max|v|) - floor(log2 largest))
             code = nearest of v / scale, ties to even; beyond the largest: the largest

    wire:    | codes of block 0 | block 1 | ... | e8m0 scales |     value = code * scale

Of the block's maximum up to 1/8 (mxfp8) or 1/4 (mxfp4) is cut off, as the scale is a power of two
and rounded down. With stochastic rounding it is doubled where that would happen: nothing is cut, so
the mean is v. Scales are half of fp8's bytes, and cost accuracy: e2m1, which has bf16 scales, has
the smaller error on normal data.

Sources: OCP Microscaling Formats (MX) 1.0, sections 5.2, 5.3 and 6.3; Rouhani et al. 2023 (arXiv
2310.10537).
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from commlib.codecs.base import Codec, Round, check_block, check_round
from commlib_kernels import Format


@dataclass(frozen=True)
class MXFP8(Codec):
    """e4m3 with one power of two per block.

    Args:
        block: elements per scale; OCP's is 32. Multiples of 8 from 32 to 4096.
        round: nearest (OCP's) or stochastic.
    """

    block: int = 32
    round: Round | None = None
    name: ClassVar[str] = "mxfp8"

    def __post_init__(self) -> None:
        check_block(self, self.block, tensor=False)
        check_round(self, self.round)

    @property
    def format(self) -> Format:
        """One byte per element and one per scale."""
        if self.round == "stochastic":
            return Format("fp8", bits=8, block=self.block, scale="e8m0_up", stochastic=True)
        return Format("fp8", bits=8, block=self.block, scale="e8m0")

    def gamma(self, numel: int | None = None) -> float:
        """1/64, of values that are cut by an eighth; stochastic: as fp8, with a maximum above 224.

        And half a subnormal step of all others.
        """
        if self.unbiased:
            return 2.0**-8 + (self.block - 1) * (2.0**-9 / 224) ** 2 / 4
        normals = [(8 + m) * 2.0**e for e in range(-9, 6) for m in range(8)]
        return _gamma(np.array([m * 2.0**-9 for m in range(8)] + normals[:-1]), self.block)


@dataclass(frozen=True)
class MXFP4(Codec):
    """e2m1 with one power of two per block.

    Args:
        block: elements per scale; OCP's is 32. Multiples of 8 from 32 to 4096.
    """

    block: int = 32
    name: ClassVar[str] = "mxfp4"

    def __post_init__(self) -> None:
        check_block(self, self.block, tensor=False)

    @property
    def format(self) -> Format:
        """Half a byte per element and one byte per scale."""
        return Format("fp4", bits=4, block=self.block, scale="e8m0")

    def gamma(self, numel: int | None = None) -> float:
        """One element at the maximum, all others where they cost most: at 1/4, which becomes 0."""
        return _gamma(np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]), self.block)


def _gamma(values: npt.NDArray[np.float64], block: int) -> float:
    """The largest ``sum e^2 / sum v^2`` of a block whose scale is 1: e errors, v elements.

    Between two values the error over ``v^2`` is largest in the middle, beyond the last at the end:
    ``|e| = end - last``. For any bound g an element's ``e^2 - g v^2`` is convex between these
    points, so that a worst block has one element at the maximum, at one of them or exact, and all
    others at one more.
    """
    last = values[-1]
    base = 2.0 ** np.floor(np.log2(last))  # the maximum is at least this, and below twice
    errors = np.append(np.diff(values) / 2, 2 * base - last)
    places = np.append((values[1:] + values[:-1]) / 2, 2 * base)
    own = places > base
    own_errors, own_places = np.append(errors[own], 0), np.append(places[own], base)
    others = block - 1
    found = (others * errors[:, None] ** 2 + own_errors**2) / (
        others * places[:, None] ** 2 + own_places**2
    )
    return float(found.max())
