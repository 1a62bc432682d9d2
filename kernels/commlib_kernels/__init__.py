"""Kernels behind commlib: arrays in, bytes out. Knows neither torch.distributed nor commlib.

Three ops, the same bytes from every backend (kernels/README.md states them)::

    quantize(fmt, x, wire, layout, tag, memory)             x + residual -> wire, residual renewed
    dequantize(fmt, wire, out, layout, add=)                wire -> out, or added to it
    reduce(fmt, wires, out, layout, tag, factor=, memory=)  sum of all wires -> a wire or a tensor

and two that code a wire losslessly in fewer bytes, and back (`squeezed`)::

    squeeze(fmt, wire, out, layout) -> bytes used           every payload for itself
    expand(fmt, data, wire, layout)                         data -> wire

A backend is a module with these functions and a `name`; `BACKENDS` lists them in the order in
which they are tried for a device. An op that a backend lacks is served by the next one.
"""

import importlib
import os
from functools import cache, lru_cache
from types import ModuleType

import torch

from commlib_kernels.formats import Format
from commlib_kernels.layout import Layout, blocks, nbytes, stride
from commlib_kernels.memory import Memory
from commlib_kernels.squeezed import bound, sizes
from commlib_kernels.tag import Tag

__all__ = [
    "BACKENDS",
    "Format",
    "Layout",
    "Memory",
    "Tag",
    "available",
    "backend_for",
    "dequantize",
    "expand",
    "load",
    "nbytes",
    "quantize",
    "reduce",
    "squeeze",
    "squeezed_bound",
    "squeezed_sizes",
    "stride",
]

BACKENDS: dict[str, tuple[str, ...]] = {
    "cpu": ("numba_cpu", "reference"),
    "cuda": ("cupy_cuda", "numba_cuda"),
}
"""Device type -> backends, best first."""

ENVIRONMENT = "COMMLIB_BACKEND"


@cache
def load(name: str) -> ModuleType | ImportError:
    """A backend, or why it cannot be used here."""
    try:
        module = importlib.import_module(f"commlib_kernels.{name}")
        if hasattr(module, "ready"):
            module.ready()
    except ImportError as error:
        return error
    return module


def available() -> dict[str, str]:
    """Every backend and "ok", or the reason why it cannot be used here."""
    names = dict.fromkeys(name for choices in BACKENDS.values() for name in choices)
    return {
        name: "ok" if isinstance(found := load(name), ModuleType) else str(found) for name in names
    }


def backend_for(device: torch.device | str, op: str = "quantize") -> ModuleType:
    """The backend that serves `op` on tensors of `device`.

    Raises:
        ValueError: no backend serves the device, or COMMLIB_BACKEND names none.
        RuntimeError: no backend can be used here, or the one named by COMMLIB_BACKEND cannot.
    """
    kind = device.type if isinstance(device, torch.device) else torch.device(device).type
    return _choose(kind, op, os.environ.get(ENVIRONMENT))


@cache
def _choose(kind: str, op: str, forced: str | None) -> ModuleType:
    choices = BACKENDS.get(kind, ())
    if not choices:
        raise ValueError(f"no kernels for {kind} tensors; devices served: {', '.join(BACKENDS)}")
    known = {name for names in BACKENDS.values() for name in names}
    if forced and forced not in known:
        raise ValueError(
            f"{ENVIRONMENT}={forced!r} is no backend; allowed: {', '.join(sorted(known))}"
        )
    if forced in choices:  # else it names one of another device
        choices = (forced,)
    for name in choices:
        module = load(name)
        if isinstance(module, ModuleType) and hasattr(module, op):
            return module
    reasons = "; ".join(f"{name}: {load(name)}" for name in choices)
    named = f" ({ENVIRONMENT}={forced})" if forced in choices else ""
    raise RuntimeError(f"no kernels for {kind} tensors can be used here{named}: {reasons}")


def quantize(
    fmt: Format,
    x: torch.Tensor,
    wire: torch.Tensor,
    layout: Layout,
    tag: Tag,
    memory: Memory | None = None,
) -> None:
    """Code flat `x` into `wire` (uint8, `nbytes(layout, fmt)`), adding and renewing `memory`."""
    _check_tensor("x", x, layout.dtype, layout.extent)
    _check_wire("wire", wire, nbytes(layout, fmt))
    if memory is not None:
        _check_memory(memory, layout, fmt, owner=layout.dense)
    backend_for(x.device, "quantize").quantize(fmt, x, wire, layout, tag, memory)


def dequantize(
    fmt: Format, wire: torch.Tensor, out: torch.Tensor, layout: Layout, *, add: bool = False
) -> None:
    """Decode `wire` into the elements of flat `out` that it covers, or add it to them."""
    _check_tensor("out", out, layout.dtype, layout.extent)
    _check_wire("wire", wire, nbytes(layout, fmt))
    backend_for(out.device, "dequantize").dequantize(fmt, wire, out, layout, add=add)


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
    """Sum payloads of one chunk, in rank order and fp32, times `factor`.

    Args:
        wires: uint8, a whole number of payloads of `stride(layout, fmt)` bytes.
        out: uint8 wire of one payload (all_reduce), or the dense chunk (reduce_scatter).
        layout: of one chunk (`Layout.only`).
    """
    if layout.chunk is None:
        raise ValueError("reduce: the layout must hold one chunk, see Layout.only(rank)")
    size = stride(layout, fmt)
    if wires.data_ptr() % 16:
        raise ValueError("reduce: wires must start at a multiple of 16 bytes (128-bit loads)")
    if wires.dtype != torch.uint8 or not wires.is_contiguous() or (size and wires.numel() % size):
        raise ValueError(
            f"reduce: wires must be contiguous uint8 payloads of {size} bytes, "
            f"got {wires.numel()} x {wires.dtype}"
        )
    if out.dtype == torch.uint8:
        _check_wire("out", out, size)
        if memory is not None:
            _check_memory(memory, layout, fmt, owner=True)
    else:
        _check_tensor("out", out, out.dtype, layout.chunk_numel(layout.chunk))
    backend_for(out.device, "reduce").reduce(
        fmt, wires, out, layout, tag, factor=factor, memory=memory
    )


