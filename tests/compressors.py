"""One message through a compressor, and what it remembers of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from commlib.codecs import codec
from commlib.feedback import Compressor, Key, feedback
from commlib_kernels import Layout


def made(text: str, rule: str = "ef", *, seed: int = 0, rank: int = 0) -> Compressor:
    """A compressor from texts."""
    return Compressor(codec(text), feedback(rule), seed, rank)


def send(
    c: Compressor,
    key: Key,
    x: torch.Tensor,
    layout: Layout | None = None,
    *,
    hold: Sequence[int] = (),
) -> torch.Tensor:
    """One message: what arrives."""
    layout = layout or Layout((x.numel(),))
    wire = torch.zeros(c.codec.nbytes(layout), dtype=torch.uint8)
    c.advance(key)
    c.compress(key, x, wire, layout, hold=hold)
    out = torch.zeros_like(x)
    c.decompress(key, wire, out, layout)
    return out


def residual(c: Compressor, name: str) -> torch.Tensor:
    """The residual as fp32."""
    state = c.state_dict()
    h = state["residuals"][name]
    if h.dtype != torch.int8:
        return h.float()
    scales = state["scales"][name].view(torch.bfloat16).float()
    return h.float() * scales.repeat_interleave(c.codec.format.block)[: h.numel()]
