"""Emulated hosts on which ranks of train.py start fast, and that can be hurt and healed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from signal import SIGKILL
from typing import Any, NamedTuple

from commlib.emulation import Network

PATIENCE = 60.0  # seconds for what takes one or two, on a machine that has other things to do
FAST = "1gbit"  # a line on which train.py computes most of the time
SLOW = "2mbit"  # and one on which it communicates: a step takes a quarter of a second


class End(NamedTuple):
    """How a process ended, and all it wrote."""

    code: int
    text: str


class Hosts:
    """`count` emulated hosts, and a process that starts ranks on them. A context manager."""

    def __init__(self, count: int) -> None:
        self.network = Network(count, FAST)
        self.count = count
        self._server: subprocess.Popen[str] | None = None
        self._jobs = 0
        self._pids: set[int] = set()

    def __enter__(self) -> Hosts:
        self.network.__enter__()
        try:
            here = ["env", f"--chdir={os.getcwd()}", f"PYTHONPATH={os.pathsep.join(sys.path)}"]
            quiet = ["OMP_NUM_THREADS=1", "OPENBLAS_NUM_THREADS=1", "TORCH_CPP_LOG_LEVEL=ERROR"]
            program = [sys.executable, "-m", "tests.faults.server"]
            self._server = subprocess.Popen(
                [*self.network._enter, *here, *quiet, *program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self._read()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.network.close()  # takes the server and all ranks along
        if self._server is not None:
            for pipe in (self._server.stdin, self._server.stdout):
                assert pipe is not None
                pipe.close()
            self._server.wait()

    # What happens to hosts.

    def run(self, *argv: str) -> None:
        """A command beside the hosts, where their ports and mounts are."""
        self.network._run(list(argv), "")

    def ip(self, text: str, host: int | None = None) -> None:
        """`ip TEXT` beside the hosts, or on one."""
        where = [] if host is None else ["-n", f"host{host}"]
        self.run("ip", *where, *text.split())

    def rate(self, text: str) -> None:
        """Set the line rate of all hosts; what is queued is lost.

        At 8 kbit/s one packet of 64 KiB, which the kernel cuts up later, keeps a queue shut for a
        minute, whatever the rate becomes meanwhile.
        """
        self.network.set_rate(None)
        self.network.set_rate(text)

    def heal(self) -> None:
        """Links up, routes as they were, lines fast, no rank running."""
        for pid in list(self._pids):
            self.signal(pid, SIGKILL)
            wait_until(lambda pid=pid: self.poll(pid) is not None, f"the end of process {pid}")
        for host in range(self.count):
            self.ip(f"link set port{host} up")
            self.ip("link set eth0 up", host)
            self.ip("route flush type unreachable", host)
            self.ip("route flush type blackhole", host)
        self.rate(FAST)

    # Ranks.

    def start(self, folder: Path, ranks: int, *options: str, disks: bool = False) -> Run:
        """Start train.py on hosts 0 to `ranks` - 1; disks: each keeps checkpoints on its own."""
        self._jobs += 1
        pids, logs = [], []
        for rank in range(ranks):
            disk = folder / (f"disk{rank}" if disks else "disk")
            argv = ["--checkpoints", str(disk), "--losses", str(folder), *options]
            environment = {
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": self.network.address(0),
                "MASTER_PORT": str(29500 + self._jobs),
                "GLOO_SOCKET_IFNAME": "eth0",
            }
            logs.append(folder / f"job{self._jobs}-rank{rank}.txt")
            pids.append(self._ask("start", rank, argv, environment, str(logs[-1])))
        self._pids.update(pids)
        return Run(self, folder, pids, logs)

    def signal(self, pid: int, number: int) -> None:
        self._ask("signal", pid, int(number))

    def poll(self, pid: int) -> int | None:
        """The exit code of a rank that has ended."""
        code: int | None = self._ask("poll", pid)
        if code is not None:
            self._pids.discard(pid)
        return code

    def _ask(self, *request: Any) -> Any:
        assert self._server is not None
        assert self._server.stdin is not None
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return self._read()

    def _read(self) -> Any:
        assert self._server is not None
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError("tests.faults.server has ended; its error is on stderr")
        return json.loads(line)


class Run:
    """The ranks of one start of train.py."""

    def __init__(self, hosts: Hosts, folder: Path, pids: list[int], logs: list[Path]) -> None:
        self.hosts, self.folder, self.pids, self.logs = hosts, folder, pids, logs
        self._codes: dict[int, int] = {}

    def wait_for(self, step: int) -> None:
        """Until all ranks have done `step`."""

        def reached() -> bool:
            ended = [end for end in map(self.end, range(len(self.pids))) if end is not None]
            if ended:
                raise AssertionError(f"a rank ended before step {step}: {ended[0].text}")
            return all(step in losses(self.folder, rank) for rank in range(len(self.pids)))

        wait_until(reached, f"step {step}")

    def signal(self, rank: int, number: int) -> None:
        self.hosts.signal(self.pids[rank], number)

    def end(self, rank: int) -> End | None:
        """How a rank ended; None while it runs."""
        if rank not in self._codes:
            code = self.hosts.poll(self.pids[rank])
            if code is None:
                return None
            self._codes[rank] = code
        return End(self._codes[rank], self.logs[rank].read_text())

    def ends(self, ranks: Sequence[int] | None = None, timeout: float = PATIENCE) -> list[End]:
        """How `ranks` (None: all) end, within `timeout` seconds."""
        chosen = range(len(self.pids)) if ranks is None else ranks
        found: dict[int, End] = {}

        def all_ended() -> bool:
            for rank in chosen:
                end = self.end(rank)
                if end is not None:
                    found[rank] = end
            return len(found) == len(chosen)

        wait_until(all_ended, f"the end of ranks {list(chosen)}", timeout)
        return [found[rank] for rank in chosen]

    def finish(self) -> None:
        """Until all ranks have ended, well."""
        for rank, end in enumerate(self.ends()):
            assert end.code == 0, f"rank {rank} ended with {end.code}: {end.text}"


def losses(folder: Path, rank: int) -> dict[int, str]:
    """The losses of a rank by step. A step done twice must have come to the same."""
    found: dict[int, str] = {}
    path = folder / f"losses{rank}"
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        if line.endswith("\n"):
            step, loss = line.split()
            assert found.setdefault(int(step), loss) == loss, f"step {step} came out otherwise"
    return found


def curves(folder: Path, ranks: int) -> list[list[str]]:
    """Every rank's losses, step after step."""
    found = [losses(folder, rank) for rank in range(ranks)]
    for rank, curve in enumerate(found):
        assert sorted(curve) == list(range(1, len(curve) + 1)), f"rank {rank} left out a step"
    return [[curve[step] for step in sorted(curve)] for curve in found]


def wait_until(true: Callable[[], bool], what: str, timeout: float = PATIENCE) -> None:
    end = time.monotonic() + timeout
    while not true():
        if time.monotonic() > end:
            raise AssertionError(f"waited {timeout:g} s for {what}")
        time.sleep(0.01)
