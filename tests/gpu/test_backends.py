"""CUDA backends on a device write the bytes of the reference, and the golden ones."""

from __future__ import annotations

import pytest
import torch

from commlib.codecs import codec
from commlib_kernels import BACKENDS, Layout, reference
from tests.contract import (
    CODECS,
    DTYPES,
    KINDS,
    LENGTHS,
    RESIDUALS,
    Case,
    check_backend,
    layouts,
    require,
)
from tests.golden.make import GOLDEN, contents, path
from tests.gpu.backends import OnDevice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RATES = {"none": (1.0, 1.0, 1.0), "fp32": (1.0, 1.0, 1.0), "bf16": (0.2, 1.0, 1.0)}
RATES["int8"] = (1.0, 1.0, 0.75)

each_backend = pytest.mark.parametrize("name", BACKENDS["cuda"])


@each_backend
@pytest.mark.parametrize("text", CODECS)
def test_every_kind_of_data_and_length(name: str, text: str) -> None:
    candidate = OnDevice(require(name))
    for dtype in DTYPES:
        for kind in KINDS if dtype == torch.float32 else ("mixed",):
            for residual in RESIDUALS if kind in ("random", "mixed") else ("fp32",):
                case = Case(
                    codec(text).format, Layout(LENGTHS, dtype), kind, residual, RATES[residual]
                )
                check_backend(candidate, reference, case)


@each_backend
@pytest.mark.parametrize("text", CODECS)
def test_every_shape_of_message(name: str, text: str) -> None:
    candidate, fmt = OnDevice(require(name), step_on_device=True), codec(text).format
    for index, (_, layout) in enumerate(layouts(fmt)):
        residual = list(RESIDUALS)[index % 4]
        rates = ((1.0, 1.0, 1.0), (0.2, 0.9, 1.0), (1.0, 1.0, 0.5))[index % 3]
        hold = (0,) if index % 2 else ()
        check_backend(candidate, reference, Case(fmt, layout, "mixed", residual, rates, hold))


@each_backend
@pytest.mark.parametrize("text", ["int4", "int8:round=stochastic", "sign", "bf16", "fp8"])
def test_long_messages(name: str, text: str) -> None:
    """More warps than a GPU holds at once."""
    case = Case(codec(text).format, Layout((3_000_001, 70_000)), residual="fp32")
    check_backend(OnDevice(require(name)), reference, case)


@each_backend
@pytest.mark.parametrize("text", [text for texts in GOLDEN.values() for text in texts])
def test_golden_bytes(name: str, text: str) -> None:
    method = next(method for method, texts in GOLDEN.items() if text in texts)
    got = contents(OnDevice(require(name)), codec(text).format)
    assert got == path(method, text).read_bytes()
