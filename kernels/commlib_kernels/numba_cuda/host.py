"""Launching: the kernels of a format, compiled once, with as little Python as possible per call."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from operator import itemgetter
from typing import Any

import torch
from numba import cuda, types

from commlib_kernels.formats import Format
from commlib_kernels.launch import INTEGERS, NUMBERS, Launch
from commlib_kernels.numba_cuda import kernels
from commlib_kernels.numba_cuda.jit import BLOCKS, SIMULATED, THREADS, kernel

_FIELDS = (*INTEGERS, *NUMBERS)


def signature(function: Callable[..., Any]) -> Any:
    """Types of a kernel's arguments: what NUMBERS names is fp32, all others are integers."""
    names = inspect.signature(function).parameters
    return types.void(*[types.float32 if name in NUMBERS else types.int64 for name in names])


def run(fmt: Format, name: str, call: Launch, warps: int, device: torch.device) -> None:
    """Queue one kernel on the current stream of a device, a warp for each tile."""
    if warps == 0:
        return
    blocks = min(-(-warps * 32 // THREADS), BLOCKS)
    if SIMULATED:
        compiled, pick = _compiled(fmt, name, device)
        compiled[blocks, THREADS](*pick(call.arguments.item()))
        return
    with _current(device):
        compiled, pick = _compiled(fmt, name, device)
        stream = _stream(torch._C._cuda_getCurrentRawStream(device.index), device)
        compiled[blocks, THREADS, stream](*pick(call.arguments.item()))


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Numba, like the driver, launches where the current device is."""
    if device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@cache
def _compiled(fmt: Format, name: str, device: torch.device) -> tuple[Any, Callable[..., Any]]:
    """A kernel, for this device, and what picks its arguments from the struct's fields."""
    function = kernels_of(fmt)[name]
    names = inspect.signature(function).parameters
    pick = itemgetter(*[_FIELDS.index(field) for field in names])
    return kernel(function, signature(function), kernels.resident(fmt, name)), pick


@cache
def kernels_of(fmt: Format) -> dict[str, Callable[..., Any]]:
    """The kernels of a format, not yet compiled."""
    return kernels.make(fmt)


@lru_cache(maxsize=256)
def _stream(handle: int, device: torch.device) -> Any:
    """Numba's view of a torch stream; handle 0 is the legacy default stream."""
    del device  # streams of different devices may share handle 0
    return cuda.external_stream(handle) if handle else cuda.legacy_default_stream()
