"""A line is cut, crawls, or leads nowhere: clear errors in time, and the same losses afterwards."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.faults.conftest import RANKS, Curves
from tests.faults.hosts import SLOW, Hosts, curves
from tests.faults.stories import TIMEOUT, assert_resumes, interrupted, why

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(300)]

CUT_OFF = "the group's store did not answer"  # what a rank says that reaches nobody


@pytest.mark.parametrize("victim", [0, 1], ids=["of the store's host", "of another host"])
def test_a_link_is_cut(hosts: Hosts, undisturbed: Curves, tmp_path: Path, victim: int) -> None:
    run = interrupted(hosts, tmp_path)
    hosts.ip(f"link set port{victim} down")
    texts = [why(end, rank) for rank, end in enumerate(run.ends())]
    if victim == 0:
        assert "no answer from rank 1 (process" in texts[0]
        assert "rank 2 (process" in texts[0]
        assert CUT_OFF in texts[1]
        assert CUT_OFF in texts[2]
    else:
        assert f"timed out after {TIMEOUT:g} s" in texts[0]
        assert "no answer from rank 1 (process" in texts[0]
        assert CUT_OFF in texts[1]
        assert "rank 1" in texts[2]
    assert_resumes(hosts, tmp_path, undisturbed)


def test_a_line_of_8_kbit(hosts: Hosts, undisturbed: Curves, tmp_path: Path) -> None:
    """A step would take over a minute."""
    run = interrupted(hosts, tmp_path)
    hosts.rate("8kbit")
    texts = [why(end, rank) for rank, end in enumerate(run.ends())]
    assert any(f"within {TIMEOUT:g} s" in text or f"after {TIMEOUT:g} s" in text for text in texts)
    assert_resumes(hosts, tmp_path, undisturbed)


def test_a_line_of_8_kbit_for_a_moment(hosts: Hosts, undisturbed: Curves, tmp_path: Path) -> None:
    run = interrupted(hosts, tmp_path, timeout=40.0)
    hosts.rate("8kbit")
    time.sleep(2.0)
    hosts.rate(SLOW)
    run.finish()
    assert curves(tmp_path, RANKS) == undisturbed


def test_a_route_to_the_store_leads_nowhere(
    hosts: Hosts, undisturbed: Curves, tmp_path: Path
) -> None:
    """Host 1 still reaches host 2, and packets of host 0 still come in."""
    run = interrupted(hosts, tmp_path)
    hosts.ip(f"route add blackhole {hosts.network.address(0)}", host=1)
    texts = [why(end, rank) for rank, end in enumerate(run.ends())]
    assert "no answer from rank 1 (process" in texts[0]
    assert CUT_OFF in texts[1]
    assert "rank 1" in texts[2]
    assert_resumes(hosts, tmp_path, undisturbed)
