"""Blocks: fp32 values to codes and scales, and back. Arrays are (blocks, elements of a block)."""

import numpy as np
import numpy.typing as npt

from commlib_kernels.formats import FP8_MAX, Format
from commlib_kernels.reference import elements
from commlib_kernels.reference.elements import E2M1, E4M3, E4M3_CODES, F32, NAN, Bits, Floats
from commlib_kernels.tables import thresholds

HUGE = np.uint32(0x7E800000)  # 2^126: from here on 1 / scale would be subnormal
HUGE_ROTATED = np.uint32(0x78800000)  # 2^114: up to 4096 such values are added to rotate back
TINY = np.uint32(0x0D800000)  # 2^-100: below this a block counts as zero
BAD_SCALE = np.uint32(0x7FC0)
RUN = 4096
LANES = 32

Codes = npt.NDArray[np.int32]


def absmax(v: Floats) -> Bits:
    """Maximum of the absolute bit patterns per row: order-free, and it shows NaN and Inf."""
    top: Bits = (elements.bits(v) & np.uint32(0x7FFFFFFF)).max(axis=1, initial=0)
    return top


def lane_sum(v: npt.NDArray[np.float64]) -> np.float64:
    """Sum in the order every backend can follow: 32 lanes, then a tree over the lanes.

    Lane j adds elements j, j + 32, ... in order; then lane j adds lane j + k for k = 16 .. 1.
    """
    padded = np.zeros(-(-max(v.size, 1) // LANES) * LANES)
    padded[: v.size] = v
    lanes = np.zeros(LANES)
    for row in padded.reshape(-1, LANES):
        lanes += row
    for k in (16, 8, 4, 2, 1):
        lanes[:k] += lanes[k : 2 * k]
    return np.float64(lanes[0])


def norm_sum(v: npt.NDArray[np.float64]) -> np.float64:
    """`lane_sum` of the `lane_sum` of every run of 4096 elements."""
    runs = [lane_sum(v[i : i + RUN]) for i in range(0, v.size, RUN)]
    return lane_sum(np.array(runs))


def scale_bits(fmt: Format, v: Floats, numel: int) -> tuple[np.uint32, np.uint32]:
    """(bf16 bits of the scale, absmax bits) of one block of `numel` elements."""
    m = absmax(v.reshape(1, -1))[0]
    if m >= (HUGE if fmt.rotate is None else HUGE_ROTATED):
        return BAD_SCALE, m
    if m < TINY:
        return np.uint32(0), m
    if fmt.scale == "mean":
        mean = norm_sum(np.abs(v.astype(np.float64))) / numel
        return elements.bf16_nearest(np.array([mean], F32))[0], m
    if fmt.scale in ("fit", "unbiased"):
        s = _fitted(fmt, v, m)
        return (BAD_SCALE if s >= HUGE >> 16 else s), m
    if fmt.power_scale:
        return _power(fmt, m), m
    if fmt.scale == "l2":
        norm = np.sqrt(norm_sum(v.astype(np.float64) ** 2))
        top = np.array([norm / fmt.levels]).astype(F32)
    else:
        top = m.reshape(1).view(F32) / F32(fmt.top)
    s = elements.bf16_up(top)[0]
    return (BAD_SCALE if s >= HUGE >> 16 else s), m


def _power(fmt: Format, m: np.uint32) -> np.uint32:
    """bf16 bits of 2^e, ``e = floor(log2 m) - floor(log2 top)``: OCP Microscaling Formats 1.0, 6.3.

    `top` is the largest code's value; m / 2^e may exceed it. With e8m0_up e is one more where so.
    """
    fraction, exponent = np.frexp(np.float64(m.reshape(1).view(F32)[0]))
    top_fraction, top_exponent = np.frexp(fmt.top)
    e = int(exponent) - int(top_exponent)
    if fmt.scale == "e8m0_up" and fraction > top_fraction:
        e += 1
    return np.uint32(127 + e << 7)


def scale_bytes(fmt: Format, scales: Bits) -> npt.NDArray[np.uint8]:
    """Scales as they travel: bf16, or e8m0, whose byte is the exponent of fp32 and 255 is NaN."""
    if fmt.power_scale:
        return np.where(scales == BAD_SCALE, 255, scales >> 7).astype(np.uint8)
    return scales.astype("<u2").view(np.uint8)


def scales_of(fmt: Format, data: npt.NDArray[np.uint8]) -> Bits:
    """The bf16 bits of scales that travelled. The byte 0 is the scale 0, not 2^-127."""
    if fmt.power_scale:
        wide = data.astype(np.uint32)
        return np.where(wide == 255, BAD_SCALE, wide << 7).astype(np.uint32)
    return data.copy().view("<u2").astype(np.uint32)


def half_sum(v: Floats) -> np.float32:
    """Sum in fp32, in halves: with zeros to a power of two, then the upper half joins the lower."""
    total = np.zeros(1 << max(v.size - 1, 1).bit_length(), F32)
    total[: v.size] = v
    while total.size > 1:
        half = total.size // 2
        total = total[:half] + total[half:]
    return np.float32(total[0])


def normal(v: Floats, m: np.uint32) -> tuple[np.float32, np.float32]:
    """(1 / root mean square, root mean square times 2^-e) of a block, e the exponent of its m.

    Squares are of ``v 2^-e``, which is below 2, so that they stay finite.
    """
    down = (np.uint32(254) - (m >> 23) << np.uint32(23)).astype(np.uint32).view(F32)
    u = v * down
    rms = np.sqrt(half_sum(u * u) / F32(v.size))
    return F32(1) / rms * down, rms


def table_codes(fmt: Format, z: Floats) -> Codes:
    """Numbers of the nearest values; between two, of the one nearer to zero."""
    t, wide = thresholds(fmt.values), z[..., None]
    over = np.where(t < 0, wide >= t, wide > t)
    codes: Codes = over.sum(axis=-1).astype(np.int32)
    return codes


def grid_codes(fmt: Format, z: Floats) -> Codes:
    """Multiples of the step nearest to z, ties to even."""
    y = np.rint(z * (F32(1) / F32(fmt.step)))
    codes: Codes = np.clip(y, -fmt.levels, fmt.levels).astype(np.int32)
    return codes


def _fitted(fmt: Format, v: Floats, m: np.uint32) -> np.uint32:
    """bf16 bits of the scale that suits the codes of ``z = v / rms`` best.

    fit: ``rms <c, z> / <c, c>``, the least error. unbiased: ``rms n / <c, z>``, EDEN's.
    """
    inv, rms = normal(v, m)
    z = v * inv
    if fmt.kind == "grid":
        c = grid_codes(fmt, z).astype(F32)
    else:
        c = np.array(fmt.values, F32)[table_codes(fmt, z)]
    along = half_sum(c * z)
    ratio = along / half_sum(c * c) if fmt.scale == "fit" else F32(v.size) / along
    up = (m >> 23 << np.uint32(23)).astype(np.uint32).view(F32)
    scale: np.uint32 = elements.bf16_nearest(np.array([rms * ratio * up], F32))[0]
    return scale


def code(
    fmt: Format,
    v: Floats,
    scales: Bits,
    random: npt.NDArray[np.uint64] | None,
    numel: int | None = None,
) -> Codes:
    """Codes of blocks whose scales are good; rows with a zero or bad scale get code 0.

    numel: real elements of a row; None: all of them.
    """
    if fmt.kind == "bf16":
        return elements.bf16_nearest(v).astype(np.int32)
    if fmt.kind == "fp16":
        return elements.fp16_nearest(v).astype(np.int32)
    if fmt.kind == "natural":
        return _natural(v, random)
    good = (scales != 0) & (scales != BAD_SCALE)
    inv = np.ones(scales.size, F32)
    np.divide(F32(1), elements.bf16_value(scales), out=inv, where=good)
    if fmt.scale in ("fit", "unbiased"):
        tops = absmax(v[:, :numel])
        inv = np.array(
            [
                normal(row[:numel], m)[0] if ok else 1
                for row, m, ok in zip(v, tops, good, strict=True)
            ],
            F32,
        )
    v = np.where(good[:, None], v, F32(0))
    if fmt.kind == "sign":
        codes = (elements.bits(v) >> 31).astype(np.int32)
    elif fmt.kind == "fp8":
        codes = _e4m3(v * inv[:, None], random)
    elif fmt.kind == "fp4":
        codes = _e2m1(v * inv[:, None])
    elif fmt.table:
        codes = table_codes(fmt, v * inv[:, None])
    elif fmt.kind == "grid":
        codes = grid_codes(fmt, v * inv[:, None])
    else:
        y = v * inv[:, None]
        y = np.rint(y) if random is None else np.floor(y + _uniform(random))
        codes = np.clip(y, -fmt.levels, fmt.levels).astype(np.int32)
    return np.where(good[:, None], codes, 0)


def value(fmt: Format, codes: Codes, scales: Bits) -> Floats:
    """Decoded values."""
    if fmt.kind == "bf16":
        return elements.bf16_value(codes)
    if fmt.kind == "fp16":
        return elements.fp16_value(codes)
    if fmt.kind == "natural":
        exponent = (codes & 0xFF).astype(np.uint32)
        sign = (codes >> 8).astype(np.uint32)
        return np.where(exponent == 255, NAN, ((sign << 31) | (exponent << 23)).view(F32))
    s = elements.bf16_value(scales)[:, None]
    if fmt.kind == "sign":
        v = np.where(codes == 1, -s, s)
    elif fmt.kind == "fp8":
        magnitude = E4M3_CODES[codes & 0x7F].astype(F32) * s
        v = np.where(codes & 0x80, -magnitude, magnitude)
    elif fmt.kind == "fp4":
        magnitude = E2M1[codes & 7].astype(F32) * s
        v = np.where(codes & 8, -magnitude, magnitude)
    elif fmt.table:
        v = np.array(fmt.values, F32)[codes] * s
    else:
        v = codes.astype(F32) * s
    return np.where(np.isnan(s), NAN, v)


def _uniform(random: npt.NDArray[np.uint64]) -> Floats:
    """16 random bits to the middle of one of 65536 cells of [0, 1)."""
    return (random.astype(F32) + F32(0.5)) * F32(2.0**-16)


def _natural(v: Floats, random: npt.NDArray[np.uint64] | None) -> Codes:
    """Sign and exponent; the mantissa is the probability of rounding up (Horvath et al. 2019)."""
    b = elements.bits(v)
    magnitude = b & np.uint32(0x7FFFFFFF)
    if random is None:
        add = np.full_like(b, 0x400000)
    else:
        add = (random.astype(np.uint32) << np.uint32(7)) | np.uint32(64)
    exponent = np.minimum((magnitude + add) >> np.uint32(23), np.uint32(254))
    signed = exponent | (b >> np.uint32(31)) << np.uint32(8)
    # The sign of a NaN is not the same on all processors: it does not travel.
    codes: Codes = np.where(magnitude >= 0x7F800000, 255, signed).astype(np.int32)
    return codes


def _e4m3(y: Floats, random: npt.NDArray[np.uint64] | None) -> Codes:
    """fp8 codes: the nearest (ties to even code), or one of the two neighbours at random."""
    a = np.minimum(np.abs(y), F32(FP8_MAX)).astype(np.float64)
    low = np.searchsorted(E4M3, a, side="right") - 1
    high = np.minimum(low + 1, E4M3.size - 1)
    gap = np.where(high > low, E4M3[high] - E4M3[low], 1.0)
    if random is None:
        twice = 2 * (a - E4M3[low])
        up = (twice > gap) | ((twice == gap) & (low % 2 == 1))
    else:
        up = (a - E4M3[low]) / gap + (random + 0.5) / 65536 >= 1
        # Below 2^-6 values are evenly spaced and the sum is taken in fp32 as for integers.
        even = np.floor(a.astype(F32) * F32(512) + _uniform(random)) > low
        up = np.where(a < 2.0**-6, even, up)
    codes: Codes = (np.where(up, high, low) | (elements.bits(y) >> 31) << 7).astype(np.int32)
    return codes


def _e2m1(y: Floats) -> Codes:
    """4-bit codes: the nearest, ties to the even code; 6 and beyond is the last."""
    a = np.abs(y)[..., None]
    middles = (E2M1[1:] + E2M1[:-1]) / 2
    # The upper neighbour of a middle is the even one where its number is.
    over = np.where(np.arange(1, E2M1.size) % 2 == 0, a >= middles, a > middles)
    codes: Codes = (over.sum(axis=-1) | (elements.bits(y) >> 31) << 3).astype(np.int32)
    return codes


def pack(fmt: Format, codes: Codes) -> npt.NDArray[np.uint8]:
    """Codes to bytes, (blocks, bytes): bit planes, lowest first; casts as little-endian words.

    A plane of w bits packs element ``j n w / 8 + i`` of an n-element block into byte i, at bit j w.
    """
    blocks, n = codes.shape
    if fmt.kind in ("fp16", "bf16"):
        return codes.astype("<u2").view(np.uint8).reshape(blocks, 2 * n)
    planes, shift = [], 0
    for width in fmt.planes:
        digits = (codes >> shift) & ((1 << width) - 1)
        groups = digits.reshape(blocks, 8 // width, n * width // 8)
        weights = (1 << (width * np.arange(8 // width)))[None, :, None]
        planes.append((groups * weights).sum(axis=1))
        shift += width
    return np.concatenate(planes, axis=1).astype(np.uint8)


def unpack(fmt: Format, data: npt.NDArray[np.uint8], n: int) -> Codes:
    """Bytes to codes, (blocks, n); uniform codes and those of grids are sign-extended."""
    blocks = data.shape[0]
    if fmt.kind in ("fp16", "bf16"):
        return np.ascontiguousarray(data).view("<u2").astype(np.int32).reshape(blocks, n)
    codes = np.zeros((blocks, n), np.int32)
    start, shift = 0, 0
    for width in fmt.planes:
        size = n * width // 8
        plane = data[:, start : start + size].astype(np.int32)
        digits = [(plane >> (j * width)) & ((1 << width) - 1) for j in range(8 // width)]
        codes |= np.concatenate(digits, axis=1) << shift
        start, shift = start + size, shift + width
    if fmt.kind in ("uniform", "grid"):
        half = 1 << (fmt.bits - 1)
        codes = (codes ^ half) - half
    return codes
