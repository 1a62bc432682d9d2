"""Lane: the exchanges of one message, found by tag, so that messages may overtake one another.

Collectives of a library are matched by their order, so a message could issue nothing before all
earlier ones have issued everything; with two exchanges per message and a sum between them, the wire
would idle while cores that backward occupies get round to that sum. Sends and receives with a tag
of their own wait for nobody:

    message k     code | exchange       | sum   | exchange | decode
    message k+1          code | exchange ........| sum | exchange | decode

Every receive is posted before the first send: 4 hosts at 1 Gbit/s moved 3 x 2 MiB per rank in 57 ms
so, in 79 ms by gloo's all-to-all, whose every step posts a receive and a send. Small messages have
lanes too: on two hosts with a core each an all-reduce of 4 KiB took 3.1 ms by gloo's all-to-all, on
a thread of gloo's own, and 1.1 ms so (see aside.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import copy

import torch

from .traffic import (
    Pending,
    Through,
    Timeout,
    Transport,
    check_all_gather,
    check_all_to_all,
    split_by_rank,
)

# A tag, 30 bits: | 1 | communicator, 10 | message, 6 | mark, 9 | exchange, 4 |. Messages of equal
# numbers are never in flight together; exchanges of one message come in order. The mark is of the
# plan: ranks in different messages do not meet (but for one chance in 512), and time out.
COMMUNICATORS, MESSAGES, MARKS, EXCHANGES = 1 << 10, 1 << 6, 1 << 9, 1 << 4


class Lane(Through):
    """`inner` for one message: all_to_all and all_gather by tagged sends and receives.

    communicator, message, mark: numbers that all ranks give alike. inner: has `tagged`.
    """

    def __init__(self, inner: Transport, communicator: int, message: int, mark: int = 0) -> None:
        super().__init__(inner)
        place = (COMMUNICATORS + communicator % COMMUNICATORS) * MESSAGES + message % MESSAGES
        self._tag = (place * MARKS + mark % MARKS) * EXCHANGES
        self._count = 0
        self._members = tuple(range(inner.size))

    def sub(self, ranks: Sequence[int]) -> Lane:
        """Some of these ranks, by the same tags: two ranks may be together in one such part only.

        Of its verbs only all_to_all and all_gather are the part's own.
        """
        part = copy(self)
        part._members = tuple(sorted(self._members[r] for r in ranks))
        part.rank = part._members.index(self._members[self.rank])
        part.size = len(part._members)
        part.ranks = tuple(self._inner.ranks[r] for r in part._members)
        part._count = 0
        return part

    def all_to_all(
        self,
        out: torch.Tensor,
        inp: torch.Tensor,
        *,
        out_splits: Sequence[int] | None = None,
        in_splits: Sequence[int] | None = None,
    ) -> Pending:
        check_all_to_all(out, inp, out_splits, in_splits, self.size)
        return self._mesh(
            split_by_rank(out, out_splits, self.size), split_by_rank(inp, in_splits, self.size)
        )

    def all_gather(self, out: torch.Tensor, inp: torch.Tensor) -> Pending:
        check_all_gather(out, inp, self.size)
        into = split_by_rank(out, None, self.size)
        own = into[self.rank]
        if 0 < abs(inp.data_ptr() - own.data_ptr()) < inp.nbytes:
            inp = inp.clone()
        own.copy_(inp.view(-1))  # before others' parts arrive where `inp` may lie
        return self._mesh(into, [own] * self.size)

    def _mesh(self, into: Sequence[torch.Tensor], mine: Sequence[torch.Tensor]) -> Pending:
        """Part r of mine to rank r, and from rank r into place r; what is empty is not sent."""
        tag, at = self._tag + self._count % EXCHANGES, self._members
        self._count += 1
        others = [(self.rank + step) % self.size for step in range(1, self.size)]
        inner = self._inner
        with inner.posting():
            pending: list[Pending] = [
                inner.recv(into[r], at[r], tag) for r in sorted(others) if into[r].numel()
            ]
            pending += [inner.send(mine[r], at[r], tag) for r in others if mine[r].numel()]
        if into[self.rank].data_ptr() != mine[self.rank].data_ptr():
            into[self.rank].copy_(mine[self.rank])
        return Together(pending)


class Together:
    """Exchanges that are done when all of them are."""

    __slots__ = ("_pending",)

    def __init__(self, pending: list[Pending]) -> None:
        self._pending = pending

    def done(self) -> bool:
        return all(pending.done() for pending in self._pending)

    def wait(self, timeout: float | None = None) -> None:
        end = None if timeout is None else time.monotonic() + timeout
        try:
            for pending in self._pending:
                pending.wait(None if end is None else max(1e-3, end - time.monotonic()))
        except Timeout as error:  # what is left when it is one's turn is not the time it had
            raise error if timeout is None else Timeout(timeout, error.detail) from error
        self._pending = []

    def poll(self, seconds: float, timeout: float) -> bool:
        self.wait(timeout)
        return True
