"""The three kernels alone, one core: quantize, dequantize, reduce, against a copy.

`make bench ARGS="-k kernels"`. Throughput in the table's extra_info: GB/s of fp32 input or output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from commlib.codecs import codec
from commlib_kernels import Layout, Memory, Tag, dequantize, nbytes, quantize, reduce

NUMEL = 4 << 20  # 16 MiB of fp32: far beyond every cache that one core has to itself
RANKS = 4
CODECS = ("int8", "int4", "int3", "fp8", "sign", "ternary", "qsgd", "natural", "bf16")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def gauge(benchmark: Any) -> Callable[[Callable[[], object]], None]:
    """Times a call after one that compiles, and adds GB/s of fp32-sized data."""

    def run(call: Callable[[], object]) -> None:
        benchmark.pedantic(call, rounds=9, warmup_rounds=1)
        benchmark.extra_info["GBps"] = NUMEL * 4 / benchmark.stats.stats.median / 1e9

    return run


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def x(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(NUMEL, generator=generator)


@pytest.mark.benchmark(group="kernels: copy")
def test_copy(gauge: Any, x: torch.Tensor) -> None:
    ready = torch.empty_like(x)
    gauge(lambda: ready.copy_(x))


@pytest.mark.benchmark(group="kernels: quantize")
@pytest.mark.parametrize("text", CODECS)
def test_quantize(gauge: Any, x: torch.Tensor, text: str) -> None:
    fmt = codec(text).rounded("nearest").format
    layout = Layout((NUMEL,), align=fmt.align)
    wire = torch.empty(nbytes(layout, fmt), dtype=torch.uint8)
    gauge(lambda: quantize(fmt, x, wire, layout, Tag()))


@pytest.mark.benchmark(group="kernels: quantize, stochastic")
@pytest.mark.parametrize("text", ["int8", "int4"])
def test_quantize_stochastic(gauge: Any, x: torch.Tensor, text: str) -> None:
    fmt = codec(f"{text}:round=stochastic").format
    layout = Layout((NUMEL,), align=fmt.align)
    wire = torch.empty(nbytes(layout, fmt), dtype=torch.uint8)
    gauge(lambda: quantize(fmt, x, wire, layout, Tag()))


@pytest.mark.benchmark(group="kernels: quantize, fused residual")
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
@pytest.mark.parametrize("text", ["int8", "int4", "int3", "sign"])
def test_quantize_with_residual(gauge: Any, x: torch.Tensor, text: str, dtype: Any) -> None:
    fmt = codec(text).rounded("nearest").format
    layout = Layout((NUMEL,), align=fmt.align)
    wire = torch.empty(nbytes(layout, fmt), dtype=torch.uint8)
    memory = Memory(torch.zeros(NUMEL, dtype=dtype))
    gauge(lambda: quantize(fmt, x, wire, layout, Tag(), memory))


@pytest.mark.benchmark(group="kernels: quantize, other inputs")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_quantize_half(gauge: Any, x: torch.Tensor, dtype: Any) -> None:
    fmt = codec("int4").rounded("nearest").format
    layout = Layout((NUMEL,), dtype=dtype, align=fmt.align)
    half, wire = x.to(dtype), torch.empty(nbytes(layout, fmt), dtype=torch.uint8)
    gauge(lambda: quantize(fmt, half, wire, layout, Tag()))


@pytest.mark.benchmark(group="kernels: dequantize")
@pytest.mark.parametrize("add", [False, True], ids=["write", "add"])
@pytest.mark.parametrize("text", CODECS)
def test_dequantize(gauge: Any, x: torch.Tensor, text: str, add: bool) -> None:
    fmt = codec(text).rounded("nearest").format
    layout = Layout((NUMEL,), align=fmt.align)
    wire = torch.empty(nbytes(layout, fmt), dtype=torch.uint8)
    quantize(fmt, x, wire, layout, Tag())
    out = torch.zeros_like(x)
    gauge(lambda: dequantize(fmt, wire, out, layout, add=add))


@pytest.mark.benchmark(group="kernels: reduce 4 payloads")
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("text", ["int8", "int4", "int3", "fp8", "sign"])
def test_reduce(gauge: Any, x: torch.Tensor, text: str, residual: bool) -> None:
    fmt = codec(text).rounded("nearest").format
    one = Layout((NUMEL,), ranks=RANKS, align=fmt.align).only(0)
    out = torch.empty(nbytes(one, fmt), dtype=torch.uint8)
    quantize(fmt, x, out, one, Tag())
    wires = out.repeat(RANKS)
    memory = Memory(torch.zeros(one.chunk_numel(0))) if residual else None
    gauge(lambda: reduce(fmt, wires, out, one, Tag(), factor=1 / RANKS, memory=memory))


@pytest.mark.benchmark(group="kernels: many small segments")
@pytest.mark.parametrize("segments", [16, 256, 1024])
def test_quantize_a_bucket(gauge: Any, x: torch.Tensor, segments: int) -> None:
    fmt = codec("int4").rounded("nearest").format
    layout = Layout((NUMEL // segments,) * segments, align=fmt.align)
    wire = torch.empty(nbytes(layout, fmt), dtype=torch.uint8)
    gauge(lambda: quantize(fmt, x, wire, layout, Tag()))
