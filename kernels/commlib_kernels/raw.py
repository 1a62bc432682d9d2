"""Pieces that travel as they are: copied, added, or summed in fp32. Used by all CPU backends."""

import torch

from commlib_kernels.formats import Format
from commlib_kernels.layout import Layout, pieces

NAN = float("nan")


def encode(fmt: Format, x: torch.Tensor, wire: torch.Tensor, layout: Layout) -> None:
    """Copy the raw pieces of `x` into `wire`."""
    for p in pieces(layout, fmt):
        if p.exact and p.numel:
            _view(wire, p.code, p.numel, layout.dtype).copy_(x[p.x : p.x + p.numel])


def decode(
    fmt: Format, wire: torch.Tensor, out: torch.Tensor, layout: Layout, *, add: bool
) -> None:
    """Copy the raw pieces of `wire` into `out`, or add them in fp32."""
    for p in pieces(layout, fmt):
        if p.exact and p.numel:
            source = _view(wire, p.code, p.numel, layout.dtype)
            here = out[p.x : p.x + p.numel]
            if add:
                settle(here, here.float() + source.float())
            else:
                here.copy_(source)


def reduce(
    fmt: Format,
    wires: torch.Tensor,
    stride: int,
    out: torch.Tensor,
    layout: Layout,
    factor: float,
) -> None:
    """Sum the raw pieces of all ranks in rank order and fp32, times `factor`."""
    for p in pieces(layout, fmt, owner=True):
        if not p.exact or not p.numel:
            continue
        total = torch.zeros(p.numel)
        for base in range(0, wires.numel(), stride):
            total += _view(wires, base + p.code, p.numel, layout.dtype)
        total *= factor
        if out.dtype == torch.uint8:
            settle(_view(out, p.code, p.numel, layout.dtype), total)
        else:
            settle(out[p.memory : p.memory + p.numel], total)


def settle(out: torch.Tensor, value: torch.Tensor) -> None:
    """Round to the dtype of `out`; one NaN for all NaNs."""
    out.copy_(value)
    wrong = torch.isnan(out)
    if wrong.any():
        out[wrong] = NAN


def _view(wire: torch.Tensor, start: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    return wire[start : start + numel * dtype.itemsize].view(dtype)
