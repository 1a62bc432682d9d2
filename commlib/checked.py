"""COMMLIB_CHECK=1: every message is stamped, and every payload that arrives is checked.

Stamps (stamp.py; the digest is of the message's plan) are exchanged before the payload, so ranks
that are in different messages find out before anything is decoded. This costs one small exchange
per exchange, and a pass over the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .stamp import STAMP, WIRE_VERSION, WORD, crc
from .traffic import Pending, Through, Transport, split_by_rank

FIELDS = ("wire version", "plan digest", "message number")  # the crc32 is of what follows


class Checked(Through):
    """A transport that stamps what goes through it; made for one message.

    watch(pending): blocks until the stamps are there, or raises. names: of the ranks, in errors.
    """

    def __init__(
        self,
        inner: Transport,
        what: str,
        mark: int,
        number: int,
        watch: Callable[[Pending], None],
        names: Sequence[int] | None = None,
    ) -> None:
        super().__init__(inner)
        self._watch = watch
        self._names = range(inner.size) if names is None else names  # ranks in the whole group
        self._head = (WIRE_VERSION, mark & WORD, number & WORD)
        self._what = what

    def all_to_all(
        self,
        out: torch.Tensor,
        inp: torch.Tensor,
        *,
        out_splits: Sequence[int] | None = None,
        in_splits: Sequence[int] | None = None,
    ) -> Pending:
        stamps = b"".join(self._stamp(part) for part in split_by_rank(inp, in_splits, self.size))
        got = self._stamps(stamps)
        pending = self._inner.all_to_all(out, inp, out_splits=out_splits, in_splits=in_splits)
        return _Verified(self, pending, list(split_by_rank(out, out_splits, self.size)), got)

    def all_gather(self, out: torch.Tensor, inp: torch.Tensor) -> Pending:
        got = self._stamps(self._stamp(inp) * self.size)
        pending = self._inner.all_gather(out, inp)
        return _Verified(self, pending, list(out.view(self.size, -1)), got)

    def all_reduce(self, x: torch.Tensor) -> Pending:
        self._stamps(self._stamp(None) * self.size)
        return self._inner.all_reduce(x)

    def broadcast(self, x: torch.Tensor, src: int) -> Pending:
        got = self._stamps(self._stamp(x if self.rank == src else None) * self.size)
        return _Verified(self, self._inner.broadcast(x, src), [x], [got[src]])

    def sub(self, ranks: Sequence[int]) -> Checked:
        names = sorted(self._names[r] for r in ranks)
        _, mark, number = self._head
        return Checked(self._inner.sub(ranks), self._what, mark, number, self._watch, names)

    def _stamp(self, payload: torch.Tensor | None) -> bytes:
        return STAMP.pack(*self._head, 0 if payload is None else crc(payload))

    def _stamps(self, mine: bytes) -> list[int]:
        """Exchange stamps; the payload checksums to expect, by rank."""
        inp = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(self.device)
        out = torch.empty_like(inp)
        self._watch(self._inner.all_to_all(out, inp))
        sums = []
        for rank, row in enumerate(out.cpu().view(self.size, -1)):
            *head, check = STAMP.unpack(bytes(row.tolist()))
            for name, got, expected in zip(FIELDS, head, self._head, strict=True):
                if got != expected:
                    raise RuntimeError(
                        f"COMMLIB_CHECK: {name} of rank {self._names[rank]} is {got:#x}, rank "
                        f"{self._names[self.rank]} in {self._what} expected {expected:#x}"
                    )
            sums.append(check)
        return sums

    def verify(self, pieces: list[torch.Tensor], sums: list[int]) -> None:
        """Compare what arrived with the senders' checksums."""
        for rank, (piece, expected) in enumerate(zip(pieces, sums, strict=True)):
            got = crc(piece)
            if got != expected:
                raise RuntimeError(
                    f"COMMLIB_CHECK: payload of rank {self._names[rank]} arrived at rank "
                    f"{self._names[self.rank]} with crc32 {got:#x}, it was sent with "
                    f"{expected:#x} ({self._what}, message {self._head[2]}, "
                    f"{piece.nbytes} bytes)"
                )


class _Verified:
    """A pending exchange whose payload is checked when it is done."""

    def __init__(
        self, checked: Checked, inner: Pending, pieces: list[torch.Tensor], sums: list[int]
    ) -> None:
        self._checked, self._inner, self._pieces, self._sums = checked, inner, pieces, sums

    def done(self) -> bool:
        return self._inner.done()

    def poll(self, seconds: float, timeout: float) -> bool:
        if not self._inner.poll(seconds, timeout):
            return False
        self.wait(timeout)
        return True

    def wait(self, timeout: float | None = None) -> None:
        self._inner.wait(timeout)
        self._checked.verify(self._pieces, self._sums)
        self._pieces, self._sums = [], []
