"""A process that runs tests of the suite on one backend, one at a time, each in forked ranks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
import unittest
from multiprocessing.connection import Connection
from typing import IO, Any

from tests.conformance.rows import FAILED, PASSED, SKIPPED, Row

WORLD_SIZE = 4
# The suite keeps tests of small groups for worlds of 8 and more.
LARGE_WORLD_SIZE = 8
SMALL_WORLD = "Skipped due to small world size."
GRACE_SECONDS = 60.0  # past the suite's own limit of a test
START_SECONDS = 180.0
OUTPUT_CHARACTERS = 20_000


class Worker:
    """The process, as its owner sees it: `run(name)`, then `answer()` once `pipe` is readable."""

    def __init__(self, backend: str, *, pretend: bool = False, show: bool = False) -> None:
        self.backend = backend
        self._how = (backend, pretend, show)
        self._test = ""
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, *self._how))
        self._process.start()
        theirs.close()
        if not self.pipe.poll(START_SECONDS):
            self.close()
            raise RuntimeError(f"a worker of {self.backend} did not start in {START_SECONDS:.0f} s")
        try:
            self.names, self.limit = self.pipe.recv()
        except EOFError:
            self.close()
            raise RuntimeError(f"a worker of {self.backend} died while it started") from None

    def run(self, test: str) -> None:
        """Begin a test."""
        self._test = test
        self._since = time.monotonic()
        self.pipe.send(test)

    def late(self) -> bool:
        """Whether the test has outlived even the suite's limit."""
        return time.monotonic() > self._since + 2 * self.limit + GRACE_SECONDS

    def answer(self) -> Row:
        """The outcome of the test. A worker that died or hangs fails it, and is started anew."""
        try:
            if self.pipe.poll():
                return self.pipe.recv()
            reason = "the worker hung"
        except (EOFError, OSError):
            reason = "the worker died"
        self.close()
        self._start()
        return Row(self._test, self.backend, FAILED, reason)

    def close(self) -> None:
        """End the process and all that it forked."""
        self.pipe.close()
        if self._process.pid is not None and self._process.is_alive():
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it had no time to lead a group of its own
                self._process.kill()
        self._process.join()


def _work(pipe: Connection, backend: str, pretend: bool, show: bool) -> None:
    os.setsid()  # its forks end with it
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported: no threads before a fork
    from tests.conformance import suite as adapter

    suite = adapter.load(backend, WORLD_SIZE, pretend=pretend)
    case = adapter.case(suite, backend, pretend=pretend)
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("a worker started threads while it imported: its forks may hang")
    pipe.send((adapter.names(suite, pretend=pretend), adapter.TEST_SECONDS))
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        if not show:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(output.fileno(), stream.fileno())
        while True:
            try:
                test = pipe.recv()
            except EOFError:
                return
            row = _run(case, test, backend, WORLD_SIZE, output)
            if row.outcome == SKIPPED and row.reason == SMALL_WORLD:
                row = _run(case, test, backend, LARGE_WORLD_SIZE, output)
            pipe.send(row)


def _run(case: Any, test: str, backend: str, world_size: int, output: IO[str]) -> Row:
    os.environ["WORLD_SIZE"] = str(world_size)
    output.seek(0)
    output.truncate()
    result = unittest.TestResult()
    began = time.monotonic()
    instance = case(test)
    instance.run(result)
    seconds = time.monotonic() - began
    outcome, reason = PASSED, ""
    if result.skipped:
        outcome, reason = SKIPPED, result.skipped[0][1]
    for _, text in (*result.failures, *result.errors):
        outcome, reason = FAILED, text
    if result.unexpectedSuccesses:
        outcome, reason = FAILED, "passed, but the suite expects it to fail"
    sys.stdout.flush()
    output.seek(0)
    printed = output.read()[-OUTPUT_CHARACTERS:] if outcome == FAILED else ""
    return Row(test, backend, outcome, reason, seconds, world_size, instance.calls, output=printed)
