"""Waiters: threads that wait for exchanges, so that the worker need not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

from .traffic import Pending

# Seconds that a stop after a failure leaves waiters whose peers are gone. What still waits then is
# left to the end of the process: the exchange may take its whole timeout.
PATIENCE = 5.0

Job = tuple[Pending, float, "Future[None]"]


class Waiters:
    """Up to `count` threads, started as they are needed.

    wake(): called whenever an exchange is done, well or not.
    """

    def __init__(self, count: int, wake: Callable[[], None]) -> None:
        self._count, self._wake = count, wake
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._busy = 0
        self._lock = threading.Lock()

    def watch(self, pending: Pending, timeout: float) -> Future[None]:
        """Wait for `pending` in the background; what went wrong is the future's exception."""
        done: Future[None] = Future()
        with self._lock:
            self._busy += 1
            if self._busy > len(self._threads) < self._count:
                name = f"commlib waiter {len(self._threads)}"
                thread = threading.Thread(target=self._loop, name=name, daemon=True)
                thread.start()
                self._threads.append(thread)
        self._jobs.put((pending, timeout, done))
        return done

    def stop(self, patience: float | None = None) -> None:
        """End the threads once they have nothing to wait for; after `patience` seconds leave them.

        A thread that comes back to a finished interpreter aborts the process there.
        """
        for _ in self._threads:
            self._jobs.put(None)
        end = None if patience is None else time.monotonic() + patience
        for thread in self._threads:
            if thread is not threading.current_thread():  # the garbage collector may run anywhere
                thread.join(None if end is None else max(0.0, end - time.monotonic()))

    def _loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            pending, timeout, done = job
            try:
                pending.wait(timeout)
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)
            del job, pending, done  # an idle thread must not hold on to a group
            with self._lock:
                self._busy -= 1
            self._wake()
