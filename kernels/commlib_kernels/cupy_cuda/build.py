"""From CUDA C++ to machine code, with NVRTC; needs no GPU.

CuPy's own compiler adds ``-ftz=true`` (which would flush the subnormals that casts keep) and its
cache does not see included headers. So headers are put into the text here, and what comes out is
kept in commlib's cache, from where CuPy loads it as a module.
"""

import hashlib
import os
import re
import struct
from functools import cache
from pathlib import Path
from typing import NamedTuple

from commlib_kernels.cache import folder

HERE = Path(__file__).parent
FILES = ("uniform", "sign", "cast", "tables", "rotated", "raw")
OPTIONS = ("-std=c++17", "-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true")
"""Every product and every sum rounds by itself: the bytes must not depend on the device."""
REPORT = "--ptxas-options=-v"


class Built(NamedTuple):
    """One module for one architecture."""

    cubin: bytes
    ptx: str
    log: str  # with REPORT: registers, stack and spills of every kernel


@cache
def text(name: str) -> str:
    """The source of a .cu file with its headers put in, each once."""
    seen: set[str] = set()

    def inline(file: str) -> str:
        if file in seen:
            return ""
        seen.add(file)
        body = (HERE / file).read_text().replace("#pragma once\n", "")
        return re.sub(r'#include "(.+)"\n', lambda found: inline(found[1]), body)

    return inline(f"{name}.cu")


def compile(name: str, arch: int, *options: str) -> Built:
    """Compile a .cu file for compute capability `arch` (90 is 9.0), with further options.

    Raises:
        RuntimeError: NVRTC refused it; the message holds its log.
    """
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(text(name), f"{name}.cu", [], [])
    try:
        nvrtc.compileProgram(program, [*OPTIONS, f"-arch=sm_{arch}", *options])
        log = nvrtc.getProgramLog(program)
        ptx = nvrtc.getPTX(program)
        return Built(whole(nvrtc.getCUBIN(program)), _text(ptx), log)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise RuntimeError(f"{name}.cu does not compile for sm_{arch}: {error}\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)


def whole(cubin: bytes) -> bytes:
    """The ELF file with its end: CuPy takes the last byte for the end of a string and drops it."""
    program_headers, section_headers = struct.unpack_from("<QQ", cubin, 32)
    entry_sizes_and_counts = struct.unpack_from("<HHHH", cubin, 54)
    end = max(
        program_headers + entry_sizes_and_counts[0] * entry_sizes_and_counts[1],
        section_headers + entry_sizes_and_counts[2] * entry_sizes_and_counts[3],
    )
    return cubin.ljust(end, b"\0")


def _text(ptx: str | bytes) -> str:
    return ptx.decode() if isinstance(ptx, bytes) else ptx


def cubin(name: str, arch: int) -> Path:
    """The file of a compiled module; compiles it the first time."""
    from cupy.cuda import nvrtc

    version = ".".join(map(str, nvrtc.getVersion()))
    digest = hashlib.sha256("\0".join((text(name), *OPTIONS, version)).encode()).hexdigest()
    path = folder("cuda") / f"{name}-sm{arch}-{digest[:16]}.cubin"
    if not path.exists():
        # Ranks may compile at the same time: each writes a file of its own and renames it.
        mine = path.with_suffix(f".{os.getpid()}")
        mine.write_bytes(compile(name, arch).cubin)
        mine.replace(path)
    return path
