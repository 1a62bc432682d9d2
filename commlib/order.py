"""Order: messages that are matched by order alone, over all communicators of a group.

Exchanges of a library find one another by the order in which each rank posts them. Every
communicator has a thread of its own: of two on one group now this, now that one would post first,
other ranks would do otherwise, and gradients of one would be added to those of the other. So a
message that has no tag of its own (see lane.py) takes a ticket when it is called, and posts when
all earlier tickets are given back.

A message that ends before it has posted everything leaves its rank behind the others: what came
next would meet what it left out. Then the order is lost, and nobody on the group posts by it again.
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
        self._lost = ""  # by which message
        self._changed = threading.Condition()
        self._living: WeakValueDictionary[int, object] = WeakValueDictionary()

    def take(self, what: str, wake: Callable[[], None]) -> Ticket:
        """A ticket for message `what`, called now. wake(): called when it may be the first.

        Raises: RuntimeError: the order is lost.
        """
        ticket = Ticket(self, what, wake)
        with self._changed:
            self.check()
            self._tickets.append(ticket)
        return ticket

    def check(self) -> None:
        """RuntimeError where the order is lost."""
        if self._lost:
            raise RuntimeError(
                f"{self._lost} ended before it was all sent, so that ranks of this group may "
                "be one exchange apart: make a new process group"
            )

    def first(self, ticket: Ticket) -> bool:
        """Whether it is the turn of `ticket`; RuntimeError where the order is lost."""
        with self._changed:
            self.check()
            return bool(self._tickets) and self._tickets[0] is ticket

    def wait(self, ticket: Ticket, seconds: float) -> bool:
        """Like `first`, but waits for up to `seconds`."""
        with self._changed:
            self._changed.wait_for(lambda: self._lost or self._tickets[0] is ticket, seconds)
            return self.first(ticket)

    def give_back(self, ticket: Ticket, *, lost: bool) -> None:
        with self._changed:
            if ticket not in self._tickets:
                return
            self._tickets.remove(ticket)
            if lost:
                self._lost = self._lost or ticket.what
            self._changed.notify_all()
            waiting = list(self._tickets) if lost else list(self._tickets)[:1]
        for other in waiting:  # without the lock: it takes its own
            other.wake()

    def enter(self, place: int, who: object) -> bool:
        """Take one of the places that communicators have in tags; False where another lives."""
        if place in self._living:
            gc.collect()
        return self._living.setdefault(place, who) is who

    def leave(self, place: int, who: object) -> None:
        if self._living.get(place) is who:
            del self._living[place]


class Ticket:
    """The turn of one message."""

    __slots__ = ("_order", "wake", "what")

    def __init__(self, order: Order, what: str, wake: Callable[[], None]) -> None:
        self._order, self.what, self.wake = order, what, wake

    @property
    def first(self) -> bool:
        """Whether it is the message's turn; RuntimeError where the order is lost."""
        return self._order.first(self)

    def wait(self, seconds: float) -> bool:
        """Like `first`, but waits for up to `seconds`."""
        return self._order.wait(self, seconds)

    def give_back(self, *, lost: bool = False) -> None:
        """The message posts no more; once is enough. lost: it should have."""
        self._order.give_back(self, lost=lost)
