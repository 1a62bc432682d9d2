"""The centre variable: values that workers pull copies of, and push updates to, each when it likes.

    worker                         centre
    Link.pull()    -- pull -->     Q(xc - m) where m is what both ends know of the worker's copy
                   <-- copy --     m += Q(xc - m) at both ends, bit for bit
    Link.push(u)   -- push -->     Q(u), and the version of xc that u was made on
                                   the rule applies Q(u); so does the worker, which gets it back

Copies are told as coded differences, so that what rounding leaves behind is in the next one; the
first is raw. A push has no answer: a worker that dies in the middle of anything leaves the centre
as it was, or with its whole update in it.

`Center` and `Session` know no network: a channel takes messages from a `Link` to its session,
`Local` within a process, `serving` between processes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum, StrEnum
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch

from commlib.optim.coded import Coded, resolved
from commlib.optim.fragments import check_plain
from commlib.optim.rules import Add, Rule
from commlib.scheme import Role, Scheme
from commlib.stamp import crc

logger = logging.getLogger("commlib")

HEADER = 32
"""Bytes before the body of every message: its kind, a number, the length of its body."""


class Kind(IntEnum):
    """What a message is."""

    JOIN = 1  # worker: who it is, what it trains
    WELCOME = 2  # centre: schemes, and the values where the worker has no copy
    REFUSED = 3  # centre: why
    PULL = 4  # worker
    COPY = 5  # centre: the coded difference to the worker's copy
    PUSH = 6  # worker: a coded update
    LEAVE = 7  # worker: no more messages
    ENDED = 8  # centre: no more answers, and why


class Start(StrEnum):
    """What a worker's copy is when it joins."""

    RESUMED = "resumed"  # as it was when both ends last heard of each other
    SAME = "same"  # the parameters that the worker has: it begins as the centre did
    RAW = "raw"  # what comes with the welcome


class Message(NamedTuple):
    """One message; `number` is a version of the centre."""

    kind: Kind
    number: int
    body: torch.Tensor  # flat uint8

    @property
    def nbytes(self) -> int:
        """On the wire."""
        return HEADER + self.body.numel()


class Channel(Protocol):
    """How a worker's messages get to its session, in order."""

    def tell(self, message: Message) -> None:
        """Send a message. RuntimeError: the centre is gone."""

    def hear(self) -> Message:
        """The answer to the oldest message not yet answered. RuntimeError: the centre is gone."""

    def close(self) -> None:
        """End it."""


