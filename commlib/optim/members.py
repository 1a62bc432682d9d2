"""Members: workers that come and go, and agree at each exchange on who is there.

A store, hosted by a launcher that no worker's death takes down, is where they agree; what is large
goes by a process group of the members, a new one (a *generation*) whenever these change. One
exchange is a *round*, in which the store holds under the round's number

    arrived   who has come. When all members of the last round are there, or `timeout` is over, the
              first to say so closes the round (compare_set: one list, whoever proposes it)
    closed    the members of this round, in order; who joins behind it; the generation
    verdict   "commit", set by the last of them whose collective succeeded, or "abort", by the first
              whose collective did not

After an abort all go to the next round with unchanged inputs; those who are gone do not arrive
there. So either all members of a round have its result, or none has. Who is not on a closed list,
because it came too late, is left out: it queues like a new worker, and gets the model from the
first member after the next exchange. Nothing waits for ever: a round takes at most `timeout` for
those who do not come (twice that and `grace` right after somebody was let in, as the first member
may hand the model to one that died), `timeout` for the collective and `timeout` for the verdict.

PCCL does the same with a master of its own: the world size is read anew after a failure, and the
collective repeated (PCCL, arXiv 2505.14065; INTELLECT-1, arXiv 2412.01152).
"""

from __future__ import annotations

import datetime
import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from commlib.communicator import Communicator
from commlib.feedback import Plain
from commlib.optim.board import PAUSE, Board
from commlib.optim.pprs import check_number
from commlib.policy import Policy
from commlib.scheme import Scheme

logger = logging.getLogger("commlib")
c10d: Any = distributed_c10d  # its stores are missing from the stubs

ATTEMPTS = 8
"""Rounds that one exchange may take."""
COMMIT, ABORT = "commit", "abort"
NOBODY = "nobody"


class LeftOut(Exception):
    """A round was closed without this worker."""


class Round(NamedTuple):
    """A closed round."""

    number: int
    ids: tuple[str, ...]
    guests: tuple[str, ...]  # who joins behind it
    queued: int  # of the queue: how many have been let in so far
    generation: int

    @property
    def everybody(self) -> set[str]:
        """Who is expected in the next round."""
        return {*self.ids, *self.guests}


