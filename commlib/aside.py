"""Gloo's own threads, kept off a core while another thread posts from it.

Gloo holds a connection's lock while a thread posts a send or a receive. What the peer answers wakes
gloo's thread, which takes the core from the one that posts, finds the lock taken, and asks for the
same news again and again (`Pair::handleEvents` does not wait for a lock) until its slice of time,
3 ms, is over. On two hosts with a core each an all-reduce of 1 MiB took 6.7 ms that way and takes
1.7 now; beside a thread that computes 11.5 and 5.5.

So while a thread posts, gloo's are SCHED_BATCH: they do not take a core from a thread that has it.
Only then: for good, and beside a thread that computes, they would wait for its slices to end
whenever a message arrives, and 4 KiB took 13 ms instead of 3.5.

Linux only; elsewhere, and where a sandbox forbids it, nothing changes.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

NAME = "gloo_tcp_loop"  # what gloo calls its thread, one for every group
TASKS = "/proc/self/task"
USUAL, POLITE = getattr(os, "SCHED_OTHER", None), getattr(os, "SCHED_BATCH", None)


class Aside:
    """A block in which gloo's threads stand aside; blocks of several threads may overlap."""

    def __init__(self) -> None:
        self._threads: list[int] = []
        self._depth = 0
        self._lock = threading.Lock()

    def find(self) -> None:
        """Look for gloo's threads: to be called when a group was made."""
        with self._lock:
            known = set(self._threads)
            self._threads = [thread for thread in _loops() if thread in known or _movable(thread)]

    def __enter__(self) -> None:
        with self._lock:
            try:
                if self._depth == 0:
                    self._put(POLITE)
                self._depth += 1
            except BaseException:  # Ctrl-C: nobody leaves what nobody has entered
                if self._depth == 0:
                    self._put(USUAL)
                raise

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._put(USUAL)

    def _put(self, policy: int | None) -> None:
        for thread in self._threads.copy():
            # The number of a thread that has ended may be that of another process by now.
            if policy is None or not os.path.exists(f"{TASKS}/{thread}") or not _movable(thread):
                self._threads.remove(thread)
                continue
            try:
                os.sched_setscheduler(thread, policy, os.sched_param(0))
            except OSError:
                self._threads.remove(thread)


def _loops() -> list[int]:
    """Gloo's threads in this process."""
    found = []
    for task in Path(TASKS).glob("*"):
        with suppress(OSError):  # it has ended meanwhile
            if (task / "comm").read_text().strip() == NAME:
                found.append(int(task.name))
    return found


def _movable(thread: int) -> bool:
    """Whether nobody has chosen another policy for it."""
    with suppress(OSError):
        return USUAL is not None and os.sched_getscheduler(thread) in (USUAL, POLITE)
    return False


ASIDE = Aside()  # gloo's threads are the process's
