"""The oracle of squeezed payloads: interleaved range coding (rANS) of symbols, one by one.

A state x holds what is coded so far as a number. With f the symbol's frequency of 4096, and c the
sum of those of the symbols before it (Duda 2013, arXiv 1311.2540)::

    coding      while x >= f 2^20: write the low 16 bits of x, x = x >> 16
                x = (x div f) 4096 + c + x mod f
    decoding    the symbol is the one with c <= x mod 4096 < c + f
                x = f (x div 4096) + x mod 4096 - c
                while x < 2^16: x = x << 16 | the next 16 bits

Eight states take turns. Symbols are coded from the last to the first, so that they are decoded from
the first to the last; the words are written in the order in which they are read.
"""

import numpy as np

from commlib_kernels.formats import Format
from commlib_kernels.reference import blocks
from commlib_kernels.squeezed import LANES, LOW, PROB_BITS, SPARE, STATES_AT, Bytes, Section

TOTAL = 1 << PROB_BITS
TOP = TOTAL - 1
SYMBOLS = 256


def split(section: Section, payload: Bytes) -> tuple[Bytes, Bytes]:
    """(symbols, plain bytes) of a section."""
    data = np.concatenate([payload[first : first + size] for first, size in section.runs])
    if section.split == "bytes":
        return data, data[:0]
    if section.split == "codes":
        parts = []
        for start, size, rows, width in _blocks(section):
            planes = payload[start : start + size].reshape(rows, -1)
            codes = blocks.unpack(_planes(section), planes, width)
            parts.append(codes.reshape(-1).astype(np.uint8))
        return np.concatenate(parts), data[:0]
    words = data.view(f"<u{section.width}")
    last = words.dtype.type(8 * section.width - 1)
    turned = words << words.dtype.type(1) | words >> last
    by_place = turned.view(np.uint8).reshape(-1, section.width).T
    return by_place[-1].copy(), by_place[:-1].reshape(-1)


def merge(section: Section, symbols: Bytes, plain: Bytes, payload: Bytes) -> None:
    """The inverse of `split`."""
    if section.split == "codes":
        done = 0
        for start, size, rows, width in _blocks(section):
            codes = symbols[done : done + rows * width].reshape(rows, width).astype(np.int32)
            payload[start : start + size] = blocks.pack(_planes(section), codes).reshape(-1)
            done += rows * width
        return
    data = symbols
    if section.split == "words":
        by_place = np.concatenate([plain, symbols]).reshape(section.width, -1)
        turned = by_place.T.copy().view(f"<u{section.width}").reshape(-1)
        last = turned.dtype.type(8 * section.width - 1)
        data = (turned >> turned.dtype.type(1) | turned << last).view(np.uint8)
    done = 0
    for first, size in section.runs:
        payload[first : first + size] = data[done : done + size]
        done += size


def _planes(section: Section) -> Format:
    """A format with codes of that width, counted from 0."""
    return Format("table", bits=section.width)


def _blocks(section: Section) -> list[tuple[int, int, int, int]]:
    """(first byte, bytes, blocks, their elements): of every run its full blocks, then the rest."""
    found = []
    for first, size in section.runs:
        numel = size * 8 // section.width
        full = numel // section.block
        whole = full * section.block * section.width // 8
        if full:
            found.append((first, whole, full, section.block))
        if numel % section.block:
            found.append((first + whole, size - whole, 1, numel % section.block))
    return found


def frequencies(symbols: Bytes) -> list[int]:
    """Of every symbol, of 4096 in all; at least 1 where it occurs, and never all 4096."""
    counts = np.bincount(symbols, minlength=SYMBOLS).astype(object)  # whole numbers of any size
    n = symbols.size
    found = [max(1, (h * TOTAL + n // 2) // n) if h else 0 for h in counts]
    while sum(found) != TOTAL:
        owed = [h * TOTAL - f * n for h, f in zip(counts, found, strict=True)]
        if sum(found) < TOTAL:
            found[owed.index(max(owed))] += 1
        else:
            least = min(d for d, f in zip(owed, found, strict=True) if f > 1)
            found[next(s for s in range(SYMBOLS) if found[s] > 1 and owed[s] == least)] -= 1
    if TOTAL in found:  # a state would not change, and 2^32 does not fit a limit
        only = found.index(TOTAL)
        found[only], found[only ^ 1] = TOP, 1
    return found


def encode(symbols: Bytes, out: Bytes) -> int:
    """words' number | symbols that occur | frequencies | states | words"""
    f = frequencies(symbols)
    start = np.cumsum([0, *f]).tolist()
    states, words = [LOW] * LANES, []
    for i in reversed(range(symbols.size)):
        s, x = int(symbols[i]), states[i % LANES]
        if x >= f[s] << 20:
            words.append(x & 0xFFFF)
            x >>= 16
        states[i % LANES] = (x // f[s] << PROB_BITS) + start[s] + x % f[s]
    data = len(words).to_bytes(4, "little")
    data += np.packbits([n > 0 for n in f], bitorder="little").tobytes()
    for n in f:
        if n:
            data += bytes([n]) if n < 128 else bytes([n & 127 | 128, n >> 7])
    data += bytes(-len(data) % 4)
    data += np.array(states, "<u4").tobytes() + np.array(words[::-1], "<u2").tobytes()
    if len(data) + SPARE > out.size:
        return 0
    out[: len(data)] = np.frombuffer(data, np.uint8)
    return len(data)


def decode(data: Bytes, symbols: Bytes, alphabet: int) -> int:
    """The inverse of `encode`; see `squeezed.PROBLEMS`."""
    if data.size < STATES_AT:
        return -1
    occurs = np.unpackbits(data[4:STATES_AT], bitorder="little")
    f, at = [0] * SYMBOLS, STATES_AT
    for s in range(SYMBOLS):
        if occurs[s]:
            if at + 2 > data.size:
                return -1
            n, at = int(data[at]), at + 1
            if n >= 128:
                n, at = n & 127 | int(data[at]) << 7, at + 1
            if not 0 < n <= TOP:
                return -2
            f[s] = n
    if sum(f) != TOTAL:
        return -3
    if any(f[alphabet:]):
        return -4
    at += -at % 4
    count = int.from_bytes(data[:4].tobytes(), "little")
    end = at + 4 * LANES + 2 * count
    if end > data.size:
        return -1
    states = data[at : at + 4 * LANES].copy().view("<u4").tolist()
    words = data[at + 4 * LANES : end].copy().view("<u2").tolist()
    owner = np.repeat(np.arange(SYMBOLS), f).tolist()
    start, used = np.cumsum([0, *f]).tolist(), 0
    for i in range(symbols.size):
        x = states[i % LANES]
        symbols[i] = s = owner[x % TOTAL]
        x = f[s] * (x // TOTAL) + x % TOTAL - start[s]
        if x < LOW:
            if used == count:
                return -5
            x, used = x << 16 | words[used], used + 1
        states[i % LANES] = x
    return end if used == count and states == [LOW] * LANES else -5
