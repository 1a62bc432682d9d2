"""Order: messages that are matched by order alone, over all communicators of a group.

Exchanges of a library find one another by the order in which each rank posts them. Every
communicator has a thread of its own: of two on one group now this, now that one would post first,
other ranks would do otherwise, and gradients of one would be added to those of the other. So a
message that has no tag of its own (see lane.py) takes a ticket when it is called, and posts when
all earlier tickets are given back.
"""

from __future__ import annotations

import gc
import threading
from collections import deque
from collections.abc import Callable
from weakref import WeakValueDictionary


class Order:
    """The tickets of one group in this process, and the communicators that live on it."""

    def __init__(self) -> None:
        self._tickets: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._living: WeakValueDictionary[int, object] = WeakValueDictionary()

    def take(self, wake: Callable[[], None]) -> Ticket:
        """A ticket for a message called now. wake(): called when it becomes the first."""
        ticket = Ticket(self, wake)
        with self._changed:
            self._tickets.append(ticket)
        return ticket

    def clear(self, seconds: float) -> bool:
        """Wait up to `seconds` for all tickets to be given back; whether they are."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._tickets, seconds)

    def enter(self, place: int, who: object) -> bool:
        """Take one of the places that communicators have in tags; False where another lives."""
        if place in self._living:
            gc.collect()
        return self._living.setdefault(place, who) is who

    def leave(self, place: int, who: object) -> None:
        if self._living.get(place) is who:
            del self._living[place]

    def first(self, ticket: Ticket) -> bool:
        with self._changed:
            return bool(self._tickets) and self._tickets[0] is ticket

    def give_back(self, ticket: Ticket) -> None:
        with self._changed:
            if ticket not in self._tickets:
                return
            self._tickets.remove(ticket)
            self._changed.notify_all()
            following = self._tickets[0] if self._tickets else None
        if following is not None:  # without the lock: it takes its own
            following.wake()


class Ticket:
    """The turn of one message."""

    __slots__ = ("_order", "wake")

    def __init__(self, order: Order, wake: Callable[[], None]) -> None:
        self._order, self.wake = order, wake

    @property
    def first(self) -> bool:
        """Whether it is the message's turn."""
        return self._order.first(self)

    def give_back(self) -> None:
        """The message posts no more; once is enough."""
        self._order.give_back(self)
