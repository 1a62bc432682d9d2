"""A disk is full or a file damaged: the checkpoint says so, and the one before it still serves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import RANKS, Curves
from tests.faults.hosts import Hosts, curves
from tests.faults.stories import SAVED, assert_resumes, train

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(300)]

FULL = r"the checkpoint of step 10 failed: rank 1: OSError: \[Errno 28\] No space left on device"


@pytest.fixture
def small_disk(hosts: Hosts, tmp_path: Path) -> Iterator[Path]:
    """Host 1's disk: there is room for one checkpoint of 1.5 MB, not for two."""
    disk = tmp_path / "disk1"
    disk.mkdir()
    hosts.run("mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk))
    yield disk
    hosts.run("umount", str(disk))


def test_a_full_disk_ends_the_run(
    hosts: Hosts, undisturbed: Curves, tmp_path: Path, small_disk: Path
) -> None:
    run = train(hosts, tmp_path, disks=True)
    for rank, end in enumerate(run.ends()):
        assert end.code == 1
        assert re.search(FULL, end.text), f"rank {rank}: {end.text}"
    hosts.run("mount", "-o", "remount,size=20m", str(small_disk))
    assert_resumes(hosts, tmp_path, undisturbed, disks=True)


def test_a_run_goes_on_beside_a_full_disk(
    hosts: Hosts, undisturbed: Curves, tmp_path: Path, small_disk: Path
) -> None:
    """A checkpoint that failed left residuals and weights as they were."""
    run = train(hosts, tmp_path, "--go-on", disks=True)
    run.finish()
    for end in run.ends():
        assert re.search(f"WARNING: {FULL}", end.text)
    assert curves(tmp_path, RANKS) == undisturbed
    hosts.run("mount", "-o", "remount,size=20m", str(small_disk))
    assert_resumes(hosts, tmp_path, undisturbed, disks=True)


def test_a_damaged_file_is_refused(hosts: Hosts, undisturbed: Curves, tmp_path: Path) -> None:
    train(hosts, tmp_path).finish()
    damaged = tmp_path / "disk" / "step15-rank1.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    for end in train(hosts, tmp_path).ends():
        assert end.code == 1
        assert f"rank 1: OSError: {damaged} is damaged, remove it" in end.text
    damaged.unlink()
    assert_resumes(hosts, tmp_path, undisturbed, after=2 * SAVED)
