"""Link: a worker's end of a centre. It pulls copies and pushes updates; see `center`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
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
    directions,
    flat,
    known,
    packed,
)
from commlib.scheme import Scheme
from commlib.stamp import crc

EMPTY = torch.empty(0, dtype=torch.uint8)


class Elastic(Protocol):
    """What a method needs of a centre, wherever it lies. Flat tensors, parameters back to back.

    copy: what this worker knows of the centre.
    """

    copy: torch.Tensor

    def pull(self) -> torch.Tensor:
        """Renew the copy, and return it."""

    def push(self, update: torch.Tensor) -> torch.Tensor:
        """Send an update; returns what of it arrives, which is what to apply here."""


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
        self.copy: torch.Tensor
        self.worker = worker
        self.bytes_sent = self.bytes_received = 0
        self.version = 0
        """Of the centre, when the copy was made."""
        self._channel = channel
        mine = flat(tensor for _, tensor in named)
        who: dict[str, Any] = {"worker": worker, **self.shape.about(), "has": crc(mine)}
        if state is not None:
            who["knows"] = self._loaded(state)
        self._welcomed(self._ask(Message(Kind.JOIN, 0, packed(json.dumps(who)))), mine)

    def pull(self) -> torch.Tensor:
        """Renew the copy of the centre, and return it (not to be written to)."""
        reply = self._ask(Message(Kind.PULL, self.version, EMPTY))
        self.copy += self._pull.decode(reply.body)
        self.version = reply.number
        return self.copy

    def push(self, update: torch.Tensor, *, source: int | None = None) -> torch.Tensor:
        """Send flat `update`; returns what of it arrives.

        Args:
            source: version of the centre that it was made on; None: the copy's.
        """
        wire, arrives = self._push.encode(update)
        self._tell(Message(Kind.PUSH, self.version if source is None else source, wire))
        if self._additive:
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
        self._tell(Message(Kind.LEAVE, 0, EMPTY))
        self._channel.close()

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
        self._config, self._additive = text, bool(about["additive"])
        push, pull = Scheme.parse(about["push"]), Scheme.parse(about["pull"])
        self._pull, self._push = directions(
            self.worker, self.shape, push, pull, about["seed"], at_center=False
        )

    def _ask(self, message: Message) -> Message:
        self.bytes_sent += message.nbytes
        reply = self._channel.ask(message)
        self.bytes_received += reply.nbytes
        if reply.kind is Kind.REFUSED:
            self._channel.close()
            raise ValueError(bytes(reply.body.numpy()).decode())
        if reply.kind is Kind.ENDED:
            raise RuntimeError(bytes(reply.body.numpy()).decode())
        return reply

    def _tell(self, message: Message) -> None:
        self.bytes_sent += message.nbytes
        self._channel.tell(message)


class Local:
    """A channel to a centre in this process."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def ask(self, message: Message) -> Message:
        """The session's answer."""
        reply = self._session.answer(message)
        assert reply is not None, message.kind
        return reply

    def tell(self, message: Message) -> None:
        """Hand it over."""
        self._session.answer(message)

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
