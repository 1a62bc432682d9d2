"""Bandwidth of every kernel that matters, as a fraction of a copy's, and what a launch costs.

Bytes really moved: what is read and what is written, residual and scales included.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import torch

import commlib_kernels
from bench.gpu.peers import quantizers
from bench.gpu.record import Record
from bench.gpu.timing import on_device, on_host
from commlib.codecs import codec
from commlib_kernels import BACKENDS, Format, Layout, Memory, Tag, load, nbytes

NUMEL = 64 << 20
"""256 MiB of fp32: several times the L2 cache."""
PAYLOADS = 8
CODECS = ("int8", "int4", "int8:round=stochastic", "int4:round=stochastic", "fp8", "bf16", "sign")
CODECS += ("nf4", "eden2", "rotate|eden2", "rotate|int4")
BARS = {"cupy_cuda": 0.85, "numba_cuda": 0.70}
LAUNCH_BARS = {"cupy_cuda": 10.0, "numba_cuda": 25.0}
"""Microseconds of the host."""
OPS = ("quantize", "quantize with residual", "dequantize", f"reduce of {PAYLOADS}")
HELD = [(c, o) for c in ("int8", "int4") for o in OPS]
"""What the bars are about."""


class Case(NamedTuple):
    """A kernel call and the bytes it moves."""

    op: str
    codec: str
    backend: str
    nbytes: int
    run: Callable[[], object]


def usable() -> Iterator[ModuleType]:
    """The CUDA backends that work here."""
    for name in BACKENDS["cuda"]:
        module = load(name)
        if isinstance(module, ModuleType):
            yield module
        else:
            print(f"{name}: {module}")


def cases(backend: ModuleType, text: str, x: torch.Tensor, h: torch.Tensor) -> Iterator[Case]:
    """The ops of one codec by one backend."""
    fmt = codec(text).format
    layout = Layout((x.numel(),), x.dtype, align=fmt.align)
    size, raw, tag, memory = nbytes(layout, fmt), x.nbytes, Tag(1, (2,), 3, 0), Memory(h)
    wire = torch.zeros(size, dtype=torch.uint8, device=x.device)

    def case(op: str, moved: int, run: Callable[[], object]) -> Case:
        return Case(op, text, backend.name, moved, run)

    yield case(OPS[0], raw + size, lambda: backend.quantize(fmt, x, wire, layout, tag))
    yield case(OPS[1], 3 * raw + size, lambda: backend.quantize(fmt, x, wire, layout, tag, memory))
    out = torch.empty_like(x)
    yield case(OPS[2], raw + size, lambda: backend.dequantize(fmt, wire, out, layout))
    yield reduction(backend, text, fmt, x)


def reduction(backend: ModuleType, text: str, fmt: Format, x: torch.Tensor) -> Case:
    """The owner's sum of 8 payloads into a wire."""
    chunk = Layout((x.numel(),), x.dtype, align=fmt.align).only(0)
    size, tag = nbytes(chunk, fmt), Tag(1, (2,), 3, 0)
    wires = torch.zeros(PAYLOADS * size, dtype=torch.uint8, device=x.device)
    for k in range(PAYLOADS):
        backend.quantize(fmt, x.roll(k), wires[k * size : (k + 1) * size], chunk, tag)
    out = torch.zeros(size, dtype=torch.uint8, device=x.device)
    return Case(
        OPS[3], text, backend.name, (PAYLOADS + 1) * size,
        lambda: backend.reduce(fmt, wires, out, chunk, tag, factor=1 / PAYLOADS),
    )  # fmt: skip


def bandwidth(record: Record) -> None:
    """All kernels and peers against a copy in the same rounds."""
    x = torch.randn(NUMEL, device="cuda")
    other, h = torch.empty_like(x), torch.zeros_like(x)
    shown = []

    def measure(group: list[Case]) -> None:
        runs = {"copy": lambda: other.copy_(x), **{str(k): c.run for k, c in enumerate(group)}}
        times = on_device(runs)
        copy = 2 * x.nbytes / times["copy"].p50 / 1e6
        for k, c in enumerate(group):
            t = times[str(k)]
            rate = c.nbytes / t.p50 / 1e6
            bar = BARS.get(c.backend) if (c.codec, c.op) in HELD else None
            record.add(
                bench="kernel", op=c.op, codec=c.codec, backend=c.backend, bytes_moved=c.nbytes,
                ms_p20=t.p20, ms_p50=t.p50, ms_p80=t.p80, GBps=rate, copy_GBps=copy,
                of_copy=rate / copy, bar=bar,
            )  # fmt: skip
            verdict = "" if bar is None else "holds" if rate / copy >= bar else f"MISSED ({bar})"
            shown.append([c.backend, c.codec, c.op, t.p50, rate, rate / copy, verdict])

    def attempt(name: str, group: Callable[[], list[Case]]) -> None:
        """One that cannot run here does not take the others with it."""
        try:
            measure(group())
        except Exception as error:
            traceback.print_exc()
            record.add(bench="kernel", backend=name, error=str(error)[:500])
            failed.append(name)

    failed: list[str] = []
    for backend in usable():
        for text in CODECS:
            attempt(f"{backend.name} {text}", partial(_listed, backend, text, x, h))
    for name, size, run in quantizers(x):
        attempt(name, partial(_peer, name, x.nbytes + size, run))
    heads = ["backend", "codec", "op", "ms", "GB/s", "of copy", "bar"]
    record.table("Kernels, 256 MiB fp32, L2 flushed", heads, shown)
    if failed:
        raise RuntimeError(f"could not be measured: {', '.join(failed)}")


def _listed(backend: ModuleType, text: str, x: torch.Tensor, h: torch.Tensor) -> list[Case]:
    return list(cases(backend, text, x, h))


def _peer(name: str, moved: int, run: Callable[[], object]) -> list[Case]:
    return [Case(OPS[0], "", name, moved, run)]


def launches(record: Record) -> None:
    """Host microseconds of one launch, torch tensors in."""
    fmt = codec("int4").format
    layout = Layout((1 << 16,), align=fmt.align)
    x, h = torch.randn(1 << 16, device="cuda"), torch.zeros(1 << 16, device="cuda")
    wire = torch.zeros(nbytes(layout, fmt), dtype=torch.uint8, device="cuda")
    tag, memory, shown = Tag(1, (2,), 3, 0), Memory(h), []
    for backend in usable():
        with mock.patch.dict(os.environ, COMMLIB_BACKEND=backend.name):
            runs = {
                "encode": lambda: commlib_kernels.quantize(fmt, x, wire, layout, tag, memory),
                "decode": lambda: commlib_kernels.dequantize(fmt, wire, x, layout),
            }
            for op, run in runs.items():
                t = on_host(run)
                bar = LAUNCH_BARS[backend.name]
                record.add(
                    bench="launch", op=op, backend=backend.name, us_p20=t.p20, us_p50=t.p50,
                    us_p80=t.p80, bar=bar,
                )  # fmt: skip
                verdict = "holds" if t.p50 <= bar else f"MISSED ({bar})"
                shown.append([backend.name, op, t.p50, t.p80, verdict])
    heads = ["backend", "message", "us p50", "us p80", "bar"]
    record.table("Host cost of one message, torch tensors in, median of 10,000", heads, shown)
