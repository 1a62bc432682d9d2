"""Squeezed payloads: eight range coders side by side, in registers.

Each symbol costs a multiplication and two lookups; the eight states do not wait for one another.
Whether a state gives up 16 bits is never branched on: they are always written, and the next word is
written over them where they stay. No division: with f a frequency, x div f is (x M) >> 44 with
M = ceil(2^44 / f), which is exact for x < f 2^20, and x M < 2^64. Equations: reference/entropy.py.
"""

import numpy as np

from commlib_kernels.numba_cpu.jit import at, entry, inlined, loop
from commlib_kernels.numba_cpu.planes import pack_planes, unpack_planes
from commlib_kernels.numba_cpu.strips import U
from commlib_kernels.squeezed import LANES, LOW, PROB_BITS, STATES_AT, Bytes, Section

u8, u16, u32, u64, i64 = np.uint8, np.uint16, np.uint32, np.uint64, np.int64

SYMBOLS, TOTAL = 256, 1 << PROB_BITS

OWED = 16 * SYMBOLS
"""Places in the memory that both work in, after the counts in four parts."""
RECIPROCALS = OWED + 8 * SYMBOLS
FREQUENCIES = RECIPROCALS + 8 * SYMBOLS
STATES = FREQUENCIES + 4 * SYMBOLS
LAST = STATES + 4 * LANES
SLOTS = LAST + 4 * LANES
WORK = SLOTS + 4 * TOTAL
LOWEST, MASK = u32(LOW), u32(TOTAL - 1)


def split(section: Section, payload: Bytes) -> tuple[Bytes, Bytes]:
    """(symbols, plain bytes) of a section; where it can be, symbols are the payload's own bytes."""
    runs, none = section.runs, np.empty(0, np.uint8)
    if section.split == "bytes":
        parts = [payload[first : first + size] for first, size in runs]
        return parts[0] if len(parts) == 1 else np.concatenate(parts), none
    symbols, plain = np.empty(section.symbols, np.uint8), np.empty(section.plain, np.uint8)
    _each(section, payload, symbols, plain, back=False)
    return symbols, plain


def merge(section: Section, symbols: Bytes, plain: Bytes, payload: Bytes) -> None:
    """The inverse of `split`."""
    if section.split != "bytes":
        _each(section, payload, symbols, plain, back=True)
        return
    done = 0
    for first, size in section.runs:
        payload[first : first + size] = symbols[done : done + size]
        done += size


def _each(section: Section, payload: Bytes, symbols: Bytes, plain: Bytes, *, back: bool) -> None:
    """Split, or merge, all runs of a section."""
    where, into, kept = payload.ctypes.data, symbols.ctypes.data, plain.ctypes.data
    done, total = 0, symbols.size
    for first, size in section.runs:
        if section.split == "codes":
            count = size * 8 // section.width
            op = _pack if back else _unpack
            op(where + first, into + done, count, section.block, section.width)
        else:
            count = size // section.width
            op = _join if back else _part
            op(where + first, into + done, kept + done, count, total, section.width)
        done += count


def encode(symbols: Bytes, out: Bytes) -> int:
    """Write the stream of `symbols`; its bytes, or 0 where `out` is too small for it."""
    work = np.zeros(WORK, np.uint8)
    addresses = symbols.ctypes.data, out.ctypes.data, work.ctypes.data
    return int(_encode(*addresses, symbols.size, out.size))


def decode(data: Bytes, symbols: Bytes, alphabet: int) -> int:
    """Read as many symbols as there is room for; the bytes read, or one of `PROBLEMS`."""
    work = np.empty(WORK, np.uint8)
    addresses = data.ctypes.data, symbols.ctypes.data, work.ctypes.data
    return int(_decode(*addresses, data.size, symbols.size, alphabet))


