"""sigma8: a byte per element, the number of a bucket; decoded to the mean of what fell into it.

::

    step = 12 sigma / 256      code = clamp(floor((v - mean) / step) + 128, 0, 255)
    value = mean of the values with this code

    wire:    | mean, step, means of the outer buckets | 256 places of 4 bits | a byte per element |

Mean and standard deviation are of all that a payload holds of a parameter: a codebook, 144 bytes,
travels with each of these pieces. The mean of an inner bucket is kept to a sixteenth of the bucket,
which adds 0.4% to the squared error; the outer two, where all lies that is further than 6 sigma
from the mean, keep theirs in fp32. On normal data the squared error is step^2 / 12, 1.8e-4 of the
variance, and int8, with a scale for 128 elements, has a quarter of it; sigma8 is for what is sent
seldom and has few outliers, as DiLoCo's pseudo-gradients.

Kernels: NumPy's on the CPU. Source: Jaghouar et al. 2024, INTELLECT-1 (arXiv 2412.01152), whose
codebook is fp32.
"""

from dataclasses import dataclass
from typing import ClassVar

from commlib.codecs.base import Codec
from commlib_kernels import Format
from commlib_kernels.formats import BUCKETS


@dataclass(frozen=True)
class Sigma8(Codec):
    """INTELLECT-1's codebook: 256 buckets over mean +- 6 sigma."""

    name: ClassVar[str] = "sigma8"

    @property
    def format(self) -> Format:
        """A byte per element, and a codebook per piece."""
        return Format("buckets", bits=8, levels=BUCKETS)

    def gamma(self, numel: int | None = None) -> float:
        """1: the means of buckets are at least as near as one mean of all, and that is all.

        A few huge outliers share a bucket, whatever their distance, and carry almost all of |v|^2.
        So error feedback, whose residual might grow, is refused.
        """
        return 1.0