class Members:
    """The members of a run, as one of its workers sees them.

    ::

        store = torch.distributed.TCPStore(host, port)        # the launcher's has is_master=True
        outer = ElasticDiLoCo(model.named_parameters(), inner, Members(store), period=100)

    Makes and destroys the process's default group (gloo): there must be no other.

    Args:
        store: hosted by a process that outlives the workers.
        policy: of what travels, as of a communicator, without feedback: residuals would belong to
            workers that may be gone.
        name: of the run, where several share a store.
        timeout: seconds that members wait for one that does not come, and a collective may take. A
            worker that is slower than the others by more is left out.
        grace: seconds that they wait after a failure, where all who live come at once.
        seed: of the random streams.

    Raises: ValueError: what cannot be.
    """

    def __init__(
        self,
        store: Any,
        policy: str | Scheme | Policy | dict[str, Any] = "sigma8",
        *,
        name: str = "run",
        timeout: float = 60.0,
        grace: float = 5.0,
        seed: int = 0,
    ) -> None:
        check_number("Members: timeout", timeout, positive=True)
        check_number("Members: grace", grace, positive=True)
        self.policy = Policy.parse(policy)
        for rule in self.policy.rules:
            if rule.scheme.feedback is not None and rule.scheme.feedback != Plain():
                raise ValueError(
                    f"Members: the policy has {str(rule.scheme)!r}, allowed: schemes without "
                    "feedback, as residuals would belong to workers that may be gone; use "
                    f"{str(rule.scheme.stateless())!r}"
                )
        self.timeout, self.grace, self.seed = timeout, grace, seed
        self.id: str | None = None
        self._board = Board(c10d.PrefixStore(f"commlib/members/{name}", store), timeout)
        self._round: Round | None = None  # the last one that was committed
        self._next = 0
        self._open: int | None = None  # the generation that `_communicator` is of
        self._communicator: Communicator | None = None
        self._sent = 0

    @property
    def ids(self) -> tuple[str, ...]:
        """The members of the last exchange, this worker among them; the first lets others in."""
        return () if self._round is None else self._round.ids

    @property
    def bytes_sent(self) -> int:
        """By this worker, to members so far; what goes to the store is not counted."""
        now = self._communicator
        return self._sent + (0 if now is None else now.transport.bytes_sent)

    # Coming and going.

    def enter(self, settings: str, at_least: int, patience: float) -> bool:
        """Whether this worker is the first, whose model is the run's; else call `receive`.

        Args:
            settings: what all workers must have alike, as text.
            at_least: the first waits for so many workers, itself included, before it begins; after
                `patience` seconds it begins with those that are there.

        Raises: ValueError: the run has other settings, or this process a default group already.
            RuntimeError: the store does not answer.
        """
        self._check_alone()
        agreed = self._board.decide("settings", settings)
        if agreed != settings:
            raise ValueError(f"Members: the run has the settings {agreed}, this worker {settings}")
        self._name()
        assert self.id is not None
        if self._board.decide("founder", self.id) != self.id:
            return False
        self._board.poll(lambda: self._board.count("queue") >= at_least - 1 or None, patience)
        guests, queued = self._queue(0)
        if len(guests) + 1 < at_least:
            logger.warning(
                "Members: begins with %d workers instead of %d", len(guests) + 1, at_least
            )
        self._round, self._next = Round(0, (self.id,), guests, queued, 0), 1
        self._board.set("latest", "0")
        self._board.set("0/verdict", COMMIT)
        self._board.set("0/closed", json.dumps(self._round))
        return True

    def receive(self, tensors: Sequence[torch.Tensor], patience: float) -> str:
        """Queue, and wait to be let in: `tensors` become the first member's, whose text it returns.

        Raises: RuntimeError: nobody let this worker in within `patience` seconds.
        """
        end = time.monotonic() + patience
        fresh = self._round is None  # who was left out needs a new number
        while time.monotonic() < end:
            if not fresh:
                self._name()
            fresh = False
            self._queue_up()
            number = int(self._board.get("latest") or 0)
            while (found := self._follow(number, end)) is not None:
                number = found.number + 1
                if self.id not in found.guests or not self._judged(found.number, end):
                    continue  # after an abort it is let in by the next round
                text = self._enter(found, tensors)
                if text is not None:
                    self._round, self._next = found, found.number + 1
                    return text
                break
            self._board.set(f"left/{self.id}", "1")
        raise RuntimeError(
            f"Members: nobody let this worker in within {patience:g} s: all members may be gone"
        )

    def welcome(self, tensors: Sequence[torch.Tensor], text: str) -> None:
        """After an exchange: the first member hands model and text to those who join."""
        if self._round is None or not self._round.guests or self.id != self._round.ids[0]:
            return
        number, guests = self._round.number, self._round.guests

        def here() -> list[str]:
            return [one for one in guests if self._board.has(f"{number}/here/{one}")]

        self._board.poll(lambda: len(here()) == len(guests) or None, self.grace)
        ready = here()
        self._board.set(f"{number}/welcome", json.dumps([ready, text]))
        failed = set(guests) - set(ready)
        if ready and not self._hand(f"{number}/welcome", (str(self.id), *ready), tensors):
            failed |= set(ready)
        for one in failed:
            logger.warning("Members: worker %s could not join and is not waited for", one)
            self._board.set(f"left/{one}", "1")

    def leave(self) -> None:
        """Say that the others need not wait for this worker any more, and close its group."""
        if self.id is not None:
            self._board.set(f"left/{self.id}", "1")
        self._round = None
        self._drop()

    # An exchange.

    def mean(
        self, x: torch.Tensor, keys: tuple[str, ...], sizes: tuple[int, ...], ndims: tuple[int, ...]
    ) -> None:
        """Replace flat `x`, of named segments, by its mean over the members that are there.

        Raises: LeftOut: they went on without this worker; x is unchanged. RuntimeError: it failed
            again and again, or the store does not answer.
        """
        if self._round is None:
            raise RuntimeError("Members: this worker is no member; enter first")
        inputs, error = x.clone(), None
        for attempt in range(ATTEMPTS):
            closed = self._close(self.grace if attempt else self.timeout)
            self._next = closed.number + 1
            if self.id not in closed.ids:
                self._drop()
                raise LeftOut
            error = self._try(closed, lambda c: c.all_reduce_segments(
                x, keys, sizes, ndims, factor="avg"
            ).wait())  # fmt: skip
            if self._vote(closed, good=error is None):
                self._round = closed
                return
            logger.warning(
                "Members: round %d of %d members failed and is repeated: %s",
                closed.number, len(closed.ids), error or "on another member",
            )  # fmt: skip
            x.copy_(inputs)
            self._drop()
        raise RuntimeError(f"Members: an exchange failed {ATTEMPTS} times, at last: {error}")

    def _close(self, patience: float) -> Round:
        """The members of the next round, once it is closed."""
        number, last = self._next, self._round
        assert last is not None
        if last.guests and last.number == number - 1:  # the first member may still be handing over
            patience += self.timeout + self.grace
        self._board.set(
            f"{number}/arrived/{self._board.count(f'{number}/arrived', 1)}", str(self.id)
        )
        begun = time.monotonic()
        while (found := self._closed(number)) is None:
            count = self._board.count(f"{number}/arrived")
            here = {self._board.get(f"{number}/arrived/{n + 1}") for n in range(count)}
            here -= {one for one in here if one is None or self._board.has(f"left/{one}")}
            if self.id not in here:  # who let it in has not seen that it arrived
                self._drop()
                raise LeftOut
            missing = {one for one in last.everybody - here if not self._board.has(f"left/{one}")}
            if not missing or time.monotonic() > begun + patience:
                self._propose(number, last, {one for one in here if one is not None})
            else:
                time.sleep(PAUSE)
        return found

    def _propose(self, number: int, last: Round, here: set[str]) -> None:
        ids = tuple(sorted(here, key=int))
        kept = last.number == number - 1 and last.ids == ids and not last.guests
        guests, queued = self._queue(last.queued)
        closed = Round(number, ids, guests, queued, last.generation if kept else number)
        self._board.decide(f"{number}/closed", json.dumps(closed))
        self._board.set("latest", str(number))  # where to look from on; it may lag behind

    def _try(self, closed: Round, collective: Callable[[Communicator], object]) -> Exception | None:
        """What went wrong with the collective of a round; of one member it is nothing."""
        try:
            if len(closed.ids) > 1:
                if self._open != closed.generation:
                    self._drop()
                    name = f"group/{closed.generation}"
                    self._communicator = self._connect(name, closed.ids, closed.generation)
                    self._open = closed.generation
                assert self._communicator is not None
                collective(self._communicator)
        except (RuntimeError, OSError) as error:
            return error
        return None

    def _vote(self, closed: Round, *, good: bool) -> bool:
        """Whether all members of the round have its result."""
        key = f"{closed.number}/verdict"
        if not good:
            return self._board.decide(key, ABORT) == COMMIT
        if self._board.count(f"{closed.number}/votes", 1) == len(closed.ids):
            return self._board.decide(key, COMMIT) == COMMIT
        found = self._board.poll(lambda: self._board.get(key), self.timeout)
        return (found or self._board.decide(key, ABORT)) == COMMIT

    # Groups.

    def _connect(self, name: str, ids: Sequence[str], seed: int) -> Communicator:
        """A communicator of these workers, on a new process group."""
        self._check_alone()
        dist.init_process_group(
            "gloo",
            store=c10d.PrefixStore(name, self._board.store),
            rank=ids.index(str(self.id)),
            world_size=len(ids),
            timeout=datetime.timedelta(seconds=self.timeout),
        )
        return Communicator(None, self.policy, seed=self.seed + seed, timeout=self.timeout)

    def _check_alone(self) -> None:
        """Before others count on this worker: it could not meet them."""
        if self._communicator is None and dist.is_initialized():
            raise ValueError(
                "Members: this process has a default process group already; elastic runs make "
                "their own, one after the other: join before or without init_process_group, or "
                "destroy it first"
            )

    def _disconnect(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def _drop(self) -> None:
        """Close the group that is open, whatever its state."""
        self._sent, self._open = self.bytes_sent, None
        closing, self._communicator = self._communicator, None
        if closing is not None:
            closing.close()
            self._disconnect()

    def _hand(self, name: str, ids: Sequence[str], tensors: Sequence[torch.Tensor]) -> bool:
        """Broadcast from the first of `ids` to the others, bit for bit; whether it worked."""
        self._drop()
        try:
            self._communicator = self._connect(name, ids, 0)
            for tensor in tensors:
                self._communicator.broadcast(tensor, 0, scheme="fp32").wait()
        except (RuntimeError, OSError) as error:
            logger.warning("Members: handing the model over failed: %s", error)
            return False
        finally:
            self._drop()
        return True

    def _enter(self, closed: Round, tensors: Sequence[torch.Tensor]) -> str | None:
        """As a guest of a round: the first member's tensors, and its text; None where it failed."""
        name = f"{closed.number}/welcome"
        self._board.set(f"{closed.number}/here/{self.id}", "1")
        found = self._board.poll(lambda: self._board.get(name), self.timeout + self.grace)
        ready, text = json.loads(found) if found else ([], "")
        if self.id not in ready:
            return None
        return str(text) if self._hand(name, (closed.ids[0], *ready), tensors) else None

    # The store.

    def _name(self) -> None:
        """A number that no worker has had."""
        self.id = str(self._board.count("ids", 1))

    def _queue_up(self) -> None:
        """Take a place in the queue; another one where somebody looked at it before it was said."""
        while self._board.decide(f"queue/{self._board.count('queue', 1)}", str(self.id)) != self.id:
            pass

    def _queue(self, after: int) -> tuple[tuple[str, ...], int]:
        """Who has queued behind the first `after`, and how many have in all.

        A place that nobody has said to be his may be of one that died: it is given up.
        """
        queued = self._board.count("queue")
        places = (self._board.decide(f"queue/{n}", NOBODY) for n in range(after + 1, queued + 1))
        guests = [one for one in places if one != NOBODY and not self._board.has(f"left/{one}")]
        return tuple(guests), queued

    def _follow(self, number: int, end: float) -> Round | None:
        """Round `number`, once it is closed."""
        return self._board.poll(lambda: self._closed(number), end - time.monotonic())

    def _judged(self, number: int, end: float) -> bool:
        found = self._board.poll(
            lambda: self._board.get(f"{number}/verdict"), end - time.monotonic()
        )
        return found == COMMIT

    def _closed(self, number: int) -> Round | None:
        text = self._board.get(f"{number}/closed")
        if text is None:
            return None
        place, ids, guests, queued, generation = json.loads(text)
        return Round(place, tuple(ids), tuple(guests), queued, generation)
