"""A board in a store: keys that workers who may be gone at any moment write for each other.

Values are texts. What is decided once stays: `decide` gives everybody the first worker's value.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from commlib.asking import Asking

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
        self._asking = Asking("Members: the store")

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
        return self._asking(call, self.timeout)
