"""CUDA C++ kernels, compiled by NVRTC and launched through CuPy.

A launch is one struct of addresses and numbers (launch.py) on torch's current stream: nothing is
copied, allocated by CuPy, or waited for.
"""

from functools import cache
from typing import Any

import torch

from commlib_kernels import launch
from commlib_kernels.cupy_cuda import build
from commlib_kernels.cupy_cuda.kernels import Op, kernels, names, source
from commlib_kernels.formats import Format
from commlib_kernels.layout import Layout, stride
from commlib_kernels.memory import Memory
from commlib_kernels.tag import Tag

__all__ = ["dequantize", "name", "quantize", "ready", "reduce", "warmup"]

name = "cupy_cuda"


def ready() -> None:
    """Raise ImportError where this backend cannot run."""
    if not torch.cuda.is_available():
        raise ImportError("torch sees no CUDA device")
    try:
        import cupy  # noqa: F401
    except ImportError as error:
        major = (torch.version.cuda or "13").partition(".")[0]
        raise ImportError(f"needs CuPy: pip install cupy-cuda{major}x ({error})") from error


def quantize(
    fmt: Format,
    x: torch.Tensor,
    wire: torch.Tensor,
    layout: Layout,
    tag: Tag,
    memory: Memory | None = None,
) -> None:
    """Code `x` into `wire`, adding and renewing the residual."""
    _launch("quantize", fmt, launch.quantize(fmt, x, wire, layout, tag, memory), x.device)


def dequantize(
    fmt: Format, wire: torch.Tensor, out: torch.Tensor, layout: Layout, *, add: bool = False
) -> None:
    """Decode `wire` into (or add it to) the elements of `out` that its payloads cover."""
    _launch("dequantize", fmt, launch.dequantize(fmt, wire, out, layout, add=add), out.device)


def reduce(
    fmt: Format,
    wires: torch.Tensor,
    out: torch.Tensor,
    layout: Layout,
    tag: Tag,
    *,
    factor: float = 1.0,
    memory: Memory | None = None,
) -> None:
    """Sum the payloads of all ranks into a wire (uint8) or a dense chunk."""
    if stride(layout, fmt):
        call = launch.reduce(fmt, wires, out, layout, tag, factor, memory)
        _launch("reduce", fmt, call, out.device)


def warmup(fmt: Format, device: torch.device | None = None) -> None:
    """Compile the kernels of this kind of format, or load them from the cache."""
    launch.check(fmt)
    with torch.cuda.device(device):  # None: the current one
        for kernel in names(fmt):
            _function(source(fmt), kernel, torch.cuda.current_device())


class _Stream:
    """What CuPy asks of a stream: its handle."""

    __slots__ = ("ptr",)

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


@cache
def _stream(handle: int) -> _Stream:
    return _Stream(handle)


@cache
def _module(file: str, index: int) -> Any:
    """The loaded module of a .cu file on device `index`, which is the current one."""
    import cupy

    major, minor = torch.cuda.get_device_capability(index)
    return cupy.RawModule(path=str(build.cubin(file, 10 * major + minor)))


@cache
def _function(file: str, kernel: str, index: int) -> Any:
    """A kernel as CuPy's launchable function; looking it up again would cost microseconds."""
    return _module(file, index).get_function(kernel).kernel


def _launch(op: Op, fmt: Format, call: launch.Launch, device: torch.device) -> None:
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(op, fmt, call, device)
        return
    stream = _stream(torch._C._cuda_getCurrentRawStream(device.index))
    for kernel in kernels(op, fmt, call):
        if kernel.blocks:
            function = _function(source(fmt), kernel.name, device.index)
            # CuPy passes an array of one element by value.
            function(
                (kernel.blocks,), (kernel.threads,), (call.words.view(launch.BYTES),), stream=stream
            )
