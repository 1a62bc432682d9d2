"""What the tests of faults have in common: a run up to its fault, what it says, how it goes on."""

from __future__ import annotations

import re
from pathlib import Path

from tests.faults.conftest import RANKS, STEPS, Curves
from tests.faults.hosts import SLOW, End, Hosts, Run, curves

TIMEOUT = 8.0  # seconds; ranks that share two cores with others' work come late by three
SAVED, STRUCK = 5, 6  # the checkpoint before the fault, and the step after which it strikes
FAILED = (
    r"RuntimeError: all_reduce of key '[^']+'[^\n]* failed on rank {rank} of 3: (?P<why>[^\n]*)"
)


def train(
    hosts: Hosts,
    folder: Path,
    *options: str,
    timeout: float = TIMEOUT,
    disks: bool = False,
) -> Run:
    """Start (again) the run that every test has."""
    length = ["--steps", str(STEPS), "--every", str(SAVED), "--timeout", str(timeout)]
    return hosts.start(folder, RANKS, *length, *options, disks=disks)


def interrupted(hosts: Hosts, folder: Path, timeout: float = TIMEOUT) -> Run:
    """A run in the middle of a step: on this line it waits for bytes most of the time."""
    hosts.rate(SLOW)
    run = train(hosts, folder, timeout=timeout)
    run.wait_for(STRUCK)
    return run


def why(end: End, rank: int) -> str:
    """What a rank says of the all_reduce that failed: the message, other ranks, what to do."""
    found = re.search(FAILED.format(rank=rank), end.text)
    assert end.code == 1, f"rank {rank} ended with {end.code}: {end.text}"
    assert found, f"rank {rank} does not say what failed: {end.text}"
    assert re.search(rf"\brank (?!{rank})\d\b", found["why"]), found["why"]
    assert "go on from a checkpoint" in found["why"]
    return found["why"]


def assert_resumes(
    hosts: Hosts, folder: Path, undisturbed: Curves, after: int = SAVED, disks: bool = False
) -> None:
    """Started again on healthy hosts, the run ends with the losses of one without a fault."""
    hosts.heal()
    run = train(hosts, folder, disks=disks)
    run.finish()
    for rank, log in enumerate(run.logs):
        assert f"rank {rank} starts after step {after}" in log.read_text()
    assert curves(folder, RANKS) == undisturbed
