"""Writes the golden files: the bytes of every format, frozen. Run: ``python -m tests.golden.make``.

A golden file that changes is a new wire version: ranks of different versions no longer understand
each other. So existing files are never overwritten without ``--force``.

Each file is: wire of step 0 | wire of step 1 with feedback | reduced wire | residual | decoded
Of a squeezed codec: bytes used (8) | the squeezed wire of a message of two payloads
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType

import torch

from commlib.codecs import codec
from commlib_kernels import Format, Layout, Memory, Tag, nbytes, reference, squeezed_bound
from commlib_kernels.layout import blocks

HERE = Path(__file__).parent
SIZES, EXACT = (168, 33, 5), (False, False, True)

GOLDEN = {
    "cast": ["fp32", "fp16", "bf16", "fp8", "fp8:block=32:round=stochastic"],
    "uniform": [
        *(f"int{bits}" for bits in range(8, 1, -1)),
        *("int8:round=stochastic", "int4:round=stochastic", "int3:block=32"),
        *("qsgd", "qsgd:levels=7:norm=max", "qsgd:levels=2:block=tensor"),
    ],
    "sign": ["sign", "sign:block=tensor", "ternary", "natural", "natural:round=nearest"],
    "codebook": ["eden4", "eden3:block=64", "eden2:scale=unbiased", "eden1", "nf4", "e2m1", "e3m0"],
    "microscaling": ["mxfp8", "mxfp8:round=stochastic", "mxfp4", "mxfp4:block=64"],
    "grid": ["grid6", "grid5", "grid4:block=256", "grid3:block=128", "grid2"],
    "buckets": ["sigma8"],
    "rotation": ["rotate|int4", "rotate:seed=5|eden2:block=128", "rotate|eden4:block=256"],
    "sparse": [
        *("topk:density=0.1|bf16", "topk:density=0.25:block=64|int8", "topk:density=0.5|fp32"),
        *("randk:density=0.1|bf16", "randk:density=0.2:block=64:scale=unbiased|fp16"),
    ],
}
"""Module in commlib/codecs -> texts."""
INNER = ("int4", "int3", "fp8", "fp32", "bf16", "mxfp4", "rotate|grid4")
SQUEEZED = [f"{text}|entropy" for text in INNER]
"""Texts of commlib/codecs/entropy.py."""
TABLE = [(method, text) for method, texts in GOLDEN.items() for text in texts]
TABLE += [("entropy", text) for text in SQUEEZED]


def path(method: str, text: str) -> Path:
    """The file of one format."""
    name = text.replace(":", "-").replace("=", "_").replace("|", "+")
    return HERE / method / f"{name}.bin"


def numbers(step: int) -> torch.Tensor:
    """The input, the same on any machine: rounded to fp32 once, with zero and bad blocks."""
    i = torch.arange(sum(SIZES), dtype=torch.int64) + 1000 * step
    mixed = (i * 2654435761) % (1 << 32)
    sizes = torch.tensor([2.0 ** (-31 - k) for k in range(6)], dtype=torch.float64)
    x = (mixed - (1 << 31)).double() * sizes[(mixed >> 7) % 6]
    x[40] *= 8
    if step == 1:
        x[130] = float("nan")  # in the short last block of the first parameter
        x[168:201] = 0
    return x.float()


def contents(backend: ModuleType, fmt: Format) -> bytes:
    """What a backend writes for the golden input."""
    layout = Layout(SIZES, exact=EXACT, align=fmt.align)
    h = torch.zeros(sum(SIZES), dtype=torch.int8)
    memory = Memory(h, torch.zeros(blocks(SIZES, fmt), dtype=torch.int16), 1.0, 1.0, 0.75)
    wires = []
    for step, held in enumerate((None, memory)):
        tag = Tag(seed=(9 << 32) + 7, keys=(11, 12, 13), step=step, rank=1)
        wires.append(torch.zeros(nbytes(layout, fmt), dtype=torch.uint8))
        if step == 1:
            warm = torch.zeros_like(wires[0])
            backend.quantize(fmt, numbers(2), warm, layout, tag, held)
        backend.quantize(fmt, numbers(step), wires[-1], layout, tag, held)
    owner, reduced = Tag(7, (21, 22, 23), 0, 0), torch.zeros_like(wires[0])
    both = torch.cat([wires[0], wires[0]])
    backend.reduce(fmt, both, reduced, layout.only(0), owner, factor=1 / 3, memory=None)
    out = torch.zeros(sum(SIZES))
    backend.dequantize(fmt, wires[1], out, layout, add=False)
    assert memory.scales is not None
    parts = (*wires, reduced, h, memory.scales, out)
    return b"".join(part.numpy().tobytes() for part in parts)


def squeezed(backend: ModuleType, fmt: Format) -> bytes:
    """What a backend squeezes for normal numbers, which are the same on any machine."""
    sizes = (4000, 33, 300)
    layout = Layout(sizes, ranks=2, exact=EXACT, align=fmt.align)
    i = torch.arange(12 * layout.extent, dtype=torch.int64)
    mixed = ((i * 2654435761) % (1 << 32) >> 8).double() * 2.0**-24
    x = (mixed.view(12, -1).sum(0) - 6).float()  # exact: the sum has no order
    wire = torch.zeros(nbytes(layout, fmt), dtype=torch.uint8)
    reference.quantize(fmt, x, wire, layout, Tag(7, (21, 22, 23), 0, 0))
    out = torch.zeros(squeezed_bound(layout, fmt), dtype=torch.uint8)
    used: int = backend.squeeze(fmt, wire, out, layout)
    return used.to_bytes(8, "little") + out[:used].numpy().tobytes()


def made(backend: ModuleType, method: str, text: str) -> bytes:
    """What the file of a codec holds."""
    return (squeezed if method == "entropy" else contents)(backend, codec(text).format)


def main() -> None:
    """Write the files that do not exist; with --force all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--force", action="store_true", help="overwrite: a new wire version")
    force = parser.parse_args().force
    for method, text in TABLE:
        file, found = path(method, text), made(reference, method, text)
        if file.exists() and not force and file.read_bytes() != found:
            raise SystemExit(
                f"{file} holds other bytes; a change of bytes is a new wire version: "
                "say so in CHANGELOG.md and run again with --force"
            )
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(found)


if __name__ == "__main__":
    main()
