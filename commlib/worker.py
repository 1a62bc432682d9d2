"""Worker: the thread that carries collectives out, several at a time.

Whatever may move, moves, the oldest first: codes a message, sums what has arrived, issues. Where
nothing moves by itself the thread sleeps until an exchange is done or another message is queued;
`Waiters` do the waiting, as gloo tells of no end of a receive to whoever does not wait for it.

Callbacks of futures run on this thread too. One that waits for another message does not block it:
it goes on with messages itself until that one is done.

Messages in a lane of their own (see lane.py) issue at any time. The others are matched by order
alone: of these only the oldest on the group that has not issued everything may issue (order.py).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from .collectives.base import Step, drive, span
from .order import Order
from .runner import Fail, Task
from .traffic import Pending, Timeout
from .waiters import PATIENCE, Waiters
from .work import GiveUp, Work

# Messages that may be started at a time. Each holds the buffers of its wire.
DEPTH = 8
# Seconds between looks at what other ranks have to say, in an exchange that takes long.
LOOK = 1.0
# Seconds that a callback's thread gives its own messages while it waits for another thread's.
GLANCE = 0.01


Look = Callable[[], None]

_here = threading.local()  # .worker: whose thread this is


class Worker:
    """One thread that starts tasks in the order they came.

    fail: called once; what it returns all later tasks get too. look(): called now and then while an
    exchange takes long; may raise. order: of the group's messages.
    """

    def __init__(self, timeout: float, fail: Fail, look: Look, order: Order) -> None:
        self._timeout, self._fail, self._look, self._order = timeout, fail, look, order
        self._queue: deque[Task] = deque()
        self._active: list[Task] = []
        self._changed = threading.Condition()
        self._news = False  # a task was queued or an exchange is done since the thread last looked
        self._waiters = Waiters(DEPTH, self._wake)
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._broken: BaseException | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is queued or in flight."""
        with self._changed:  # a task on its way from one to the other is in neither
            return not self._queue and not self._active

    def capturing(self) -> bool:
        """Never: CUDA graphs are of CUDA devices."""
        return False

    def work(self, result: Any, parts: int, give_up: GiveUp | None = None) -> Work:
        """A Work that blocks in `wait` until the tasks are done."""
        return Work(result, parts, give_up, self._until)

    def fork(self) -> AbstractContextManager[None]:
        """Nothing to do: what the caller does while no task is under way is done at once."""
        return nullcontext()

    def now(self) -> float:
        return time.perf_counter()

    def since(self, start: float, record: Callable[[float], None]) -> None:
        record(time.perf_counter() - start)

    def read(self, numbers: torch.Tensor, then: Callable[[list[Any]], None]) -> None:
        then(numbers.tolist())

    def submit(self, task: Task) -> None:
        """Queue a task; its Work completes, well or not."""
        try:
            with self._changed:
                if self._broken is not None:
                    task.work._finish(self._broken)
                    return
                if not task.lane:
                    task.ticket = self._order.take(task.what, self._wake)
                if self._thread is None:
                    thread = threading.Thread(target=self._loop, name="commlib", daemon=True)
                    thread.start()  # may fail, where processes are limited
                    self._thread = thread
                self._queue.append(task)
                self._wake()
        except RuntimeError as error:
            self._break(error, task)

    def run(self, task: Task) -> None:
        """Carry a task out on the calling thread; only while idle."""
        task.step = Step.READY  # it has started
        try:
            with nullcontext() if task.lane else self.in_turn(task.what), task.writing:
                drive(task.steps, self.watch if task.lane else self.attend)
        except BaseException as error:
            self._broken = self._fail(error, [task])
            task.work._finish(self._broken)
            if not isinstance(error, Exception):  # Ctrl-C stays what it is
                raise
            raise self._broken from error
        task.work._finish()

    @contextmanager
    def in_turn(self, what: str) -> Iterator[None]:
        """A block that posts, once all that was called earlier on the group has."""
        ticket, done = self._order.take(what, lambda: None), False
        end = time.monotonic() + self._timeout
        try:
            self._until(lambda: ticket.first)
            while not ticket.wait(LOOK):
                self._until(lambda: ticket.first)
                if time.monotonic() >= end:
                    raise Timeout(self._timeout, "messages called earlier have not gone out")
                self._look()
            yield
            done = True
        finally:
            ticket.give_back(lost=not done)

    def attend(self, pending: Pending) -> None:
        """Block until an exchange is done."""
        attend(pending, self._timeout, self._look)

    def watch(self, pending: Pending) -> None:
        """Like `attend`, for exchanges that only tell of their end to whoever waits for it."""
        found = self._waiters.watch(pending, self._timeout)
        with span("wait"):
            while not wait([found], LOOK).done:
                self._look()
        found.result()

    def tasks(self) -> list[Task]:
        """What is in flight or queued."""
        with self._changed:
            return [*self._active, *self._queue]

    def flush(self) -> None:
        """Wait until idle."""
        self._until(lambda: self.idle)
        with self._changed:
            self._changed.wait_for(lambda: self.idle)

    def stop(self) -> None:
        """End the thread once the queue is empty.

        A thread left running into the interpreter's end aborts the process there.
        """
        with self._changed:
            self._stopping = True
            self._wake()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._waiters.stop(None if self._broken is None else PATIENCE)

    def _wake(self) -> None:
        with self._changed:
            self._news = True
            self._changed.notify_all()

    def _loop(self) -> None:
        # Asking makes a new thread take up the process's number: a matrix product would else use
        # all cores, and spin on those of other ranks (1200 ms a step of PowerSGD instead of 20).
        torch.get_num_threads()
        _here.worker = self
        with torch.no_grad():
            while self._turn():
                pass

    def _until(self, done: Callable[[], bool]) -> None:
        """On a worker's thread, in a callback: go on with its messages until `done()`.

        Or until it has none: what is left is then another worker's, which does not wake this one.
        """
        here: Worker | None = getattr(_here, "worker", None)
        while here is not None and not done() and not here.idle:
            if not here._turn(LOOK if here is self else GLANCE):
                return

    def _turn(self, patience: float = LOOK) -> bool:
        """Move a message, or wait for news; False when the thread is to end."""
        # An idle thread must not hold on to its last task: that keeps the group alive.
        task: Task | None = None
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or not self.idle)
            if self.idle:
                return False
            self._news = False
        try:
            for task in self._tasks():
                if self._move(task):
                    break
            else:
                with span("wait"), self._changed:
                    task = self._active[0]
                    quiet = not self._changed.wait_for(lambda: self._news, patience)
                if quiet and patience == LOOK:  # without the lock: the store may take its time
                    self._look()
        except BaseException as error:
            self._break(error, task)
        return self._broken is None

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
        step, answer = task.step, True
        if step is Step.READY or step is Step.PARKED:
            answer = task.ticket is None or task.ticket.first
            if step is Step.PARKED and not answer:
                return False
        elif step is Step.ISSUED:
            self._release(task)
        elif step is not None and not self._arrived(task, step):
            return False
        if task.advance(None if step is None else answer):
            return True
        with self._changed:
            self._active.remove(task)
            self._changed.notify_all()
        self._release(task)
        task.work._finish()
        return True

    def _release(self, task: Task, *, lost: bool = False) -> None:
        """It has issued everything: others may. lost: it ends without."""
        if task.ticket is not None:
            task.ticket.give_back(lost=lost)
            task.ticket = None

    def _arrived(self, task: Task, pending: Pending) -> bool:
        """Whether what `task` waits for is done; raises what went wrong."""
        if task.waiting is None:
            if not pending.done():
                task.waiting = self._waiters.watch(pending, self._timeout)
                return False
            pending.wait(self._timeout)
        elif task.waiting.done():
            task.waiting.result()
            task.waiting = None
        else:
            return False
        return True

    def _break(self, error: BaseException, task: Task | None) -> None:
        with self._changed:
            tasks = [*self._active, *self._queue]
        if task in tasks or (task is not None and task.step is None):
            tasks = [task, *(other for other in tasks if other is not task)]  # the one that failed
        try:
            broken = self._fail(error, tasks)
        except BaseException as worse:  # nobody may be left waiting
            broken = worse
        with self._changed:
            self._broken = broken
            tasks += [other for other in self._queue if other not in tasks]
            self._active.clear()
            self._queue.clear()
            self._changed.notify_all()
        for other in tasks:
            self._release(other, lost=True)
            other.work._finish(broken)


def attend(pending: Pending, timeout: float, look: Look) -> None:
    """Wait for an exchange, looking up every second."""
    if pending.done():
        pending.wait(timeout)
        return
    end = time.monotonic() + timeout
    with span("wait"):
        while not pending.poll(min(LOOK, max(1e-3, end - time.monotonic())), timeout):
            if time.monotonic() >= end:
                raise Timeout(timeout)
            look()
