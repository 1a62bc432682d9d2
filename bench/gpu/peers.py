"""What a user would pick instead: quantizers in eager torch, torch.compile, Triton, bitsandbytes.

All code 128 elements with one scale, as ours do; none keeps a residual or packs anything else than
whole bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

BLOCK = 128

Run = Callable[[], object]


def eager(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 in torch's own operations."""
    blocks = x.view(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127
    return torch.round(blocks / scale).clamp(-127, 127).to(torch.int8), scale


def quantizers(x: torch.Tensor) -> Iterator[tuple[str, int, Run]]:
    """(name, bytes written, a call) of every peer that is installed."""
    written = x.numel() + x.numel() // BLOCK * 4
    yield "torch eager int8", written, lambda: eager(x)
    compiled = torch.compile(eager)
    yield "torch.compile int8", written, lambda: compiled(x)
    yield from _triton(x, written)
    try:
        from bitsandbytes.functional import quantize_blockwise
    except ImportError:
        return
    yield "bitsandbytes int8", written, lambda: quantize_blockwise(x, blocksize=BLOCK)


def _triton(x: torch.Tensor, written: int) -> Iterator[tuple[str, int, Run]]:
    try:
        from bench.gpu import triton_peer
    except ImportError:
        return
    for name, dtype in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        codes = torch.empty(x.numel(), dtype=dtype, device=x.device)
        scales = torch.empty(x.numel() // BLOCK, device=x.device)

        def run(codes: torch.Tensor = codes, scales: torch.Tensor = scales) -> None:
            triton_peer.quantize(x, codes, scales)

        yield f"Triton {name}", written, run