def warmup() -> None:
    """Compile all of it, or load it from the cache."""
    symbols, out = np.zeros(64, np.uint8), np.empty(256, np.uint8)
    decode(out[: encode(symbols, out)], symbols, 2)
    for part in (Section("words", 2, 1, ((0, 4),)), Section("codes", 3, 8, ((0, 6),))):
        merge(part, *split(part, out), out)


# ---- words and codes ------------------------------------------------------------------------


@entry
def _part(data, symbols, plain, n, total, width):
    """Words turned left by a bit: the highest byte, and the others in planes `total` apart."""
    top, low = at(symbols, u8), at(plain, u8)
    if width == 2:
        words = at(data, u16)
        for i in range(U(n)):
            x = u32(words[i])
            top[i] = u8(x >> u32(7))
            low[i] = u8((x << u32(1)) | (x >> u32(15)))
    else:
        wide = at(data, u32)
        second, third = at(plain + total, u8), at(plain + i64(2) * total, u8)
        for i in range(U(n)):
            x = wide[i]
            top[i] = u8(x >> u32(23))
            low[i] = u8((x << u32(1)) | (x >> u32(31)))
            second[i] = u8(x >> u32(7))
            third[i] = u8(x >> u32(15))


@entry
def _join(data, symbols, plain, n, total, width):
    """The inverse of `_part`."""
    top, low = at(symbols, u8), at(plain, u8)
    if width == 2:
        words = at(data, u16)
        for i in range(U(n)):
            x = u32(top[i]) << u32(8) | u32(low[i])
            words[i] = u16((x >> u32(1)) | (x << u32(15)))
    else:
        wide = at(data, u32)
        second, third = at(plain + total, u8), at(plain + i64(2) * total, u8)
        for i in range(U(n)):
            x = u32(top[i]) << u32(24) | u32(third[i]) << u32(16)
            x |= u32(second[i]) << u32(8) | u32(low[i])
            wide[i] = u32((x >> u32(1)) | (x << u32(31)))


