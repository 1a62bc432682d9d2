"""Residuals that no kernel takes: refused by name, before one writes where it must not.

Those without room are in test_layout.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from commlib.codecs import codec
from commlib_kernels import Layout, Memory, Tag, nbytes, quantize

INT4 = codec("int4").format
LAYOUT = Layout((256, 512))


def int8(scales: torch.Tensor) -> dict[str, Any]:
    return {"residual": torch.zeros(768, dtype=torch.int8), "scales": scales}


@pytest.mark.parametrize(
    ("memory", "complaint"),
    [
        *(
            ({"residual": torch.zeros(768, dtype=dtype)}, f"is {dtype}; allowed: fp32, bf16, int8")
            for dtype in (torch.float16, torch.float64, torch.int32)
        ),
        (int8(torch.zeros(6, dtype=torch.int8)), r"needs 6 .*got 6 x torch\.int8"),
        (int8(torch.zeros(12, dtype=torch.int16)[::2]), "needs 6 flat contiguous scales"),
        ({"residual": torch.zeros(768), "hold": (2,)}, r"hold=\(2,\); allowed: segments 0 to 1"),
        ({"residual": torch.zeros(768), "hold": (-1,)}, r"hold=\(-1,\)"),
    ],
)
def test_what_is_no_residual_of_a_message_is_refused(memory: Any, complaint: str) -> None:
    wire = torch.zeros(nbytes(LAYOUT, INT4), dtype=torch.uint8)
    with pytest.raises(ValueError, match=complaint):
        quantize(INT4, torch.ones(768), wire, LAYOUT, Tag(), Memory(**memory))
    assert not wire.any()


def test_others_are_taken() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        scales = torch.zeros(6, dtype=torch.int16) if dtype is torch.int8 else None
        memory = Memory(torch.zeros(768, dtype=dtype), scales, hold=(1,))
        wire = torch.zeros(nbytes(LAYOUT, INT4), dtype=torch.uint8)
        quantize(INT4, torch.randn(768), wire, LAYOUT, Tag(), memory)
        assert memory.residual[:256].any()
        assert not memory.residual[256:].any()
