"""Launching: the kernels of a format, compiled once, with as little Python as possible per call."""

import inspect
from collections.abc import Callable
from functools import cache
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numba import types

from commlib_kernels.formats import Format
from commlib_kernels.launch import INTEGERS, LANES, NUMBERS, PLACES, Launch, lanes_per_block
from commlib_kernels.numba_cuda import kernels
from commlib_kernels.numba_cuda.jit import BLOCKS, SIMULATED, THREADS, kernel

_FIELDS = (*INTEGERS, *NUMBERS)


def signature(function: Callable[..., Any]) -> Any:
    """Types of a kernel's arguments: what NUMBERS names is fp32, all others are integers."""
    names = inspect.signature(function).parameters
    return types.void(*[types.float32 if name in NUMBERS else types.int64 for name in names])


def run(fmt: Format, name: str, call: Launch, warps: int, device: torch.device) -> None:
    """Queue one kernel on the current stream of a device, a warp for each tile (or run, group)."""
    if warps == 0:
        return
    threads, blocks = THREADS, min(-(-warps * 32 // THREADS), BLOCKS)
    if (lanes := lanes_per_block(fmt)) > LANES:  # a block of threads for each tile
        threads, blocks = lanes, min(warps, BLOCKS)
    if SIMULATED:
        compiled, pick = _simulated(fmt, name)
        compiled[blocks, threads](*pick(call.arguments.item()))
        return
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            run(fmt, name, call, warps, device)
    else:
        _launch(_loaded(fmt, name, device.index), blocks, call, device.index, threads)


@cache
def _simulated(fmt: Format, name: str) -> tuple[Any, Callable[..., Any]]:
    """A kernel of the simulator, and what picks its arguments from the struct's fields."""
    function = kernels_of(fmt)[name]
    pick = itemgetter(*[_FIELDS.index(field) for field in inspect.signature(function).parameters])
    return kernel(function, signature(function), kernels.resident(fmt, name)), pick


class _Loaded(NamedTuple):
    """A kernel on a device: the driver's handle, and where in the struct its arguments lie."""

    handle: int
    offsets: npt.NDArray[np.int64]
    dispatcher: Any  # owns the module


@cache
def _loaded(fmt: Format, name: str, index: int) -> _Loaded:
    """Compile a kernel for device `index`, which is the current one, and load it."""
    function = kernels_of(fmt)[name]
    dispatcher = kernel(function, signature(function), kernels.resident(fmt, name))
    (compiled,) = dispatcher.overloads.values()
    fields = [PLACES[field] for field in inspect.signature(function).parameters]
    handle = int(compiled._codelibrary.get_cufunc().handle)
    return _Loaded(handle, np.array(fields, np.int64), dispatcher)


def _launch(loaded: _Loaded, blocks: int, call: Launch, index: int, threads: int = THREADS) -> None:
    """Hand a kernel to the driver. Numba's own launch takes 34 us of the host, this one 6."""
    from cuda.bindings import driver

    # The driver wants the address of every argument, and copies what lies there.
    addresses = loaded.offsets + _address(call.words)
    stream = torch._C._cuda_getCurrentRawStream(index)
    (error,) = driver.cuLaunchKernel(
        loaded.handle, blocks, 1, 1, threads, 1, 1, 0, stream, _address(addresses), 0
    )
    if error:
        raise RuntimeError(f"a kernel of numba_cuda was not launched: {error}")


def _address(array: npt.NDArray[np.int64]) -> int:
    return int(array.__array_interface__["data"][0])


@cache
def kernels_of(fmt: Format) -> dict[str, Callable[..., Any]]:
    """The kernels of a format, not yet compiled."""
    return kernels.make(fmt)
