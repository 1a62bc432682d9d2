"""GPU kernels compiled by Numba: one kernel an op, on torch's current stream, without waiting.

Importing this package needs neither a GPU nor numba-cuda: `ready` says what is missing, and the
first call brings in the rest.
"""

import contextlib
import os
from importlib import import_module
from importlib.util import find_spec

import torch

from commlib_kernels import launch
from commlib_kernels.formats import Format
from commlib_kernels.layout import Layout, stride
from commlib_kernels.memory import Memory
from commlib_kernels.tag import Tag

__all__ = ["dequantize", "name", "quantize", "ready", "reduce", "warmup"]

name = "numba_cuda"

SIMULATOR = "NUMBA_ENABLE_CUDASIM"


def ready() -> None:
    """Raise ImportError, with what to do, where this backend cannot run."""
    if find_spec("numba_cuda") is None:
        raise ImportError("numba_cuda needs a package: pip install 'numba-cuda[cu13]'")
    if os.environ.get(SIMULATOR) != "1" and not torch.cuda.is_available():
        raise ImportError(
            f"numba_cuda needs a CUDA device, and torch sees none; {SIMULATOR}=1 simulates one"
        )
    if os.environ.get(SIMULATOR) != "1":
        with contextlib.suppress(ImportError):
            # numba-cuda takes numba.cuda's place by a .pth file, which PYTHONPATH does not read.
            import_module("_numba_cuda_redirector")
        try:
            import_module("numba.cuda.cgutils")
        except ImportError as error:
            raise ImportError(f"numba.cuda is not numba-cuda's: {error}") from error


def quantize(
    fmt: Format,
    x: torch.Tensor,
    wire: torch.Tensor,
    layout: Layout,
    tag: Tag,
    memory: Memory | None = None,
) -> None:
    """Code `x` into `wire`, adding and renewing the residual."""
    from commlib_kernels.numba_cuda.host import run

    call = launch.quantize(fmt, x, wire, layout, tag, memory)
    if fmt.per_segment:
        run(fmt, "quantize_peaks", call, call.pieces.runs, x.device)
        run(fmt, "combine", call, call.pieces.groups, x.device)
    name = "quantize" if memory is None else "quantize_residual"
    run(fmt, name, call, call.tiles, x.device)


def dequantize(
    fmt: Format, wire: torch.Tensor, out: torch.Tensor, layout: Layout, *, add: bool = False
) -> None:
    """Decode `wire` into (or add it to) the elements of `out` that its payloads cover."""
    from commlib_kernels.numba_cuda.host import run

    call = launch.dequantize(fmt, wire, out, layout, add=add)
    run(fmt, "dequantize_add" if add else "dequantize", call, call.tiles, out.device)


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
    """Sum the payloads of all ranks into a wire (uint8) or a dense chunk."""
    from commlib_kernels.numba_cuda.host import run

    call = launch.reduce(fmt, wires, out, layout, tag, factor, memory)
    if out.dtype != torch.uint8:
        run(fmt, "dense", call, call.tiles, out.device)
        return
    if fmt.per_segment:
        run(fmt, "reduce_peaks", call, call.pieces.runs, out.device)
        run(fmt, "combine", call, call.pieces.groups, out.device)
    name = "reduce" if memory is None else "reduce_residual"
    run(fmt, name, call, call.tiles, out.device)


def warmup(fmt: Format, device: torch.device | str | None = None) -> None:
    """Compile this format's kernels and load them on a device (by default the current one)."""
    launch.check(fmt)
    place = torch.device("cpu" if os.environ.get(SIMULATOR) == "1" else device or "cuda")
    layout = Layout((fmt.block,), align=fmt.align)
    x = torch.zeros(fmt.block, device=place)
    wire = torch.zeros(stride(layout, fmt), dtype=torch.uint8, device=place)
    for memory in (None, Memory(torch.zeros_like(x))):
        quantize(fmt, x, wire, layout, Tag(), memory)
        reduce(fmt, wire, torch.empty_like(wire), layout.only(0), Tag(), memory=memory)
    reduce(fmt, wire, x, layout.only(0), Tag())
    dequantize(fmt, wire, x, layout)
    dequantize(fmt, wire, x, layout, add=True)
