"""`make gpu-check`: everything that CUDA paths promise, on a device, each part under a clock.

PYTHONPATH=.:kernels python -m bench.gpu.check [tests backends memcheck racecheck]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.gpu.record import Record

ROOT = Path(__file__).parent.parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "gpu"]
SANITIZE = [sys.executable, "-m", "bench.gpu.sanitized", "cupy_cuda"]
TAIL = 4000
"""Characters of the output that the record keeps."""


def parts() -> dict[str, tuple[list[str], int]]:
    """Name -> (command, seconds it may take)."""
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    options = ["--error-exitcode", "9", "--target-processes", "all"]
    return {
        "backends": ([*PYTEST, "tests/gpu/test_backends.py"], 150),
        "tests": ([*PYTEST, "tests/gpu", "--ignore=tests/gpu/test_backends.py"], 240),
        "memcheck": ([sanitizer, "--tool", "memcheck", *options, *SANITIZE], 90),
        "racecheck": ([sanitizer, "--tool", "racecheck", *options, *SANITIZE], 90),
    }


def main() -> None:
    """Run the parts that are named, or all; say which hold."""
    known = parts()
    names = sys.argv[1:] or list(known)
    if unknown := set(names) - set(known):
        raise SystemExit(f"unknown parts: {', '.join(unknown)}; allowed: {', '.join(known)}")
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; bench.gpu checks nothing without one")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    record, shown = Record("check"), []
    for name in names:
        command, limit = known[name]
        print(f"== {name}: {' '.join(command)}", flush=True)
        start = time.perf_counter()
        verdict, output = _run(command, limit, env)
        seconds = time.perf_counter() - start
        print(output[-TAIL:], flush=True)
        record.add(check=name, verdict=verdict, seconds=seconds, output=output[-TAIL:])
        shown.append([name, verdict, seconds])
    record.table("Checks", ["check", "verdict", "seconds"], shown)
    print(f"rows in {record.path}")
    sys.exit(any(verdict != "holds" for _, verdict, _ in shown))


def _run(command: list[str], limit: int, env: dict[str, str]) -> tuple[str, str]:
    """("holds", or what went wrong; what it printed)."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, text=True, timeout=limit,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except FileNotFoundError as error:
        return f"not run: {error}", ""
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        return f"FAILED: not done after {limit} s", text
    return "holds" if done.returncode == 0 else f"FAILED: exit {done.returncode}", done.stdout


if __name__ == "__main__":
    main()
