"""Exchange: a work of c10d as `traffic.Pending` wants it."""

from __future__ import annotations

import datetime
import re
import time
from collections import deque
from typing import Any

from .traffic import Timeout

TIMED_OUT = re.compile("timed? ?out", re.IGNORECASE)  # in what gloo says of a timeout

# A gloo thread lets go of a tensor a moment after its exchange is done. If it is the last to hold
# it, it needs the interpreter's lock for that, and never gets it if the group is being destroyed (3
# of 52 short runs hung there): so the tensors of the last exchanges are kept until the next ones.
_recent: deque[object] = deque(maxlen=4)


class Exchange:
    """A c10d work, and the tensors it uses."""

    __slots__ = ("_any", "_tellable", "_tensors", "_work", "source")

    def __init__(
        self,
        work: Any,
        tensors: object,
        *,
        tellable: bool = True,
        source: int | None = None,
        any_source: bool = False,
    ) -> None:
        self._work = work
        self._tensors = tensors
        self._tellable = tellable  # gloo's sends and receives complete only in wait()
        self.source = source
        self._any = any_source

    def done(self) -> bool:
        return self._work is None or (self._tellable and self._work.is_completed())

    def wait(self, timeout: float | None = None) -> None:
        if self._work is None:
            return
        start = time.monotonic()
        try:
            if timeout is None:
                self._work.wait()
            else:
                self._work.wait(datetime.timedelta(seconds=timeout))
        except RuntimeError as error:
            late = timeout is not None and time.monotonic() - start > 0.9 * timeout
            if timeout is not None and late and TIMED_OUT.search(str(error)):
                raise Timeout(timeout, error) from error
            raise
        if self._any:
            self.source = self._work._source_rank()
        if self._tellable:
            _recent.append(self._tensors)
        self._work = self._tensors = None

    def poll(self, seconds: float, timeout: float) -> bool:
        if not self._tellable:
            self.wait(timeout)
            return True
        try:
            self.wait(seconds)
        except Timeout:
            if not self.done():
                return False  # only this look was too short
            self.wait(timeout)
        return True