class Center:
    """The values, and what their workers know of them. Threads may use it at once.

    Args:
        params: named tensors, as `model.named_parameters()`, all of one dtype; copied.
        push: scheme of updates, such as "int4", "rotate|eden2" or (DOWNPOUR, asynchronous SGD)
            "int4+ef"; fp64 travels raw.
        pull: scheme of copies, which contracts and has no feedback, as a copy is told by its
            difference; None: `push`'s codec, rounding to nearest where that was left open.
        rule: what an update does; None: it is added.
        seed: of the random streams.

    Raises: ValueError: no parameters, several dtypes or devices other than the CPU, schemes whose
        messages have no fixed size, a pull with feedback or that does not contract.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, torch.Tensor]],
        *,
        push: str | Scheme = "fp32",
        pull: str | Scheme | None = None,
        rule: Rule | None = None,
        seed: int = 0,
    ) -> None:
        named = list(params)
        self.shape = Shape.of(named)
        named_scheme = push if isinstance(push, Scheme) else Scheme.parse(push)
        self.push = resolved(push, Role.GRADIENT)
        self.pull = resolved(named_scheme.stateless() if pull is None else pull, Role.OTHER)
        check_contracts("Center: pull", self.pull, self.shape.sizes)
        self.rule: Rule = Add() if rule is None else rule
        self.seed = seed
        self.values = flat(tensor for _, tensor in named)
        self.version = 0
        """Updates so far."""
        self.delays: Counter[int] = Counter()
        """How many updates were made on values so many updates old."""
        self.lock = threading.RLock()
        self.after: Callable[[int], None] | None = None
        """Called with the version after an update was pushed, by the thread of its worker, which
        holds no lock: it may save the centre."""
        self.bytes_sent = self.bytes_received = 0
        self._sessions: dict[str, Session] = {}
        Session(self, "")  # a codec that cannot serve is refused here, not when a worker comes

    def session(self, worker: str) -> Session:
        """What is known of a worker; made when it is first heard of."""
        with self.lock:
            if worker not in self._sessions:
                self._sessions[worker] = Session(self, worker)
            return self._sessions[worker]

    def forget(self, worker: str) -> None:
        """Drop what is known of a worker, and its link: if it comes again, it gets the values."""
        with self.lock:
            session = self._sessions.pop(worker, None)
        if session is not None:
            session.cut("the centre has forgotten it")

    def shown(self) -> tuple[torch.Tensor, int]:
        """What workers see now, in memory of its own, and its version."""
        with self.lock:
            return self.rule.shown(self.values).clone(), self.version

    def apply(self, update: torch.Tensor, source: int) -> int:
        """Let the rule apply an update made on version `source`; the version after it."""
        with self.lock:
            delay = self.version - source
            self.rule.apply(self.values, update, delay)
            self.version += 1
            self.delays[delay] += 1
            return self.version

    def copy_to(self, params: Iterable[torch.Tensor], values: torch.Tensor | None = None) -> None:
        """Write the values (or others of the same shape) to parameters in their order.

        Raises: ValueError: other parameters than the centre's, or in another order; they stay.
        """
        those = list(params)
        check_sizes("Center.copy_to", [one.numel() for one in those], self.shape.sizes)
        with self.lock:
            spread(self.values if values is None else values, those)

    def state_dict(self) -> dict[str, Any]:
        """Values, version, the rule's memory and what workers know: a run goes on bit for bit.

        It may be taken while workers push and pull: it is of a moment between their messages.
        """
        with self.lock:
            sessions = sorted(self._sessions.items())
        with contextlib.ExitStack() as held:
            # sessions before the centre, and in one order, as those who answer take them
            for _, session in sessions:
                held.enter_context(session.lock)
            held.enter_context(self.lock)
            return {
                "values": self.values.clone(),
                "version": self.version,
                "delays": dict(self.delays),
                "rule": self.rule.state_dict(),
                "rule_name": type(self.rule).__name__,
                "sessions": {worker: session.state_dict() for worker, session in sessions},
                "config": self.config(),
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`. Links from before are cut: their workers come again.

        Raises: ValueError: it is of other parameters, schemes, seed or rule; nothing has changed.
        """
        if state.get("config") != self.config():
            raise ValueError(
                f"Center: the state is of {state.get('config')}, allowed: {self.config()}"
            )
        saved, mine = state.get("rule_name"), type(self.rule).__name__
        if saved not in (None, mine):
            raise ValueError(f"Center: the state is of the rule {saved}, allowed: {mine}")
        with self.lock:
            self.rule.load_state_dict(state["rule"])
            self.values.copy_(state["values"])
            self.version = int(state["version"])
            self.delays = Counter({int(d): int(n) for d, n in state["delays"].items()})
            before, self._sessions = self._sessions, {}
            for worker, saved in state["sessions"].items():
                self.session(worker).load_state_dict(saved)
        for session in before.values():  # without the lock: sessions come before the centre
            session.cut("the centre has gone to a saved state")

    def config(self) -> str:
        """What both ends of every link must have alike, as text."""
        about = {"push": str(self.push), "pull": str(self.pull), "seed": self.seed}
        rule = {"additive": self.rule.additive, "takes": self.rule.takes}
        return json.dumps({**self.shape.about(), **about, **rule})


