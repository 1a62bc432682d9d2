"""Loops over one strip: some whole blocks, held in scratch memory in the L1 cache.

Working strip by strip keeps the cost of a call (and of branching on dtypes) away from the blocks,
and every loop simple enough to vectorise. In all functions `v` is the strip in fp32: `nb` blocks of
`width` elements, of which the first `n` are real and the rest, up to a multiple of 8, are zeros.
`s` holds a block's scale as a number; 0 marks a zero block and NaN one that is not finite.
"""

import numpy as np

from commlib_kernels.numba_cpu.jit import SCALARS, bits, floats, loop
from commlib_kernels.scalar import BAD_SCALE, HUGE, NAN, TINY

U = np.uintp
u8, u16, u32 = np.uint8, np.uint16, np.uint32
f32, f64, i8, i32 = np.float32, np.float64, np.int8, np.int32

FP32, FP16, BF16, INT8, NONE = 0, 1, 2, 3, 4
"""Element types of tensors and residuals, as kernels are told them."""

ABSMAX, L2, MEAN, UNSCALED, FITTED, UNBIASED, POWER, POWER_UP = range(8)
"""Scale rules, as kernels are told them."""

STRIP = 2048
"""Elements that are worked on together (at least a block): with its codes it fits the L1 cache."""
STRIP_KEEPING = 512
"""The same with a residual, which is read and written as well: while the processor codes one short
strip it loads the next. A third faster than 2048 (64 MiB as int4: 6.2 instead of 8.6 ms)."""
MAX_BLOCK = 4096
LANES = U(32)
RUN = U(4096)

bf16_up, bf16_nearest, bf16_value = SCALARS.bf16_up, SCALARS.bf16_nearest, SCALARS.bf16_value
fp16_nearest, fp16_value = SCALARS.fp16_nearest, SCALARS.fp16_value
power_scale = SCALARS.power_scale


@loop
def load(x32, x16, dtype, o, n, v):
    """Elements from o on as fp32; zeros up to the next multiple of 8."""
    if dtype == FP32:
        for i in range(n):
            v[i] = x32[o + i]
    elif dtype == BF16:
        for i in range(n):
            v[i] = bf16_value(x16[o + i])
    else:
        for i in range(n):
            v[i] = fp16_value(x16[o + i])
    for i in range(n, (n + U(7)) & ~U(7)):
        v[i] = f32(0)


@loop
def store(x32, x16, dtype, o, n, v):
    """fp32 values to the tensor, rounded to nearest even; one NaN for all NaNs."""
    if dtype == FP32:
        for i in range(n):
            x32[o + i] = v[i] if v[i] == v[i] else floats(NAN)
    elif dtype == BF16:
        for i in range(n):
            x16[o + i] = u16(bf16_nearest(v[i]))
    else:
        for i in range(n):
            x16[o + i] = u16(fp16_nearest(v[i]))


@loop
def clear(v, first, last):
    """v = 0 from element `first` to `last`."""
    for i in range(first, last):
        v[i] = f32(0)


@loop
def multiply(v, n, factor):
    """v *= factor."""
    for i in range(n):
        v[i] *= factor


@loop
def add(x, y, n):
    """y = x + y."""
    for i in range(n):
        y[i] = x[i] + y[i]


@loop
def add_scaled(g, alpha, h, n, padded, v):
    """v = g + alpha h, not fused; zeros after the last element."""
    for i in range(n):
        v[i] = g[i] + alpha * h[i]
    for i in range(n, padded):
        v[i] = f32(0)


# ---- scales ---------------------------------------------------------------------------------


@loop
def absmax(v, o, n):
    """Maximum of the absolute bit patterns: integers, because that vectorises and shows NaN.

    Numba makes 64 bits of `&`; a maximum of those takes four times as long.
    """
    m = u32(0)
    for i in range(n):
        m = max(m, u32(bits(v[o + i]) & u32(0x7FFFFFFF)))
    return m


@loop
def lane_add(v, o, n, rule, lanes):
    """Element i joins lane i mod 32: its square (l2) or its magnitude (mean), in fp64."""
    whole = n // LANES * LANES
    if rule == L2:
        for row in range(o, o + whole, LANES):
            for j in range(LANES):
                lanes[j] += f64(v[row + j]) * f64(v[row + j])
        for j in range(n - whole):
            lanes[j] += f64(v[o + whole + j]) * f64(v[o + whole + j])
    else:
        for row in range(o, o + whole, LANES):
            for j in range(LANES):
                lanes[j] += abs(f64(v[row + j]))
        for j in range(n - whole):
            lanes[j] += abs(f64(v[o + whole + j]))


@loop
def lane_total(lanes):
    """Tree over the lanes; leaves them zero."""
    k = U(16)
    while k > U(0):
        for j in range(k):
            lanes[j] += lanes[j + k]
        k = k // U(2)
    total = lanes[0]
    for j in range(LANES):
        lanes[j] = f64(0)
    return total


