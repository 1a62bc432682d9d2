"""Positions of a sparse piece: drawn, written as Elias and Fano code them, read and checked.

Positions are ascending 32-bit numbers, counted from the piece's first element.
"""

import numpy as np

from commlib_kernels.numba_cpu.jit import SCALARS, loop
from commlib_kernels.numba_cpu.strips import U
from commlib_kernels.philox import CHOICE_KEY

u8, u32, u64 = np.uint8, np.uint32, np.uint64
philox = SCALARS.philox
KEY = (u32(CHOICE_KEY[0]), u32(CHOICE_KEY[1]))


@loop
def draw(first, m, k, start, low, high, places, o):
    """One of each of k parts of the run of m elements at `first`, turned at random; to places[o].

    Ascending: those that the turn carries over the end come first.
    """
    words = philox(u32(0), u32(start), low, high, KEY[0], KEY[1])
    turn = u64(words[0]) * u64(m) >> u64(32)
    split = k  # the first that the turn carries over the end of the run
    each, more, a, rest = u64(m) // u64(k), u64(m) % u64(k), u64(0), u64(0)
    for j in range(k):
        if j % U(4) == U(3):
            words = philox(u32((j + U(1)) // U(4)), u32(start), low, high, KEY[0], KEY[1])
        lane = (j + U(1)) % U(4)
        w = words[0]
        w = words[1] if lane == U(1) else w
        w = words[2] if lane == U(2) else w
        w = words[3] if lane == U(3) else w
        b, rest = a + each, rest + more  # (j + 1) m / k without a division
        if rest >= u64(k):
            b, rest = b + u64(1), rest - u64(k)
        place = a + (u64(w) * (b - a) >> u64(32)) + turn
        if place >= u64(m) and split == k:
            split = j
        places[o + j] = u32(place)
        a = b
    carried = k - split
    if carried == U(0):
        for j in range(k):
            places[o + j] += u32(first)
        return
    turned(places, o, split, k)
    for j in range(carried):
        places[o + j] = places[o + j] - u32(m) + u32(first)
    for j in range(carried, k):
        places[o + j] += u32(first)


@loop
def reverse(places, a, b):
    """Elements a .. b - 1 back to front."""
    for i in range((b - a) // U(2)):
        left, right = places[a + i], places[b - U(1) - i]
        places[a + i], places[b - U(1) - i] = right, left


@loop
def turned(places, o, split, k):
    """The last k - split of k elements to the front."""
    reverse(places, o, o + split)
    reverse(places, o + split, o + k)
    reverse(places, o, o + k)


@loop
def write_places(places, o, count, numel, low, wire, c):
    """`count` positions below `numel` to byte c: their `low` low bits, then the rest in unary."""
    held, bits = u64(0), u64(0)
    mask, step = (u64(1) << u64(low)) - u64(1), u64(low)
    for i in range(count):
        held |= (u64(places[o + i]) & mask) << bits
        bits += step
        while bits >= u64(8):
            wire[c] = u8(held & u64(255))
            c += U(1)
            held >>= u64(8)
            bits -= u64(8)
    if bits:
        wire[c] = u8(held & u64(255))
        c += U(1)
    length = count + ((numel - U(1)) >> low) + U(1)
    for i in range((length + U(7)) >> U(3)):
        wire[c + i] = u8(0)
    for i in range(count):
        j = (U(places[o + i]) >> low) + i
        wire[c + (j >> U(3))] |= u8(U(1) << (j & U(7)))


@loop
def read_places(wire, c, count, numel, low, places, o):
    """The inverse; False where that many ascending positions below `numel` are not there."""
    upper = c + ((count * low + U(7)) >> U(3))
    length = count + ((numel - U(1)) >> low) + U(1)
    held, bits, found = u64(0), u64(0), U(0)
    mask, step = (u64(1) << u64(low)) - u64(1), u64(low)
    before = U(0)  # one more than the last position
    for b in range((length + U(7)) >> U(3)):
        byte = u64(wire[upper + b])
        if byte == u64(0):
            continue
        for i in range(U(8)):
            j = b * U(8) + i
            if (byte >> u64(i)) & u64(1) and j < length:
                if found == count:
                    return False
                while bits < step:
                    held |= u64(wire[c]) << bits
                    c += U(1)
                    bits += u64(8)
                place = ((j - found) << low) | U(held & mask)
                held >>= step
                bits -= step
                if place < before or place >= numel:
                    return False
                places[o + found] = u32(place)
                before = place + U(1)
                found += U(1)
    return found == count