@entry
def _unpack(data, symbols, n, block, width):
    """Codes from their planes; the last block may be short."""
    whole = U(n) // U(block)
    unpack_planes(at(data, u8), U(0), whole, U(block), width, at(symbols, u8))
    done = whole * U(block)
    if done < U(n):
        rest = at(symbols + i64(done), u8)
        unpack_planes(at(data, u8), done * U(width) // U(8), U(1), U(n) - done, width, rest)


@entry
def _pack(data, symbols, n, block, width):
    """The inverse of `_unpack`."""
    whole = U(n) // U(block)
    pack_planes(at(symbols, u8), whole, U(block), width, at(data, u8), U(0))
    done = whole * U(block)
    if done < U(n):
        rest = at(symbols + i64(done), u8)
        pack_planes(rest, U(1), U(n) - done, width, at(data, u8), done * U(width) // U(8))


# ---- frequencies ----------------------------------------------------------------------------


@loop
def count(symbols, n, h):
    """How often each symbol occurs; in four parts, as one would wait for itself."""
    whole = n & ~U(3)
    for i in range(U(0), whole, U(4)):
        h[U(symbols[i])] += u32(1)
        h[U(256) + U(symbols[i + U(1)])] += u32(1)
        h[U(512) + U(symbols[i + U(2)])] += u32(1)
        h[U(768) + U(symbols[i + U(3)])] += u32(1)
    for i in range(whole, n):
        h[U(symbols[i])] += u32(1)


@loop
def frequencies(h, n, owed, f):
    """Of 4096 in all: the nearest, then one more or less for those that are owed most or least."""
    left = i64(TOTAL)
    for s in range(U(SYMBOLS)):
        c = i64(h[s]) + i64(h[U(256) + s]) + i64(h[U(512) + s]) + i64(h[U(768) + s])
        f[s] = 0
        if c > i64(0):
            f[s] = u32(max(i64(1), (c * i64(TOTAL) + n // i64(2)) // n))
        owed[s] = c * i64(TOTAL) - i64(f[s]) * n
        left -= i64(f[s])
    while left > i64(0):
        best = U(0)
        for s in range(U(1), U(SYMBOLS)):
            if owed[s] > owed[best]:
                best = s
        f[best] += u32(1)
        owed[best] -= n
        left -= i64(1)
    while left < i64(0):
        best = U(SYMBOLS)
        for s in range(U(SYMBOLS)):
            if f[s] > u32(1) and (best == U(SYMBOLS) or owed[s] < owed[best]):
                best = s
        f[best] -= u32(1)
        owed[best] += n
        left += i64(1)
    for s in range(U(SYMBOLS)):
        if f[s] == u32(TOTAL):  # a state would not change, and 2^32 does not fit a limit
            f[s], f[s ^ U(1)] = u32(TOTAL - 1), u32(1)
            break


@loop
def table(f, m, data):
    """Write which symbols occur and their frequencies; f and m become what `put` looks up."""
    place, start = U(STATES_AT), u32(0)
    for b in range(U(4), U(STATES_AT)):
        data[b] = u8(0)
    for s in range(U(SYMBOLS)):
        v = f[s]
        if v:
            data[U(4) + s // U(8)] |= u8(1) << u8(s & U(7))
            if v < u32(128):
                data[place] = u8(v)
                place += U(1)
            else:
                data[place], data[place + U(1)] = u8(v & u32(127) | u32(128)), u8(v >> u32(7))
                place += U(2)
            m[s] = ((u64(1) << u64(44)) + u64(v) - u64(1)) // u64(v)
            f[s] = v | start << u32(16)
            start += v
    while place & U(3):
        data[place] = u8(0)
        place += U(1)


@loop
def read_table(data, size, alphabet, slots):
    """Frequencies to slots: of each of 4096, its symbol, that one's frequency, and its place there.

    Returns: where the table ends, or one of `PROBLEMS`.
    """
    place, total, beyond = U(STATES_AT), u32(0), False
    for s in range(U(SYMBOLS)):
        if (data[U(4) + s // U(8)] >> u8(s & U(7))) & u8(1):
            if place + U(2) > U(size):
                return i64(-1)
            v = u32(data[place])
            place += U(1)
            if v > u32(127):
                v = v & u32(127) | u32(data[place]) << u32(7)
                place += U(1)
            if v == u32(0) or v > MASK:
                return i64(-2)
            for i in range(min(U(v), U(TOTAL) - min(U(TOTAL), U(total)))):
                slots[U(total) + i] = u32(s) | v << u32(8) | u32(i) << u32(20)
            total += v
            beyond |= s >= U(alphabet)
    if total != u32(TOTAL):
        return i64(-3)
    return i64(-4) if beyond else i64(place)


# ---- coding ---------------------------------------------------------------------------------


@inlined
def put(x, s, f, m, words, p):
    """Code symbol s into state x; its low word is written, and kept where x is too large."""
    v = f[s]
    n = v & u32(0xFFFF)
    over = u32(x >> u32(20) >= n)
    words[p - U(1)] = u16(x)
    x = x >> (over << u32(4))
    q = u32((u64(x) * m[s]) >> u64(44))
    return u32((q << u32(12)) + (x - q * n) + (v >> u32(16))), p - U(over)


@entry
def _encode(symbols, out, work, size, room):
    data, sym = at(out, u8), at(symbols, u8)
    f, m, x = at(work + FREQUENCIES, u32), at(work + RECIPROCALS, u64), at(work + STATES, u32)
    n, h = U(size), at(work, u32)
    count(sym, n, h)
    frequencies(h, i64(size), at(work + OWED, i64), f)
    place = U(STATES_AT)
    for i in range(U(SYMBOLS)):
        place += U(f[i] > u32(0)) + U(f[i] > u32(127))
    front = ((place + U(3)) // U(4) * U(4) + U(4 * LANES)) // U(2)
    end = U(room) // U(2)
    if end < front + U(8):
        return i64(0)
    table(f, m, data)

    # From the last word that there is room for, down; then moved to where they belong.
    words, p, i = at(out, u16), end, n
    for lane in range(U(LANES)):
        x[lane] = LOWEST
    while i & U(7) and p >= front + U(8):
        i -= U(1)
        x[i & U(7)], p = put(x[i & U(7)], U(sym[i]), f, m, words, p)
    a, b, c, d, e, g, j, k = x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]
    while i > U(0) and p >= front + U(8):
        i -= U(8)
        k, p = put(k, U(sym[i + U(7)]), f, m, words, p)
        j, p = put(j, U(sym[i + U(6)]), f, m, words, p)
        g, p = put(g, U(sym[i + U(5)]), f, m, words, p)
        e, p = put(e, U(sym[i + U(4)]), f, m, words, p)
        d, p = put(d, U(sym[i + U(3)]), f, m, words, p)
        c, p = put(c, U(sym[i + U(2)]), f, m, words, p)
        b, p = put(b, U(sym[i + U(1)]), f, m, words, p)
        a, p = put(a, U(sym[i]), f, m, words, p)
    if p < front + U(8):
        return i64(0)
    states = at(out + i64(2) * i64(front) - i64(4 * LANES), u32)
    states[0], states[1], states[2], states[3] = a, b, c, d
    states[4], states[5], states[6], states[7] = e, g, j, k
    for i in range(end - p):
        words[front + i] = words[p + i]
    at(out, u32)[0] = u32(end - p)
    return i64(2) * i64(front + end - p)


@inlined
def get(x, slots, words, p):
    """Decode a symbol from state x, which takes a word where it is too small."""
    v = slots[U(x & MASK)]
    y = u32((v >> u32(8)) & MASK) * (x >> u32(PROB_BITS)) + (v >> u32(20))
    short = u32(y) < LOWEST
    longer = u32(u32(y) << u32(16)) | u32(words[p])
    return longer if short else u32(y), u8(v), p + U(short)


@entry
def _decode(stream, symbols, work, size, n, alphabet):
    data, sym, x = at(stream, u8), at(symbols, u8), at(work + STATES, u32)
    slots, count = at(work + SLOTS, u32), U(n)
    if size < STATES_AT:
        return i64(-1)
    place = read_table(data, size, alphabet, slots)
    if place < i64(0):
        return place
    place = (place + i64(3)) // i64(4) * i64(4)
    end = U(at(stream, u32)[0])
    if place + i64(4 * LANES) + i64(2) * i64(end) > size:
        return i64(-1)
    states, words = at(stream + place, u32), at(stream + place + i64(4 * LANES), u16)
    i = p = U(0)
    a, b, c, d = states[0], states[1], states[2], states[3]
    e, g, j, k = states[4], states[5], states[6], states[7]
    while i + U(8) <= count and p + U(8) <= end:
        a, sym[i], p = get(a, slots, words, p)
        b, sym[i + U(1)], p = get(b, slots, words, p)
        c, sym[i + U(2)], p = get(c, slots, words, p)
        d, sym[i + U(3)], p = get(d, slots, words, p)
        e, sym[i + U(4)], p = get(e, slots, words, p)
        g, sym[i + U(5)], p = get(g, slots, words, p)
        j, sym[i + U(6)], p = get(j, slots, words, p)
        k, sym[i + U(7)], p = get(k, slots, words, p)
        i += U(8)
    x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7] = a, b, c, d, e, g, j, k
    last = at(work + LAST, u16)
    last[0] = u16(0)
    while i < count:  # the last ones; a state must not read what is behind the words
        lane = i & U(7)
        if p < end:
            x[lane], sym[i], p = get(x[lane], slots, words, p)
        else:
            x[lane], sym[i], more = get(x[lane], slots, last, U(0))
            if more:
                return i64(-5)
        i += U(1)
    if p != end:
        return i64(-5)
    for lane in range(U(LANES)):
        if x[lane] != LOWEST:
            return i64(-5)
    return place + i64(4 * LANES) + i64(2) * i64(end)
