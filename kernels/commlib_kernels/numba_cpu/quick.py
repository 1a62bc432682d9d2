"""One pass for what people use most: int4 and int8, plain or with a classic fp32 residual.

Coding, packing and renewing the residual in one loop saves three passes over the L1 cache, a third
of the time. The general path (coders.py, kernels.py) gives the same bytes for every format.
"""

from typing import Any

import numpy as np

from commlib_kernels.numba_cpu.ahead import ask, ask_fp32
from commlib_kernels.numba_cpu.coders import is_coded
from commlib_kernels.numba_cpu.drawn import drawn_nibbles, drawn_octets
from commlib_kernels.numba_cpu.jit import SCALARS, bits, floats, inlined, loop, specialise
from commlib_kernels.numba_cpu.nearest import INTEGERS, RUN, nibbles, octets
from commlib_kernels.numba_cpu.vectors import LANES
from commlib_kernels.scalar import NAN

U = np.uintp
u8, u32, i8, i32, f32 = np.uint8, np.uint32, np.int8, np.int32, np.float32

uniform = SCALARS.uniform
WHOLE = U(RUN * LANES)
ASKED = U(256)
"""Elements of a block up to which it pays to ask for memory a block at a time."""


@inlined
def pick_within(y, word, low, high):
    """Ties to even, of what is within [low, high] (not looked at) when rounded: the low byte."""
    return i32(bits(y + f32(INTEGERS)))


@inlined
def number_within(code):
    """The number that was picked."""
    return floats(u32(code)) - f32(INTEGERS)


@inlined
def pick_stochastic(y, word, low, high):
    """Floor after adding a uniform number."""
    return min(max(i32(np.floor(y + uniform(word))), low), high)


@inlined
def number_picked(code):
    """The number that was picked."""
    return f32(code)


@inlined
def put4(wire, p, i, half, a, d):
    """Two to a byte."""
    wire[p + i] = u8((a & i32(15)) | (d << i32(4)))


@inlined
def put8(wire, p, i, half, a, d):
    """A byte each."""
    wire[p + i] = u8(a)
    wire[p + half + i] = u8(d)


# Bound below.
pick: Any = None
number: Any = None
put: Any = None
vectors: Any = None
BYTES: Any = None
DRAWN: Any = None


def keeping_pass(v, nb, width, s, levels, r, wire, c, h, omega, ahead):
    """Code a strip of full blocks and renew its residual; i and i + width / 2 go together."""
    low, high = i32(-levels), i32(levels)
    half = width // U(2)
    for b in range(nb):
        o = b * width
        p, w = c + b * half * U(BYTES), o // U(2)
        scale = s[b]
        if width <= ASKED:
            if not DRAWN:
                ask(ahead, o, width)
            ask_fp32(h, nb * width + o, width)
        if is_coded(scale):
            inv = f32(1) / scale
            for i in range(half):
                word = r[w + i]
                a = pick(v[o + i] * inv, word & u32(0xFFFF), low, high)
                d = pick(v[o + half + i] * inv, word >> u32(16), low, high)
                put(wire, p, i, half, a, d)
                h[o + i] = omega * (v[o + i] - number(a) * scale)
                h[o + half + i] = omega * (v[o + half + i] - number(d) * scale)
        else:
            for i in range(half * U(BYTES)):
                wire[p + i] = u8(0)
            if scale == f32(0):
                for i in range(width):
                    h[o + i] = f32(0)


def _bind(nbits: int, *, drawn: bool) -> Any:
    bound = {
        "pick": pick_stochastic if drawn else pick_within,
        "number": number_picked if drawn else number_within,
        "put": put4 if nbits == 4 else put8,
        "BYTES": nbits // 4,
        "DRAWN": drawn,
    }
    return specialise(keeping_pass, f"{nbits}_{drawn}", bound)


nearest4_keep, nearest8_keep = (_bind(nbits, drawn=False) for nbits in (4, 8))
random4_keep, random8_keep = (_bind(nbits, drawn=True) for nbits in (4, 8))


