"""Ranks as threads of one process: the transport of tests and documentation.

Every exchange is a slot that each rank joins in its own order; the last to come moves the bytes for
all. So an exchange that ranks issue in different orders fails here as it would on a network.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .order import Order
from .traffic import (
    Timeout,
    all_gather_bytes,
    all_reduce_bytes,
    all_to_all_bytes,
    broadcast_bytes,
    check_all_gather,
    check_all_to_all,
    check_rank,
    check_tensor,
    split_by_rank,
)

Move = Callable[[list[tuple[torch.Tensor, ...]]], None]


class _World:
    """What the threads share: slots, mailboxes, the store, and the reason it broke."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.slots: dict[object, _Slot] = {}
        self.boxes: dict[object, list[_Letter]] = {}
        self.store: dict[str, str] = {}
        self.broken: str | None = None

    def fail(self, reason: str) -> None:
        """Wake every rank that waits, with `reason`."""
        with self.changed:
            self.broken = self.broken or reason
            self.changed.notify_all()


class _Slot:
    """One exchange: who has joined, with what."""

    def __init__(self, world: _World, what: object, members: tuple[int, ...]) -> None:
        self.world = world
        self.what = what
        self.members = members
        self.joined: dict[int, tuple[torch.Tensor, ...]] = {}
        self.finished = False
        self.error: str | None = None

    def join(self, place: int, what: object, tensors: tuple[torch.Tensor, ...], move: Move) -> None:
        with self.world.changed:
            if what != self.what:
                self.error = (
                    f"rank {self.rank(place)} came with {what}, another rank with {self.what}"
                )
            self.joined[place] = tensors
            if self.error is None and len(self.joined) == len(self.members):
                with torch.no_grad():
                    move([self.joined[r] for r in self.members])
                self.finished = True
            self.world.changed.notify_all()

    def done(self) -> bool:
        return self.finished or self.error is not None

    def rank(self, place: int) -> int | str:
        """Who joins at a place."""
        return place

    def poll(self, seconds: float, timeout: float) -> bool:
        with self.world.changed:
            self.world.changed.wait_for(lambda: self.done() or bool(self.world.broken), seconds)
        if self.done() or self.world.broken:
            self.wait(0.0)
            return True
        return False

    def wait(self, timeout: float | None = None) -> None:
        world = self.world
        with world.changed:
            in_time = world.changed.wait_for(lambda: self.done() or bool(world.broken), timeout)
            if self.finished:
                return
            missing = [self.rank(p) for p in self.members if p not in self.joined]
        if timeout is not None and not in_time:
            raise Timeout(timeout, f"exchange {self.what}: ranks {missing} did not come")
        raise RuntimeError(f"exchange {self.what} failed: {self.error or world.broken}")


class _Letter(_Slot):
    """A send and the receive that meets it: places 0 and 1."""

    def __init__(self, world: _World, what: object, src: int | None, dst: int, place: int) -> None:
        super().__init__(world, what, (0, 1))
        self.source, self.dst, self.place = src, dst, place

    def meets(self, src: int | None, place: int) -> bool:
        """Whether what lies here is the other half of a send from `src`, or of a receive."""
        return self.place != place and (None in (src, self.source) or src == self.source)

    def rank(self, place: int) -> int | str:
        return self.dst if place else "any" if self.source is None else self.source


