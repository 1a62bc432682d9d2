"""torchao's and hivemind's codecs, for the frontier: what they decode to, and in how many bits.

Each takes the segments of a message and codes one after the other, so that a codec with one scale
or one codebook per tensor gets one per parameter, as in its own library. Bits are counted in the
peer's favour: codes packed without a gap, whatever its tensors take in memory; without headers; and
scales in bf16 where it lets one choose. Versions tried: torchao 0.18.0, hivemind 1.1.12.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

Coded = tuple[float, Tensor]
"""(bits of the wire, decoded values) of one segment."""


def _hivemind(name: str, x: Tensor) -> Coded:
    module = import_module("hivemind.compression")
    # hivemind 1.1.12 reads its sizes as int(array of one), which numpy 2.4 refuses.
    module.quantization.int = lambda a: int(np.asarray(a).item())
    codec = getattr(module, name)()
    message = codec.compress(x, module.CompressionInfo.from_tensor(x))
    return 8 * len(message.buffer), codec.extract(message)


def _groups(x: Tensor, group: int) -> Tensor:
    if x.numel() % group:
        raise RuntimeError(f"{x.numel()} elements are not whole groups of {group}")
    return x.view(-1, group)


def _torchao_int(bits: int, group: int, x: Tensor) -> Coded:
    """Symmetric integers with a bf16 scale per group: `IntxWeightOnlyConfig`."""
    q = import_module("torchao.quantization.quant_primitives")
    rows, block = _groups(x, group), (1, group)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    scale, zero = q.choose_qparams_affine(
        rows, q.MappingType.SYMMETRIC, block, torch.int8, low, high, scale_dtype=torch.bfloat16
    )
    codes = q.quantize_affine(rows, block, scale, zero, torch.int8, low, high)
    out = q.dequantize_affine(codes, block, scale, zero, torch.int8, low, high)
    return (bits + 16 / group) * x.numel(), out


def _torchao_int4_zero(group: int, x: Tensor) -> Coded:
    """0 .. 15 with a bf16 scale and a bf16 zero per group: `Int4WeightOnlyConfig` (tinygemm)."""
    q = import_module("torchao.quantization.quant_primitives")
    rows, block = _groups(x, group), (1, group)
    scale, zero = q._choose_qparams_affine_tinygemm(
        rows, q.MappingType.ASYMMETRIC, block, torch.int32, 0, 15, 1e-30,
        scale_dtype=torch.bfloat16, zero_point_dtype=torch.bfloat16,
    )  # fmt: skip
    codes = q._quantize_affine_tinygemm(rows, block, scale, zero, torch.int32, 0, 15)
    out = q._dequantize_affine_tinygemm(codes, block, scale, zero, torch.int32, 0, 15)
    return (4 + 32 / group) * x.numel(), out


def _torchao_float8(group: int, x: Tensor) -> Coded:
    """e4m3 with an fp32 scale per group."""
    q = import_module("torchao.quantization.quant_primitives")
    rows = _groups(x, group)
    scale = q._choose_scale_float8(rows, [1, group], torch.float8_e4m3fn)
    codes = q._quantize_affine_float8(rows, scale, torch.float8_e4m3fn)
    out = q._dequantize_affine_float8(codes, scale, torch.float32)
    return (8 + 32 / group) * x.numel(), out


def _torchao_mx(bits: int, mode: str, x: Tensor) -> Coded:
    """MX formats: blocks of 32, a power of two in one byte; FLOOR is OCP's scale."""
    mx = import_module("torchao.prototype.mx_formats.mx_tensor")
    elements: Any = {8: torch.float8_e4m3fn, 4: torch.float4_e2m1fn_x2}[bits]
    mode = getattr(mx.ScaleCalculationMode, mode)
    scale, codes = mx.to_mx(_groups(x, 32), elements, 32, mode)
    out = mx.to_dtype(codes, scale, elements, 32, torch.float32)
    return (bits + 8 / 32) * x.numel(), out


def _torchao_nvfp4(x: Tensor) -> Coded:
    """e2m1 with an e4m3 scale per 16 elements, and one fp32 scale per tensor."""
    module = import_module("torchao.prototype.mx_formats.nvfp4_tensor")
    rows = _groups(x, 16)
    whole = module.per_tensor_amax_to_scale(rows.abs().max())
    coded = module.NVFP4Tensor.to_nvfp4(rows, per_tensor_scale=whole)
    return 4.5 * x.numel() + 32, coded.dequantize(torch.float32)


def _torchao_nf4(x: Tensor) -> Coded:
    """QLoRA's: blocks of 64, their scales as int8 in blocks of at most 256 with an fp32 scale."""
    module = import_module("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    blocks = len(_groups(x, 64))
    outer = next(n for n in range(256, 0, -1) if blocks % n == 0)
    out = module.to_nf4(x, 64, outer).get_original_weight()
    return (4 + 8 / 64 + 32 / (64 * outer)) * x.numel() + 32, out


OPTIONAL: dict[str, Callable[[Tensor], Coded]] = {
    "torchao int8, groups of 128": partial(_torchao_int, 8, 128),
    "torchao int4, groups of 128": partial(_torchao_int, 4, 128),
    "torchao int4, groups of 32": partial(_torchao_int, 4, 32),
    "torchao int3, groups of 32": partial(_torchao_int, 3, 32),
    "torchao int2, groups of 32": partial(_torchao_int, 2, 32),
    "torchao int4 with zeros, groups of 128": partial(_torchao_int4_zero, 128),
    "torchao int4 with zeros, groups of 32": partial(_torchao_int4_zero, 32),
    "torchao float8, groups of 128": partial(_torchao_float8, 128),
    "torchao mxfp8": partial(_torchao_mx, 8, "FLOOR"),
    "torchao mxfp8 rceil": partial(_torchao_mx, 8, "RCEIL"),
    "torchao mxfp4": partial(_torchao_mx, 4, "FLOOR"),
    "torchao mxfp4 rceil": partial(_torchao_mx, 4, "RCEIL"),
    "torchao nvfp4": _torchao_nvfp4,
    "torchao nf4": _torchao_nf4,
    "hivemind Float16": partial(_hivemind, "Float16Compression"),
    "hivemind ScaledFloat16": partial(_hivemind, "ScaledFloat16Compression"),
    "hivemind Uniform8Bit": partial(_hivemind, "Uniform8BitQuantization"),
    "hivemind Quantile8Bit": partial(_hivemind, "Quantile8BitQuantization"),
    "hivemind Blockwise8Bit": partial(_hivemind, "BlockwiseQuantization"),
}
"""Label -> coder of one segment."""


def measured(label: str, segments: Sequence[Tensor]) -> tuple[float, Tensor]:
    """(bytes, decoded values) of a whole message."""
    bits, parts = 0.0, []
    for segment in segments:
        # torchao is made for weights: a scale below 1.2e-7 becomes that, which gradients need. They
        # are given to it times a power of two, which rounds nothing.
        power = 1.0
        if label.startswith("torchao"):
            power = 2.0 ** -math.floor(math.log2(float(segment.abs().max()) or 1.0))
        mine, out = OPTIONAL[label](segment * power)
        if not out.isfinite().all():
            raise RuntimeError("decodes to values that are not finite")
        bits += mine
        parts.append(out.flatten() / power)
    return bits / 8, torch.cat(parts)
