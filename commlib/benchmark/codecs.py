"""Codecs on one core: input GB/s of every operation, beside a plain copy and other codecs.

All figures count the fp32 bytes that go in (encode) or come out (decode, reduce: the elements
decoded, times four), so `of_copy` = 1 means as fast as copying the tensor into a ready buffer. The
copy runs in every round beside the operations; `of_copy` is the median of the paired ratios.

`R-D gap` = bits - 0.5 log2(1/NMSE), with NMSE = |x - decode(encode(x))|^2 / |x|^2 on Gaussian data:
bits per element above the rate-distortion bound, which no code of that error can go below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from commlib_kernels import Layout, backend_for

from ..codecs import CODECS, Codec, codec
from ..feedback import Compressor, ErrorFeedback, owner_key
from .peers import PEERS, keep_freed_memory
from .rows import CodecRow
from .timing import Ratio, interleave, paired_ratio, percentile, rounds_within

PAYLOADS = 4  # what a fused reduce adds up, as with four ranks
STAGED = ("topk|bf16", "topk:block=1024|bf16", "randk|bf16", "int4|entropy", "fp32|entropy")
"""What is measured by default beside every codec of the table."""
OPERATIONS = ("encode", "encode+ef", "stochastic", "decode", "decode+add", "reduce4", "reduce4+ef")


@dataclass(frozen=True)
class CodecBench:
    """What to measure: codec texts, bytes of fp32 input, threads, rounds or seconds per codec."""

    codecs: tuple[str, ...] = ()  # empty: every codec of the table, and STAGED
    size: int = 64 << 20
    threads: int = 1
    iters: int | None = None
    budget: float = 3.0
    peers: bool = True
    seed: int = 0


def roundings(c: Codec) -> tuple[Codec, ...]:
    """The codec under each rounding it knows, nearest first; itself where it has no choice."""
    return tuple(dict.fromkeys((c.rounded("nearest"), c.rounded("stochastic"))))


def operations(
    c: Codec, x: torch.Tensor, feedback: ErrorFeedback | None = None
) -> dict[str, Callable[[], object]]:
    """Everything a codec does, each on buffers of its own, ready to be called again and again.

    x: flat tensor of at least PAYLOADS elements. Pairs a codec must not be used with error feedback
    are left out, as a scheme would refuse them.
    """
    feedback = ErrorFeedback() if feedback is None else feedback
    layout = Layout(sizes=(x.numel(),), dtype=x.dtype, align=c.align)
    one = Layout(sizes=(x.numel(),), dtype=x.dtype, ranks=PAYLOADS, align=c.align).only(0)
    plain = Compressor(c)
    wire = torch.empty(c.nbytes(layout), dtype=torch.uint8)
    out = torch.zeros_like(x)
    payload = torch.empty(c.nbytes(one), dtype=torch.uint8)
    wires = payload[: plain.compress(None, x, payload, one)].repeat(PAYLOADS)
    reduced = torch.empty(c.nbytes(one), dtype=torch.uint8)
    plain.compress(None, x, wire, layout)

    found: dict[str, Callable[[], object]] = {
        "encode": lambda: plain.compress(None, x, wire, layout),
        "decode": lambda: plain.decompress(None, wire, out, layout),
        "decode+add": lambda: plain.decompress(None, wire, out, layout, add=True),
        "reduce4": lambda: plain.reduce(None, wires, reduced, one, factor=0.25),
    }
    try:
        feedback.check(c, x.numel())
    except ValueError:
        return found
    remembering = Compressor(c, feedback)
    scratch = torch.empty_like(wire)
    owner = owner_key("x")

    def compress() -> None:
        remembering.advance("x")
        remembering.compress("x", x, scratch, layout)

    def reduce() -> None:
        remembering.advance(owner)
        remembering.reduce(owner, wires, reduced, one, factor=0.25)

    return {**found, "encode+ef": compress, "reduce4+ef": reduce}


def run(
    bench: CodecBench,
    on_rows: Callable[[list[CodecRow]], object] | None = None,
    on_skip: Callable[[str, str], object] | None = None,
) -> list[CodecRow]:
    """Measure every codec of `bench`, then the peers; `on_skip(name, reason)` for absent peers."""
    rows: list[CodecRow] = []
    with _threads(bench.threads):
        generator = torch.Generator().manual_seed(bench.seed)
        x = torch.randn(max(PAYLOADS, bench.size // 4), generator=generator)

        def add(found: list[CodecRow]) -> None:
            rows.extend(found)
            if on_rows is not None:
                on_rows(found)

        for text in bench.codecs or (*CODECS, *STAGED):
            add(_measure(codec(text), x, bench))
        if bench.peers:
            keep_freed_memory()
        for name, make in PEERS.items() if bench.peers else ():
            try:
                peer = make(x)
            except (ImportError, OSError, RuntimeError, AttributeError) as error:
                if on_skip is not None:
                    on_skip(name, " ".join(str(error).split())[:120])
                continue
            times = _times(peer.operations, x, bench)
            about = _about(peer.nbytes, x, peer.decoded())
            add(_codec_rows(name, peer.backend, times, x, peer.nbytes, about))
    return rows


def warmup(codecs: Sequence[str] = ()) -> list[Callable[[], object]]:
    """Steps that together compile every kernel: each operation of each codec, small, per dtype.

    Where there are CUDA devices, their kernels too. Each step's `__name__` says what it warms.
    """

    def step(c: Codec, dtype: torch.dtype) -> Callable[[], object]:
        def run_all() -> None:
            for call in operations(c, torch.ones(1000, dtype=dtype)).values():
                call()

        run_all.__name__ = f"{c} {str(dtype).removeprefix('torch.')}"
        return run_all

    def cuda_step(c: Codec, device: torch.device) -> Callable[[], object]:
        def compile_all() -> None:
            backend_for(device).warmup(c.format, device)

        compile_all.__name__ = f"{c} {device}"
        return compile_all

    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    ready = [c for text in codecs or (*CODECS, *STAGED) for c in roundings(codec(text))]
    steps = [step(c, dtype) for c in ready for dtype in dtypes]
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    on_cuda = [c for c in ready if c.format.on_cuda and c.fixed_size]
    return steps + [cuda_step(c, device) for c in on_cuda for device in devices]


def _measure(c: Codec, x: torch.Tensor, bench: CodecBench) -> list[CodecRow]:
    first, *others = roundings(c)
    contestants = operations(first, x)
    stochastic = [o for o in (first, *others) if getattr(o, "round", None) == "stochastic"]
    if stochastic:
        contestants["stochastic"] = operations(stochastic[0], x)["encode"]
    times = _times(contestants, x, bench)

    layout = Layout(sizes=(x.numel(),), dtype=x.dtype, align=first.align)
    wire, out = torch.empty(first.nbytes(layout), dtype=torch.uint8), torch.empty_like(x)
    compressor = Compressor(first)
    used = compressor.compress(None, x, wire, layout)
    compressor.decompress(None, wire, out, layout)
    about = _about(used, x, out)
    return _codec_rows(str(c), backend_for(x.device).name, times, x, used, about)


def _times(
    contestants: dict[str, Callable[[], object]], x: torch.Tensor, bench: CodecBench
) -> dict[str, list[float]]:
    ready = torch.empty_like(x)
    everyone = {"copy": lambda: ready.copy_(x), **contestants}
    interleave(everyone, 1)  # compiles, allocates residuals, touches pages
    trial = interleave(everyone, 1)
    seconds = sum(values[0] for values in trial.values())
    return interleave(everyone, bench.iters or rounds_within(bench.budget, seconds))


def _about(
    nbytes: int, x: torch.Tensor, decoded: torch.Tensor
) -> tuple[float, float, float | None]:
    """bits per element, NMSE, and the distance to the rate-distortion bound (None if lossless)."""
    bits = 8.0 * nbytes / x.numel()
    # in pieces: fp64 copies of a 64 MiB tensor would cost half a gigabyte
    error = power = 0.0
    for a, b in zip(x.split(1 << 20), decoded.view(-1).split(1 << 20), strict=True):
        error += float((a.double() - b.double()).square().sum())
        power += float(a.double().square().sum())
    nmse = error / power if power else 0.0
    return bits, nmse, bits - 0.5 * math.log2(1.0 / nmse) if nmse else None


def _codec_rows(
    scheme: str,
    backend: str,
    times: dict[str, list[float]],
    x: torch.Tensor,
    wire_bytes: int,
    about: tuple[float, float, float | None],
) -> list[CodecRow]:
    size = x.numel() * x.element_size()
    rows = []
    for name, seconds in times.items():
        # a rate's ratio is the time's ratio upside down
        slower = paired_ratio(seconds, times["copy"])
        of_copy = Ratio(1 / slower.median, _inverse(slower.high), _inverse(slower.low))
        p50 = percentile(seconds, 50)
        bits, nmse, gap = about
        rows.append(
            CodecRow(
                op=name,
                scheme=scheme,
                backend=backend,
                size_bytes=size,
                wire_bytes=wire_bytes,
                ms_p50=p50 * 1e3,
                ms_p80=percentile(seconds, 80) * 1e3,
                input_GBps=size / p50 / 1e9,
                of_copy=of_copy.median,
                of_copy_ci_low=of_copy.low,
                of_copy_ci_high=of_copy.high,
                bits=bits,
                nmse=nmse,
                rd_gap=gap,
                iters=len(seconds),
                threads=torch.get_num_threads(),
            )
        )
    return rows


def _inverse(bound: float | None) -> float | None:
    return None if bound is None else 1 / bound


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
