"""numba_cuda's kernels compile without a GPU, and say what they need to run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from commlib_kernels import numba_cuda

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


@pytest.mark.skipif(SIMULATED, reason="the simulator compiles nothing")
@pytest.mark.parametrize("cc", [(7, 5), (9, 0), (12, 0)], ids=str)
def test_kernels_compile_and_fuse_nothing(cc: tuple[int, int]) -> None:
    """No fused multiply-add, which rounds once where the byte contract rounds twice."""
    pytest.importorskip("numba_cuda")
    from commlib_kernels.numba_cuda import build

    ops = ("quantize", "dequantize", "reduce", "reduce_residual")
    found = dict(build.of_format("int8", build.FORMATS["int8"], cc, ops))
    assert list(found) == [f"int8.{op}" for op in ops]
    for name, ptx in found.items():
        assert f".target sm_{cc[0]}{cc[1]}" in ptx, name
        assert ".visible .entry" in ptx, name
        assert "fma." not in ptx, name
        assert ".local" not in ptx, f"{name}: an array of a unit is not in registers"


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
