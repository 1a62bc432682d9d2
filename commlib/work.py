"""Work: a collective under way; Worker: the thread that carries them out in call order.

The worker runs several messages at a time. Only the oldest that has not issued everything may issue
(see collectives.base), the next one codes meanwhile:

    message k     code | issue | wait | reduce | issue      | wait | decode
    message k+1          code ......................| issue | wait | ...
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .collectives.base import Step, Steps, drive, span
from .traffic import Pending

# Messages that may be started at a time: one on the wire, one decoding, one coding.
DEPTH = 3
# Seconds between looks at what other ranks have to say, in an exchange that takes long.
LOOK = 1.0


GiveUp = Callable[[float], BaseException]


class Work:
    """A collective that was called; like torch.distributed's Work."""

    __slots__ = ("_error", "_event", "_future", "_give_up", "_left", "_lock", "_result")

    def __init__(self, result: Any, parts: int = 1, give_up: GiveUp | None = None) -> None:
        self._result = result
        self._give_up = give_up  # what a timeout of wait() leads to
        self._left = parts
        self._error: BaseException | None = None
        self._future: torch.futures.Future[Any] | None = None
        self._lock = threading.Lock()
        self._event = threading.Event() if parts else None

    def wait(self, timeout: float | None = None) -> bool:
        """Block until done; True. Raises its error.

        After `timeout` seconds the communicator is aborted, and RuntimeError says so.
        """
        if self._event is not None and not self._event.wait(timeout):
            assert timeout is not None
            error = RuntimeError(f"not done after {timeout:g} s")
            raise error if self._give_up is None else self._give_up(timeout)
        if self._error is not None:
            raise self._error
        return True

    def is_completed(self) -> bool:
        """Whether it is done, well or not."""
        return self._left == 0

    def exception(self) -> BaseException | None:
        """What went wrong, once completed."""
        return self._error

    def result(self) -> Any:
        """The output tensor, once done."""
        self.wait()
        return self._result

    def get_future(self) -> torch.futures.Future[Any]:
        """A future of `result()`; completed by the thread that finishes the collective."""
        with self._lock:
            if self._future is None:
                devices = [self._result.device] if self._result.is_cuda else None
                self._future = torch.futures.Future(devices=devices)
                if self._left == 0:
                    self._complete(self._future)
            return self._future

    def _complete(self, future: torch.futures.Future[Any]) -> None:
        if self._error is None:
            future.set_result(self._result)
        else:
            future.set_exception(self._error)

    def _finish(self, error: BaseException | None = None) -> None:
        """One part is done; with an error all are."""
        with self._lock:
            if self._left == 0:
                return
            self._left = 0 if error is not None else self._left - 1
            if self._left:
                return
            self._error = error
            future = self._future
        if self._event is not None:
            self._event.set()
        if future is not None:
            self._complete(future)


@dataclass
class Task:
    """A message to carry out.

    names: states that it reads and writes; a message that shares one must wait for its end.
    """

    steps: Steps
    work: Work
    what: str
    names: frozenset[str] = frozenset()
    step: Step | Pending | None = None  # what it asked for last
    issued: bool = field(default=False)

    def advance(self, answer: bool | None) -> bool:
        """Run to the next request; False at the end."""
        try:
            self.step = self.steps.send(answer)  # type: ignore[arg-type]  # None starts it
        except StopIteration:
            return False
        return True


Look = Callable[[], None]
Fail = Callable[[BaseException, list[Task]], BaseException]


class Worker:
    """One thread that runs tasks in the order they came.

    fail(error, tasks): called once, with the tasks in flight, the one that failed first; returns
    the error that they and all later ones get. look(): called now and then while an exchange takes
    long; may raise.
    """

    def __init__(self, timeout: float, fail: Fail, look: Look) -> None:
        self._timeout, self._fail, self._look = timeout, fail, look
        self._queue: deque[Task] = deque()
        self._active: list[Task] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._broken: BaseException | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is queued or in flight."""
        with self._changed:  # a task on its way from one to the other is in neither
            return not self._queue and not self._active

    def submit(self, task: Task) -> None:
        """Queue a task; its Work completes, well or not."""
        with self._changed:
            if self._broken is not None:
                task.work._finish(self._broken)
                return
            self._queue.append(task)
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="commlib", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def run(self, task: Task) -> None:
        """Carry a task out on the calling thread; only while idle."""
        task.step = Step.READY  # it has started
        try:
            drive(task.steps, lambda pending: attend(pending, self._timeout, self._look))
        except BaseException as error:
            self._broken = self._fail(error, [task])
            task.work._finish(self._broken)
            if not isinstance(error, Exception):  # Ctrl-C stays what it is
                raise
            raise self._broken from error
        task.work._finish()

    def tasks(self) -> list[Task]:
        """What is in flight or queued."""
        with self._changed:
            return [*self._active, *self._queue]

    def flush(self) -> None:
        """Wait until idle."""
        with self._changed:
            self._changed.wait_for(lambda: self.idle)

    def stop(self) -> None:
        """End the thread once the queue is empty.

        A thread left running into the interpreter's end aborts the process there.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _loop(self) -> None:
        with torch.no_grad():
            while True:
                # An idle thread must not hold on to its last task: that keeps the group alive.
                task: Task | None = None
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping or not self.idle)
                    if self.idle:
                        return
                try:
                    for task in self._tasks():
                        if self._move(task):
                            break
                    else:
                        # nothing moves by itself: wait for the oldest
                        task = self._active[0]
                        assert not isinstance(task.step, Step | None)
                        attend(task.step, self._timeout, self._look)
                except BaseException as error:
                    self._break(error, task)
                    return

    def _tasks(self) -> list[Task]:
        """The tasks in flight, and the next one if it may start."""
        with self._changed:
            if self._queue and len(self._active) < DEPTH:
                busy = frozenset().union(*(task.names for task in self._active))
                if not busy & self._queue[0].names:
                    self._active.append(self._queue.popleft())
            return list(self._active)

    def _move(self, task: Task) -> bool:
        """Run `task` to its next request, if that request is granted."""
        before = self._active[: self._active.index(task)]
        step, answer = task.step, True
        if step is Step.READY or step is Step.PARKED:
            answer = all(other.issued for other in before)
            if step is Step.PARKED and not answer:
                return False
        elif step is Step.ISSUED:
            task.issued = True
        elif step is not None:
            if not step.done():
                return False
            step.wait(self._timeout)  # raises what went wrong
        if task.advance(None if step is None else answer):
            return True
        with self._changed:
            self._active.remove(task)
            self._changed.notify_all()
        task.work._finish()
        return True

    def _break(self, error: BaseException, task: Task | None) -> None:
        with self._changed:
            tasks = [*self._active, *self._queue]
        if task in tasks:  # first the one that failed
            tasks.remove(task)
            tasks.insert(0, task)
        broken = self._fail(error, tasks)
        with self._changed:
            self._broken = broken
            tasks += [other for other in self._queue if other not in tasks]
            self._active.clear()
            self._queue.clear()
            self._changed.notify_all()
        for other in tasks:
            other.work._finish(broken)


def attend(pending: Pending, timeout: float, look: Look) -> None:
    """Wait for an exchange, looking up every second."""
    if pending.done():
        pending.wait(timeout)
        return
    end = time.monotonic() + timeout
    with span("wait"):
        while not pending.poll(min(LOOK, max(0.0, end - time.monotonic())), timeout):
            if time.monotonic() >= end:
                raise RuntimeError(f"timed out after {timeout} s")
            look()
