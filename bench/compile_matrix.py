"""Compile every CUDA kernel for every architecture, without a GPU, and read the compiler's report.

    python -m bench.compile_matrix                all kernels, sm_75 to sm_120; see QUICK
    python -m bench.compile_matrix --all          all kernels for all architectures
    python -m bench.compile_matrix --arch 90 --backend cupy_cuda

Fails on a spill (registers that went to memory) and on a fused multiply-add: it rounds once where
the byte contract rounds twice. `stack` is what a thread keeps in local memory, in bytes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
SAME_PTX = {80: 75, 86: 75, 89: 75, 90: 75, 120: 100}
"""NVVM writes the same PTX for both, but for the line that names the target: it is written once
and assembled for each. tests/kernels/test_numba_cuda_build.py sees to it that this is so."""
CUPY, NUMBA = "cupy_cuda", "numba_cuda"
QUICK = {"rotated": (90,), "tables": (75, 90)}
QUICK |= dict.fromkeys(("nf4", "eden4_4096", "rotate_eden2", "rotate_qsgd"), (90,))
"""Parts that are compiled for these only, without --all: tables and rotations are put together from
what other parts have, and would take as long as all of these."""


@dataclass(frozen=True)
class Report:
    """What the compiler said of one kernel for one architecture."""

    backend: str
    kernel: str
    arch: int
    registers: int
    stack: int  # bytes
    spilled: int  # bytes stored and loaded
    fused: int  # fused multiply-adds in the PTX

    @property
    def good(self) -> bool:
        """Whether it may be shipped."""
        return not self.spilled and not self.fused


def reports(backend: str, label: str, arch: int, ptx: str, log: str) -> Iterator[Report]:
    """The kernels of one compiled text: `log` is what ptxas says with -v.

    label: what to call the only kernel of a text, where its own name is mangled.
    """
    entries = re.split(r"\.entry\s+", ptx)[1:]
    bodies = {re.split(r"\W", text, maxsplit=1)[0]: text for text in entries}
    parts = re.split(r"Compiling entry function '(\w+)'", log)[1:]
    for kernel, text in zip(parts[::2], parts[1::2], strict=True):
        registers = re.search(r"Used (\d+) registers", text)
        memory = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text
        )
        if registers is None or memory is None:
            raise RuntimeError(f"ptxas says nothing of {kernel} for sm_{arch}:\n{text}")
        stack, stores, loads = map(int, memory.groups())
        fused = bodies[kernel].count("fma.")
        yield Report(
            backend, label or kernel, arch, int(registers[1]), stack, stores + loads, fused
        )


def ptxas() -> str:
    """The assembler: of the package nvidia-cuda-nvcc, or on the PATH."""
    import nvidia

    for folder in nvidia.__path__:
        for found in sorted(Path(folder).glob("*/bin/ptxas")):
            return str(found)
    path = shutil.which("ptxas")
    if path is None:
        raise SystemExit("no ptxas: pip install nvidia-cuda-nvcc, or put a CUDA toolkit on PATH")
    return path


def assembled(ptx: str, arch: int) -> str:
    """What ptxas says of a PTX text."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas(), "-v", f"--gpu-name=sm_{arch}", file.name, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas refuses a kernel for sm_{arch}:\n{done.stderr}")
    return done.stderr


Job = tuple[str, str, tuple[int, ...]]
"""Backend, part (a .cu file, a format of numba_cuda), architectures."""


def jobs(backends: Sequence[str], archs: tuple[int, ...], everything: bool) -> Iterator[Job]:
    """What is compiled by one process at a time, the longest first.

    Numba works out a format's functions once for all architectures, and longer than it compiles.
    """

    def wanted(part: str) -> tuple[int, ...]:
        return archs if everything else tuple(a for a in archs if a in QUICK.get(part, archs))

    if CUPY in backends:
        from commlib_kernels.cupy_cuda.build import FILES

        yield from ((CUPY, file, (arch,)) for file in FILES for arch in wanted(file))
    if NUMBA in backends:
        from commlib_kernels.numba_cuda.build import FORMATS

        yield from ((NUMBA, label, wanted(label)) for label in FORMATS if wanted(label))


def compiled(backend: str, part: str, archs: tuple[int, ...]) -> list[Report]:
    """Do a job."""
    found: list[Report] = []
    if backend == CUPY:
        from commlib_kernels.cupy_cuda import build

        for arch in archs:
            built = build.compile(part, arch, build.REPORT)
            found += reports(backend, "", arch, built.ptx, built.log)
        return found

    from commlib_kernels.numba_cuda.build import FORMATS, of_format

    texts: dict[int, list[tuple[str, str]]] = {}
    for arch in archs:
        source = SAME_PTX.get(arch, arch)
        if source not in texts:
            texts[source] = list(of_format(part, FORMATS[part], divmod(source, 10)))
        for name, text in texts[source]:
            ptx = retargeted(text, source, arch)
            found += reports(backend, name, arch, ptx, assembled(ptx, arch))
    return found


def retargeted(ptx: str, source: int, arch: int) -> str:
    """The PTX that NVVM writes for `arch`, from the one for `source` in SAME_PTX."""
    return ptx.replace(f".target sm_{source}\n", f".target sm_{arch}\n", 1)


def main() -> None:
    """Print one line per kernel: the most registers of all architectures, and what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES)
    parser.add_argument("--backend", action="append", choices=(CUPY, NUMBA))
    parser.add_argument("--all", action="store_true", help="also what QUICK leaves out")
    parser.add_argument("--json", metavar="FILE", help="one row per kernel and architecture")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: all)")
    args = parser.parse_args()
    archs = tuple(args.arch or ARCHITECTURES)
    found: list[Report] = []
    # Numba's front end makes millions of objects that stay: looking for garbage among them takes a
    # third of its time.
    with ProcessPoolExecutor(args.jobs, initializer=gc.disable) as pool:
        listed = jobs(args.backend or (CUPY, NUMBA), archs, args.all or bool(args.arch))
        work = [pool.submit(compiled, *job) for job in listed]
        try:
            for done in tqdm(as_completed(work), total=len(work), desc="compile", disable=None):
                found += done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    found.sort(key=lambda r: (r.backend, r.kernel, r.arch))
    if args.json:
        Path(args.json).write_text("".join(json.dumps(asdict(r)) + "\n" for r in found))
    print(table(found, archs))
    bad = [r for r in found if not r.good]
    for r in bad:
        print(
            f"FAIL {r.backend} {r.kernel} sm_{r.arch}: {r.spilled} bytes spilled, {r.fused} fused"
        )
    print(f"{len(found)} kernels, each per architecture: {len(found) - len(bad)} good")
    sys.exit(bool(bad))


def table(found: list[Report], archs: tuple[int, ...]) -> str:
    """Registers per architecture, the worst stack and spills."""
    rows = []
    for backend, kernel in dict.fromkeys((r.backend, r.kernel) for r in found):
        of = {r.arch: r for r in found if (r.backend, r.kernel) == (backend, kernel)}
        worst = [
            max(getattr(r, what) for r in of.values()) for what in ("stack", "spilled", "fused")
        ]
        rows.append(
            [backend, kernel, *(of[a].registers if a in of else "-" for a in archs), *worst]
        )
    heads = ["backend", "kernel", *(f"sm_{a}" for a in archs), "stack", "spilled", "fused"]
    return tabulate(rows, heads)


if __name__ == "__main__":
    main()