class Session:
    """The centre's end of one worker."""

    def __init__(self, center: Center, worker: str) -> None:
        self.center, self.worker = center, worker
        self.lock = threading.Lock()
        """Held while a message is answered; a worker's messages come one after the other."""
        self._links, self._why = 0, ""
        self._pushed: int | None = None  # the version that the message under way has made
        self._begin()

    def open(self) -> int:
        """A number for a new link of this worker; those before it are answered no more."""
        return self.cut("a newer link bears its name")

    def cut(self, why: str) -> int:
        """Answer no more on links so far; see `open`."""
        with self.lock:
            self._links, self._why = self._links + 1, why
            return self._links

    def _begin(self) -> None:
        center = self.center
        self.copy: torch.Tensor | None = None
        self._pull, self._push = directions(
            self.worker, center.shape, center.push, center.pull, center.seed, at_center=True
        )

    def answer(self, message: Message, link: int | None = None) -> Message | None:
        """Do what a worker's message asks for; the answer, where it has one.

        Args:
            link: it came by, of `open`; None: the only one.

        Raises: RuntimeError: a message that makes no sense, after which the link is to be cut, or
            one by a link older than the newest.
        """
        center = self.center
        with self.lock:
            if link is not None and link != self._links:
                raise RuntimeError(f"a link of worker {self.worker!r} was cut: {self._why}")
            self._pushed = None
            made = self._answer(message)
            pushed = self._pushed
        with center.lock:
            center.bytes_received += message.nbytes
            center.bytes_sent += 0 if made is None else made.nbytes
        if pushed is not None and center.after is not None:
            center.after(pushed)
        return made

    def _answer(self, message: Message) -> Message | None:
        if message.kind is Kind.JOIN:
            who = json.loads(bytes(message.body.numpy()))
            if not isinstance(who, dict):
                raise RuntimeError(f"worker {self.worker!r} joined as {shorten(who)}")
            return self._join(who)
        if message.kind is Kind.LEAVE:
            return None
        if self.copy is None:
            raise RuntimeError(f"worker {self.worker!r} sent {message.kind.name} before JOIN")
        if message.kind is Kind.PULL:
            shown, version = self.center.shown()
            wire, arrived = self._pull.encode(shown - self.copy)
            self.copy += arrived
            return Message(Kind.COPY, version, wire)
        if message.kind is Kind.PUSH:
            update = self._push.decode(message.body)
            self._pushed = self.center.apply(update, message.number)
            if self.center.rule.additive:
                self.copy += update
            return None
        raise RuntimeError(
            f"worker {self.worker!r} sent {message.kind.name}, which is the centre's"
        )

    def _join(self, who: Mapping[str, Any]) -> Message:
        """Take the worker in: it goes on from the copy that both ends have, or gets the values."""
        mine = self.center.shape.about()
        different = [name for name in mine if who.get(name) != mine[name]]
        if different:
            name = different[0]
            text = (
                f"worker {self.worker!r} has {name} {shorten(who.get(name))}, the centre "
                f"{shorten(mine[name])}"
            )
            return Message(Kind.REFUSED, 0, packed(text))
        start, version = Start.RESUMED, self.center.version
        if self.copy is None or who.get("knows") != known(self.copy, self._pull, self._push):
            self._begin()
            self.copy, version = self.center.shown()
            start = Start.SAME if who.get("has") == crc(self.copy) else Start.RAW
        head = packed(json.dumps({"start": start, "config": self.center.config()}))
        raw = self.copy.view(torch.uint8)[: None if start is Start.RAW else 0]
        return Message(Kind.WELCOME, version, torch.cat([packed_length(head), head, raw]))

    def state_dict(self) -> dict[str, Any]:
        """The worker's copy, and where both directions are."""
        copy = {} if self.copy is None else {"copy": self.copy.clone()}
        return {"pull": self._pull.state_dict(), "push": self._push.state_dict(), **copy}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._pull.load_state_dict(state["pull"])
        self._push.load_state_dict(state["push"])
        self.copy = state["copy"].clone() if "copy" in state else None