@loop
def nearest4(v, nb, width, s, wire, c, ahead):
    """Of 4 bits, to the nearest, without a residual: by whole vectors."""
    half = width // U(2)
    whole = half & ~(WHOLE - U(1))
    for b in range(nb):
        o, p = b * width, c + b * half
        if is_coded(s[b]):
            inv = f32(1) / s[b]
            for i in range(U(0), whole, WHOLE):
                ask(ahead, o + U(2) * i, U(2) * WHOLE)
                nibbles(v, o + i, o + half + i, inv, wire, p + i)
            for i in range(whole, half):
                a = pick_within(v[o + i] * inv, u32(0), 0, 0)
                put4(wire, p, i, half, a, pick_within(v[o + half + i] * inv, u32(0), 0, 0))
        else:
            for i in range(half):
                wire[p + i] = u8(0)


@loop
def nearest8(v, nb, width, s, wire, c, ahead):
    """The same of 8 bits."""
    whole = width & ~(WHOLE - U(1))
    for b in range(nb):
        o, p = b * width, c + b * width
        if is_coded(s[b]):
            inv = f32(1) / s[b]
            for i in range(U(0), whole, WHOLE):
                ask(ahead, o + i, WHOLE)
                octets(v, o + i, o, inv, wire, p + i)
            for i in range(whole, width):
                wire[p + i] = u8(pick_within(v[o + i] * inv, u32(0), 0, 0))
        else:
            for i in range(width):
                wire[p + i] = u8(0)


def random_pass(v, nb, width, s, levels, r, wire, c):
    """Drawn, without a residual: by whole vectors."""
    low, high = i32(-levels), i32(levels)
    half = width // U(2)
    whole = half & ~(WHOLE - U(1))
    for b in range(nb):
        o, p, w = b * width, c + b * half * U(BYTES), b * half
        if is_coded(s[b]):
            inv = f32(1) / s[b]
            for i in range(U(0), whole, WHOLE):
                vectors(v, o + i, half, inv, high, r, w + i, wire, p + i)
            for i in range(whole, half):
                word = r[w + i]
                a = pick_stochastic(v[o + i] * inv, word & u32(0xFFFF), low, high)
                d = pick_stochastic(v[o + half + i] * inv, word >> u32(16), low, high)
                put(wire, p, i, half, a, d)
        else:
            for i in range(half * U(BYTES)):
                wire[p + i] = u8(0)


random4, random8 = (
    specialise(random_pass, str(nbits), {"vectors": vectors, "put": put, "BYTES": nbits // 4})
    for nbits, vectors, put in ((4, drawn_nibbles, put4), (8, drawn_octets, put8))
)


@loop
def quick(v, nb, width, s, levels, stochastic, r, nbits, wire, c, h, keeps, omega, ahead):
    """Code, pack and renew in one pass, where there is one.

    Scales must be of the absolute maximum, so that nothing exceeds `levels`; if stochastic they may
    be of the norm too, and of 8 bits any, which are clamped.
    """
    if nbits == 4:
        if stochastic:
            if keeps:
                random4_keep(v, nb, width, s, levels, r, wire, c, h, omega, ahead)
            else:
                random4(v, nb, width, s, levels, r, wire, c)
        elif keeps:
            nearest4_keep(v, nb, width, s, levels, r, wire, c, h, omega, ahead)
        else:
            nearest4(v, nb, width, s, wire, c, ahead)
    elif stochastic:
        if keeps:
            random8_keep(v, nb, width, s, levels, r, wire, c, h, omega, ahead)
        else:
            random8(v, nb, width, s, levels, r, wire, c)
    elif keeps:
        nearest8_keep(v, nb, width, s, levels, r, wire, c, h, omega, ahead)
    else:
        nearest8(v, nb, width, s, wire, c, ahead)


@loop
def spread4(wire, c, nb, width, s, v):
    """v = decoded, of 4 bits: a quarter faster than by way of codes."""
    half = width // U(2)
    for b in range(nb):
        o, p = b * width, c + b * half
        if s[b] == s[b]:
            for i in range(half):
                two = i32(i8(wire[p + i]))  # shifts are of 64 bits, unless they are cut
                v[o + i] = f32(i32(two << i32(28)) >> i32(28)) * s[b]
                v[o + half + i] = f32(two >> i32(4)) * s[b]
        else:
            for i in range(width):
                v[o + i] = floats(NAN)
