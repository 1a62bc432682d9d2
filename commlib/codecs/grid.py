"""grid: multiples of a step, each element with as many bits as it needs, once they are squeezed.

::

    z = v / rms(v)    code = clamp(rint(z / step), -127, 127)    step = sqrt(2 pi e) / 2^bits
    scale = rms <c, z> / <c, c>    the least squared error       value = code * scale

    wire:    | 8 bits per element | scales |       ``grid4|entropy``: about 4 bits per element

The differential entropy of a normal variable is that of a uniform one of width sqrt(2 pi e) sigma:
so the codes of normal data have an entropy of about `bits`, and coded by it they are within 0.25
bits of the rate-distortion bound, where the best codes of a fixed size lose 0.4 to 0.7 (Gish and
Pierce 1968). ``rotate|grid4|entropy`` makes any data look normal.
"""

import math
from dataclasses import dataclass

import numpy as np

from commlib.codecs.base import Codec, check_block, is_whole
from commlib_kernels import Format

LEVELS = 127


@dataclass(frozen=True)
class Grid(Codec):
    """Codes of 8 bits whose entropy on normal data is about `bits`; meant for ``|entropy``.

    Args:
        bits: 2 .. 6.
        block: elements per scale, a multiple of 8 from 32 to 4096.
    """

    bits: int = 4
    block: int = 1024

    def __post_init__(self) -> None:
        if not is_whole(self.bits) or self.bits not in range(2, 7):
            raise ValueError(f"grid: bits={self.bits!r}; allowed: 2 .. 6")
        check_block(self, self.block, tensor=False)

    @property
    def id(self) -> str:
        """grid2 .. grid6."""
        return f"grid{self.bits}"

    @property
    def step(self) -> float:
        """In root mean squares of a block; an fp32 number."""
        return float(np.float32(math.sqrt(2 * math.pi * math.e) / 2**self.bits))

    @property
    def format(self) -> Format:
        """A byte per element and one scale per block."""
        return Format("grid", bits=8, levels=LEVELS, block=self.block, scale="fit", step=self.step)

    def gamma(self, numel: int | None = None) -> float:
        """``step^2 / 4``: no element is off by more than half a step, if none is clamped.

        An element can be as large as ``sqrt(block)`` root mean squares. Where that is beyond the
        last code: 1 - cos^2 of the angle between z and its codes c. Elements with c = 0 have at
        most ``step^2 / 4`` of the energy; for the others c step / z lies between m, of the largest
        that is clamped (or 2/3), and 2, so that ``cos^2 >= 4 m 2 / (m + 2)^2`` (Kantorovich). The
        scale's own rounding, 2^-9 of it, comes on top.
        """
        half, rounding = self.step**2 / 4, 2.0**-16
        largest = math.sqrt(self.block) / self.step
        if largest <= LEVELS + 0.5:
            return half + rounding
        m = min(2 / 3, LEVELS / largest)
        return 1 - (1 - half) * 8 * m / (m + 2) ** 2 + rounding

    @property
    def _named(self) -> tuple[str, ...]:
        return ("bits",)
