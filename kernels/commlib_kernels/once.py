"""What is made once, also where threads come together, as kernels are given its address."""

import threading
from collections.abc import Callable
from functools import cache, wraps
from typing import TypeVar

T = TypeVar("T")


def once(function: Callable[..., T]) -> Callable[..., T]:
    """`functools.cache`, and threads that come together get one object, which stays.

    `cache` lets each make its own and keeps the last one: an address in another would soon be of
    memory that nobody holds.
    """
    lock, kept = threading.RLock(), cache(function)

    @wraps(function)
    def call(*arguments: object) -> T:
        with lock:
            return kept(*arguments)

    return call
