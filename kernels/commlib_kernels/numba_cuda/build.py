"""Kernels as PTX, for any GPU and without one: what a build checks before anything runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from numba import cuda

from commlib_kernels.formats import Format
from commlib_kernels.numba_cuda.host import kernels_of, signature
from commlib_kernels.numba_cuda.jit import THREADS
from commlib_kernels.numba_cuda.kernels import resident

FORMATS: dict[str, Format] = {
    "raw": Format("raw"),
    "fp16": Format("fp16", bits=16),
    "bf16": Format("bf16", bits=16),
    "fp8": Format("fp8", bits=8, scale="absmax"),
    "fp8_stochastic": Format("fp8", bits=8, scale="absmax", stochastic=True),
    "int8": Format("uniform", bits=8, levels=127, scale="absmax"),
    "int4_stochastic": Format("uniform", bits=4, levels=7, scale="absmax", stochastic=True),
    "int3_4096": Format("uniform", bits=3, levels=3, block=4096, scale="absmax"),
    "sign": Format("sign", bits=1, scale="mean"),
    "ternary_tensor": Format(
        "uniform", bits=2, levels=1, scale="absmax", per_segment=True, stochastic=True
    ),
    "qsgd": Format("uniform", bits=4, levels=7, block=512, scale="l2", stochastic=True),
    "natural": Format("natural", bits=9, stochastic=True),
    "nf4": Format("table", bits=4, levels=1, block=64, scale="absmax", table="nf4"),
    "eden4_4096": Format("gauss", bits=4, block=4096, scale="unbiased", table="gauss4"),
    "rotate_eden2": Format("gauss", bits=2, block=1024, scale="fit", table="gauss2", rotate=0),
    "rotate_qsgd": Format(
        "uniform", bits=4, levels=7, block=128, scale="l2", stochastic=True, rotate=0
    ),
}
"""Between them: every kind, width of plane, scale rule, way of rounding and length of block."""


def kernels(cc: tuple[int, int]) -> Iterator[tuple[str, str]]:
    """Name and PTX of every kernel of every format in FORMATS, for one compute capability."""
    for label, fmt in FORMATS.items():
        yield from of_format(label, fmt, cc)


def of_format(
    label: str, fmt: Format, cc: tuple[int, int], only: tuple[str, ...] = ()
) -> Iterator[tuple[str, str]]:
    """Name and PTX of the kernels of one format, or of those named."""
    with _no_device(cc):
        for name, function in kernels_of(fmt).items():
            if only and name not in only:
                continue
            bounds = THREADS, resident(fmt, name)
            text, _ = cuda.compile_ptx(function, signature(function), cc=cc, launch_bounds=bounds)
            yield f"{label}.{name}", text


@contextmanager
def _no_device(cc: tuple[int, int]) -> Iterator[None]:
    """Numba asks the driver for a device even where it is told what to compile for."""

    class Device:
        compute_capability = cc

    with patch("numba.cuda.dispatcher.get_current_device", Device):
        yield
