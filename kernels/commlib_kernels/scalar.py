"""The arithmetic of one element, as scalar functions that Numba compiles for CPUs and for GPUs.

`make` is a factory because the two targets differ in the decorator, in how a product or a sum is
kept from being contracted into a fused multiply-add (the bytes must not depend on that), in how a
float's bits are read, and in how it becomes an integer. Equations: kernels/README.md.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

u32, u64, i32, f32 = np.uint32, np.uint64, np.int32, np.float32

HUGE = u32(0x7E800000)
"""2^126: a block with a larger maximum is not representable (1 / scale would be subnormal)."""
HUGE_ROTATED = u32(0x78800000)
"""2^114: the same of a rotated block, of whose values 4096 are added."""
TINY = u32(0x0D800000)
"""2^-100: a block with a smaller maximum counts as zero."""
BAD_SCALE = u32(0x7FC0)
"""bf16 NaN: the scale of a block that holds NaN, Inf or a huge value."""
NAN = u32(0x7FC00000)

Function = Callable[..., Any]


class Scalars(NamedTuple):
    """What `make` gives."""

    bf16_up: Function
    bf16_nearest: Function
    bf16_value: Function
    fp16_nearest: Function
    fp16_value: Function
    e4m3_nearest: Function
    e4m3_stochastic: Function
    e4m3_value: Function
    e2m1_nearest: Function
    e2m1_value: Function
    power_scale: Function
    natural_nearest: Function
    natural_stochastic: Function
    natural_value: Function
    uniform: Function
    philox: Function


def make(
    jit: Function,
    mul: Function,
    add: Function,
    bits: Function,
    floats: Function,
    rint: Function,
    floor: Function,
) -> Scalars:
    """Compile the scalar functions.

    Args:
        jit: decorator; should inline.
        mul, add: fp32 product and sum that are never fused with what follows.
        bits, floats: fp32 to its uint32 pattern and back.
        rint, floor: a small fp32 >= 0 to a uint32, ties to even or downwards.
    """

    @jit
    def bf16_up(x):
        return (bits(x) + u32(0xFFFF)) >> u32(16)

    @jit
    def bf16_nearest(x):
        b = bits(x)
        near = (b + u32(0x7FFF) + ((b >> u32(16)) & u32(1))) >> u32(16)
        return near if (b & u32(0x7FFFFFFF)) <= u32(0x7F800000) else u32(0x7FC0)

    @jit
    def bf16_value(b):
        return floats(u32(b) << u32(16))

    @jit
    def fp16_nearest(x):
        b = bits(x)
        a = b & u32(0x7FFFFFFF)
        sign = (b >> u32(16)) & u32(0x8000)
        normal = (a + u32(0xFFF) + ((a >> u32(13)) & u32(1))) >> u32(13)
        # 2^-14 is the smallest normal: below it the steps are even, 2^-24 apart.
        even = rint(mul(floats(min(a, u32(0x38800000))), f32(2.0**24)))
        half = even if a < u32(0x38800000) else normal - u32(112 << 10)
        half = u32(0x7C00) if a >= u32(0x477FF000) else half
        return sign | half if a <= u32(0x7F800000) else u32(0x7E00)

    @jit
    def fp16_value(h):
        w = u32(h)
        magnitude = (w & u32(0x7FFF)) << u32(13)
        # A power of two moves the exponent's bias, and turns subnormals into normals.
        value = bits(mul(floats(magnitude), f32(2.0**112)))
        value = value if magnitude < u32(0x0F800000) else magnitude | u32(0x7F800000)
        return floats(value | ((w & u32(0x8000)) << u32(16)))

    @jit
    def e4m3_nearest(y):
        b = bits(y)
        a = min(b & u32(0x7FFFFFFF), u32(0x43E00000))  # 448
        normal = ((a + u32(0x7FFFF) + ((a >> u32(20)) & u32(1))) >> u32(20)) - u32(120 << 3)
        even = rint(mul(floats(min(a, u32(0x3C800000))), f32(512)))
        return (even if a < u32(0x3C800000) else normal) | ((b >> u32(24)) & u32(0x80))

    @jit
    def e4m3_stochastic(y, r):
        b = bits(y)
        a = min(b & u32(0x7FFFFFFF), u32(0x43E00000))
        normal = ((a + ((u32(r) << u32(4)) | u32(8))) >> u32(20)) - u32(120 << 3)
        small = mul(floats(min(a, u32(0x3C800000))), f32(512))
        even = floor(add(small, uniform(r)))
        return (even if a < u32(0x3C800000) else normal) | ((b >> u32(24)) & u32(0x80))

    @jit
    def e4m3_value(c):
        w = u32(c)
        magnitude = w & u32(0x7F)
        normal = (magnitude << u32(20)) + u32(120 << 23)
        even = bits(mul(f32(i32(magnitude)), f32(2.0**-9)))
        value = even if magnitude < u32(8) else normal
        return floats(value | ((w & u32(0x80)) << u32(24)))

    @jit
    def e2m1_nearest(y):
        b = bits(y)
        a = min(b & u32(0x7FFFFFFF), u32(0x40C00000))  # 6
        normal = ((a + u32(0x1FFFFF) + ((a >> u32(22)) & u32(1))) >> u32(22)) - u32(126 << 1)
        even = rint(mul(floats(min(a, u32(0x3F800000))), f32(2)))
        return (even if a < u32(0x3F800000) else normal) | ((b >> u32(28)) & u32(8))

    @jit
    def e2m1_value(c):
        w = u32(c)
        magnitude = w & u32(7)
        normal = (magnitude << u32(22)) + u32(126 << 23)
        even = bits(mul(f32(i32(magnitude)), f32(0.5)))
        value = even if magnitude < u32(2) else normal
        return floats(value | ((w & u32(8)) << u32(28)))

    @jit
    def power_scale(m, top, up):
        """bf16 bits of 2^(floor(log2 m) - floor(log2 top)); `up`: twice that where m exceeds it."""
        fraction = u32(0x7FFFFF)
        over = up and (m & fraction) > (bits(top) & fraction)
        e = (m >> u32(23)) - (bits(top) >> u32(23)) + u32(127)
        return (e + u32(1) if over else e) << u32(7)

    @jit
    def natural_code(b, add_bits):
        magnitude = b & u32(0x7FFFFFFF)
        exponent = min((magnitude + add_bits) >> u32(23), u32(254))
        code = exponent | ((b >> u32(31)) << u32(8))
        return code if magnitude < u32(0x7F800000) else u32(255)

    @jit
    def natural_nearest(x):
        return natural_code(bits(x), u32(0x400000))

    @jit
    def natural_stochastic(x, r):
        return natural_code(bits(x), (u32(r) << u32(7)) | u32(64))

    @jit
    def natural_value(c):
        w = u32(c)
        exponent = w & u32(0xFF)
        value = ((w >> u32(8)) << u32(31)) | (exponent << u32(23))
        return floats(NAN if exponent == u32(255) else value)

    @jit
    def uniform(r):
        """16 random bits to the middle of one of 65536 cells of [0, 1)."""
        # Exact: 1 + (R + 1/2) / 65536 has the bits R << 7 | 64 in its mantissa.
        return add(floats(u32(0x3F800040) | (u32(r) << u32(7))), f32(-1))

    @jit
    def turn(c0, c1, c2, c3, k0, k1):
        p0 = u64(c0) * u64(0xD2511F53)
        p1 = u64(c2) * u64(0xCD9E8D57)
        return u32(p1 >> u64(32)) ^ c1 ^ k0, u32(p1), u32(p0 >> u64(32)) ^ c3 ^ k1, u32(p0)

    @jit
    def philox(c0, c1, c2, c3, k0, k1):
        """Philox4x32-10. Written out: a loop of rounds would keep the caller from vectorising."""
        w0, w1 = u32(0x9E3779B9), u32(0xBB67AE85)
        c0, c1, c2, c3 = turn(c0, c1, c2, c3, k0, k1)
        k0, k1 = u32(k0 + w0), u32(k1 + w1)
        c0, c1, c2, c3 = turn(c0, c1, c2, c3, k0, k1)
        k0, k1 = u32(k0 + w0), u32(k1 + w1)
        c0, c1, c2, c3 = turn(c0, c1, c2, c3, k0, k1)
        k0, k1 = u32(k0 + w0), u32(k1 + w1)
        c0, c1, c2, c3 = turn(c0, c1, c2, c3, k0, k1)
        k0, k1 = u32(k0 + w0), u32(k1 + w1)
        c0, c1, c2, c3 = turn(c0, c1, c2, c3, k0, k1)
        k0, k1 = u32(k0 + w0), u32(k1 + w1)
        c0, c1, c2, c3 = turn(c0, c1, c2, c3, k0, k1)
        k0, k1 = u32(k0 + w0), u32(k1 + w1)
        c0, c1, c2, c3 = turn(c0, c1, c2, c3, k0, k1)
        k0, k1 = u32(k0 + w0), u32(k1 + w1)
        c0, c1, c2, c3 = turn(c0, c1, c2, c3, k0, k1)
        k0, k1 = u32(k0 + w0), u32(k1 + w1)
        c0, c1, c2, c3 = turn(c0, c1, c2, c3, k0, k1)
        k0, k1 = u32(k0 + w0), u32(k1 + w1)
        return turn(c0, c1, c2, c3, k0, k1)

    return Scalars(
        bf16_up,
        bf16_nearest,
        bf16_value,
        fp16_nearest,
        fp16_value,
        e4m3_nearest,
        e4m3_stochastic,
        e4m3_value,
        e2m1_nearest,
        e2m1_value,
        power_scale,
        natural_nearest,
        natural_stochastic,
        natural_value,
        uniform,
        philox,
    )
