"""numba_cuda's kernels compile without a GPU, and say what they need to run."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch

from bench.compile_matrix import ARCHITECTURES, QUICK, SAME_PTX, jobs, retargeted
from commlib.codecs import codec
from commlib_kernels import Layout, Memory, Tag, launch, nbytes, numba_cuda

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


@cache
def texts(arch: int) -> dict[str, str]:
    """PTX of int8's kernels by name; not of all where another architecture's text stands for it."""
    from commlib_kernels.numba_cuda import build

    ops: tuple[str, ...] = ("quantize", "dequantize")
    if arch not in SAME_PTX:
        ops += "reduce", "reduce_residual"
    found = dict(build.of_format("int8", build.FORMATS["int8"], divmod(arch, 10), ops))
    assert list(found) == [f"int8.{op}" for op in ops]
    return found


def unnumbered(ptx: str) -> list[str]:
    """The lines, with kernels called by what they are: Numba counts in their names what it did."""
    (kernel,) = re.findall(r"\.visible \.entry (\w+)\(", ptx)
    return ptx.replace(kernel, "kernel").replace(kernel.removeprefix("_ZN"), "kernel").splitlines()


@pytest.mark.skipif(SIMULATED, reason="the simulator compiles nothing")
class TestCompiling:
    @pytest.fixture(autouse=True)
    def _compiler(self) -> None:
        pytest.importorskip("numba_cuda")

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_no_fused_multiply_add(self, arch: int) -> None:
        """It rounds once where the byte contract rounds twice."""
        for name, ptx in texts(arch).items():
            assert f".target sm_{arch}\n" in ptx, name
            assert ".visible .entry" in ptx, name
            assert "fma." not in ptx, name
            assert ".local" not in ptx, f"{name}: an array of a unit is not in registers"

    @pytest.mark.parametrize("arch", SAME_PTX)
    def test_one_text_serves_several_architectures(self, arch: int) -> None:
        """Or `make compile-matrix` would look at kernels that nobody runs."""
        source = SAME_PTX[arch]
        for name, ptx in texts(arch).items():
            expected = retargeted(texts(source)[name], source, arch)
            assert unnumbered(expected) == unnumbered(ptx), name

    def test_the_matrix_takes_every_part(self) -> None:
        """All for all architectures with --all; else every file and kind for one at least."""
        from commlib_kernels.cupy_cuda.build import FILES
        from commlib_kernels.numba_cuda.build import FORMATS

        def parts(everything: bool) -> dict[str, set[int]]:
            found: dict[str, set[int]] = {}
            for _, part, archs in jobs(("cupy_cuda", "numba_cuda"), ARCHITECTURES, everything):
                found.setdefault(part, set()).update(archs)
            return found

        assert parts(True) == {part: set(ARCHITECTURES) for part in (*FILES, *FORMATS)}
        assert set(QUICK) <= {*FILES, *FORMATS}
        assert set(FILES) <= set(parts(False))
        quick = [FORMATS[part] for part in parts(False) if part in FORMATS]
        assert {fmt.kind for fmt in quick} == {fmt.kind for fmt in FORMATS.values()}


@pytest.mark.skipif(SIMULATED, reason="the simulator is a device")
def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(numba_cuda, "find_spec", lambda name: name)
    with pytest.raises(ImportError, match="needs a CUDA device, and torch sees none"):
        numba_cuda.ready()


def test_without_numba_cuda_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_cuda, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'numba-cuda\[cu13\]'"):
        numba_cuda.ready()


def test_importing_the_package_brings_in_nothing() -> None:
    """Whoever lists backends pays nothing, and `ready` can say what is missing."""
    program = "import sys, commlib_kernels.numba_cuda; print('numba.cuda' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.skipif(SIMULATED, reason="the simulator has no driver")
def test_the_driver_gets_the_address_of_every_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    from commlib_kernels.numba_cuda import host

    seen = []

    def launched(handle: int, *rest: int) -> tuple[int]:
        pointers = (ctypes.c_void_p * 3).from_address(rest[8])
        integer = ctypes.c_int64.from_address(pointers[0])
        numbers = [ctypes.c_float.from_address(p).value for p in pointers[1:]]
        seen.append((handle, rest[:8], rest[9], integer.value, *numbers))
        return (0,)

    monkeypatch.setattr(driver, "cuLaunchKernel", launched)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    fields = [launch.PLACES[name] for name in ("x", "alpha", "omega")]
    loaded = host._Loaded(42, np.array(fields, np.int64), None)
    fmt, layout, x = codec("int4").format, Layout((128,), align=128), torch.zeros(128)
    wire = torch.zeros(nbytes(layout, fmt), dtype=torch.uint8)
    memory = Memory(torch.zeros(128), alpha=0.25, beta=1.0, omega=0.5)
    host._launch(loaded, 3, launch.quantize(fmt, x, wire, layout, Tag(), memory), 0)
    assert seen == [(42, (3, 1, 1, 128, 1, 1, 0, 7), 0, x.data_ptr(), 0.25, 0.5)]
    monkeypatch.setattr(driver, "cuLaunchKernel", lambda *rest: (1,))
    with pytest.raises(RuntimeError, match="was not launched: 1"):
        host._launch(loaded, 3, launch.quantize(fmt, x, wire, layout, Tag(), memory), 0)
