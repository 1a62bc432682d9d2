"""A rank stops, pauses, or dies: with torchrun nobody need do anything about it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP

import pytest

from tests.faults.conftest import RANKS, STEPS, Curves
from tests.faults.hosts import SLOW, Hosts, curves, losses, wait_until
from tests.faults.stories import SAVED, STRUCK, TIMEOUT, assert_resumes, interrupted, why

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(300)]


def test_a_rank_is_stopped(hosts: Hosts, undisturbed: Curves, tmp_path: Path) -> None:
    run = interrupted(hosts, tmp_path)
    run.signal(1, SIGSTOP)
    for rank, end in zip((0, 2), run.ends([0, 2]), strict=True):
        text = why(end, rank)
        assert f"timed out after {TIMEOUT:g} s" in text
        assert "rank 1" in text
    run.signal(1, SIGCONT)  # it wakes up in a group that is gone
    (late,) = run.ends([1])
    assert "nothing heard from rank 0 (process" in why(late, 1)
    assert_resumes(hosts, tmp_path, undisturbed)


def test_a_rank_pauses(hosts: Hosts, undisturbed: Curves, tmp_path: Path) -> None:
    run = interrupted(hosts, tmp_path)
    run.signal(1, SIGSTOP)
    time.sleep(TIMEOUT / 3)
    run.signal(1, SIGCONT)
    run.finish()
    assert curves(tmp_path, RANKS) == undisturbed


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_is_killed(hosts: Hosts, undisturbed: Curves, tmp_path: Path, victim: int) -> None:
    run = interrupted(hosts, tmp_path)
    run.signal(victim, SIGKILL)
    ends = run.ends()
    assert ends[victim].code == -SIGKILL
    for rank in {0, 1, 2} - {victim}:
        assert f"rank {victim}" in why(ends[rank], rank)
    assert_resumes(hosts, tmp_path, undisturbed)


def test_torchrun_restarts_a_rank_that_is_killed(hosts: Hosts, tmp_path: Path) -> None:
    expected = tmp_path / "expected"
    expected.mkdir()
    hosts.start(expected, 2, "--steps", str(STEPS)).finish()
    folder = tmp_path / "restarted"
    folder.mkdir()
    hosts.rate(SLOW)
    with torchrun(hosts, folder, 2) as agents:
        wait_until(lambda: all(STRUCK in losses(folder, rank) for rank in (0, 1)), "the fault", 120)
        (victim,) = (pid for pid in processes(str(folder)) if rank_of(pid) == "1")
        os.kill(victim, SIGKILL)
        wait_until(lambda: all(agent.poll() is not None for agent in agents), "the end", 120)
    texts = [(folder / f"torchrun{node}.txt").read_text() for node in (0, 1)]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(texts)
    for rank, text in enumerate(texts):
        assert f"rank {rank} starts after step {SAVED}" in text
    assert curves(folder, 2) == curves(expected, 2)
    assert processes(str(folder)) == []


@contextmanager
def torchrun(hosts: Hosts, folder: Path, nodes: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """torchrun on each of `nodes` hosts, with one rank of train.py, which it restarts.

    It keeps its store over restarts (torch 2.13), where gloo may find addresses of ranks that are
    gone; it fails then, and is restarted once more.
    """
    argv = [sys.executable, "-m", "torch.distributed.run"]
    argv += ["--nnodes", str(nodes), "--nproc-per-node", "1", "--max-restarts", "5"]
    argv += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts.network.address(0)}:29400"]
    argv += ["--monitor-interval", "0.2"]
    train = ["-m", "tests.faults.train", "--checkpoints", str(folder / "disk")]
    train += ["--losses", str(folder), "--steps", str(STEPS), "--every", str(SAVED)]
    train += ["--timeout", str(TIMEOUT)]
    path = os.pathsep.join(sys.path)
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    with ExitStack() as stack:
        agents = []
        for node in range(nodes):
            log = stack.enter_context((folder / f"torchrun{node}.txt").open("wb"))
            keeps_store = f"is_host={int(node == 0)}"  # its host's name tells it nothing here
            mine = ["--local-addr", hosts.network.address(node), "--rdzv-conf", keeps_store]
            command = hosts.network.command(node, [*argv, *mine, *train])
            agents.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
        try:
            yield agents
        finally:
            for pid in processes(str(folder)):  # torchrun's ranks are in sessions of their own
                with suppress(ProcessLookupError):
                    os.kill(pid, SIGKILL)
            for agent in agents:
                agent.wait()


def processes(marker: str) -> list[int]:
    """Processes that have a path below `marker` on their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it may end while we look
            if marker.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def rank_of(pid: int) -> str | None:
    """RANK in the environment of a process."""
    text = Path(f"/proc/{pid}/environ").read_bytes().decode()
    return dict(line.partition("=")[::2] for line in text.split("\0")).get("RANK")
