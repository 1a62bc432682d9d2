"""Philox4x32-10 against its published vectors and an independent scalar version; who gets what."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commlib_kernels import Tag
from commlib_kernels.once import once
from commlib_kernels.philox import choice_words, lanes, philox, seed_word

WORDS = st.integers(0, 2**32 - 1)

KNOWN = [  # counter, key, result: the Random123 distribution, kat_vectors, "philox4x32 10"
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def scalar(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 from the paper, in Python integers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (
            second >> 32 ^ b ^ k,
            second & 0xFFFFFFFF,
            first >> 32 ^ d ^ m,
            first & 0xFFFFFFFF,
        )
        k, m = k + 0x9E3779B9 & 0xFFFFFFFF, m + 0xBB67AE85 & 0xFFFFFFFF
    return a, b, c, d


def vectorised(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    words = philox(tuple(np.array([c], np.uint64) for c in counter), key)
    return tuple(int(w[0]) for w in words)


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], want: object) -> None:
    assert scalar(counter, key) == want
    assert vectorised(counter, key) == want


@settings(max_examples=50, deadline=None)
@given(st.tuples(WORDS, WORDS, WORDS, WORDS), st.tuples(WORDS, WORDS))
def test_agrees_with_the_scalar_version(counter: tuple[int, ...], key: tuple[int, int]) -> None:
    assert vectorised(counter, key) == scalar(counter, key)


@pytest.mark.parametrize("width", [8, 40, 128])
def test_lanes_are_an_eighth_of_a_block_apart(width: int) -> None:
    """Element k n/8 + i of a block takes half a word of group i: word k of 4, low then high."""
    tag, base = Tag(seed=(7 << 32) + 1, keys=(11, 12), step=(1 << 32) + 3, rank=-1), 1024
    got = lanes(tag, 1, base, 3, width)
    assert got.shape == (3, width)
    for row in range(3):
        for element in range(width):
            k, i = divmod(element, width // 8)
            group = (base + row * width) // 8 + i
            words = scalar((group, 0, 3, 0xFFFFFFFF), (7 ^ 1, 12))
            assert got[row, element] == (words[k % 4] >> (16 if k >= 4 else 0)) & 0xFFFF


def test_long_segments_use_the_second_word_of_the_counter() -> None:
    base = 8 * ((1 << 32) + 5)
    words = scalar((5, 1, 0, 0), (0, 0))
    assert lanes(Tag(), 0, base, 1, 8)[0, 0] == words[0] & 0xFFFF


def test_seeds_of_any_size_fold_into_a_word() -> None:
    assert seed_word(5) == 5
    assert seed_word((3 << 32) + 5) == 3 ^ 5
    assert 0 <= seed_word(2**100 + 1) < 2**32


def test_sixteen_bits_are_uniform() -> None:
    got = lanes(Tag(seed=3), 0, 0, 512, 128).astype(float).ravel()
    assert abs(got.mean() / 65536 - 0.5) < 0.005
    assert abs(np.corrcoef(got[:-1], got[1:])[0, 1]) < 0.02


def test_choices_count_elements_in_one_word() -> None:
    far, near = (choice_words((1, 2), start, 50) for start in ((1 << 32) + 4096, 4096))
    assert far.tolist() == near.tolist()


def test_threads_that_ask_together_get_one_object() -> None:
    """Kernels are given its address: no copy may be dropped."""
    made, together = [], threading.Barrier(4)

    @once
    def numbers(n: int) -> list[int]:
        made.append(n)
        time.sleep(0.02)
        return [n]

    def ask(n: int) -> int:
        together.wait()
        return id(numbers(n))

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(ask, [7] * 4))) == 1
    assert made == [7]
    assert numbers(7) is numbers(7)
