"""Work: a collective that was called, as its caller sees it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

GiveUp = Callable[[float], BaseException]
CarryOn = Callable[[Callable[[], bool]], None]
"""carry_on(done): what a thread that carries messages out does until `done()`; others return."""


def writing(*tensors: torch.Tensor) -> AbstractContextManager[object]:
    """A block, on any thread, in which a caller's `tensors` may be written to.

    Those of `torch.inference_mode` take no writes outside of it.
    """
    if any(x.is_inference() for x in tensors):
        return torch.inference_mode()
    return torch.no_grad()


class Work:
    """A collective that was called; like torch.distributed's Work."""

    __slots__ = (
        "_carry_on",
        "_error",
        "_event",
        "_future",
        "_give_up",
        "_left",
        "_lock",
        "_result",
    )

    def __init__(
        self,
        result: Any,
        parts: int = 1,
        give_up: GiveUp | None = None,
        carry_on: CarryOn | None = None,
    ) -> None:
        self._result = result
        self._give_up = give_up  # what a timeout of wait() leads to
        self._carry_on = carry_on
        self._left = parts
        self._error: BaseException | None = None
        self._future: torch.futures.Future[Any] | None = None
        self._lock = threading.Lock()
        self._event = threading.Event() if parts else None

    def wait(self, timeout: float | None = None) -> bool:
        """Block until done; True. Raises its error.

        After `timeout` seconds the communicator is aborted, and RuntimeError says so.
        """
        left = timeout
        if self._carry_on is not None and self._left:
            end = math.inf if timeout is None else time.monotonic() + timeout
            self._carry_on(lambda: self._left == 0 or time.monotonic() >= end)
            left = None if timeout is None else max(0.0, end - time.monotonic())
        if self._event is not None and not self._event.wait(left):
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
        """A future of `result()`; completed by the thread that finishes the collective.

        Its callbacks run on that thread. There a Work may be waited for, as everywhere; a future of
        another call may not: it would never be completed.
        """
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
