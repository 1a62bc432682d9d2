"""Ranks as real processes, shared by all tests: starting python and torch anew takes seconds each.

    def test_it(pool: Pool) -> None:
        results = pool.run(function, argument, ranks=3)

`function(argument)` runs in each of 3 processes, with a default group of those 3 made for this run
and destroyed after it: of gloo, or of what the pool's `setup` says. It must be importable (a
module's function), arguments and result must pickle. The store of the group lives in the test's own
process, so that any rank may die.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bench.forked import forked

START_SECONDS = 400.0
# Gloo sometimes (3 of 500 times) fails to connect its ranks on loopback; such a run is repeated.
NOT_CONNECTED = "Gloo connectFullMesh failed"


class RankError(RuntimeError):
    """A rank raised; the text has its traceback."""


def gloo(rank: int) -> str:
    """The setup of ranks without a device."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    return "gloo"


class Pool:
    """Worker processes that run one function at a time; restarted after a failure.

    setup: `setup(rank)` runs in each of them before its group is made; returns the backend.
    """

    def __init__(self, ranks: int = 4, setup: Callable[[int], str] = gloo) -> None:
        self.ranks = ranks
        self._setup = setup
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        self._store: dist.TCPStore | None = None
        self._runs = 0

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        ranks: int | None = None,
        timeout: float = 60.0,
        group_timeout: float = 60.0,
        may_die: bool = False,
    ) -> list[Any]:
        """What `function(*args)` returned on each rank.

        Args:
            ranks: 1 to the pool's size; None: all.
            timeout: seconds for all of it. group_timeout: of the process group.
            may_die: ranks may end without an answer; their result is None.

        Raises: RankError with the first rank's traceback, or naming ranks that died or hang. The
        workers are started anew after that.
        """
        ranks = self.ranks if ranks is None else ranks
        assert 1 <= ranks <= self.ranks
        how = (ranks, timeout, group_timeout, may_die)
        try:
            return self._run(function, args, *how)
        except RankError as error:
            if NOT_CONNECTED not in str(error):
                raise
            return self._run(function, args, *how)
        except BaseException:  # pytest's timeout comes in here: the next test gets new workers
            self.close()
            raise

    def _run(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        ranks: int,
        timeout: float,
        group_timeout: float,
        may_die: bool,
    ) -> list[Any]:
        self._start()
        self._runs += 1
        for rank in range(ranks):
            task = (self._setup, function, args, rank, ranks, self._runs, group_timeout, timeout)
            self._workers[rank][1].send(task)
        answers, ended = self._collect(ranks, timeout)
        missing = [rank for rank in range(ranks) if rank not in answers]
        died = [rank for rank in missing if rank in ended]
        failed = [(rank, text) for rank, (ok, text) in sorted(answers.items()) if not ok]
        if missing or failed:
            self.close()
        if failed:
            texts = "\n".join(f"rank {rank} of {ranks}:\n{text}" for rank, text in failed)
            raise RankError(f"{texts}\nranks that died: {died}, without answer: {missing}")
        if set(missing) - set(died) or (died and not may_die):
            raise RankError(f"ranks that died: {died}, without answer after {timeout} s: {missing}")
        return [answers[rank][1] if rank in answers else None for rank in range(ranks)]

    def close(self) -> None:
        """End the workers, kindly first."""
        workers, self._workers = self._workers, []  # gone, even if this is interrupted
        for _, pipe in workers:
            with contextlib.suppress(OSError):
                pipe.send(None)
            pipe.close()
        end = time.monotonic() + 2.0
        for process, _ in workers:
            process.join(max(0.0, end - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        self._store = None  # holds what groups that failed left for their like

    def _start(self) -> None:
        if self._workers:
            return
        if self._store is None:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = forked()
        for _ in range(self.ranks):
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, self._store.port), daemon=True)
            process.start()
            theirs.close()  # so that its end is seen here
            self._workers.append((process, mine))
        for _, pipe in self._workers:
            if not pipe.poll(START_SECONDS):
                self.close()
                raise RankError(f"a worker did not start within {START_SECONDS} s")
            pipe.recv()

    def _collect(self, ranks: int, timeout: float) -> tuple[dict[int, tuple[bool, Any]], set[int]]:
        """The answers by rank, and the ranks whose process ended instead."""
        answers: dict[int, tuple[bool, Any]] = {}
        ended: set[int] = set()
        waiting = {self._workers[rank][1]: rank for rank in range(ranks)}
        end = time.monotonic() + timeout
        while waiting and time.monotonic() < end:
            for pipe in wait(list(waiting), max(0.0, end - time.monotonic())):
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    answers[rank] = pipe.recv()
                except (EOFError, OSError):
                    ended.add(rank)
            failed = any(not ok for ok, _ in answers.values())
            if failed:  # the others may wait for it: give them a moment to say what they saw
                end = min(end, time.monotonic() + 5.0)
        return answers, ended


def _work(pipe: Connection, port: int) -> None:
    torch.set_num_threads(1)
    torch.seed()  # a fork has its server's random state: ranks would draw alike
    np.random.seed()
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    pipe.send("ready")
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        if task is None:
            return
        pipe.send(_run(store, *task))


def _run(
    store: dist.Store,
    setup: Callable[[int], str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    ranks: int,
    number: int,
    group_timeout: float,
    timeout: float,
) -> tuple[bool, Any]:
    # a rank that hangs shows where, on stderr, before it is killed
    faulthandler.dump_traceback_later(max(0.1, timeout - 1.0), exit=False)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            setup(rank),
            store=dist.PrefixStore(f"run{number}", store),
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=group_timeout),
        )
        return True, function(*args)
    except BaseException:
        return False, traceback.format_exc()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()
