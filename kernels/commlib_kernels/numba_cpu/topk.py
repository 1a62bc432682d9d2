"""The k largest magnitudes of a run, exactly: one pass, and a little work on few candidates.

A threshold is guessed (from a sample, or the run before); what is not below it is a candidate. When
there are too many candidates the k best are kept and the threshold rises to above the worst of
them: later equals lose anyway. Where the guess was too high, there are fewer than k candidates, and
the pass is made again without one. So the guess decides how long it takes, never what is found.
"""

import numpy as np

from commlib_kernels.numba_cpu.jit import SCALARS, at, bits, loop
from commlib_kernels.numba_cpu.strips import BF16, FP32, U, add_scaled, load

u8, u16, u32, u64, i64, f32 = np.uint8, np.uint16, np.uint32, np.uint64, np.int64, np.float32
bf16_value, fp16_value = SCALARS.bf16_value, SCALARS.fp16_value

MAGNITUDE = u32(0x7FFFFFFF)
TILE = 2048
SLACK = 1024
"""Candidates beyond 2 k that may be kept, apart from those of one tile."""
SAMPLE, SHORT = 8192, 8192
MARGIN = u32(3 << 19)
"""How far (in bits of the pattern) the next run's guess lies below this run's threshold."""

SOURCE, KIND, RESIDUAL = range(3)
"""Where a piece's values come from: an address, its dtype, that of an fp32 residual or 0."""


def room(k: int, m: int) -> int:
    """Candidates to make room for where k of m are chosen, and room for a sample."""
    return max(min(2 * k + SLACK, m) + TILE, SAMPLE) + 1


@loop
def value_at(s, alpha, i):
    """Element i of a source."""
    if s[KIND] == FP32:
        v = at(s[SOURCE], f32)[i]
    elif s[KIND] == BF16:
        v = bf16_value(at(s[SOURCE], u16)[i])
    else:
        v = fp16_value(at(s[SOURCE], u16)[i])
    if s[RESIDUAL] != 0:
        v = v + alpha * at(s[RESIDUAL], f32)[i]
    return v


@loop
def tile(s, alpha, o, n, loaded, summed):
    """The address of elements o .. o + n - 1 as fp32: their own, or that of one of two buffers."""
    v = s[SOURCE] + i64(4) * i64(o)
    if s[KIND] != FP32:
        load(at(s[SOURCE], f32), at(s[SOURCE], u16), s[KIND], o, n, at(loaded, f32))
        v = loaded
    if s[RESIDUAL] != 0:
        h = at(s[RESIDUAL] + i64(4) * i64(o), f32)
        add_scaled(at(v, f32), alpha, h, n, n, at(summed, f32))
        v = summed
    return v


@loop
def peak(v, n):
    """The largest magnitude of n values, as a pattern."""
    m = u32(0)
    for i in range(n):
        m = max(m, bits(v[i]) & MAGNITUDE)
    return m


@loop
def mark(v, n, t, flags):
    """1 for every magnitude that is not below t, else 0."""
    for i in range(n):
        flags[i] = u8((bits(v[i]) & MAGNITUDE) >= t)


@loop
def scan(v, n, first, t, places, values, c, flags):
    """Append what is not below t; the number of candidates. `flags` is the address of n bytes.

    Few pass: comparing all of a tile vectorises, and eight are then skipped at a time.
    """
    marks, words = at(flags, u8), at(flags, u64)
    mark(v, n, t, marks)
    whole = n // U(8)
    for w in range(whole):
        if words[w] != u64(0):
            for i in range(w * U(8), w * U(8) + U(8)):
                places[c] = u32(first + i)
                values[c] = v[i]
                c += U(marks[i])
    for i in range(whole * U(8), n):
        places[c] = u32(first + i)
        values[c] = v[i]
        c += U(marks[i])
    return c


@loop
def count_from(values, c, t):
    """How many magnitudes are not below t."""
    n = u32(0)
    for i in range(c):
        n += u32((bits(values[i]) & MAGNITUDE) >= t)
    return U(n)


@loop
def kth(values, c, k):
    """The pattern of the k-th largest of c magnitudes, or a lower one from which on there are k."""
    low, high = u32(0), peak(values, c)  # from low on there are at least k
    if count_from(values, c, high) >= k:
        return high
    while high - low > u32(1):
        middle = low + (high - low) // u32(2)
        n = count_from(values, c, middle)
        if n == k:
            return middle
        if n > k:
            low = middle
        else:
            high = middle
    return low


@loop
def prune(places, values, c, k):
    """Keep the k best of c candidates, of equal ones the first; the threshold that they passed."""
    t = kth(values, c, k)
    equal = U(0)
    for i in range(c):
        equal += U((bits(values[i]) & MAGNITUDE) > t)
    equal = k - equal  # so many of those at the threshold stay
    o = U(0)
    for i in range(c):
        m = bits(values[i]) & MAGNITUDE
        tied = m == t and equal > U(0)
        places[o] = places[i]
        values[o] = values[i]
        o += U(m > t or tied)
        equal -= U(tied)
    return t


@loop
def sampled(s, alpha, first, m, k, values):
    """A threshold that somewhat more than k of the run probably reach."""
    # Eight neighbours at a time: a line of the cache costs what one does.
    groups = min(max(m // U(64), U(256)), U(SAMPLE)) // U(8)
    count, step = groups * U(8), m // groups
    for i in range(count):
        values[i] = value_at(s, alpha, first + i // U(8) * step + i % U(8))
    share = f32(count) * f32(k) / f32(m)
    rank = U(share * f32(1.1) + f32(3) * np.sqrt(share)) + U(2)
    if rank >= count:
        return u32(0)
    return kth(values, count, rank)


@loop
def best(s, alpha, first, m, k, guess, loaded, summed, flags, places, values):
    """The k largest of the m elements from `first` on to places and values; the threshold."""
    limit = min(U(2) * k + U(SLACK), m)
    t = guess
    if guess == u32(0) and m >= U(SHORT):
        t = sampled(s, alpha, first, m, k, values)
    while True:
        c, low = U(0), t
        for o in range(U(0), m, U(TILE)):
            n = min(U(TILE), m - o)
            v = at(tile(s, alpha, first + o, n, loaded, summed), f32)
            c = scan(v, n, first + o, low, places, values, c, flags)
            if c > limit:
                low = prune(places, values, c, k) + u32(1)
                c = k
        if c >= k:
            break
        t = u32(0)
    if c > k:
        low = prune(places, values, c, k)
    return low
