"""`make gpu-check`: everything that CUDA paths promise, on a device, each part under a clock.

PYTHONPATH=.:kernels python -m bench.gpu.check [backends tests sanitizer]
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from bench.gpu.record import Record
from commlib_kernels import BACKENDS

ROOT = Path(__file__).parent.parent.parent
# Without the project's configuration: it names plugins that this machine may lack.
PYTEST = [
    *(sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"),
    *("--maxfail", "8", "--tb", "short"),
    *("-c", os.devnull, "--rootdir", ".", "--import-mode", "importlib"),
]
SANITIZE = [sys.executable, "-m", "bench.gpu.sanitized", "cupy_cuda"]
TOOLS = ("memcheck", "racecheck", "synccheck")
SHARDS = 16
"""Processes that share the backends' tests: Numba compiles every kernel of every format anew."""
TAIL = 4000
"""Characters of the output that the record keeps."""


class Part(NamedTuple):
    """Commands that run side by side, and the seconds they may take."""

    commands: list[list[str]]
    limit: int
    environments: list[dict[str, str]]


def parts() -> dict[str, Part]:
    """Everything that is checked; the limits add up to less than nine minutes."""
    places = f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin"
    sanitizer = shutil.which("compute-sanitizer", path=places) or "compute-sanitizer"
    # What a library asks the driver in vain is no error of a kernel.
    options = ["--error-exitcode", "9", "--target-processes", "all", "--report-api-errors", "no"]
    backends = [*PYTEST, "tests/gpu/test_backends.py"]
    others = [*PYTEST, "tests/gpu", "--ignore", "tests/gpu/test_backends.py"]
    shards = [{"COMMLIB_SHARD": f"{k}/{SHARDS}"} for k in range(SHARDS)]
    return {
        "backends": Part([backends] * SHARDS, 140, shards),
        # Ranks on CPU, which tests compare with, by the backend that compiles nothing.
        "tests": Part([others], 200, [{"COMMLIB_BACKEND": "reference"}]),
        # Every tensor an allocation of its own: within a pool's block no overrun would show.
        "sanitizer": Part(
            [[sanitizer, "--tool", tool, *options, *SANITIZE] for tool in TOOLS],
            180,
            [{"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}] * len(TOOLS),
        ),
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
    env["COMMLIB_REQUIRE"] = ",".join(BACKENDS["cuda"])  # a backend that is missing has failed
    record, shown = Record("-".join(["check", *sys.argv[1:]])), []
    for name in names:
        print(f"== {name}: {' '.join(known[name].commands[0])}", flush=True)
        start = time.perf_counter()
        verdict, output = _run(known[name], env)
        seconds = time.perf_counter() - start
        print(output[-2 * TAIL :], flush=True)
        record.path.with_name(f"{record.path.stem}-{name}.log").write_text(output)
        record.add(check=name, verdict=verdict, seconds=seconds, output=output[-TAIL:])
        shown.append([name, verdict, seconds])
    record.table("Checks", ["check", "verdict", "seconds"], shown)
    print(f"rows in {record.path}")
    sys.exit(any(verdict != "holds" for _, verdict, _ in shown))


def _run(part: Part, env: dict[str, str]) -> tuple[str, str]:
    """("holds", or what went wrong; the end of what was printed)."""
    end = time.monotonic() + part.limit
    try:
        running = [
            subprocess.Popen(
                command, cwd=ROOT, env={**env, **extra}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            )
            for command, extra in zip(part.commands, part.environments, strict=True)
        ]  # fmt: skip
    except FileNotFoundError as error:
        return f"not run: {error}", ""
    # One thread each: a pipe that nobody reads would stop its process.
    with ThreadPoolExecutor(len(running)) as pool:
        found = list(pool.map(lambda process: _ended(process, end), running))
    wrong = [verdict for verdict, _ in found if verdict]
    # What went wrong comes last, where a cut leaves it.
    output = "\n".join(text for _, text in sorted(found, key=lambda one: bool(one[0])))
    return wrong[0] if wrong else "holds", output


def _ended(process: subprocess.Popen[str], end: float) -> tuple[str, str]:
    """("", or what went wrong; what the process printed); past its time it is killed."""
    try:
        output, _ = process.communicate(timeout=max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # a group of its own: its ranks go with it
        output, _ = process.communicate()
        return "FAILED: not done in its time", output
    if process.returncode:
        return f"FAILED: exit {process.returncode}", output
    if "pytest" in process.args and not re.search(r"\d+ passed", output):
        return "FAILED: no test ran", output
    return "", output


if __name__ == "__main__":
    main()
