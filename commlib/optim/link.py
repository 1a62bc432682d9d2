"""Link: a worker's end of a centre. It pulls copies and pushes updates; see `center`."""

from __future__ import annotations

import json
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch

from commlib.optim.center import (
    Center,
    Channel,
    Kind,
    Message,
    Session,
    Shape,
    Start,
    check_sizes,
    directions,
    flat,
    known,
    packed,
)
from commlib.optim.rules import Takes
from commlib.scheme import Scheme
from commlib.stamp import crc

References = tuple[weakref.ref[torch.Tensor], ...]

EMPTY = torch.empty(0, dtype=torch.uint8)


class End(Protocol):
    """What a method needs of a centre, wherever it lies. Flat tensors, parameters back to back.

    copy: what this worker knows of the centre.
    takes: what its rule does with a push.
    additive: whether that is to add it as it comes, so that what leaves a worker is in the centre.
    sizes: elements of each parameter, or of the pieces that it is cut into.
    given: what it was made of, in its order, as far as that is known.
    """

    copy: torch.Tensor
    takes: Takes
    given: References

    @property
    def additive(self) -> bool: ...

    @property
    def sizes(self) -> tuple[int, ...]: ...

    def pull(self) -> torch.Tensor:
        """Renew the copy, and return it."""

    def push(self, update: torch.Tensor) -> torch.Tensor:
        """Send an update; returns what of it arrives, which is what to apply here."""


def check_end(who: str, center: object) -> None:
    """Refuse what is no end of a centre, such as the centre itself (ValueError)."""
    if not isinstance(getattr(center, "copy", None), torch.Tensor) or not hasattr(center, "takes"):
        raise ValueError(
            f"{who}: got a {type(center).__name__} for a link to its centre, allowed: a Link or "
            "Sharded, which local(center, params, worker) makes in this process, connect(...) and "
            "connect_shards(...) to others, or Gathered"
        )


def check_takes(who: str, takes: Takes, center: End) -> None:
    """Refuse a centre whose rule takes something else than `who` pushes (ValueError)."""
    check_end(who, center)
    if center.takes != takes:
        raise ValueError(
            f"{who}: pushes {takes}, and the rule of its centre takes {center.takes}; allowed: "
            "Projected(schedule) for gradients, Add() for updates, of Downpour Momentum(rate) too"
        )


def check_additive(who: str, center: End, why: str) -> None:
    """Refuse a centre whose rule does not add an update as it comes (ValueError)."""
    if not center.additive:
        raise ValueError(
            f"{who}: the rule of its centre does not add updates as they come, {why}; allowed: "
            "a Center with rule=None, Add() or Averaged(Add())"
        )


def references(tensors: Iterable[torch.Tensor]) -> References:
    """Of the tensors that an end was made of, which may be copies that are gone by now."""
    return tuple(weakref.ref(one) for one in tensors)


def check_order(who: str, params: Sequence[torch.Tensor], center: End) -> None:
    """Refuse other parameters than a centre's, or in another order (ValueError).

    Those that the end was made of are known; others are told apart by their sizes.
    """
    check_sizes(who, [one.numel() for one in params], center.sizes)
    given = {id(there()): place for place, there in enumerate(center.given)}
    places = [given[id(one)] for one in params if id(one) in given]
    if places != sorted(places):
        raise ValueError(
            f"{who}: the parameters are in another order than the link's, by which values of one "
            "would be written to another: link the parameters in the order of the optimizer's "
            "groups, and make the centre of them in that order"
        )


