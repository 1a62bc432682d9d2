"""Start one process per rank, on emulated hosts or on loopback, and end them all."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from typing import IO

from commlib.emulation.network import Network

MASTER_PORT = 29500
# How long the other ranks may go on after one has failed: long enough to report the failure
# themselves, which often names the reason better than the first exit code does.
GRACE_SECONDS = 5.0


def spawn(
    argv: Sequence[str],
    ranks: int,
    *,
    hosts: int | None = None,
    rate: str | None = None,
    network: Network | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 600.0,
) -> int:
    """Run `argv` once per rank and return 0, the first failed rank's exit code, or 124 (timeout).

    With `rate` or `hosts` the ranks run on a new network of that many emulated hosts and that
    rate, with `network` on that (running) one; with none of them, all run on this machine's
    loopback. By default every rank gets a host of its own; fewer `hosts` hold several ranks each,
    in order, the first ones one more where it does not divide: 5 ranks on 2 hosts are 0, 1, 2 and
    3, 4. Ranks of one host talk inside it, so what `sent_bytes` counts is what passes between
    hosts. Every rank sees RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT,
    GLOO_SOCKET_IFNAME and OMP_NUM_THREADS=1; `env` is added last. Rank 0 writes to this process's
    stdout and stderr; the others' output is kept and its end shown if they fail. After a failure, a
    timeout (seconds) or an exception here, every rank is killed.

    Raises: ValueError for bad numbers, RuntimeError where hosts cannot be emulated.
    """
    if ranks < 1:
        raise ValueError(f"ranks={ranks}: at least one rank must run")
    if hosts is not None and not 1 <= hosts <= ranks:
        raise ValueError(f"hosts={hosts}: from 1 to ranks={ranks}, as every host runs a rank")
    if network is None and (hosts or rate) is None:
        return _Ranks(argv, [ranks], None, env).join(timeout)
    used = hosts or ranks
    sizes = [ranks // used + (host < ranks % used) for host in range(used)]
    if network is None:
        with Network(used, rate) as own:
            return _Ranks(argv, sizes, own, env).join(timeout)
    if rate is not None:
        raise ValueError("give rate or network, not both: a network has its own rate")
    if used > network.hosts:
        raise ValueError(
            f"ranks={ranks} on {used} hosts, but the network has {network.hosts}: give `hosts` to "
            "run several ranks on each"
        )
    return _Ranks(argv, sizes, network, env).join(timeout)


class _Ranks:
    """The processes of one `spawn`: `sizes[h]` of them on host h, or all of them on loopback."""

    def __init__(
        self,
        argv: Sequence[str],
        sizes: Sequence[int],
        network: Network | None,
        env: Mapping[str, str] | None,
    ) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.logs: list[IO[bytes] | None] = []
        world = {
            "WORLD_SIZE": str(sum(sizes)),
            "MASTER_ADDR": network.address(0) if network else "127.0.0.1",
            "MASTER_PORT": str(MASTER_PORT if network else _free_port()),
            "GLOO_SOCKET_IFNAME": "eth0" if network else "lo",
            "OMP_NUM_THREADS": "1",
        }
        places = [(host, local) for host, ranks in enumerate(sizes) for local in range(ranks)]
        try:
            for rank, (host, local) in enumerate(places):
                place = {"RANK": rank, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": sizes[host]}
                command = network.command(host, argv) if network else [*_until_parent_ends(), *argv]
                log = tempfile.TemporaryFile() if rank else None  # noqa: SIM115, closed in kill()
                self.logs.append(log)
                with _cores(host, len(sizes)) if network else nullcontext():
                    process = subprocess.Popen(
                        command,
                        env={
                            **os.environ,
                            **world,
                            **{name: str(value) for name, value in place.items()},
                            **(env or {}),
                        },
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                self.processes.append(process)
        except BaseException:
            self.kill()
            raise

    def join(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        try:
            while True:
                codes = [process.poll() for process in self.processes]
                failed = [rank for rank, code in enumerate(codes) if code]
                if failed:
                    return self._failure(failed)
                if None not in codes:
                    return 0
                if time.monotonic() > deadline:
                    running = [rank for rank, code in enumerate(codes) if code is None]
                    self._report(f"ranks {running} still ran after {timeout:g} s: killed", running)
                    return 124
                time.sleep(0.02)
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.processes:
            # The group: under nsenter the rank itself is a child of the process we know.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for log in self.logs:
            if log is not None:
                log.close()
        self.processes.clear()
        self.logs.clear()

    def _failure(self, first: list[int]) -> int:
        code = self.processes[first[0]].returncode
        end = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < end and any(p.poll() is None for p in self.processes):
            time.sleep(0.02)
        codes = {rank: process.poll() for rank, process in enumerate(self.processes)}
        named = ", ".join(
            f"rank {rank}: " + ("still running" if code is None else f"exit code {code}")
            for rank, code in codes.items()
            if code != 0
        )
        self._report(f"rank {first[0]} failed ({named})", [rank for rank in codes if codes[rank]])
        return code

    def _report(self, what: str, ranks: Sequence[int], lines: int = 30) -> None:
        """Say what happened, and the end of what those ranks wrote (rank 0: on the screen)."""
        print(f"commlib: {what}", file=sys.stderr)
        for rank in ranks:
            log = self.logs[rank]
            if log is None:
                continue
            log.seek(0)
            text = log.read().decode(errors="replace").rstrip()
            if text:
                print(f"--- rank {rank}:", *text.splitlines()[-lines:], sep="\n", file=sys.stderr)


@contextmanager
def _cores(host: int, hosts: int) -> Iterator[None]:
    """Processes started meanwhile get this host's share of the cores.

    A host has its own cores. Left to itself, the kernel let two of four ranks on two cores finish
    their forward pass while the others had hardly begun, and the network waited for those.
    """
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[host::hosts] or {cores[host % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@cache
def _until_parent_ends() -> tuple[str, ...]:
    """A prefix under which a loopback rank dies with this process (hosts' ranks always do)."""
    prefix = ("setpriv", "--pdeathsig", "KILL", "--")
    try:
        works = subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    except OSError:
        works = False
    return prefix if works else ()
