"""The randomised Hadamard transform of blocks: ``H D v / 2^f``, and back ``D H y / 2^(k - f)``.

D negates the elements that `philox.signs` names, counted within the segment. H is the Hadamard
matrix of n = 2^k elements, in natural order, applied in k steps from the widest butterflies to the
narrowest; every sum is rounded to fp32. f = floor(k / 2): the powers of two, which round nothing,
come before the sums on the way there and after them on the way back. A block that is no power of
two (the short last one) is rotated in pieces: the largest power of two first, then that of what is
left.
"""

import numpy as np
import numpy.typing as npt

from commlib_kernels.philox import SIGNS, signs
from commlib_kernels.reference.elements import F32, Floats


def powers(width: int) -> list[int]:
    """The pieces of a block of `width` elements: its binary digits, largest first."""
    return [1 << bit for bit in reversed(range(width.bit_length())) if width >> bit & 1]


def forward(v: Floats, seed: int, start: int) -> Floats:
    """Rotate (blocks, width), the first element of which is number `start` of its segment."""
    k = _exponents(v.shape[1])
    return _hadamard(_flip(v * np.exp2(-(k // 2)).astype(F32), seed, start))


def backward(y: Floats, seed: int, start: int) -> Floats:
    """The inverse, but for rounding."""
    k = _exponents(y.shape[1])
    return _flip(_hadamard(y) * np.exp2(k // 2 - k).astype(F32), seed, start)


def _exponents(width: int) -> npt.NDArray[np.int64]:
    """k of the piece of every element of a block."""
    pieces = np.array(powers(width))
    return np.repeat(np.log2(pieces).astype(np.int64), pieces)


def _flip(v: Floats, seed: int, start: int) -> Floats:
    places = (start + np.arange(v.size)) % SIGNS
    flipped: Floats = (v.view(np.uint32) ^ signs(seed)[places].reshape(v.shape)).view(F32)
    return flipped


def _hadamard(v: Floats) -> Floats:
    parts: list[npt.NDArray[np.float32]] = []
    place = 0
    for n in powers(v.shape[1]):
        x = v[:, place : place + n]
        half = n // 2
        while half:
            pairs = x.reshape(len(v), -1, 2, half)
            a, b = pairs[:, :, 0], pairs[:, :, 1]
            x = np.stack([a + b, a - b], axis=2).reshape(len(v), n)
            half //= 2
        parts.append(x)
        place += n
    return np.concatenate(parts, axis=1)