class Link:
    """A worker's end of a centre.

    Args:
        channel: to the worker's session.
        params: named tensors, as those of the centre.
        worker: its name. One that comes again under its name is the same worker.
        state: of `state_dict()`, to go on from; the centre gives the values raw where it has
            another memory of this worker.

    Raises: ValueError: the centre has other parameters, or the state is of such.
    """

    def __init__(
        self,
        channel: Channel,
        params: Iterable[tuple[str, torch.Tensor]],
        worker: str,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        named = list(params)
        self.shape = Shape.of(named)
        self.given = references(tensor for _, tensor in named)
        self.copy: torch.Tensor
        self.worker = worker
        self.bytes_sent = self.bytes_received = 0
        self.version = 0
        """Of the centre, when the copy was made."""
        self._channel = channel
        self._ended = ""
        mine = flat(tensor for _, tensor in named)
        who: dict[str, Any] = {"worker": worker, **self.shape.about(), "has": crc(mine)}
        if state is not None:
            who["knows"] = self._loaded(state)
        self._tell(Message(Kind.JOIN, 0, packed(json.dumps(who))))
        self._welcomed(self._hear(), mine)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each parameter."""
        return self.shape.sizes

    def pull(self) -> torch.Tensor:
        """Renew the copy of the centre, and return it (not to be written to)."""
        self.request()
        return self.receive()

    def request(self) -> None:
        """The first half of `pull`, which does not wait for the answer."""
        self._tell(Message(Kind.PULL, self.version, EMPTY))

    def receive(self) -> torch.Tensor:
        """The other half."""
        reply = self._hear()
        self.copy += self._pull.decode(reply.body)
        self.version = reply.number
        return self.copy

    def push(self, update: torch.Tensor, *, source: int | None = None) -> torch.Tensor:
        """Send flat `update`; returns what of it arrives.

        Args:
            source: version of the centre that it was made on; None: the copy's.

        Raises: ValueError: an update of another shape or dtype than the copy; nothing has changed.
        """
        wanted = (self.copy.shape, self.copy.dtype)
        if (update.shape, update.dtype) != wanted:
            raise ValueError(
                f"worker {self.worker!r}: an update of shape {tuple(update.shape)}, "
                f"{update.dtype}, allowed: {tuple(wanted[0])}, {wanted[1]}"
            )
        wire, arrives = self._push.encode(update)
        self._tell(Message(Kind.PUSH, self.version if source is None else source, wire))
        if self.additive:
            self.copy += arrives
        return arrives

    def residual(self) -> torch.Tensor | None:
        """What pushes so far left to be sent; see `Coded.residual`."""
        return self._push.residual()

    def drop(self, elements: torch.Tensor) -> None:
        """Drop the residual of flat bool `elements`."""
        self._push.drop(elements)

    def close(self) -> None:
        """Leave. The centre remembers this worker's copy in case it comes again."""
        if not self._ended:
            self._tell(Message(Kind.LEAVE, 0, EMPTY))
            self._end("it was closed")

    def state_dict(self) -> dict[str, Any]:
        """The copy, and where both directions are."""
        return {
            "copy": self.copy.clone(),
            "version": self.version,
            "config": self._config,
            "pull": self._pull.state_dict(),
            "push": self._push.state_dict(),
        }

    def _loaded(self, state: Mapping[str, Any]) -> list[int]:
        self._configure(state["config"])
        self._pull.load_state_dict(state["pull"])
        self._push.load_state_dict(state["push"])
        self.copy = state["copy"].clone()
        self.version = int(state["version"])
        return known(self.copy, self._pull, self._push)

    def _welcomed(self, reply: Message, mine: torch.Tensor) -> None:
        length = int(reply.body[:8].view(torch.int64))
        head, raw = json.loads(bytes(reply.body[8 : 8 + length].numpy())), reply.body[8 + length :]
        if head["start"] == Start.RESUMED:
            return
        self._configure(head["config"])
        self.copy = raw.clone().view(self.shape.dtype) if raw.numel() else mine
        self.version = reply.number

    def _configure(self, text: str) -> None:
        """Take the schemes from the centre: there is one place where they are chosen."""
        about = json.loads(text)
        if any(about[name] != mine for name, mine in self.shape.about().items()):
            raise ValueError(
                f"worker {self.worker!r}: the state is of parameters {about['names']} of sizes "
                f"{about['sizes']}, allowed: {list(self.shape.names)} of {list(self.shape.sizes)}"
            )
        self._config, self.additive = text, bool(about["additive"])
        self.takes: Takes = about["takes"]
        push, pull = Scheme.parse(about["push"]), Scheme.parse(about["pull"])
        self._pull, self._push = directions(
            self.worker, self.shape, push, pull, about["seed"], at_center=False
        )

    def _tell(self, message: Message) -> None:
        if self._ended:
            raise RuntimeError(f"the link of worker {self.worker!r} has ended: {self._ended}")
        self.bytes_sent += message.nbytes
        self._channel.tell(message)

    def _hear(self) -> Message:
        reply = self._channel.hear()
        self.bytes_received += reply.nbytes
        if reply.kind in (Kind.REFUSED, Kind.ENDED):
            self._end(bytes(reply.body.numpy()).decode())
            raise (ValueError if reply.kind is Kind.REFUSED else RuntimeError)(self._ended)
        return reply

    def _end(self, why: str) -> None:
        self._ended = why
        self._channel.close()


class Local:
    """A channel to a centre in this process."""

    def __init__(self, session: Session) -> None:
        self._session, self._number = session, session.open()
        self._replies: deque[Message] = deque()
        self._failed = ""

    def tell(self, message: Message) -> None:
        """Hand it over. What a rule or `Center.after` raises ends the link, as in `Server`."""
        if self._failed:
            raise RuntimeError(f"the link of worker {self._session.worker!r} {self._failed}")
        try:
            reply = self._session.answer(message, self._number)
        except Exception as error:  # after an update, or before it: the copies may differ now
            self._failed = f"has ended, as a message failed: {type(error).__name__}: {error}"
            raise
        if reply is not None:
            self._replies.append(reply)

    def hear(self) -> Message:
        """The session's answer."""
        return self._replies.popleft()

    def close(self) -> None:
        """Nothing to end."""


def local(
    center: Center,
    params: Iterable[tuple[str, torch.Tensor]],
    worker: str,
    state: Mapping[str, Any] | None = None,
) -> Link:
    """A link to a centre in this process, for workers that are threads or take turns."""
    return Link(Local(center.session(worker)), params, worker, state)
