"""A little of every kernel, for compute-sanitizer to watch: `compute-sanitizer python -m ...`."""

from __future__ import annotations

import sys

import torch

from commlib.codecs import codec
from commlib_kernels import load, reference
from tests.contract import CODECS, Case, check_backend, layouts
from tests.gpu.backends import OnDevice

LAYOUTS = ("one rank", "four ranks", "offsets", "stacked")


def main() -> None:
    """Every codec over some layouts and residuals, by the backend that is named."""
    module = load(sys.argv[1])
    if isinstance(module, ImportError):
        raise SystemExit(str(module))
    backend, residuals = OnDevice(module, margin=0), ("none", "fp32", "bf16", "int8")
    for text in CODECS:
        fmt = codec(text).format
        found = [layout for name, layout in layouts(fmt) if name in LAYOUTS]
        for residual, layout in zip(residuals, found, strict=True):
            check_backend(backend, reference, Case(fmt, layout, "mixed", residual))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
