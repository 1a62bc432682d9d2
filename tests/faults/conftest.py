"""Three emulated hosts for all tests of faults, and what the losses are without any."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from commlib import emulation
from tests.faults.hosts import Hosts, curves

RANKS = 3
STEPS = 18
Curves = list[list[str]]


@pytest.fixture(scope="session")
def _network() -> Iterator[Hosts]:
    reason = emulation.available()
    if reason is not None:
        if "namespaces" in os.environ.get("COMMLIB_REQUIRE", "").split(","):
            pytest.fail(f"COMMLIB_REQUIRE names namespaces, and no hosts can be emulated: {reason}")
        pytest.skip(f"cannot emulate hosts: {reason}")
    with Hosts(RANKS) as hosts:
        yield hosts


@pytest.fixture
def hosts(_network: Hosts) -> Iterator[Hosts]:
    """Three hosts in good health, with nothing on them, before the test and after it."""
    _network.heal()
    yield _network
    _network.heal()


@pytest.fixture(scope="session")
def undisturbed(_network: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Curves:
    """The losses of three ranks in a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    _network.start(folder, RANKS, "--steps", str(STEPS)).finish()
    return curves(folder, RANKS)
