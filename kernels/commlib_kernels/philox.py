"""Philox4x32-10, vectorised: the counter-based generator behind stochastic rounding.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
One call turns a 128-bit counter and a 64-bit key into four 32-bit words. Here::

    counter = (group, group >> 32, step, rank)        key = (seed, key of the segment)

A *group* is eight elements of a block that lie an eighth of the block apart; group g of a segment
starts counting at element 8 g. Word w gives the low half to lane w and the high half to lane w + 4.
"""

import numpy as np
import numpy.typing as npt

from commlib_kernels.once import once
from commlib_kernels.tag import Tag

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

_MASK = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)


def philox(
    counter: tuple[npt.NDArray[np.uint64], ...], key: tuple[int, int]
) -> tuple[npt.NDArray[np.uint64], ...]:
    """Four words (as uint64 arrays below 2^32) for every counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0 = c0 * np.uint64(MULTIPLIERS[0])
        p1 = c2 * np.uint64(MULTIPLIERS[1])
        c0 = (p1 >> _HIGH) ^ c1 ^ np.uint64(k0)
        c2 = (p0 >> _HIGH) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & _MASK, p0 & _MASK
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def seed_word(seed: int) -> int:
    """A seed of any size folded into the 32 bits of the key."""
    return (seed ^ (seed >> 32)) & 0xFFFFFFFF


def lanes(tag: Tag, segment: int, base: int, rows: int, width: int) -> npt.NDArray[np.uint64]:
    """16 random bits for every element of `rows` consecutive blocks of `width` elements.

    Args:
        base: index within the segment of the first element, a multiple of 8.

    Returns:
        (rows, width) array; element ``k * width / 8 + i`` of a block is lane k of its group i.
    """
    groups = base // 8 + np.arange(rows * width // 8, dtype=np.uint64).reshape(rows, width // 8)
    full = np.full_like
    words = philox(
        (
            groups & _MASK,
            groups >> _HIGH,
            full(groups, int(tag.step) & 0xFFFFFFFF),
            full(groups, tag.rank & 0xFFFFFFFF),
        ),
        (seed_word(tag.seed), tag.key(segment) & 0xFFFFFFFF),
    )
    low = [w & np.uint64(0xFFFF) for w in words]
    high = [w >> np.uint64(16) for w in words]
    return np.concatenate(low + high, axis=1)


SIGNS_RANK, SIGNS_KEY = 0xFFFFFFFF, 0x726F7461
"""Counter word and key of the signs of rotations: streams that no message draws from."""

SIGNS = 4096
"""Elements after which signs repeat: those of the largest block."""


@once
def signs(seed: int) -> npt.NDArray[np.uint32]:
    """0x80000000 for every element that a rotation negates, else 0; read-only.

    Element i is bit ``i mod 32`` of word ``i / 32``, and word w that of call ``w / 4``.
    """
    calls = np.arange(SIGNS // 128, dtype=np.uint64)
    rank = np.full_like(calls, SIGNS_RANK)
    words = philox(
        (calls, np.zeros_like(calls), np.zeros_like(calls), rank), (seed_word(seed), SIGNS_KEY)
    )
    bits = np.stack(words, axis=1)[:, :, None] >> np.arange(32, dtype=np.uint64)
    found = (bits.reshape(-1) << np.uint64(31)).astype(np.uint32) & np.uint32(0x80000000)
    found.flags.writeable = False
    return found


SHARED_RANK = 0xFFFFFFFF
"""Counter word of what all ranks draw alike."""

CHOICE_KEY = (0x72616E64, 0x6B000000)
"""Key of the random choices of sparse formats."""


def choice(tag: Tag, segment: int) -> tuple[int, int]:
    """The number that a message's random choice is drawn from: the same on all ranks."""
    zero = np.zeros(1, np.uint64)
    step, rank = zero + np.uint64(int(tag.step) & 0xFFFFFFFF), zero + np.uint64(SHARED_RANK)
    key = (seed_word(tag.seed), tag.key(segment) & 0xFFFFFFFF)
    low, high, _, _ = philox((zero, zero, step, rank), key)
    return int(low[0]), int(high[0])


def choice_words(number: tuple[int, int], start: int, count: int) -> npt.NDArray[np.uint64]:
    """The first `count` random words of the run that begins at element `start` of its segment."""
    calls = np.arange(-(-count // 4), dtype=np.uint64)
    fixed = [np.full_like(calls, word) for word in (start & 0xFFFFFFFF, *number)]
    return np.stack(philox((calls, *fixed), CHOICE_KEY), axis=1).reshape(-1)[:count]