class Shape(NamedTuple):
    """What a centre and its workers must have alike of the parameters."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, named: Iterable[tuple[str, torch.Tensor]]) -> Shape:
        """Of named tensors. ValueError: none, several dtypes, parts, or not on the CPU."""
        pairs = list(named)
        dtypes = {str(tensor.dtype) for _, tensor in pairs}
        if len(dtypes) != 1:
            found = " and ".join(sorted(dtypes)) or "none"
            raise ValueError(f"parameters of a centre are {found}, allowed: some, of one dtype")
        for name, tensor in pairs:
            check_plain(f"parameter {name!r}", tensor)
            if tensor.device.type != "cpu":
                raise ValueError(
                    f"parameter {name!r} is on {tensor.device}, allowed: the CPU, where centres "
                    "and their links work; give them a copy that is there"
                )
        sizes = tuple(tensor.numel() for _, tensor in pairs)
        return cls(tuple(name for name, _ in pairs), sizes, pairs[0][1].dtype)

    def about(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"names": list(self.names), "sizes": list(self.sizes), "dtype": str(self.dtype)}


def directions(
    worker: str, shape: Shape, push: Scheme, pull: Scheme, seed: int, *, at_center: bool
) -> tuple[Coded, Coded]:
    """Both directions of a worker's link, pull and push, at one of its ends."""
    return (
        Coded(f"{worker}/pull", pull, shape.sizes, shape.dtype, sends=at_center, seed=seed),
        Coded(f"{worker}/push", push, shape.sizes, shape.dtype, sends=not at_center, seed=seed),
    )


def known(copy: torch.Tensor, pull: Coded, push: Coded) -> list[int]:
    """Numbers that two ends of a link have alike exactly where they are in step."""
    return [pull.number, push.number, crc(copy)]


def check_contracts(what: str, scheme: Scheme, sizes: Iterable[int]) -> None:
    """Refuse a codec that cannot carry differences to what was sent before (ValueError)."""
    if scheme != scheme.stateless():
        raise ValueError(
            f"{what} is {str(scheme)!r}, allowed: schemes without feedback, as what rounding "
            f"leaves is in the next difference; use {str(scheme.stateless())!r}"
        )
    gamma = scheme.codec.gamma(max(sizes, default=1))
    if not gamma < 1:
        raise ValueError(
            f"{what} is {str(scheme)!r}, which does not contract: |Q(v) - v|^2 <= {gamma:.3g} "
            "|v|^2, allowed: below 1, or differences grow; use nearest rounding (round=nearest) "
            "or a smaller block"
        )


def flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Tensors back to back, in memory of their own."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def spread(values: torch.Tensor, params: Iterable[torch.Tensor]) -> None:
    """Write flat `values` to the tensors they are of. ValueError: to others, which stay."""
    place, those = 0, list(params)
    if (there := sum(one.numel() for one in those)) != values.numel():
        raise ValueError(f"parameters have {there} values, the centre {values.numel()}")
    with torch.no_grad():
        for one in those:
            one.copy_(values[place : place + one.numel()].view_as(one))
            place += one.numel()


def check_sizes(who: str, mine: Sequence[int], there: Sequence[int]) -> None:
    """Refuse other parameters than a centre's, or in another order (ValueError).

    Orders are told apart by sizes: parameters end where the centre's, or their pieces, end.
    """
    if sum(mine) != sum(there) or not {*accumulate(mine)} <= {*accumulate(there)}:
        raise ValueError(
            f"{who}: got {len(mine)} parameters of {sum(mine)} values, its centre has "
            f"{len(there)} of {sum(there)}, or they are in another order; allowed: the same, in "
            "the same order. Frozen ones may be in both or in neither"
        )


def packed(text: str) -> torch.Tensor:
    """Text as a body."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def packed_length(body: torch.Tensor) -> torch.Tensor:
    """Eight bytes that say how long a body is."""
    return torch.tensor([body.numel()], dtype=torch.int64).view(torch.uint8)


def shorten(value: object, most: int = 80) -> str:
    """A value as text of at most so many characters."""
    text = str(value)
    return text if len(text) <= most else text[: most - 3] + "..."