@loop
def scale_of(m, huge, total, numel, rule, levels):
    """bf16 bits of the scale, from the absolute maximum's bits and the norm's sum."""
    if m >= huge:
        return BAD_SCALE
    if m < TINY:
        return u32(0)
    if rule == MEAN:
        return bf16_nearest(f32(total / f64(numel)))
    if rule >= POWER:
        return power_scale(m, levels, rule == POWER_UP)
    top = floats(m) / levels
    if rule == L2:
        top = f32(np.sqrt(total) / f64(levels))
    s = bf16_up(top)
    return BAD_SCALE if s >= HUGE >> u32(16) else s


@loop
def find_scales(v, nb, width, n, huge, rule, levels, lanes, s):
    """The scale of every block of the strip."""
    for b in range(nb):
        o = b * width
        m = absmax(v, o, width)
        total = f64(0)
        if rule in (L2, MEAN):
            lane_add(v, o, width, rule, lanes)
            total = lane_total(lanes)
        s[b] = bf16_value(scale_of(m, huge, total, min(width, n - o), rule, levels))


@loop
def add_and_scale(g, alpha, h, nb, width, rule, levels, v, s):
    """`add_scaled` and `find_scales` (of the absmax) of full blocks in one pass."""
    for b in range(nb):
        m = u32(0)
        for i in range(b * width, (b + U(1)) * width):
            y = g[i] + alpha * h[i]
            v[i] = y
            m = max(m, u32(bits(y) & u32(0x7FFFFFFF)))
        s[b] = bf16_value(scale_of(m, HUGE, f64(0), width, rule, levels))


@loop
def write_scales(s, nb, words, o):
    """Scales to the wire, as bf16."""
    for b in range(nb):
        words[o + b] = u16(bits(s[b]) >> u32(16))


@loop
def read_scales(words, o, step, nb, s):
    """Scales from the wire; step 0 where all blocks share one."""
    for b in range(nb):
        s[b] = bf16_value(words[o + b * step])


@loop
def write_powers(s, nb, wire, o):
    """Scales that are powers of two to the wire, as e8m0: the exponent of fp32; NaN is 255."""
    for b in range(nb):
        wire[o + b] = u8(bits(s[b]) >> u32(23))


@loop
def read_powers(wire, o, nb, s):
    """The same from the wire. The byte 0 is the scale 0, not 2^-127."""
    for b in range(nb):
        e = u32(wire[o + b])
        s[b] = floats(NAN if e == u32(255) else e << u32(23))


@loop
def same_scale(scale, nb, s):
    """One scale for all blocks."""
    for b in range(nb):
        s[b] = scale


# ---- residuals ------------------------------------------------------------------------------


@loop
def load_residual(h16, h8, hs, kind, o, block, nb, width, n, h):
    """A bf16 or int8 residual as fp32."""
    if kind == BF16:
        for i in range(n):
            h[i] = bf16_value(h16[o + i])
    else:
        for b in range(nb):
            scale = bf16_value(hs[block + b])
            start = b * width
            for i in range(min(width, n - start)):
                h[start + i] = f32(h8[o + start + i]) * scale


@loop
def store_residual(h16, h8, hs, kind, o, block, nb, width, n, h, s):
    """Keep the residual of the blocks that were coded; as int8 it gets scales of its own."""
    if kind == BF16:
        for i in range(n):
            h16[o + i] = u16(bf16_nearest(h[i]))
    else:
        for b in range(nb):
            if s[b] == s[b]:
                start = b * width
                last = min(width, n - start)
                scale = scale_of(absmax(h, start, last), HUGE, f64(0), last, ABSMAX, f32(127))
                inv = f32(0)
                if scale == BAD_SCALE:  # what int8 cannot hold is forgotten, not kept as NaN
                    scale = u32(0)
                if scale != u32(0):
                    inv = f32(1) / bf16_value(scale)
                hs[block + b] = u16(scale)
                for i in range(last):
                    y = np.rint(h[start + i] * inv)
                    h8[o + start + i] = i8(min(max(i32(y), i32(-127)), i32(127)))


@loop
def renew_from(nb, width, n, s, v, decoded, h, carry, omega):
    """As `renew` (kernels.py), from what was decoded."""
    for b in range(nb):
        o = b * width
        last = min(o + width, n)
        if s[b] == f32(0):
            for i in range(o, last):
                h[i] = f32(0)
        elif s[b] == s[b] and carry == f32(0):
            for i in range(o, last):
                h[i] = omega * (v[i] - decoded[i])
        elif s[b] == s[b]:
            for i in range(o, last):
                h[i] = carry * h[i] + omega * (v[i] - decoded[i])