class ThreadTransport:
    """`commlib.traffic.Transport` between threads; build a world with `ThreadTransport.world`."""

    def __init__(
        self,
        world: _World,
        rank: int,
        ranks: tuple[int, ...],
        timeout: float,
        name: str = "",
        parent: ThreadTransport | None = None,
    ) -> None:
        self.rank = rank
        self.size = len(ranks)
        self.ranks = ranks
        self.timeout = timeout
        self.bytes_sent = 0
        self._parent = parent  # counts what this one sends, too
        self.device = torch.device("cpu")
        self.tagged = True
        self.order = Order()
        self._world = world
        self._name = name
        self._count: dict[object, int] = {}

    @classmethod
    def world(cls, size: int, timeout: float = 30.0) -> list[ThreadTransport]:
        """`size` connected transports, one for each thread. `timeout` in seconds."""
        world, ranks = _World(), tuple(range(size))
        return [cls(world, rank, ranks, timeout) for rank in ranks]

    def all_to_all(
        self,
        out: torch.Tensor,
        inp: torch.Tensor,
        *,
        out_splits: Sequence[int] | None = None,
        in_splits: Sequence[int] | None = None,
    ) -> _Slot:
        self._check("all_to_all", out, inp)
        check_all_to_all(out, inp, out_splits, in_splits, self.size)
        self._add(all_to_all_bytes(inp, in_splits, self.rank, self.size))
        outs, inps = (
            split_by_rank(out, out_splits, self.size),
            split_by_rank(inp, in_splits, self.size),
        )

        def move(rows: list[tuple[torch.Tensor, ...]]) -> None:
            for dst, row in enumerate(rows):
                for src, part in enumerate(row[: self.size]):
                    part.copy_(rows[src][self.size + dst])

        # Unequal parts are each rank's own affair; equal ones must be equal everywhere.
        what = ("all_to_all", inp.dtype, None if in_splits else inp.numel())
        return self._join(what, (*outs, *inps), move)

    def all_gather(self, out: torch.Tensor, inp: torch.Tensor) -> _Slot:
        self._check("all_gather", out, inp)
        check_all_gather(out, inp, self.size)
        self._add(all_gather_bytes(inp.nbytes, self.size))

        def move(rows: list[tuple[torch.Tensor, ...]]) -> None:
            # `inp` may lie inside `out`: read all before writing any
            joined = torch.cat([row[1].reshape(-1) for row in rows])
            for row in rows:
                row[0].view(-1).copy_(joined)

        return self._join(("all_gather", inp.dtype, inp.numel()), (out, inp), move)

    def all_reduce(self, x: torch.Tensor) -> _Slot:
        self._check("all_reduce", x)
        self._add(all_reduce_bytes(x.nbytes, self.size))

        def move(rows: list[tuple[torch.Tensor, ...]]) -> None:
            total = rows[0][0].clone()
            for row in rows[1:]:
                total += row[0]
            for row in rows:
                row[0].copy_(total)

        return self._join(("all_reduce", x.dtype, x.numel()), (x,), move)

    def broadcast(self, x: torch.Tensor, src: int) -> _Slot:
        self._check("broadcast", x)
        check_rank("broadcast", src, self.size)
        self._add(broadcast_bytes(x.nbytes, self.rank, src, self.size))

        def move(rows: list[tuple[torch.Tensor, ...]]) -> None:
            for rank, row in enumerate(rows):
                if rank != src:
                    row[0].copy_(rows[src][0])

        return self._join(("broadcast", x.dtype, x.numel(), src), (x,), move)

    def send(self, x: torch.Tensor, dst: int, tag: int = 0) -> _Letter:
        self._check("send", x)
        check_rank("send", dst, self.size)
        self._add(x.nbytes)
        return self._letter(x, self.rank, dst, tag, 0)

    def recv(self, x: torch.Tensor, src: int | None, tag: int = 0) -> _Letter:
        self._check("recv", x)
        if src is not None:
            check_rank("recv", src, self.size)
        return self._letter(x, src, self.rank, tag, 1)

    def posting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def barrier(self) -> None:
        self._join(("barrier",), (), lambda rows: None).wait(self.timeout)

    def turn(self) -> int:
        return self._next("turn") - 1

    def post(self, key: str, value: str) -> None:
        with self._world.changed:
            self._world.store[self._name + key] = value
            self._world.changed.notify_all()

    def forget(self, key: str) -> None:
        with self._world.changed:
            self._world.store.pop(self._name + key, None)

    def read(self, key: str, timeout: float) -> str:
        store, name = self._world.store, self._name + key
        with self._world.changed:
            if not self._world.changed.wait_for(lambda: name in store, timeout):
                raise TimeoutError(f"nobody posted {key!r} within {timeout} s")
            return store[name]

    def sub(self, ranks: Sequence[int]) -> ThreadTransport:
        for rank in ranks:
            check_rank("sub", rank, self.size)
        members = tuple(sorted(self.ranks[r] for r in ranks))
        if self.ranks[self.rank] not in members:
            raise ValueError(f"sub: rank {self.rank} is not one of {list(ranks)}")
        turn = self._next(("sub", members))
        name = f"{self._name}{members}.{turn}/"
        mine = members.index(self.ranks[self.rank])
        return ThreadTransport(self._world, mine, members, self.timeout, name, self)

    def _add(self, nbytes: int) -> None:
        self.bytes_sent += nbytes
        if self._parent is not None:
            self._parent._add(nbytes)

    def _check(self, verb: str, *tensors: torch.Tensor) -> None:
        for x in tensors:
            check_tensor(verb, x, self.device)

    def _next(self, stream: object) -> int:
        self._count[stream] = self._count.get(stream, 0) + 1
        return self._count[stream]

    def _join(self, what: object, tensors: tuple[torch.Tensor, ...], move: Move) -> _Slot:
        return self._slot("all", tuple(range(self.size)), what, tensors, move)

    def _letter(self, x: torch.Tensor, src: int | None, dst: int, tag: int, place: int) -> _Letter:
        """Meet the first half in the box that fits, in the order they came, or lie there."""

        def move(rows: list[tuple[torch.Tensor, ...]]) -> None:
            rows[1][0].copy_(rows[0][0])

        what = ("send", x.dtype, x.numel())
        with self._world.changed:
            box = self._world.boxes.setdefault((self._name, self.ranks, dst, tag), [])
            letter = next((other for other in box if other.meets(src, place)), None)
            if letter is None:
                letter = _Letter(self._world, what, src, dst, place)
                box.append(letter)
            else:
                box.remove(letter)
                letter.source = src if letter.source is None else letter.source
            letter.join(place, what, (x,), move)
        return letter

    def _slot(
        self,
        stream: object,
        members: tuple[int, ...],
        what: object,
        tensors: tuple[torch.Tensor, ...],
        move: Move,
    ) -> _Slot:
        name = (self._name, self.ranks, stream, self._next(stream))
        with self._world.changed:
            slot = self._world.slots.setdefault(name, _Slot(self._world, what, members))
        slot.join(self.rank, what, tensors, move)
        if slot.done():
            with self._world.changed:
                self._world.slots.pop(name, None)
        return slot


def run_ranks(
    size: int, function: Callable[[ThreadTransport], Any], *, timeout: float = 60.0
) -> list[Any]:
    """Run `function(transport)` on `size` threads; returns the results in rank order.

    The first error of any rank is raised again here, after it has woken the others. RuntimeError
    where ranks are still running after `timeout` seconds.
    """
    transports = ThreadTransport.world(size, timeout)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = function(transports[rank])
        except BaseException as error:
            errors.append(error)
            transports[rank]._world.fail(f"rank {rank} raised {type(error).__name__}: {error}")

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank{rank}", daemon=True)
        for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    stuck = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    if errors:
        raise errors[0]
    if stuck:
        transports[0]._world.fail("run_ranks gave up")
        raise RuntimeError(f"ranks {stuck} did not finish within {timeout} s")
    return results
