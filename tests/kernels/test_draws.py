"""Random words by whole vectors, and the codes that are drawn with them, against the reference."""

from typing import Any

import numba
import numpy as np
import pytest

from commlib_kernels.numba_cpu import drawn, draws
from commlib_kernels.philox import lanes
from commlib_kernels.reference import elements
from commlib_kernels.tag import Tag

RANDOM = np.random.default_rng(0)


@numba.njit
def words(r: Any, nb: Any, width: Any, stream: Any, ahead: Any) -> None:
    draws.random_words(r, nb, width, stream, ahead)


@pytest.mark.parametrize("group", [0, 5, 2**32 - 1, 2**32 - 10, 2**32, 3 * 2**32 + 7])
@pytest.mark.parametrize("width", [8, 32, 40, 64, 96, 104, 128, 256])
@pytest.mark.parametrize("nb", [1, 3])
def test_words_of_a_strip_are_those_of_its_lanes(nb: int, width: int, group: int) -> None:
    """Eight, four and one group at a time, also where the counter's first word overflows."""
    tag = Tag(seed=2**32 - 1, keys=(2**32 - 3,), step=2**31 + 5, rank=2**32 - 2)
    u = np.uint32
    stream = (np.uintp(group), u(tag.step), u(tag.rank), u(tag.seed), u(tag.keys[0]))
    r = np.zeros(nb * width // 2 + 8, u)
    memory = np.zeros(nb * width, np.float32)  # is only asked for
    ahead = (memory.ctypes.data, np.uintp(memory.nbytes))
    words(r, np.uintp(nb), np.uintp(width), stream, ahead)
    drawn = r[: nb * width // 2].reshape(nb, width // 2)
    got = np.concatenate([drawn & u(0xFFFF), drawn >> u(16)], axis=1)
    np.testing.assert_array_equal(got, lanes(tag, 0, 8 * group, nb, width))
    assert not r[nb * width // 2 :].any()


def codes(bits: int, v: Any, inv: Any, levels: int, r: Any) -> Any:
    """Of 64 elements with 32 words."""
    kernel = drawn.drawn_nibbles if bits == 4 else drawn.drawn_octets

    @numba.njit
    def run(v: Any, inv: Any, levels: Any, r: Any, wire: Any) -> None:
        o, half = np.uintp(8), np.uintp(32)
        kernel(v, o, half, inv, levels, r, np.uintp(4), wire, np.uintp(2))

    wire = np.zeros(8 * bits + 4, np.uint8)
    padded = np.pad(v.astype(np.float32), 8), np.pad(r, 4)
    run(padded[0], np.float32(inv), np.int32(levels), padded[1], wire)
    assert not wire[:2].any()
    assert not wire[-2:].any()
    return wire[2:-2].view(np.int8)


def wanted(v: Any, inv: Any, levels: int, r: Any) -> Any:
    low, high = r & np.uint32(0xFFFF), r >> np.uint32(16)
    u = ((np.concatenate([low, high]) + 0.5) / 65536).astype(np.float32)
    y = v.astype(np.float32) * np.float32(inv) + u
    return np.clip(np.floor(y), -levels, levels).astype(np.int8)


def test_nibbles_and_octets_are_floors_of_sums() -> None:
    for _ in range(20):
        r = RANDOM.integers(0, 2**32, 32, dtype=np.uint32)
        v = RANDOM.uniform(-7, 7, 64)
        want = wanted(v, 1, 7, r)
        np.testing.assert_array_equal(codes(4, v, 1, 7, r), (want[:32] & 15) | want[32:] << 4)
        v *= 300 / 7  # far above the levels too
        np.testing.assert_array_equal(codes(8, v, 1, 100, r), wanted(v, 1, 100, r))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [4, 5, 6, 7])
def test_nibbles_need_no_clamp(levels: int, dtype: Any) -> None:
    """Every mantissa of the largest element, with the smallest and the largest random number.

    Scales of the norm are divided in fp64; a norm is never below its largest element.
    """
    m = np.arange(0x3F800000, 0x40000000, dtype=np.uint32).view(np.float32)
    top = (m.astype(dtype) / dtype(levels)).astype(np.float32)
    y = m * (np.float32(1) / elements.bf16_value(elements.bf16_up(top)))
    least, most = np.float32(2**-17), np.float32(1 - 2**-17)
    assert np.floor(y + most).max() == levels
    assert np.floor(-y + least).min() == -levels


def test_octets_need_one() -> None:
    """So that the clamp above is seen to matter: some mantissas give 128."""
    m = np.arange(0x3F800000, 0x40000000, dtype=np.uint32).view(np.float32)
    scale = elements.bf16_value(elements.bf16_up(m / np.float32(127)))
    y = m * (np.float32(1) / scale)
    assert np.floor(y + np.float32(1 - 2**-17)).max() == 128
