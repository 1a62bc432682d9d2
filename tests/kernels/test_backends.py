"""Every backend writes the bytes of the reference: all formats, dtypes, residuals, shapes, data."""

from __future__ import annotations

import pytest
import torch

from commlib.codecs import codec
from commlib_kernels import Layout, Tag, cupy_cuda, nbytes, reference
from tests.contract import (
    CODECS,
    CPU_CODECS,
    DTYPES,
    SPARSE,
    Case,
    backends,
    cases_of_data,
    cases_of_shape,
    check_backend,
    require,
)

COMMON = {"bf16", "int8", "int4", "int4:round=stochastic", "sign", "rotate|eden4"}
"""Texts that `make test` tries on the CUDA C++ kernels; `make test-cuda` tries all."""


def pair(name: str, text: str) -> object:
    rare = name == "cuda_host" and text not in COMMON
    return pytest.param(name, text, marks=[pytest.mark.cuda_host] if rare else [])


FAST = [name for name in backends() if name != "reference"]
PAIRS = [pair(name, text) for name in FAST for text in CODECS]
PAIRS += [pair("numba_cpu", text) for text in CPU_CODECS + SPARSE]


@pytest.mark.parametrize(("name", "text"), PAIRS)
class TestSameBytes:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_of_every_kind_of_data_and_length(
        self, name: str, text: str, dtype: torch.dtype
    ) -> None:
        candidate = require(name)
        for case in cases_of_data(codec(text).format, dtype):
            check_backend(candidate, reference, case)

    def test_of_every_shape_of_message(self, name: str, text: str) -> None:
        candidate = require(name)
        for case in cases_of_shape(codec(text).format):
            check_backend(candidate, reference, case)


@pytest.mark.parametrize("name", ["reference", "numba_cpu", "cuda_host"])
def test_an_fp8_code_that_nobody_writes_has_a_value(name: str) -> None:
    """Bytes that changed on the way may hold 0x7F."""
    backend, fmt, layout = require(name), codec("fp8:block=32").format, Layout((32,))
    wire, out = torch.zeros(nbytes(layout, fmt), dtype=torch.uint8), torch.empty(32)
    reference.quantize(fmt, torch.full((32,), 448.0), wire, layout, Tag())
    wire[0], wire[1] = 0x7F, 0xFF
    backend.dequantize(fmt, wire, out, layout, add=False)
    assert out[:2].tolist() == [480.0, -480.0]
    assert out[2:].equal(torch.full((30,), 448.0))


@pytest.mark.parametrize("text", CPU_CODECS + SPARSE)
def test_what_cuda_lacks_is_refused(text: str) -> None:
    backend, fmt = require("cuda_host"), codec(text).format
    assert not fmt.on_cuda
    layout = Layout((fmt.block,), align=fmt.align)
    wire = torch.zeros(nbytes(layout, fmt), dtype=torch.uint8)
    calls = [
        lambda: backend.quantize(fmt, torch.ones(fmt.block), wire, layout, Tag()),
        lambda: cupy_cuda.warmup(fmt),  # what communicators call before ranks meet
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"no CUDA kernels for .* take int2 to int8"):
            call()


def test_a_missing_backend_fails_where_it_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(pytest.skip.Exception, match="no_such_backend"):
        require("no_such_backend")
    monkeypatch.setenv("COMMLIB_REQUIRE", "reference,no_such_backend")
    with pytest.raises(pytest.fail.Exception, match="COMMLIB_REQUIRE names no_such_backend"):
        require("no_such_backend")


def test_a_wrong_byte_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself can fail: a rounding that is off by one code is seen (T34)."""
    from types import ModuleType

    broken = ModuleType("broken")
    broken.name = "broken"
    for op in ("quantize", "dequantize", "reduce"):
        setattr(broken, op, getattr(reference, op))

    def quantize(fmt, x, wire, *rest):  # type: ignore[no-untyped-def]
        reference.quantize(fmt, x, wire, *rest)
        wire[3] ^= 1

    broken.quantize = quantize
    with pytest.raises(pytest.fail.Exception, match=r"1 of .* bytes of the wire of step 0"):
        check_backend(broken, reference, Case(codec("int8").format, Layout((64,))))
