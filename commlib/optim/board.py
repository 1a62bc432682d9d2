"""A board in a store: keys that workers who may be gone at any moment write for each other.

Values are texts. What is decided once stays: `decide` gives everybody the first worker's value.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

PAUSE = 0.02
"""Seconds between looks into the store."""


class Board:
    """A c10d store whose answers are waited for, but not for ever.

    Args:
        store: of this worker.
        timeout: seconds that an answer may take.

    Every call raises RuntimeError where the store does not answer.
    """

    def __init__(self, store: Any, timeout: float) -> None:
        self.store, self.timeout = store, timeout
        self._asked: threading.Thread | None = None

    def poll(self, look: Callable[[], T | None], seconds: float) -> T | None:
        """What `look` finds within `seconds`."""
        end = time.monotonic() + seconds
        while (found := look()) is None and time.monotonic() < end:
            time.sleep(PAUSE)
        return found

    def decide(self, key: str, value: str) -> str:
        """`value`, or what somebody else has set before."""
        return bytes(self._ask(lambda: self.store.compare_set(key, "", value))).decode()

    def count(self, key: str, more: int = 0) -> int:
        """A counter, after adding to it."""
        return int(self._ask(lambda: self.store.add(f"count/{key}", more)))

    def has(self, key: str) -> bool:
        """Whether somebody has set it."""
        return bool(self._ask(lambda: self.store.check([key])))

    def get(self, key: str) -> str | None:
        """Its value, where it has one."""
        return bytes(self._ask(lambda: self.store.get(key))).decode() if self.has(key) else None

    def set(self, key: str, value: str) -> None:
        """Whatever it was before."""
        self._ask(lambda: self.store.set(key, value))

    def _ask(self, call: Callable[[], Any]) -> Any:
        """`call` of the store, beside a clock: its client waits for ever for a host that stopped.

        Raises: RuntimeError after `timeout` seconds, and at once while a call has no answer.
        """
        answer: list[Any] = []

        def ask() -> None:
            try:
                answer.append(call())
            except Exception as error:
                answer.append(error)

        if self._asked is not None and self._asked.is_alive():
            raise RuntimeError("Members: the store still does not answer")
        self._asked = threading.Thread(target=ask, name="commlib members", daemon=True)
        self._asked.start()
        self._asked.join(self.timeout)
        if not answer:
            raise RuntimeError(f"Members: the store did not answer within {self.timeout:g} s")
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]
