"""CUDA C++ without a GPU: what the host tells a kernel, how sources become modules.

The bytes are held by tests/kernels/test_backends.py, through the host shim.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
import torch

from bench.compile_matrix import Report, reports, table
from commlib.codecs import codec
from commlib_kernels import Layout, Memory, Tag, launch, load, nbytes
from commlib_kernels.cupy_cuda import _Stream, build
from commlib_kernels.cupy_cuda.kernels import kernels, source
from commlib_kernels.philox import SIGNS
from tests.contract import CODECS

FUSED = 'extern "C" __global__ void fused(float* x, float a) { x[0] = x[0] * a + 1.0f; }'
SPILLED = """
ptxas info    : Compiling entry function 'k' for 'sm_90'
ptxas info    : Function properties for k
    24 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 96 registers, used 0 barriers
"""


def fields(kind: str, struct_name: str) -> list[str]:
    """Names of the fields of one type in a struct of call.cuh, in their order."""
    text = (build.HERE / "call.cuh").read_text()
    body = re.search(rf"struct {struct_name} \{{(.*?)\}};", text, re.DOTALL)
    assert body is not None
    lines = re.findall(rf"\b{kind} ([^;]+);", body[1])
    return [name.strip() for line in lines for name in line.split(",")]


class TestTheHostAndTheKernelAgree:
    def test_on_the_arguments(self) -> None:
        assert fields("i64", "Call") == list(launch.INTEGERS)
        assert fields("float", "Call") == [*launch.NUMBERS, f"table[{launch.TABLE}]"]

    def test_on_where_they_lie(self) -> None:
        places = {name: field[1] for name, field in (launch.STRUCT.fields or {}).items()}
        assert places == launch.PLACES

    def test_on_the_table_of_pieces(self) -> None:
        names = fields("i64", "Piece")
        assert len(names) == launch.TABLE_COLUMNS
        assert [names[getattr(launch, n.upper())] for n in names[:-1]] == names[:-1]

    def test_on_constants(self) -> None:
        text = build.text("uniform")
        for name in ("EXACT_TILE", "RUN"):
            assert f"constexpr int {name} = {getattr(launch, name)};" in text
        assert (launch.FP32, launch.FP16, launch.BF16, launch.INT8, launch.NONE) == (0, 1, 2, 3, 4)
        assert "enum Kind { FP32, FP16, BF16, INT8, NONE };" in text
        assert "enum Rule { ABSMAX, L2, MEAN, UNSCALED, FIT, UNBIASED };" in text
        assert list(launch.RULES.values()) == [0, 1, 2, 3, 4, 5]
        assert f"constexpr int SIGNS = {SIGNS};" in build.text("rotated").replace("  ", "")

    @pytest.mark.parametrize("text", CODECS)
    def test_on_the_names_of_kernels(self, text: str) -> None:
        fmt, made_of = codec(text).format, build.text(source(codec(text).format))
        made = set(re.findall(r"KERNEL\((\w+),", made_of))
        for name in re.findall(r"(?:KERNELS|GROUPED)\((\w+),", made_of):
            made |= {f"{op}_{name}" for op in ("quantize", "dequantize", "reduce")}
        for name in re.findall(r"MEASURES\((\w+),", made_of):
            made |= {f"measure_quantize_{name}", f"measure_reduce_{name}"}
        layout, x = Layout((300,), align=fmt.align), torch.zeros(300)
        wire = torch.zeros(nbytes(layout, fmt), dtype=torch.uint8)
        call = launch.quantize(fmt, x, wire, layout, Tag(), None)
        assert {kernel.name for kernel in kernels("quantize", fmt, call)} <= made
        call = launch.reduce(fmt, wire, wire, layout.only(0), Tag(), 1.0, None)
        assert {kernel.name for kernel in kernels("reduce", fmt, call)} <= made


def test_a_table_is_made_once_per_layout_and_not_per_message() -> None:
    fmt, layout = codec("int4").format, Layout((1000, 24), align=128)
    x, wire = torch.zeros(1024), torch.zeros(nbytes(layout, fmt), dtype=torch.uint8)
    one = launch.quantize(fmt, x, wire, layout, Tag(step=1), Memory(torch.zeros(1024)))
    other = launch.quantize(fmt, x.clone(), wire, layout, Tag(step=2), Memory(torch.ones(1024)))
    assert one.pieces.table is other.pieces.table
    assert one.arguments["x"] != other.arguments["x"]
    held = launch.quantize(fmt, x, wire, layout, Tag(), Memory(torch.zeros(1024), hold=(1,)))
    assert held.pieces.table is not one.pieces.table


def test_an_unusable_backend_says_why() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "no CUDA device" in str(load("cupy_cuda"))


def test_cupy_takes_the_arguments_by_value() -> None:
    """As far as a launch gets without a driver: past the look at its arguments."""
    function = pytest.importorskip("cupy.cuda.function").Function
    fmt, layout = codec("int4").format, Layout((128,), align=128)
    wire = torch.zeros(nbytes(layout, fmt), dtype=torch.uint8)
    words = launch.quantize(fmt, torch.zeros(128), wire, layout, Tag(), None).words
    if torch.cuda.is_available():
        pytest.skip("there is a driver; tests/gpu launches")
    unloaded = function.__new__(function)
    with pytest.raises(RuntimeError):  # of CUDA: there is no driver
        unloaded((1,), (128,), (words.view(launch.BYTES),), stream=_Stream(0))
    with pytest.raises(TypeError):
        unloaded((1,), (128,), (words,), stream=_Stream(0))


def test_headers_are_put_in_once() -> None:
    for file in build.FILES:
        text = build.text(file)
        assert "#include" not in text
        assert "#pragma once" not in text
        assert text.count("struct Call {") == 1


class TestCompiling:
    """Needs NVRTC, no GPU."""

    @pytest.fixture(autouse=True)
    def _nvrtc(self) -> None:
        pytest.importorskip("cupy")

    def test_a_module_is_a_whole_elf_file(self) -> None:
        """CuPy hands out one byte too few, which a file must not lack."""
        cubin = build.compile("raw", 90).cubin
        assert cubin[:4] == b"\x7fELF"
        (headers,) = struct.unpack_from("<Q", cubin, 32)
        size, count = struct.unpack_from("<HH", cubin, 54)
        assert len(cubin) >= headers + size * count
        assert build.whole(cubin[:-1]) == cubin

    @pytest.mark.parametrize("arch", [75, 90])
    def test_no_fused_multiply_add(self, arch: int) -> None:
        built = build.compile("raw", arch, build.REPORT)
        found = list(reports("cupy_cuda", "", arch, built.ptx, built.log))
        assert {r.kernel for r in found} == {"quantize_raw", "dequantize_raw", "reduce_raw"}
        assert all(r.good for r in found)

    def test_a_module_is_compiled_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(build, "folder", lambda name: tmp_path)
        path = build.cubin("raw", 80)
        first = path.stat().st_mtime_ns
        assert build.cubin("raw", 80) == path
        assert path.stat().st_mtime_ns == first
        assert list(tmp_path.iterdir()) == [path]

    def test_what_does_not_compile_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build, "text", lambda name: "no C++")
        with pytest.raises(RuntimeError, match=r"raw\.cu does not compile for sm_90"):
            build.compile("raw", 90)


class TestTheMatrixCanFail:
    def test_on_a_fused_multiply_add(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("cupy")
        monkeypatch.setattr(build, "text", lambda name: FUSED)
        monkeypatch.setattr(build, "OPTIONS", ("-std=c++17",))
        built = build.compile("raw", 90, build.REPORT)
        (found,) = reports("cupy_cuda", "", 90, built.ptx, built.log)
        assert found.fused == 1
        assert not found.good

    def test_on_a_spill(self) -> None:
        (found,) = reports("cupy_cuda", "", 90, ".entry k(", SPILLED)
        assert found == Report("cupy_cuda", "k", 90, registers=96, stack=24, spilled=24, fused=0)
        assert not found.good
        assert "24" in table([found], (90,))
