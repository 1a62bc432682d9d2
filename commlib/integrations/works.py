"""What torch's callers hold of an asynchronous call: `torch.distributed.Work` over commlib's."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from commlib.work import Work, writing

Timeout = datetime.timedelta | float | None


def seconds(timeout: Timeout) -> float | None:
    """A timeout as `commlib.work` takes it; c10d's zero means the group's."""
    if isinstance(timeout, datetime.timedelta):
        timeout = timeout.total_seconds()
    return timeout or None


class AsyncWork(dist.Work):
    """A compressed collective.

    outputs: the tensors it is for. after: what is left to do once it is done, by whoever finds out
    first.
    """

    def __init__(
        self, work: Work, outputs: Sequence[torch.Tensor], after: Callable[[], None] | None = None
    ) -> None:
        super().__init__()
        self._work, self._outputs, self._after = work, outputs, after
        self._future: torch.futures.Future[list[torch.Tensor]] | None = None
        if after is not None:
            self.get_future()

    def wait(self, timeout: Timeout = None) -> bool:
        """Block until the result is there; `timeout` in seconds, None or 0: the group's.

        On CUDA the caller's stream waits, and the host only with a `timeout`.
        """
        self._work.wait(seconds(timeout))
        if self._after is not None:
            self.get_future().wait()
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return self._work.is_completed() and (self._after is None or self.get_future().done())

    def is_success(self) -> bool:
        return self.is_completed() and self._work.exception() is None

    def exception(self) -> BaseException | None:
        """What went wrong, once completed."""
        return self._work.exception()

    def result(self) -> list[torch.Tensor]:
        self.wait()
        return list(self._outputs)

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        """Resolves to the list of outputs, as c10d's futures do."""

        def outcome(done: torch.futures.Future[Any]) -> list[torch.Tensor]:
            done.value()  # raises where the collective failed
            if self._after is not None:
                with writing(*self._outputs):
                    self._after()
            return list(self._outputs)

        if self._future is None:
            self._future = self._work.get_future().then(outcome)
        return self._future


class Together(dist.Work):
    """Calls that were made as one: some compressed, some torch's own."""

    def __init__(self, works: Sequence[Any], outputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._works, self._outputs = works, outputs

    def wait(self, timeout: Timeout = None) -> bool:
        """As `AsyncWork`, for each of them."""
        for work in self._works:
            if timeout:
                work.wait(datetime.timedelta(seconds=seconds(timeout) or 0.0))
            else:
                work.wait()
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return all([work.is_completed() for work in self._works])

    def is_success(self) -> bool:
        return all([work.is_success() for work in self._works])

    def exception(self) -> BaseException | None:
        return next((e for work in self._works if (e := work.exception()) is not None), None)

    def result(self) -> list[torch.Tensor]:
        self.wait()
        return list(self._outputs)

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        """Resolves to the list of outputs. RuntimeError where torch's own part has no future."""

        def outcome(done: torch.futures.Future[Any]) -> list[torch.Tensor]:
            for future in done.value():
                future.value()  # raises where one failed
            return list(self._outputs)

        return torch.futures.collect_all([work.get_future() for work in self._works]).then(outcome)
