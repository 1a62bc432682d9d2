"""Measuring a group once: every rank runs this together and ends with the same `Profile`.

Times are of the real all_reduce path, from a barrier to the slowest rank. Candidates take turns, so
that a slow stretch of the machine hits all of them, and each is compared with the raw all_reduce of
its own round:

    seconds(raw) = median      seconds(candidate) = seconds(raw) * third quartile of the ratios

so that on a machine too noisy to tell, nothing looks faster than raw. All ranks compute the profile
from the same gathered numbers; what is measured next, and how often, follows from those alone.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from commlib_kernels.layout import Layout
from commlib_kernels.tag import Tag

from ..compressors import Compressors
from ..feedback import owner_key
from ..scheme import Scheme
from ..topology import Link
from ..transport import Transport
from .auto import CANDIDATES, FP32_BYTES, RAW, Curve, Profile, Speed

logger = logging.getLogger("commlib")

# Bytes of the fp32 tensor: 4 KiB to 16 MiB in steps of four.
SIZES = tuple(4096 << k for k in range(0, 13, 2))
# The grid ends at the first size whose plain all_reduce takes this many seconds: from there on the
# link decides, and time is linear in bytes.
LONG = 0.15
# Seconds spent per size, and the bounds of its number of rounds.
SPEND, ROUNDS = 0.25, (5, 15)
# fp32 values that codec speeds are measured on: 4 MiB, more than a core's own cache.
SPEED_NUMEL = 1 << 20
SPEED_ROUNDS = 5

ALONE = "a group of one rank has no link to measure; it sends nothing"

Run = Callable[[str, torch.Tensor], None]


def measure(run: Run, transport: Transport, candidates: Sequence[str] = CANDIDATES) -> Profile:
    """Measure the group behind `transport`; collective, all ranks call it.

    run: `run(scheme, tensor)` all-reduces the tensor in place under that scheme and returns when it
    is done. candidates: scheme texts, raw (`fp32`) first. ValueError for a group of one rank.
    """
    if transport.size < 2:
        raise ValueError(ALONE)
    if not candidates or candidates[0] != RAW:
        raise ValueError(f"candidates must start with {RAW!r}, got {list(candidates)}")
    began = time.perf_counter()
    curves = _curves(run, transport, candidates)
    speeds = tuple(speed(transport, scheme) for scheme in candidates[1:])
    sent = 2 * (transport.size - 1) / transport.size
    plain = curves[0]
    native = _fit(plain.nbytes[0], plain.seconds[0], plain.nbytes[-1], plain.seconds[-1], sent, 1)
    exchange = _exchange(transport, plain.nbytes[-1], sent)
    # What the smallest message costs beyond its two exchanges is our own path's.
    smallest = min((curve.seconds[0] for curve in curves[1:]), default=0.0)
    overhead = max(0.0, smallest - 2 * exchange.latency)
    logger.info("measured %d ranks in %.1f s", transport.size, time.perf_counter() - began)
    return Profile(transport.size, curves, speeds, native, exchange, overhead)


def _curves(run: Run, transport: Transport, candidates: Sequence[str]) -> tuple[Curve, ...]:
    generator = torch.Generator().manual_seed(transport.rank)
    source = torch.randn(SIZES[-1] // FP32_BYTES, generator=generator).to(transport.device)
    work = torch.empty_like(source)

    def once(scheme: str, nbytes: int) -> float:
        x = work[: nbytes // FP32_BYTES]
        x.copy_(source[: x.numel()])  # sums of sums would overflow
        return _timed(transport, lambda: run(scheme, x))

    for scheme in candidates:
        once(scheme, SIZES[0])  # kernels compile here
    measured: list[int] = []
    seconds: dict[str, list[float]] = {scheme: [] for scheme in candidates}
    for nbytes in SIZES:
        # the first round is not counted: plans are agreed and buffers made in it
        first = _slowest(transport, [once(scheme, nbytes) for scheme in candidates])
        rounds = min(max(int(SPEND / sum(first)), ROUNDS[0]), ROUNDS[1])
        every = [once(scheme, nbytes) for _ in range(rounds) for scheme in candidates]
        slowest = _slowest(transport, every)
        raw = slowest[:: len(candidates)]
        typical = statistics.median(raw)
        measured.append(nbytes)
        seconds[RAW].append(typical)
        for place, scheme in enumerate(candidates[1:], 1):
            times = slowest[place :: len(candidates)]
            ratios = [mine / plain for mine, plain in zip(times, raw, strict=True)]
            seconds[scheme].append(typical * statistics.quantiles(ratios, method="inclusive")[2])
        if typical > LONG and len(measured) >= 2:
            break
    return tuple(Curve(s, tuple(measured), tuple(seconds[s])) for s in candidates)


def speed(transport: Transport, text: str) -> Speed:
    """What codes by `text`, as two_phase uses it, on all ranks at once; collective.

    With the residual that its feedback keeps.
    """
    scheme = Scheme.parse(text).resolve()
    codec = scheme.codec
    compressor = Compressors(transport.device, 0, transport.rank).of(scheme)
    layout = Layout(sizes=(SPEED_NUMEL,), ranks=transport.size, align=codec.align)
    mine = layout.only(transport.rank)
    device = transport.device
    generator = torch.Generator().manual_seed(transport.rank)
    x = torch.randn(SPEED_NUMEL, generator=generator).to(device)
    wire = torch.zeros(codec.nbytes(layout), dtype=torch.uint8, device=device)
    back = torch.zeros(codec.nbytes(mine), dtype=torch.uint8, device=device)
    # any payloads will do as what the others sent: take my own chunk's, once per rank
    wires = back[: codec.encode(x, back, mine, Tag())].repeat(transport.size)
    key, owner = "x", owner_key("x")
    steps = (
        lambda: compressor.compress(key, x, wire, layout),
        lambda: compressor.decompress(owner, wire, x, layout),
        lambda: compressor.reduce(owner, wires, back, mine, factor=1 / transport.size),
    )
    for step in steps:
        step()
    times = [_timed(transport, step) for _ in range(SPEED_ROUNDS) for step in steps]
    slowest = _slowest(transport, times)
    seconds = [statistics.median(slowest[place::3]) for place in range(3)]
    nbytes = SPEED_NUMEL * FP32_BYTES
    encode, decode, reduce = (nbytes / max(s, 1e-9) for s in seconds)
    return Speed(text, encode, decode, reduce, codec.expected(layout) / nbytes)


def exchange(transport: Transport, nbytes: int) -> Link:
    """The link that fp32 tensors of up to `nbytes` bytes see in two_phase; collective.

    ValueError for a group of one rank.
    """
    if transport.size < 2:
        raise ValueError(ALONE)
    return _exchange(transport, nbytes, 2 * (transport.size - 1) / transport.size)


def _exchange(transport: Transport, nbytes: int, sent: float) -> Link:
    """The byte exchanges of two_phase, from two sizes of wire buffer."""
    seconds = []
    sizes = (SIZES[0], max(nbytes // FP32_BYTES, 4 * SIZES[0]))
    for size in sizes:
        stride = size // transport.size
        out = torch.zeros(stride * transport.size, dtype=torch.uint8, device=transport.device)
        inp = torch.zeros_like(out)

        def both(out: torch.Tensor = out, inp: torch.Tensor = inp, stride: int = stride) -> None:
            transport.all_to_all(out, inp).wait()
            transport.all_gather(out, inp[:stride]).wait()

        both()
        mine = [_timed(transport, both) for _ in range(SPEED_ROUNDS)]
        seconds.append(statistics.median(_slowest(transport, mine)))
    return _fit(sizes[0], seconds[0], sizes[1], seconds[1], sent, 2)


def _fit(n0: int, t0: float, n1: int, t1: float, sent: float, messages: int) -> Link:
    """The link with t = messages * latency + sent * n / bandwidth through two measurements."""
    bandwidth = sent * (n1 - n0) / max(t1 - t0, 1e-9)
    return Link(max(0.0, t0 - sent * n0 / bandwidth) / messages, bandwidth)


def _timed(transport: Transport, call: Callable[[], object]) -> float:
    """Seconds of `call` on this rank, from a barrier."""
    transport.barrier()
    _settle(transport.device)
    start = time.perf_counter()
    call()
    _settle(transport.device)
    return time.perf_counter() - start


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slowest(transport: Transport, seconds: Sequence[float]) -> list[float]:
    """Element by element the largest of all ranks; the same numbers on every rank."""
    mine = torch.tensor(seconds, dtype=torch.float64, device=transport.device)
    every = mine.new_empty(transport.size * mine.numel())
    transport.all_gather(every, mine).wait()
    return [float(t) for t in every.view(transport.size, -1).amax(0).tolist()]
