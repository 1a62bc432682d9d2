"""CUDA backends on a device write the bytes of the reference, and the golden ones."""

from __future__ import annotations

import pytest
import torch

from commlib.codecs import codec
from commlib_kernels import BACKENDS, Layout, reference
from tests.contract import (
    CODECS,
    DTYPES,
    Case,
    cases_of_data,
    cases_of_shape,
    check_backend,
    require,
)
from tests.golden.make import GOLDEN, contents, path
from tests.gpu.backends import OnDevice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROWS = [
    (method, text)
    for method, texts in GOLDEN.items()
    for text in texts
    if codec(text).format.on_cuda
]

each_backend = pytest.mark.parametrize("name", BACKENDS["cuda"])


@each_backend
@pytest.mark.parametrize("text", CODECS)
def test_every_kind_of_data_and_length(name: str, text: str) -> None:
    candidate = OnDevice(require(name))
    for dtype in DTYPES:
        for case in cases_of_data(codec(text).format, dtype):
            check_backend(candidate, reference, case)


@each_backend
@pytest.mark.parametrize("text", CODECS)
def test_every_shape_of_message(name: str, text: str) -> None:
    candidate = OnDevice(require(name), step_on_device=True)
    for case in cases_of_shape(codec(text).format):
        check_backend(candidate, reference, case)


@each_backend
@pytest.mark.parametrize(
    "text", ["int4", "int8:round=stochastic", "sign", "bf16", "fp8", "nf4", "rotate|eden2"]
)
def test_long_messages(name: str, text: str) -> None:
    """More warps than a GPU holds at once."""
    case = Case(codec(text).format, Layout((3_000_001, 70_000)), residual="fp32")
    check_backend(OnDevice(require(name)), reference, case)


@each_backend
@pytest.mark.parametrize(("method", "text"), ROWS)
def test_golden_bytes(name: str, method: str, text: str) -> None:
    got = contents(OnDevice(require(name)), codec(text).format)
    assert got == path(method, text).read_bytes()