def squeezed_bound(layout: Layout, fmt: Format) -> int:
    """The most bytes that `squeeze` writes for a message."""
    return bound(layout, fmt)


def squeezed_sizes(data: torch.Tensor, count: int | None = None) -> tuple[int, ...]:
    """Bytes of each of `count` squeezed payloads in `data`, one after the other; None: of all.

    Raises:
        RuntimeError: a header is cut off or says what cannot be.
    """
    return sizes(data.numpy(), count)


def squeeze(fmt: Format, wire: torch.Tensor, out: torch.Tensor, layout: Layout) -> int:
    """Code the payloads of a wire losslessly, each for itself; returns the bytes used.

    Args:
        wire: uint8, `nbytes(layout, fmt)` bytes; its padding does not travel.
        out: uint8, `squeezed_bound(layout, fmt)` bytes; payloads lie in it without gaps.
    """
    _check_wire("wire", wire, nbytes(layout, fmt))
    _check_wire("out", out, bound(layout, fmt))
    used: int = backend_for(wire.device, "squeeze").squeeze(fmt, wire, out, layout)
    return used


def expand(fmt: Format, data: torch.Tensor, wire: torch.Tensor, layout: Layout) -> None:
    """The inverse of `squeeze`: payloads in `data`, without gaps, back to `wire`.

    Args:
        data: uint8, at least as long as its payloads.
        wire: uint8, `nbytes(layout, fmt)` bytes, or any number of payloads of one chunk.

    Raises:
        RuntimeError: the bytes are not what `squeeze` wrote for this layout and format.
    """
    size = stride(layout, fmt)
    if layout.chunk is None or not size or wire.numel() % size:
        _check_wire("wire", wire, nbytes(layout, fmt))
    else:
        _check_wire("wire", wire, wire.numel())
    _check_wire("data", data, data.numel())
    backend_for(data.device, "expand").expand(fmt, data, wire, layout)


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_MEMORIES = (torch.float32, torch.bfloat16, torch.int8)


def _check_tensor(name: str, x: torch.Tensor, dtype: torch.dtype, numel: int) -> None:
    if x.dtype != dtype or dtype not in _FLOATS:
        raise ValueError(
            f"{name}: got {x.dtype} for a layout of {dtype}; kernels take fp32, fp16 and bf16"
        )
    if x.dim() != 1 or not x.is_contiguous() or x.numel() < numel:
        raise ValueError(
            f"{name}: needs a flat contiguous tensor of at least {numel} elements, "
            f"got shape {tuple(x.shape)} with strides {x.stride()}"
        )


def _check_memory(memory: Memory, layout: Layout, fmt: Format, *, owner: bool) -> None:
    """Refuse residuals that do not have the elements, and int8's scales, of a message."""
    needed, scaled = _residuals(layout, fmt, owner)
    residual, scales = memory.residual, memory.scales
    if residual.dtype not in _MEMORIES:
        raise ValueError(f"memory: the residual is {residual.dtype}; allowed: fp32, bf16, int8")
    if residual.dim() != 1 or not residual.is_contiguous() or residual.numel() < needed:
        raise ValueError(
            f"memory: the residual needs {needed} flat contiguous elements, "
            f"got shape {tuple(residual.shape)} with strides {residual.stride()}"
        )
    if residual.dtype == torch.int8 and not (
        scales is not None
        and scales.dtype == torch.int16
        and scales.dim() == 1
        and scales.is_contiguous()
        and scales.numel() >= scaled
    ):
        found = "none" if scales is None else f"{scales.numel()} x {scales.dtype}"
        raise ValueError(
            f"memory: an int8 residual needs {scaled} flat contiguous scales (int16) here, got "
            f"{found}"
        )
    last = len(layout.sizes) - 1
    if any(not 0 <= segment <= last for segment in memory.hold):
        raise ValueError(f"memory: hold={memory.hold}; allowed: segments 0 to {last}")


@lru_cache(maxsize=4096)
def _residuals(layout: Layout, fmt: Format, owner: bool) -> tuple[int, int]:
    """Elements of a message's residuals, and blocks of them."""
    if not owner:
        return layout.numel, blocks(layout.sizes, fmt) * (layout.ranks if layout.stacked else 1)
    (rank,) = layout.payloads
    cuts = (layout.cut(segment, rank) for segment in range(len(layout.sizes)))
    sizes = tuple(end - begin for begin, end in cuts)
    return sum(sizes), blocks(sizes, fmt)


def _check_wire(name: str, wire: torch.Tensor, size: int) -> None:
    flat = wire.dim() == 1 and wire.is_contiguous()
    if wire.dtype != torch.uint8 or not flat or wire.numel() != size:
        raise ValueError(
            f"{name}: needs {size} contiguous bytes (uint8), got {wire.numel()} x {wire.dtype}"
        )
    if wire.data_ptr() % 16:
        raise ValueError(f"{name}: must start at a multiple of 16 bytes (128-bit loads)")
