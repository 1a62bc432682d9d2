"""The CUDA C++ kernels compiled for this processor: a backend for tests, byte for byte the GPU's.

Everything but the launch is what a GPU gets: the same sources, the same arguments (launch.py), the
same table of pieces. `shim.h` stands for CUDA.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

from commlib_kernels import Format, Layout, Memory, Tag, launch
from commlib_kernels.cupy_cuda.build import text
from commlib_kernels.cupy_cuda.kernels import Op, kernels, source
from commlib_kernels.layout import stride

name = "cuda_host"

SHIM = Path(__file__).with_name("shim.h")
# No fused multiply-add, as NVRTC is told (-fmad=false); x86-64 has one only where asked for.
OPTIONS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function")


def _compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


def ready() -> None:
    """Raise ImportError where nothing can be compiled."""
    if _compiler() is None:
        raise ImportError("no C++ compiler: install g++")


@cache
def library(name: str) -> ctypes.CDLL:
    """A .cu file as a shared library; kept in the temporary directory by its content."""
    compiler = _compiler()
    assert compiler is not None, "ready() tells"
    source = f'{SHIM.read_text()}\n#line 1 "{name}.cu"\n{text(name)}'
    digest = hashlib.sha256("\0".join((source, compiler, *OPTIONS, *WARNINGS)).encode())
    folder = Path(tempfile.gettempdir()) / "commlib-cuda-host"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{digest.hexdigest()[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / "made.so"
            command = [compiler, *OPTIONS, *WARNINGS, "-x", "c++", "-", "-o", str(made)]
            done = subprocess.run(command, input=source, text=True, capture_output=True)
            if done.returncode:
                pytest.fail(f"{name}.cu does not compile for the host:\n{done.stderr[:4000]}")
            made.replace(path)
    return ctypes.CDLL(str(path))


def _run(op: Op, fmt: Format, call: launch.Launch) -> None:
    for kernel in kernels(op, fmt, call):
        function = getattr(library(source(fmt)), kernel.name)
        address = ctypes.c_void_p(call.words.ctypes.data)
        function(address, ctypes.c_uint(kernel.blocks), ctypes.c_uint(kernel.threads))


def quantize(
    fmt: Format,
    x: torch.Tensor,
    wire: torch.Tensor,
    layout: Layout,
    tag: Tag,
    memory: Memory | None = None,
) -> None:
    """As every backend's."""
    _run("quantize", fmt, launch.quantize(fmt, x, wire, layout, tag, memory))


def dequantize(
    fmt: Format, wire: torch.Tensor, out: torch.Tensor, layout: Layout, *, add: bool = False
) -> None:
    """As every backend's."""
    _run("dequantize", fmt, launch.dequantize(fmt, wire, out, layout, add=add))


def reduce(
    fmt: Format,
    wires: torch.Tensor,
    out: torch.Tensor,
    layout: Layout,
    tag: Tag,
    *,
    factor: float = 1.0,
    memory: Memory | None = None,
) -> None:
    """As every backend's."""
    if stride(layout, fmt):
        _run("reduce", fmt, launch.reduce(fmt, wires, out, layout, tag, factor, memory))
