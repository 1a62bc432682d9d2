"""Other people's 8-bit and 4-bit codecs, where they are installed, under the same clock.

Each peer quantizes rows of `BLOCK` elements with a scale per row, on the CPU (`per tensor`: one
scale), into the fresh buffers its interface makes. A peer that is missing or does not work here
says why and is left out.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch

BLOCK = 128  # commlib's default block: the same number of scales for everybody


class Peer(NamedTuple):
    """A foreign codec: operations under our names, bytes of its wire, and what it decodes to."""

    backend: str
    operations: dict[str, Callable[[], object]]
    nbytes: int
    decoded: Callable[[], torch.Tensor]


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks, so that peers do not pay page faults for every result.

    Without it a decode into a fresh 64 MiB tensor ran at a tenth of its speed, which would tell of
    the operating system and flatter us, who write into ready buffers.
    """
    m_mmap_max, m_trim_threshold = -4, -1  # malloc.h
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def _rows_of(x: torch.Tensor) -> torch.Tensor:
    if x.numel() % BLOCK:
        raise RuntimeError(f"{x.numel()} elements are not whole rows of {BLOCK}")
    return x.view(-1, BLOCK)


def _fbgemm_8bit(x: torch.Tensor) -> Peer:
    import_module("fbgemm_gpu")
    rows, ops = _rows_of(x), torch.ops.fbgemm
    wire = ops.FloatToFused8BitRowwiseQuantized(rows)
    return Peer(
        "fbgemm",
        {
            "encode": lambda: ops.FloatToFused8BitRowwiseQuantized(rows),
            "decode": lambda: ops.Fused8BitRowwiseQuantizedToFloat(wire),
        },
        wire.numel(),
        lambda: ops.Fused8BitRowwiseQuantizedToFloat(wire),
    )


def _fbgemm_4bit(x: torch.Tensor) -> Peer:
    import_module("fbgemm_gpu")
    rows, ops = _rows_of(x), torch.ops.fbgemm
    wire = ops.FloatToFusedNBitRowwiseQuantizedSBHalf(rows, 4)
    return Peer(
        "fbgemm",
        {
            "encode": lambda: ops.FloatToFusedNBitRowwiseQuantizedSBHalf(rows, 4),
            "decode": lambda: ops.FusedNBitRowwiseQuantizedSBHalfToFloat(wire, 4),
        },
        wire.numel(),
        lambda: ops.FusedNBitRowwiseQuantizedSBHalfToFloat(wire, 4),
    )


def _quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = rows.abs().amax(dim=1, keepdim=True) * (1.0 / 127.0)
    return (rows / scale.clamp_min(1e-30)).round().clamp(-127, 127).to(torch.int8), scale


def _dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return codes * scale


def _torch_int8(
    x: torch.Tensor, backend: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Peer:
    rows = _rows_of(x)
    quantize, dequantize = wrap(_quantize), wrap(_dequantize)
    codes, scale = quantize(rows)
    return Peer(
        backend,
        {"encode": lambda: quantize(rows), "decode": lambda: dequantize(codes, scale)},
        codes.numel() + scale.numel() * 4,
        lambda: dequantize(codes, scale).view(-1),
    )


def _torch_per_tensor(x: torch.Tensor) -> Peer:
    """torch's own quantized tensor: one scale for everything, so fewer passes and more error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated; it is measured, not used
        codes = torch.quantize_per_tensor_dynamic(x, torch.qint8, False)
    return Peer(
        "torch",
        {
            "encode": lambda: torch.quantize_per_tensor_dynamic(x, torch.qint8, False),
            "decode": codes.dequantize,
        },
        codes.numel() + 8,
        codes.dequantize,
    )


def _bitsandbytes(x: torch.Tensor) -> Peer:
    functional = import_module("bitsandbytes.functional")
    codes, state = functional.quantize_blockwise(x, blocksize=BLOCK)
    return Peer(
        "bitsandbytes",
        {
            "encode": lambda: functional.quantize_blockwise(x, blocksize=BLOCK),
            "decode": lambda: functional.dequantize_blockwise(codes, state),
        },
        codes.numel() + state.absmax.numel() * 4,
        lambda: functional.dequantize_blockwise(codes, state),
    )


def _bitsandbytes_4bit(kind: str, x: torch.Tensor) -> Peer:
    functional = import_module("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(x, blocksize=64, quant_type=kind)
    return Peer(
        "bitsandbytes",
        {
            "encode": lambda: functional.quantize_4bit(x, blocksize=64, quant_type=kind),
            "decode": lambda: functional.dequantize_4bit(codes, state),
        },
        codes.numel() + state.absmax.numel() * 4,
        lambda: functional.dequantize_4bit(codes, state).view(-1),
    )


PEERS: dict[str, Callable[[torch.Tensor], Peer]] = {
    "FBGEMM 8-bit rowwise": _fbgemm_8bit,
    "FBGEMM 4-bit rowwise": _fbgemm_4bit,
    "torch int8 per tensor": _torch_per_tensor,
    "torch int8 eager": lambda x: _torch_int8(x, "torch", lambda f: f),
    "torch.compile int8": lambda x: _torch_int8(
        x, "torch.compile", lambda f: torch.compile(f, dynamic=False)
    ),
    "bitsandbytes 8-bit": _bitsandbytes,
    "bitsandbytes nf4": partial(_bitsandbytes_4bit, "nf4"),
    "bitsandbytes fp4": partial(_bitsandbytes_4bit, "fp4"),
}
