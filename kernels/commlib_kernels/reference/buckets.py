"""Buckets: a piece's values by number of an even grid, decoded to the mean of what fell there.

::

    mu, sigma    mean and standard deviation of the piece's n values
    step         12 sigma / 256: 256 buckets over mu +- 6 sigma
    code         bucket of v; what lies beyond the grid is in the first or the last one
    value        mean of the values in its bucket

    codes of a piece:  | mu 4 | step 4 | first 4 | last 4 | places 128 | a byte per element |

The means of the inner buckets lie inside of them: four bits say in which sixteenth. Those of the
first and the last do not, and travel as fp32. Sums are in the order of `blocks.norm_sum`, or of
integers, which have none.
"""

import numpy as np
import numpy.typing as npt

from commlib_kernels.formats import BUCKETS, HEAD, SIGMAS
from commlib_kernels.reference import blocks
from commlib_kernels.reference.elements import F32, NAN, Floats

Bytes = npt.NDArray[np.uint8]

HALF = BUCKETS // 2
SMALLEST = F32(2.0**-126)  # below it 1 / step would be infinite
PLACES = 16  # of a mean inside of its bucket


def encode(v: Floats) -> tuple[Bytes, np.uint32]:
    """The bytes of a piece that is not empty, and the absmax bits of its values."""
    out = np.zeros(HEAD + -(-v.size // 8) * 8, np.uint8)
    numbers = out[:16].view("<f4")
    m = blocks.absmax(v.reshape(1, -1))[0]
    if m >= blocks.HUGE:
        numbers[1] = NAN
        return out, m
    if m < blocks.TINY:
        return out, m
    wide = v.astype(np.float64)
    mu = F32(norm_sum(wide) / v.size)
    sigma = np.sqrt(norm_sum((wide - np.float64(mu)) ** 2) / v.size)
    step = F32(sigma * (2 * SIGMAS / BUCKETS))
    inverse = F32(1) / step if step >= SMALLEST else F32(0)
    y = (v - mu) * inverse
    floor = np.floor(y)
    codes = np.clip(floor + F32(HALF), 0, BUCKETS - 1).astype(np.uint8)
    counts = np.bincount(codes, minlength=BUCKETS)
    # Whole numbers, whose sum is exact. What lies just below a bucket's end may round to it.
    parts = np.minimum(np.floor((y - floor) * F32(65536)), F32(65535))
    parts[(codes == 0) | (codes == BUCKETS - 1)] = 0
    sums = np.bincount(codes, parts, BUCKETS).astype(np.int64)
    places = sums // (np.maximum(counts, 1) << 12)
    numbers[0], numbers[1] = mu, step
    for place, code in ((2, 0), (3, BUCKETS - 1)):
        if counts[code]:
            numbers[place] = norm_sum(np.where(codes == code, wide, 0.0)) / counts[code]
    out[16:HEAD] = places[0::2] | places[1::2] << 4
    out[HEAD : HEAD + v.size] = codes
    return out, m


def decode(data: Bytes, numel: int) -> Floats:
    """The values of a piece that is not empty, and of its padding; NaN where its head is bad."""
    size = -(-numel // 8) * 8
    return table(data[:HEAD])[data[HEAD : HEAD + size]]


def table(head: Bytes) -> Floats:
    """What every code of a piece stands for."""
    mu, step, first, last = head[:16].copy().view("<f4")
    if not np.isfinite([mu, step, first, last]).all():
        return np.full(BUCKETS, NAN)
    packed = head[16:HEAD]
    places = np.empty(BUCKETS, np.uint8)
    places[0::2], places[1::2] = packed & 15, packed >> 4
    # Exact: multiples of 1/32 below 129.
    at = np.arange(-HALF, HALF, dtype=F32) + (places.astype(F32) + F32(0.5)) / F32(PLACES)
    values: Floats = at * step + mu
    values[0], values[-1] = first, last
    return np.where(np.isfinite(values), values, NAN)


def norm_sum(v: npt.NDArray[np.float64]) -> np.float64:
    """`blocks.norm_sum`, of many runs at once."""
    full = v.size // blocks.RUN
    lanes = np.zeros((full, blocks.LANES))
    rows = v[: full * blocks.RUN].reshape(full, blocks.RUN // blocks.LANES, blocks.LANES)
    for row in range(rows.shape[1]):
        lanes += rows[:, row]
    for k in (16, 8, 4, 2, 1):
        lanes[:, :k] += lanes[:, k : 2 * k]
    runs = list(lanes[:, 0])
    if v.size > full * blocks.RUN:
        runs.append(blocks.lane_sum(v[full * blocks.RUN :]))
    return blocks.lane_sum(np.array(runs))
