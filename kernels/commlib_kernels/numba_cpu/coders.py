"""What the kinds of formats do with a strip: code it, pack it, unpack it; what a code means.

A coder is five functions. ``code(v, nb, width, s, levels, stochastic, r, table, q)`` fills the
codes q (zeros where the block's scale is 0 or NaN), ``pack(q, nb, width, bits, wire, words, c)``
and ``unpack(wire, words, c, nb, width, bits, q)`` move them to and from byte c of the wire, and
``value(code, scale, constants(table))`` is the value of one code. `words` is the wire seen as
16-bit words.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from commlib_kernels.numba_cpu.jit import SCALARS, bits, floats, inlined, loop
from commlib_kernels.numba_cpu.planes import pack_planes, unpack_planes

U = np.uintp
u8, u16, u32, i8, i32, f32 = np.uint8, np.uint16, np.uint32, np.int8, np.int32, np.float32

uniform = SCALARS.uniform
e4m3_nearest, e4m3_stochastic = SCALARS.e4m3_nearest, SCALARS.e4m3_stochastic
natural_nearest, natural_stochastic = SCALARS.natural_nearest, SCALARS.natural_stochastic
e4m3_value, natural_value = SCALARS.e4m3_value, SCALARS.natural_value
bf16_nearest, bf16_value = SCALARS.bf16_nearest, SCALARS.bf16_value
fp16_nearest, fp16_value = SCALARS.fp16_nearest, SCALARS.fp16_value


class Coder(NamedTuple):
    """The functions of one kind, and the dtype that its codes need."""

    code: Callable[..., Any]
    pack: Callable[..., Any]
    unpack: Callable[..., Any]
    value: Callable[..., Any]
    codes: Any
    constants: Callable[..., Any]


@inlined
def is_coded(scale):
    """Not of a zero block, nor of one that is not finite."""
    return scale == scale and scale != f32(0)


# ---- uniform --------------------------------------------------------------------------------


@loop
def uniform_nearest(v, o, n, inv, low, high, q):
    """Ties to even."""
    for i in range(n):
        q[o + i] = i8(min(max(i32(np.rint(v[o + i] * inv)), low), high))


@loop
def uniform_stochastic(v, o, n, inv, low, high, r, q):
    """Floor after adding a uniform number."""
    h = n // U(2)
    w = o // U(2)
    for i in range(h):
        y = v[o + i] * inv + uniform(r[w + i] & u32(0xFFFF))
        q[o + i] = i8(min(max(i32(np.floor(y)), low), high))
    for i in range(h):
        y = v[o + h + i] * inv + uniform(r[w + i] >> u32(16))
        q[o + h + i] = i8(min(max(i32(np.floor(y)), low), high))


@loop
def uniform_code(v, nb, width, s, levels, stochastic, r, table, q):
    """One reciprocal per block: a division per element costs a quarter of the speed."""
    low, high = i32(-levels), i32(levels)
    for b in range(nb):
        o = b * width
        if not is_coded(s[b]):
            for i in range(width):
                q[o + i] = i8(0)
        elif stochastic:
            uniform_stochastic(v, o, width, f32(1) / s[b], low, high, r, q)
        else:
            uniform_nearest(v, o, width, f32(1) / s[b], low, high, q)


@loop
def uniform_pack(q, nb, width, nbits, wire, words, c):
    """Bit planes; 4 and 8 bits, which people use most, without a detour."""
    if nbits == 8:
        for i in range(nb * width):
            wire[c + i] = u8(q[i])
    elif nbits == 4:
        h = width // U(2)
        for b in range(nb):
            o = b * width
            p = c + b * h
            for i in range(h):
                wire[p + i] = u8((q[o + i] & i8(15)) | (q[o + h + i] << i8(4)))
    else:
        pack_planes(q, nb, width, nbits, wire, c)


@loop
def uniform_unpack(wire, words, c, nb, width, nbits, q):
    """Codes with their sign."""
    if nbits == 8:
        for i in range(nb * width):
            q[i] = i8(wire[c + i])
    elif nbits == 4:
        h = width // U(2)
        for b in range(nb):
            o = b * width
            p = c + b * h
            for i in range(h):
                q[o + i] = i8(i8(wire[p + i] << u8(4)) >> i8(4))
            for i in range(h):
                q[o + h + i] = i8(i8(wire[p + i]) >> i8(4))
    else:
        unpack_planes(wire, c, nb, width, nbits, q)
        half = i8(1 << (nbits - 1))
        for i in range(nb * width):
            q[i] = i8(i8(q[i] ^ half) - half)  # left as an int64 it takes 15 times as long


@inlined
def uniform_value(code, scale, c):
    """code * scale: exact, 8 bits times 8 bits."""
    return f32(code) * scale


# ---- fp8 ------------------------------------------------------------------------------------


@loop
def fp8_code(v, nb, width, s, levels, stochastic, r, table, q):
    """e4m3 of v / scale."""
    for b in range(nb):
        o = b * width
        if not is_coded(s[b]):
            for i in range(width):
                q[o + i] = u8(0)
            continue
        inv = f32(1) / s[b]
        if stochastic:
            h = width // U(2)
            w = o // U(2)
            for i in range(h):
                q[o + i] = u8(e4m3_stochastic(v[o + i] * inv, r[w + i] & u32(0xFFFF)))
            for i in range(h):
                q[o + h + i] = u8(e4m3_stochastic(v[o + h + i] * inv, r[w + i] >> u32(16)))
        else:
            for i in range(width):
                q[o + i] = u8(e4m3_nearest(v[o + i] * inv))


@loop
def fp8_pack(q, nb, width, nbits, wire, words, c):
    """A byte each."""
    for i in range(nb * width):
        wire[c + i] = q[i]


@loop
def fp8_unpack(wire, words, c, nb, width, nbits, q):
    """A byte each."""
    for i in range(nb * width):
        q[i] = wire[c + i]


@inlined
def fp8_value(code, scale, c):
    """e4m3 value times scale: exact, 4 bits times 8 bits."""
    return e4m3_value(code) * scale


# ---- sign -----------------------------------------------------------------------------------


@loop
def sign_code(v, nb, width, s, levels, stochastic, r, table, q):
    """1 where the sign bit is set."""
    for b in range(nb):
        o = b * width
        if is_coded(s[b]):
            for i in range(width):
                q[o + i] = u8(bits(v[o + i]) >> u32(31))
        else:
            for i in range(width):
                q[o + i] = u8(0)


@loop
def sign_pack(q, nb, width, nbits, wire, words, c):
    """Eight to a byte."""
    pack_planes(q, nb, width, 1, wire, c)


@loop
def sign_unpack(wire, words, c, nb, width, nbits, q):
    """Eight from a byte."""
    unpack_planes(wire, c, nb, width, 1, q)


@inlined
def sign_value(code, scale, c):
    """+-scale."""
    return floats(bits(scale) ^ (u32(code) << u32(31)))


# ---- natural --------------------------------------------------------------------------------


@loop
def natural_code(v, nb, width, s, levels, stochastic, r, table, q):
    """Exponent in 8 bits, sign in the ninth."""
    if stochastic:
        h = width // U(2)
        for b in range(nb):
            o = b * width
            w = o // U(2)
            for i in range(h):
                q[o + i] = u16(natural_stochastic(v[o + i], r[w + i] & u32(0xFFFF)))
            for i in range(h):
                q[o + h + i] = u16(natural_stochastic(v[o + h + i], r[w + i] >> u32(16)))
    else:
        for i in range(nb * width):
            q[i] = u16(natural_nearest(v[i]))


@loop
def natural_pack(q, nb, width, nbits, wire, words, c):
    """Exponents, then signs."""
    pack_planes(q, nb, width, 9, wire, c)


@loop
def natural_unpack(wire, words, c, nb, width, nbits, q):
    """Exponents, then signs."""
    unpack_planes(wire, c, nb, width, 9, q)


@inlined
def natural_power(code, scale, c):
    """+-2^e."""
    return natural_value(code)


# ---- casts ----------------------------------------------------------------------------------


@loop
def word_pack(q, nb, width, nbits, wire, words, c):
    """Little-endian words."""
    o = c // U(2)
    for i in range(nb * width):
        words[o + i] = q[i]


@loop
def word_unpack(wire, words, c, nb, width, nbits, q):
    """Little-endian words."""
    o = c // U(2)
    for i in range(nb * width):
        q[i] = words[o + i]


@loop
def bf16_code(v, nb, width, s, levels, stochastic, r, table, q):
    """Nearest even."""
    for i in range(nb * width):
        q[i] = u16(bf16_nearest(v[i]))


@inlined
def bf16_cast(code, scale, c):
    """The value of bf16 bits."""
    return bf16_value(code)


@loop
def fp16_code(v, nb, width, s, levels, stochastic, r, table, q):
    """Nearest even."""
    for i in range(nb * width):
        q[i] = u16(fp16_nearest(v[i]))


@inlined
def fp16_cast(code, scale, c):
    """The value of fp16 bits."""
    return fp16_value(code)


@inlined
def nothing(table):
    """No constants."""
    return f32(0)


CODERS: dict[str, Coder] = {
    "uniform": Coder(uniform_code, uniform_pack, uniform_unpack, uniform_value, np.int8, nothing),
    "fp8": Coder(fp8_code, fp8_pack, fp8_unpack, fp8_value, np.uint8, nothing),
    "sign": Coder(sign_code, sign_pack, sign_unpack, sign_value, np.uint8, nothing),
    "natural": Coder(natural_code, natural_pack, natural_unpack, natural_power, np.uint16, nothing),
    "bf16": Coder(bf16_code, word_pack, word_unpack, bf16_cast, np.uint16, nothing),
    "fp16": Coder(fp16_code, word_pack, word_unpack, fp16_cast, np.uint16, nothing),
}
"""Kind of a format -> its coder."""
