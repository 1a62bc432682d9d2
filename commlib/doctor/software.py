"""Python, packages, CUDA wheels and environment variables: present and fitting together."""

from __future__ import annotations

import ctypes
import difflib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib import import_module, metadata
from pathlib import Path

from .finding import Finding, fault, ok, warn

OLDEST = {"torch": (2, 11), "numpy": (1, 26), "numba": (0, 61)}  # as in pyproject.toml
PYTHONS = ((3, 11), (3, 13))
VARIABLES = ("COMMLIB_POLICY", "COMMLIB_BACKEND", "COMMLIB_CHECK", "COMMLIB_CACHE")


def python_and_packages() -> Iterator[Finding]:
    """Python, torch, numpy and numba: present, new enough, and importable together."""
    version = sys.version_info[:2]
    text = ".".join(map(str, sys.version_info[:3]))
    if PYTHONS[0] <= version <= PYTHONS[1]:
        yield ok("python", text)
    else:
        yield warn("python", text, "commlib is tested on 3.11 to 3.13")
    for package, oldest in OLDEST.items():
        need = ".".join(map(str, oldest))
        try:
            module = import_module(package)  # numba itself refuses a numpy it does not know
        except ImportError as error:
            found = str(error).splitlines()[0]
            yield fault(package, found, f"pip install '{package}>={need}'")
            continue
        if numbers(module.__version__) < oldest:
            yield fault(package, module.__version__, f"pip install '{package}>={need}'")
        else:
            yield ok(package, module.__version__)


def cuda() -> Iterator[Finding]:
    """torch's CUDA build against the driver, and the installed wheels against both."""
    import torch

    driver, build = driver_version(), torch.version.cuda
    yield from cuda_match(driver, build, installed("cupy", "numba-cuda", "cuda-bindings"))
    if build and driver and not torch.cuda.is_available():
        yield fault("cuda", "torch sees no device", "look at CUDA_VISIBLE_DEVICES and nvidia-smi")


def cuda_match(
    driver: tuple[int, int] | None, build: str | None, wheels: Mapping[str, str]
) -> Iterator[Finding]:
    """The findings for a driver (None: none), torch's CUDA version (None: CPU build) and wheels."""
    if driver is None and build is None:
        yield ok("cuda", "no driver, and torch is a CPU build")
    elif build is None:
        yield warn("cuda", "a driver, but torch is a CPU build", "install torch's CUDA build")
    elif driver is None:
        yield warn("cuda", f"torch for CUDA {build}, but no driver: CPU only", "install the driver")
    elif driver[0] < numbers(build)[0]:
        yield fault(
            "cuda",
            f"torch for CUDA {build}, driver for {driver[0]}.{driver[1]}",
            f"install torch for CUDA {driver[0]}, or a newer driver",
        )
    else:
        yield ok("cuda", f"torch for CUDA {build}, driver for {driver[0]}.{driver[1]}")
    cupys = [name for name in wheels if name.startswith("cupy")]
    if len(cupys) > 1:
        yield fault("cupy", f"{', '.join(cupys)} in one place", "uninstall all, install one")
    major = str(numbers(build)[0]) if build else None
    for name in cupys:
        if major and name != "cupy" and not name.startswith(f"cupy-cuda{major}"):
            todo = f"uninstall it and install the extra cuda{major}"
            yield fault(name, f"{wheels[name]}, but torch is for CUDA {build}", todo)
        elif len(cupys) == 1:
            yield ok(name, wheels[name])
    bindings = wheels.get("cuda-bindings")
    if "numba-cuda" in wheels:
        if bindings is None:
            todo = f"pip install 'numba-cuda[cu{major or 13}]'"
            yield fault("numba-cuda", f"{wheels['numba-cuda']} without cuda-bindings", todo)
        elif major and str(numbers(bindings)[0]) != major:
            found = f"cuda-bindings {bindings}, but torch is for CUDA {build}"
            yield fault("numba-cuda", found, f"pip install 'numba-cuda[cu{major}]'")
        else:
            yield ok("numba-cuda", wheels["numba-cuda"])


def backends() -> Iterator[Finding]:
    """Which kernels serve each device, and why the others do not."""
    import torch

    from commlib_kernels import BACKENDS, available, backend_for

    states = available()
    for device, names in BACKENDS.items():
        if device == "cuda" and not torch.cuda.is_available():
            continue  # `cuda` says why
        try:
            chosen = backend_for(device).name
        except (RuntimeError, ValueError) as error:
            todo = "see the reasons of the backends, or unset COMMLIB_BACKEND"
            yield fault(f"kernels on {device}", str(error), todo)
            continue
        rest = ", ".join(f"{name}: {states[name]}" for name in names if name != chosen)
        what, found = f"kernels on {device}", chosen + (f" ({rest})" if rest else "")
        if chosen == "reference" and not os.environ.get("COMMLIB_BACKEND"):
            yield warn(what, found, "install numba: the reference backend is slow")
        else:
            yield ok(what, found)


def driver_version() -> tuple[int, int] | None:
    """(major, minor) of the newest CUDA the installed driver supports; None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def installed(*prefixes: str) -> dict[str, str]:
    """Name and version of the installed distributions whose name starts with a prefix."""
    found = {}
    for distribution in metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        if name.startswith(prefixes):
            found[name] = distribution.version
    return found


def numbers(version: str) -> tuple[int, ...]:
    """(2, 13) of `2.13.0+cpu`: enough to compare with."""
    parts = version.split("+")[0].split(".")[:2]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)


def environment(variables: Mapping[str, str] | None = None) -> Iterator[Finding]:
    """commlib's environment variables, each against what it may be; unknown ones are misspelt."""
    from commlib_kernels import available

    from ..policy import Policy

    env = os.environ if variables is None else variables
    for name in sorted(n for n in env if n.startswith("COMMLIB_")):
        value = env[name]
        if name == "COMMLIB_POLICY" and value != "auto":
            try:
                Policy.parse(value)
            except ValueError as error:
                yield fault(name, value, str(error))
                continue
        elif name == "COMMLIB_BACKEND" and value not in available():
            yield fault(name, value, f"one of {', '.join(available())}")
            continue
        elif name == "COMMLIB_CHECK" and value not in ("", "0", "1"):
            yield fault(name, value, "0 or 1")
            continue
        elif name not in VARIABLES:
            near = difflib.get_close_matches(name, VARIABLES, 1)
            yield warn(name, "not a variable of commlib", f"{near[0]}?" if near else "unset it")
            continue
        yield ok(name, value)


def kernel_cache() -> Iterator[Finding]:
    """Whether compiled kernels can be kept, and where."""
    from commlib_kernels.numba_cpu.jit import cache_dir

    folder = cache_dir()
    what = "kernel cache"
    kept = sum(1 for _ in folder.rglob("*.nbc"))
    found = f"{folder}, {kept} kernels" if kept else f"{folder}, empty"
    todo = "export COMMLIB_CACHE=FOLDER, writable and the same at every start"
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        yield fault(what, f"{folder} cannot be written: {error.strerror}", todo)
        return
    asked = os.environ.get("COMMLIB_CACHE")
    if asked and not folder.is_relative_to(Path(asked).expanduser()):
        yield warn(what, f"{found}; COMMLIB_CACHE={asked} cannot be written", todo)
    elif folder.is_relative_to(tempfile.gettempdir()) and "COMMLIB_CACHE" not in os.environ:
        yield warn(what, f"{found}; the home folder cannot be written", todo)
    elif not kept:
        yield warn(what, found, "`commlib warmup`, or the first training steps wait for compiles")
    else:
        yield ok(what, found)
