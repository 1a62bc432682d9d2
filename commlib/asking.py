"""Asking a store beside a clock: its client waits for ever for a host that stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

SLICE = 0.1
"""Seconds of one look whether the answer is there."""


class Asking:
    """Calls of one store, each in a thread of its own. whose: the store, for errors."""

    def __init__(self, whose: str) -> None:
        self._whose = whose
        self._unanswered: threading.Thread | None = None

    def __call__(self, call: Callable[[], Any], seconds: float) -> Any:
        """What `call` returns, or raises.

        Slices are counted and not the clock: a process that was stopped (SIGSTOP, a laptop's lid)
        for longer than `seconds` finds the answer when it goes on.

        Raises: RuntimeError after `seconds`, and at once while that call still has no answer.
        """
        answer: list[Any] = []

        def ask() -> None:
            try:
                answer.append(call())
            except Exception as error:
                answer.append(error)

        if self._unanswered is not None and self._unanswered.is_alive():
            raise RuntimeError(f"{self._whose} still does not answer")
        thread = threading.Thread(target=ask, name="commlib store", daemon=True)
        thread.start()
        left = seconds
        while thread.is_alive() and left > 0:
            thread.join(min(SLICE, left))
            left -= SLICE
        if not answer:
            self._unanswered = thread
            raise RuntimeError(f"{self._whose} did not answer within {seconds:g} s")
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]
