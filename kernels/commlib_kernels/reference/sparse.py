"""Sparse formats: choosing elements, writing where they are, and putting them back.

The values that were chosen are coded by the ops of the dense formats, as a piece of their own.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from commlib_kernels.compact import Chosen
from commlib_kernels.formats import Format
from commlib_kernels.philox import choice, choice_words
from commlib_kernels.reference.elements import F32, Floats, bits
from commlib_kernels.sparse import Sparse
from commlib_kernels.tag import Tag

Bytes = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int64]


def head(tag: Tag, segment: int) -> Bytes:
    """The eight bytes that name a random choice: the same for all ranks."""
    return np.array(choice(tag, segment), "<u4").view(np.uint8)


def runs(sparse: Sparse, numel: int) -> Iterator[tuple[int, int, int]]:
    """(first element, elements, how many of them travel) of every run of a piece."""
    length = sparse.run or numel
    for first in range(0, numel, length):
        m = min(length, numel - first)
        yield first, m, sparse.of(m)


def choose(sparse: Sparse, v: Floats, start: int, number: Bytes) -> Places:
    """Ascending positions of what travels of a piece; `number` is the random choice's."""
    if sparse.rule == "randk":
        return random(sparse, v.size, start, number)
    parts = [np.zeros(0, np.int64)]
    for first, m, k in runs(sparse, v.size):
        magnitude = (bits(v[first : first + m]) & np.uint32(0x7FFFFFFF)).astype(np.int64)
        best = np.argsort(-magnitude, kind="stable")[:k]  # of equal ones the lower position
        parts.append(first + np.sort(best))
    return np.concatenate(parts)


def random(sparse: Sparse, numel: int, start: int, number: Bytes) -> Places:
    """One element of each of k parts of a run, parts as equal as can be and turned at random.

    So every element is as likely as any other: k in m.
    """
    low, high = (int(w) for w in number[:8].copy().view("<u4"))
    parts = [np.zeros(0, np.int64)]
    for first, m, k in runs(sparse, numel):
        w = choice_words((low, high), start + first, k + 1).astype(object)
        turn = w[0] * m >> 32
        edges = [j * m // k for j in range(k + 1)]
        found = [a + (w[j + 1] * (b - a) >> 32) for j, (a, b) in enumerate(pairwise(edges))]
        parts.append(first + np.sort((np.array(found, np.int64) + turn) % m))
    return np.concatenate(parts)


def ratios(sparse: Sparse, numel: int) -> Floats:
    """m / k of every value that travels."""
    parts = [np.zeros(0, F32)]
    parts += [np.full(k, F32(m / k)) for _, m, k in runs(sparse, numel)]
    return np.concatenate(parts)


def write(sparse: Sparse, places: Places, numel: int, number: Bytes, out: Bytes) -> None:
    """The bytes in front of the codes; padding is not written."""
    if sparse.rule == "randk":
        out[:8] = number
        return
    low = sparse.low_bits(numel)
    lows = (places[:, None] >> np.arange(low)) & 1
    uppers = np.zeros(places.size + ((numel - 1) >> low) + 1, np.uint8)
    uppers[(places >> low) + np.arange(places.size)] = 1
    data = [
        np.packbits(part.reshape(-1).astype(np.uint8), bitorder="little") for part in (lows, uppers)
    ]
    packed = np.concatenate(data)
    out[: packed.size] = packed


def find(fmt: Format, chosen: Chosen, data: Bytes) -> Places | None:
    """The positions that a payload says; None where they are none."""
    sparse, numel = fmt.sparse, chosen.piece.numel
    assert sparse is not None
    front = data[chosen.piece.code : chosen.values.code]
    if sparse.rule == "randk":
        return random(sparse, numel, chosen.start, front)
    low, count = sparse.low_bits(numel), chosen.values.numel
    size = -(-count * low // 8)
    lows = np.unpackbits(front[:size], bitorder="little")[: count * low].reshape(count, low)
    length = count + ((numel - 1) >> low) + 1
    uppers = np.unpackbits(front[size:], bitorder="little")[:length]
    (ones,) = uppers.nonzero()
    if ones.size != count:
        return None
    places: Places = (ones - np.arange(count)) << low
    places += (lows.astype(np.int64) << np.arange(low)).sum(axis=1)
    if (np.diff(places) <= 0).any() or places[-1] >= numel:
        return None
    return places
