"""The suite's test class for one backend: as PyTorch runs it for its own, but with forked ranks.

`DistributedTest._DistTestBase` asks in three ways what a backend can do; a backend it has never
heard of would skip nearly all of it:

- tables of names (`DistTestCases.backend_feature`, `PROFILING_SUPPORTED_BACKENDS`, ...): the
  backend is entered where gloo stands.
- decorators that compare the module's `BACKEND` while the class body runs, `BACKEND != "gloo"` or
  `BACKEND not in {"gloo"}`. Nothing can change them afterwards, so `BACKEND` is a `GlooLike`: a
  string that opens gloo's gates and reads as what it is wherever a group is made of it.
- names of profiler events, `commlib:all_reduce`: what commlib passes on is recorded by the gloo
  group it goes over, so gloo's events are looked up: as many, with the same shapes.

None of it makes a test pass. Each rank checks that its default group is the backend's, and counts
the calls that reach the class of that group.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import multiprocessing
import os
import tempfile
import types
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from tests.conformance import gpus, spy

REFERENCE = "gloo"
MODULE = "torch.testing._internal.distributed.distributed_test"
TEST_SECONDS = 100  # for any one test
BARRIER_SECONDS = 60  # the suite's own 10 are too few where four ranks share busy cores


class GlooLike(str):
    """The name of a backend that is held to all that gloo is held to."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return other == REFERENCE or str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:  # str has one of its own
        return not self == other

    def __hash__(self) -> int:
        return hash(REFERENCE)  # found in sets that name gloo


def load(backend: str, world_size: int, *, pretend: bool = False) -> types.ModuleType:
    """The suite's module, made for `backend`: once in a process, its gates are read at import.

    pretend: as if each rank had a GPU (see `gpus`).
    """
    os.environ.update(
        BACKEND=backend,
        WORLD_SIZE=str(world_size),
        TEMP_DIR=tempfile.gettempdir(),  # the suite makes its own for each test
        INIT_METHOD="file://",  # its kind opens a gate; each test gets a file of its own
        GLOO_SOCKET_IFNAME="lo",
        PYTORCH_PRINT_REPRO_ON_FAILURE="0",
        DISTRIBUTED_TESTS_DEFAULT_TIMEOUT=str(TEST_SECONDS),
    )
    common: Any = importlib.import_module("torch.testing._internal.common_distributed")
    common.TIMEOUT_OVERRIDE.clear()
    if pretend:
        gpus.open_gates(common)
    if backend == REFERENCE:
        return importlib.import_module(MODULE)
    spy.preload(backend)  # registers it, and no rank has to import it
    cases = common.DistTestCases
    for names in (*cases.backend_feature.values(), *cases.skip_collective.values()):
        if REFERENCE in names:
            names.add(backend)
    cases.backend_feature["plugin"].add(backend)
    with mock.patch("os.environ", {**os.environ, "BACKEND": GlooLike(backend)}):
        suite: Any = importlib.import_module(MODULE)
    for name in dir(suite):
        if name.endswith("PROFILING_SUPPORTED_BACKENDS"):
            getattr(suite, name).append(backend)
    suite.get_profiling_event = events_of_the_reference(suite.get_profiling_event, backend)
    return suite


def events_of_the_reference(look_up: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """`get_profiling_event` that finds gloo's events, named as the backend's."""

    def events(name: str, *args: Any, **options: Any) -> list[Any]:
        found = []
        for event in look_up(name.replace(f"{backend}:", f"{REFERENCE}:"), *args, **options):
            found.append(copy.copy(event))  # the profiler keeps its own, to be looked up again
            found[-1].name = event.name.replace(f"{REFERENCE}:", f"{backend}:")
        return found

    return events


def case(suite: Any, backend: str, *, pretend: bool = False) -> type[unittest.TestCase]:
    """The suite's tests as a TestCase class whose ranks are forks of this process.

    Forks, for a spawned rank imports torch for seconds; this process must not have started a
    thread, nor run torch's parallel loops, before a test runs.
    """

    class TestDistributed(suite.TestDistBackend, suite.DistributedTest._DistTestBase):
        calls: int | None = None  # none where the test skips before its ranks start

        def setUp(self) -> None:
            super().setUp()
            suite.INIT_METHOD = os.environ["INIT_METHOD"]  # spawned ranks read it at import
            spy.prepare(Path(os.environ["TEMP_DIR"]))
            self._start_processes(multiprocessing.get_context("fork").Process)

        def tearDown(self) -> None:
            for process in self.processes:
                process.kill()
                process.join()
            self.calls = spy.collect(Path(os.environ["TEMP_DIR"]), backend)
            super().tearDown()

        @classmethod
        def _run(cls, rank: int, *args: Any, **options: Any) -> None:
            with (
                spy.counting(Path(os.environ["TEMP_DIR"]), rank, backend),
                gpus.pretended(rank) if pretend else contextlib.nullcontext(),
            ):
                super()._run(rank, *args, **options)

        def run_test(self, *args: Any, **options: Any) -> None:
            if dist.get_backend() != backend:
                raise AssertionError(f"the group is of {dist.get_backend()}, not of {backend}")
            super().run_test(*args, **options)

        def _barrier(self, wait_for: int | None = None, timeout: float = 0) -> None:
            suite.Barrier.sync(wait_for, max(timeout, BARRIER_SECONDS))

    return TestDistributed


def names(suite: Any, *, pretend: bool = False) -> list[str]:
    """All tests of the suite, also those that skip here; pretend: those that ask for GPUs."""
    tests = suite.DistributedTest._DistTestBase
    found = [name for name in dir(tests) if name.startswith("test_")]
    return [name for name in found if gpus.needed(name, getattr(tests, name))] if pretend else found
