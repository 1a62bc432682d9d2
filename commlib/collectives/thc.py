"""THC: codes that owners of parts add without decoding them (Li et al. 2024, arXiv 2302.08545).

All ranks use one grid, so that the sum of their codes is the code of their sum. On W ranks, of a
chunk of at most 4096 values of a parameter with its residual, v_r = g_r + h_r:

    y_r = rotate(v_r)                                signs from a shared seed, then Hadamard
    s   = max_r rms(y_r)                             first exchange: a number per chunk
    k_r = stochastic rounding of y_r, clamped to +-clip s, to the grid 0 .. L     L = 2^bits - 1
    K   = sum_r k_r                                  second exchange, all-to-all of packed codes;
                                                     the owner adds integers, W L at most
    D   = unrotate(clip s (2 K / L - W))             third exchange, all-gather of K
    h_r = v_r - unrotate(clip s (2 k_r / L - 1))     with feedback: rounding and clamping
    out = factor D

Rotated values are close to Gaussian, whatever v was, so that few lie beyond `clip` standard
deviations: at 4 bits 2.2 of them make the least error, step^2 / 6 by rounding and
2 ((1 + c^2) (1 - Phi(c)) - c phi(c)) by clamping. Sums are of integers and everything after them
element by element in one order: all ranks end with the same bits, and a parameter's result does not
depend on its bucket.

A chunk with a NaN or Inf on any rank, or rms from 2^104 on, becomes NaN on all ranks, and its
residuals stay. One with rms below 2^-100 on all ranks becomes zero, and is owed.

Bytes a rank sends: (W-1)/W n (bits / 8 + 1) for n values, 2 instead of 1 where W L > 255, and
4 (W-1) for each chunk.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from commlib_kernels.layout import Layout

from ..algorithms import Thc
from ..feedback import Compressor, Key, Plain, names_of
from ..scheme import Scheme
from ..topology import Topology
from ..traffic import Transport
from .base import Step, Steps, begin, scale_, span
from .pool import Pool

CLIP = 2.2  # standard deviations, for 4 bits
CLIPS = {2: 1.27, 4: CLIP, 8: 3.77}  # of the least error for Gaussian values
MAX_BITS = 8
CHUNK = 4096  # values that are rotated together, and have one scale
LEAST = 8  # the smallest rotation: whole bytes of codes
ALIGN = 16  # bytes that parts begin at
# Sums of what is decoded stay finite below: 2^11 ranks, clip below 2^2, a rotation times 2^6.
LIMIT, TINY = 2.0**104, 2.0**-100


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """x times the Hadamard matrix over sqrt(n), which is its own inverse, along dimension -1.

    x: (..., n), n a power of two, floating. Raises ValueError for another n.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"hadamard: the last dimension is {n}, it must be a power of two; pad it")
    half, y = 1, x
    while half < n:
        pairs = y.reshape(*x.shape[:-1], n // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack([a + b, a - b], dim=-2)
        half *= 2
    return y.reshape(x.shape) / math.sqrt(n)


def rotate(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Flat x, padded with zeros to a power of two, with random signs, through `hadamard`.

    seed: of the signs, below 2^32, the same on all workers. Norms stay.
    """
    size = 1 << max(0, x.numel() - 1).bit_length()
    padded = torch.nn.functional.pad(x, (0, size - x.numel()))
    return hadamard(padded * _signs(size, seed, x.device))


def unrotate(y: torch.Tensor, seed: int, numel: int) -> torch.Tensor:
    """The first `numel` elements of what `rotate` made y of."""
    return (hadamard(y) * _signs(y.numel(), seed, y.device))[:numel]


def scale(y: torch.Tensor) -> torch.Tensor:
    """Root mean square of y, of which the largest of all workers becomes their scale."""
    return y.square().mean().sqrt()


def encode(
    y: torch.Tensor,
    scale: float | torch.Tensor,
    generator: torch.Generator,
    *,
    bits: int = 4,
    clip: float = CLIP,
) -> torch.Tensor:
    """Codes 0 .. 2^bits - 1 (uint8) of y between -clip scale and clip scale, beyond them the ends.

    scale: of all, or of each row (rows, 1), finite and above 0.
    generator: of the rounding, another on every worker. The expected value of a code is the place
    of its clamped value. Raises ValueError for a bad grid.
    """
    levels = _levels(bits, scale, clip)
    place = ((y / (clip * scale)).clamp(-1, 1) + 1) * (levels / 2)
    dither = torch.rand(y.shape, generator=generator, dtype=y.dtype).to(y.device)
    return (place + dither).floor().clamp(0, levels).to(torch.uint8)


def units(codes: torch.Tensor, workers: int = 1, *, bits: int = 4) -> torch.Tensor:
    """What a sum of `workers` codes stands for, in units of clip scale / L: 2 K - W L, int64.

    Linear: the units of a sum are the sum of units, exactly.
    """
    return 2 * codes.to(torch.int64) - workers * _levels(bits)


def decode(
    codes: torch.Tensor,
    workers: int,
    scale: float | torch.Tensor,
    *,
    bits: int = 4,
    clip: float = CLIP,
) -> torch.Tensor:
    """The mean (fp32) of the `workers` values whose codes add up to `codes`; scale as encoded."""
    levels = _levels(bits, scale, clip)
    return units(codes, workers, bits=bits).to(torch.float32) * (clip * scale / (levels * workers))


def _signs(numel: int, seed: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randint(2, (numel,), generator=generator) - 1).to(device)


def _levels(bits: int, scale: float | torch.Tensor = 1.0, clip: float = 1.0) -> int:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"thc: bits is {bits}, allowed: 1 to {MAX_BITS}")
    known = 1.0 if isinstance(scale, torch.Tensor) else scale  # a device would have to tell
    if not (math.isfinite(known) and known > 0 and math.isfinite(clip) and clip > 0):
        raise ValueError(f"thc: scale {scale} and clip {clip} must be finite and above 0")
    return (1 << bits) - 1


def sum_dtype(workers: int, bits: int) -> torch.dtype:
    """What holds the sum of `workers` codes. ValueError where 16 bits do not."""
    most = workers * _levels(bits)
    if most <= torch.iinfo(torch.uint8).max:
        return torch.uint8
    if most <= torch.iinfo(torch.int16).max:
        return torch.int16
    raise ValueError(
        f"thc: codes of {bits} bits of {workers} ranks add up to {most}, and sums travel in 16 "
        f"bits, at most {torch.iinfo(torch.int16).max}; give fewer bits, or another algorithm"
    )


class Piece(NamedTuple):
    """Chunks of one segment: rows x width values, of which `numel` from `start` on are its own."""

    segment: int
    start: int
    numel: int
    rows: int
    width: int
    code: int  # place of its first code, and of its first chunk, in the message
    chunk: int


@lru_cache(maxsize=1024)
def pieces(sizes: tuple[int, ...]) -> tuple[Piece, ...]:
    """Full chunks of every segment, then its rest with zeros to a power of two."""
    found: list[Piece] = []
    code = chunk = 0
    for segment, size in enumerate(sizes):
        rest = size % CHUNK
        width = max(LEAST, 1 << max(0, rest - 1).bit_length())
        for start, numel, rows, wide in (
            (0, size - rest, size // CHUNK, CHUNK), (size - rest, rest, 1, width)
        ):  # fmt: skip
            if numel:
                found.append(Piece(segment, start, numel, rows, wide, code, chunk))
                code, chunk = code + rows * wide, chunk + rows
    return tuple(found)


def all_reduce(
    x: torch.Tensor,
    transport: Transport,
    compressor: Compressor,
    key: Key,
    layout: Layout,
    pool: Pool,
    *,
    factor: float = 1.0,
    hold: tuple[int, ...] = (),
    bits: int = 4,
) -> Steps:
    """Replace flat `x` by `factor` times the sum over ranks; arguments as in `two_phase`.

    bits: of a code, 2, 4 or 8. hold: segments of which this rank's residual is not sent.

    Raises: ValueError: the sum of so many ranks' codes is too large.
    """
    if transport.size == 1:
        scale_(x, layout, factor)
        return
    kind, parts = sum_dtype(transport.size, bits), pieces(layout.sizes)
    if not parts:
        return
    begin(compressor, key)
    names = names_of(key) or ("",) * len(layout.sizes)
    shared = [f"{compressor.seed},{name},{compressor.step(key)}" for name in names]
    segments = [x[a : a + n] for a, n in zip(layout.starts, layout.sizes, strict=True)]
    residuals = [
        None
        if compressor.feedback == Plain()
        else compressor.residual(name, size, transport.size, factor)
        for name, size in zip(names, layout.sizes, strict=True)
    ]
    signs = [_signs(CHUNK, zlib.crc32(f"signs,{text}".encode()), x.device) for text in shared]
    chunks = parts[-1].chunk + parts[-1].rows
    mine, every = pool.take(4 * chunks), pool.take(4 * chunks * transport.size)
    stride = _stride(layout.sizes, transport.size, bits)
    wire, got = pool.take(stride * transport.size), pool.take(stride * transport.size)
    sums = pool.take(stride * (8 // bits) * kind.itemsize)
    gathered = pool.take(sums.numel() * transport.size)

    with span("encode"):
        turned = []
        for p in parts:
            v = segments[p.segment][p.start : p.start + p.numel].float()
            residual = residuals[p.segment]
            if residual is not None and p.segment not in hold:
                v = v + residual[p.start : p.start + p.numel]
            turned.append(_turn(v, p, signs[p.segment]))
        torch.cat([_rms(y) for y in turned], out=mine.view(torch.float32))
    while not (yield Step.PARKED):
        pass
    with span("exchange"):
        exchange = transport.all_gather(every, mine)
    yield exchange

    with span("encode"):
        scales = every.view(torch.float32).view(transport.size, chunks).amax(0)  # NaN stays
        good = scales < LIMIT
        live = good & (scales >= TINY)
        scales = torch.where(live, scales, 1.0)[:, None]
        private = [zlib.crc32(f"{text},{transport.rank}".encode()) for text in shared]
        generators = [torch.Generator().manual_seed(seed) for seed in private]
        for p, y in zip(parts, turned, strict=True):
            rows = slice(p.chunk, p.chunk + p.rows)
            y = torch.where(live[rows, None], y, 0.0)
            codes = encode(y, scales[rows], generators[p.segment], bits=bits, clip=CLIPS[bits])
            _place(wire, p, bits).copy_(pack(codes.view(-1), bits))
        end = (parts[-1].code + parts[-1].rows * parts[-1].width) * bits // 8
        wire[end:].zero_()
    with span("exchange"):
        exchange = transport.all_to_all(got, wire)
    yield exchange
    with span("reduce"):
        codes = unpack(got, bits).view(transport.size, -1)
        sums.view(kind).copy_(codes.sum(0, dtype=torch.int32))
    with span("exchange"):
        exchange = transport.all_gather(gathered, sums)
    yield Step.ISSUED
    yield exchange

    with span("decode"):
        totals = gathered.view(kind)
        for p, y in zip(parts, turned, strict=True):
            rows, place = slice(p.chunk, p.chunk + p.rows), slice(p.start, p.start + p.numel)
            here = p, scales[rows], live[rows, None], bits
            total = totals[p.code : p.code + p.rows * p.width]
            mean, known = _values(total, transport.size, *here), good[rows, None]
            turn = signs[p.segment][: p.width]
            back = torch.where(known, hadamard(mean) * turn, math.nan).view(-1)[: p.numel]
            segments[p.segment][place] = back.mul_(factor * transport.size)
            residual = residuals[p.segment]
            if residual is not None:
                own = _values(unpack(_place(wire, p, bits), bits), 1, *here)
                left, old = (hadamard(y - own) * turn).view(-1)[: p.numel], residual[place]
                if p.segment in hold:
                    left = left + old
                kept = known.expand(p.rows, p.width).reshape(-1)[: p.numel]
                old.copy_(torch.where(kept, left, old))
    pool.give(mine, every, wire, got, sums, gathered)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (uint8) 8 / bits to the byte, the first lowest."""
    each = codes.view(-1, 8 // bits)
    packed = each[:, 0].clone()
    for place in range(1, 8 // bits):
        packed |= each[:, place] << (place * bits)
    return packed


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes that `pack` made `packed` of."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & _levels(bits)).view(-1)


def approximated(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Flat fp32 `x` as one rank codes it, by its own scales."""
    out = torch.empty_like(x)
    signs, generator = _signs(CHUNK, 0, x.device), torch.Generator().manual_seed(0)
    for p in pieces((x.numel(),)):
        y = _turn(x[p.start : p.start + p.numel], p, signs)
        scale = _rms(y)[:, None]
        scale = torch.where((scale >= TINY) & (scale < LIMIT), scale, 1.0)
        codes = encode(y, scale, generator, bits=bits, clip=CLIPS[bits])
        back = hadamard(decode(codes, 1, scale, bits=bits, clip=CLIPS[bits])) * signs[: p.width]
        out[p.start : p.start + p.numel] = back.view(-1)[: p.numel]
    return out


def _turn(v: torch.Tensor, p: Piece, signs: torch.Tensor) -> torch.Tensor:
    """The chunks of a piece, rotated: (rows, width)."""
    padded = torch.nn.functional.pad(v, (0, p.rows * p.width - p.numel))
    return hadamard(padded.view(p.rows, p.width) * signs[: p.width])


def _values(
    codes: torch.Tensor, workers: int, p: Piece, scale: torch.Tensor, live: torch.Tensor, bits: int
) -> torch.Tensor:
    """What sums of codes of a piece decode to: (rows, width), zeros where a chunk is not live."""
    mean = decode(codes.view(p.rows, p.width), workers, scale, bits=bits, clip=CLIPS[bits])
    return torch.where(live, mean, 0.0)


def _rms(y: torch.Tensor) -> torch.Tensor:
    """Root mean square of each row; squares neither overflow nor vanish. NaN where one is not
    finite."""
    largest = y.abs().amax(1, keepdim=True)
    norm = (y / torch.where(largest == 0, 1.0, largest)).square().mean(1).sqrt()
    return norm * largest[:, 0]


def _place(wire: torch.Tensor, p: Piece, bits: int) -> torch.Tensor:
    """The bytes of a piece's codes."""
    start = p.code * bits // 8
    return wire[start : start + p.rows * p.width * bits // 8]


def _stride(sizes: Sequence[int], workers: int, bits: int) -> int:
    """Bytes of the part of a message that one rank owns."""
    last = pieces(tuple(sizes))[-1:]
    total = sum((p.code + p.rows * p.width) * bits // 8 for p in last)
    return -(-total // (workers * ALIGN)) * ALIGN


def wire_bytes(layout: Layout, scheme: Scheme, topology: Topology) -> int:
    """Bytes a rank sends: (W-1) scales of every chunk, parts of codes, and sums of its part."""
    config = scheme.algorithm
    assert isinstance(config, Thc)
    if topology.size == 1 or not layout.numel:
        return 0
    chunks = sum(p.rows for p in pieces(layout.sizes))
    stride = _stride(layout.sizes, topology.size, config.bits)
    sums = stride * (8 // config.bits) * sum_dtype(topology.size, config.bits).itemsize
    return (topology.size - 1) * (4 * chunks + stride + sums)


def seconds(layout: Layout, scheme: Scheme, topology: Topology) -> float:
    """Three exchanges one after the other, of W-1 payloads each."""
    if topology.size == 1:
        return 0.0
    return topology.link.seconds(wire_bytes(layout, scheme, topology), messages=3)
