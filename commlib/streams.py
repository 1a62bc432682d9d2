"""SideStream: collectives on CUDA, queued by the calling thread on a stream beside its own.

    caller's stream   ... gradients --o---- backward goes on ------------------o-- wait(), optimizer
                                       \\ event                           event /
    side stream                         o- code --.        .- sum - .. - decode
    NCCL's stream                                  `- exchange -'

The host waits for nothing: `Pending.wait` of NCCL makes the current stream wait, `Work.wait` the
caller's, and both return at once. So the calling thread can queue a whole collective by itself, and
calls are in order because their thread is. NCCL's own watchdog looks after exchanges that hang.

Everything is one fork from the caller's stream and one join, with no number on the host that
changes from call to call: a CUDA graph captures it as it stands (what it may capture: `capture`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from .collectives.base import Step, drive
from .runner import Fail, Task
from .traffic import Pending
from .work import GiveUp, Work

# Streams are of high priority: a few small kernels, and then the wire is busy. Behind the backward
# pass, whose kernels fill the device, they would wait for each of them.
PRIORITY = -1
# Seconds between looks in a `wait` with a timeout.
POLL = 1e-3

Defer = Callable[[Callable[[], bool], Callable[[], None]], None]


class SideStream:
    """A `Runner` for one CUDA device.

    aborted(): whether the communicator is, so that nothing may be waited for. defer(done, finish):
    calls `finish` some time after `done()` has become true. cuda: torch.cuda, or what tests put in
    its place. timeout: seconds an exchange may take; None: the group's.
    """

    idle = True  # nothing is ever queued on the host

    def __init__(
        self,
        device: torch.device,
        fail: Fail,
        aborted: Callable[[], bool],
        defer: Defer,
        cuda: Any = torch.cuda,
        timeout: float | None = None,
    ) -> None:
        self.device, self._timeout = device, timeout
        self._fail, self._aborted, self._defer, self._cuda = fail, aborted, defer, cuda
        self._stream = cuda.Stream(device, priority=PRIORITY)

    def capturing(self) -> bool:
        """Whether the caller's stream is being captured into a CUDA graph."""
        if self._cuda.current_device() == self.device.index:
            return bool(self._cuda.is_current_stream_capturing())
        with self._cuda.device(self.device):
            return bool(self._cuda.is_current_stream_capturing())

    def work(self, result: Any, parts: int, give_up: GiveUp | None = None) -> Work:
        """A Work that makes streams wait, not threads."""
        return StreamWork(result, parts, give_up, self.device, self._cuda)

    def run(self, task: Task) -> None:
        """Queue all of a task."""
        task.step = Step.READY  # it has started
        try:
            with self.fork(), task.writing:
                drive(task.steps)
                task.work._finish()
        except BaseException as error:
            broken = self._fail(error, [task])
            task.work._finish(broken)
            if not isinstance(error, Exception):  # Ctrl-C stays what it is
                raise
            raise broken from error

    def submit(self, task: Task) -> None:
        """Queue all of a task whose caller may let go of its tensors before it is done.

        Their memory is the caller's stream's to use again; a caller that waits is past the side
        stream's work by then, one that does not must not get it back before.
        """
        for tensor in task.tensors:
            tensor.record_stream(self._stream)
        self.run(task)

    def in_turn(self, what: str) -> AbstractContextManager[None]:
        """At once: what was called earlier is in the library's queue."""
        return nullcontext()

    def attend(self, pending: Pending) -> None:
        """Make the current stream wait for an exchange."""
        pending.wait()

    def watch(self, pending: Pending) -> None:
        """Like `attend`, for an exchange that the host reads next: it fails after the timeout."""
        pending.wait(self._timeout)

    @contextmanager
    def fork(self) -> Iterator[None]:
        """The side stream as the current one, behind all that the caller has queued."""
        self._stream.wait_stream(self._cuda.current_stream(self.device))
        with self._cuda.stream(self._stream):  # and its device as the current one
            yield

    def now(self) -> Any:
        """An event here; None in a capture, where nothing happens now."""
        if self.capturing():
            return None
        event = self._cuda.Event(enable_timing=True)
        event.record(self._cuda.current_stream(self.device))
        return event

    def since(self, start: Any, record: Callable[[float], None]) -> None:
        """The device's seconds from `start` to here, once it got here; nothing of a capture."""
        if start is not None:
            end = self.now()
            self._defer(end.query, lambda: record(start.elapsed_time(end) / 1e3))

    def read(self, numbers: torch.Tensor, then: Callable[[list[Any]], None]) -> None:
        """Call `then` with the numbers once the device has them."""
        # a copy to memory that is not pinned would block
        on_host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=numbers.is_cuda)
        on_host.copy_(numbers, non_blocking=True)
        self._defer(self.now().query, lambda: then(on_host.tolist()))

    def tasks(self) -> list[Task]:
        """None: what is queued is with the device."""
        return []

    def flush(self) -> None:
        """Block until the device has done everything, replays of captured graphs included.

        Nothing of a communicator that was aborted may ever end: that is not waited for.
        """
        if not self._aborted():
            self._cuda.synchronize(self.device)

    def stop(self) -> None:
        """Nothing runs."""


class StreamWork(Work):
    """A collective that is queued: an event behind it.

    Like a work of torch's NCCL backend: `wait()` makes the caller's current stream wait and returns
    at once, `wait(timeout)` blocks until the device is done, `is_completed()` asks the device. In a
    capture only `wait()` and `get_future()` have a meaning.
    """

    __slots__ = ("_cuda", "_device", "_done", "_stream")

    def __init__(
        self, result: Any, parts: int, give_up: GiveUp | None, device: torch.device, cuda: Any
    ) -> None:
        super().__init__(result, parts, give_up)
        self._device, self._cuda = device, cuda
        self._stream: Any = None
        self._done: Any = None
        if parts == 0:
            self._mark()

    def wait(self, timeout: float | None = None) -> bool:
        """Make the caller's current stream wait for the result; True. Raises its error.

        With a `timeout` the host blocks too. After that many seconds the communicator is aborted.
        """
        if self._error is not None:
            raise self._error
        self._cuda.current_stream(self._device).wait_event(self._done)
        if timeout is not None:
            end = time.monotonic() + timeout
            while not self._done.query():
                if time.monotonic() >= end:
                    assert self._give_up is not None
                    raise self._give_up(timeout)
                time.sleep(POLL)
        return True

    def is_completed(self) -> bool:
        """Whether the device is done, or the call failed."""
        return self._error is not None or (self._left == 0 and bool(self._done.query()))

    def _finish(self, error: BaseException | None = None) -> None:
        if error is None and self._left == 1:
            self._mark()
        super()._finish(error)

    def _mark(self) -> None:
        self._stream = self._cuda.current_stream(self._device)
        self._done = self._stream.record_event()

    def _complete(self, future: torch.futures.Future[Any]) -> None:
        """A future takes the current streams as those that its value comes from."""
        with self._cuda.stream(self._stream):
            super()._complete(future)
