"""Serving: a centre whose workers are other processes, which come, stall, die and come again.

    server                                        worker "w3"
    Server(center, store).start()                 link = connect(store, named_parameters, "w3")

Every link is a gloo group of its own, of two ranks, made when a worker comes: gloo groups do not
grow, and one that lost a rank takes no new one in. At the centre a thread per link waits for its
worker's next message, so whichever comes first is served first, and a worker that stalls keeps
nobody waiting. One that dies breaks its own link, which is dropped; one that comes again under its
name gets a new link, and the old one is cut.

The store (a `TCPStore`) is where they find each other; it is best kept by the centre's process,
without which the workers have nothing to do anyway.
"""

from __future__ import annotations

import datetime
import logging
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.distributed import distributed_c10d

from commlib.optim.center import HEADER, Center, Kind, Message, Session, packed
from commlib.optim.link import EMPTY, Link

logger = logging.getLogger("commlib")

c10d: Any = distributed_c10d  # much of it is missing from the stubs

TIMEOUT = 600.0
POLL = 0.02  # seconds between looks for new workers
TAG = 0x63656E
ROOM = 1 << 20  # bytes of a body beyond the values': names and schemes
CENTER, WORKER = 0, 1
ASKS = (Kind.JOIN, Kind.PULL)  # the messages that have an answer

# A gloo group that is destroyed with a call of a dead peer still in it may wait for the
# interpreter's lock while it is held; so groups stay until the process ends.
_kept: list[object] = []


class Pipe:
    """One end of a link. place: CENTER or WORKER. most: bytes that a body may have.

    Raises: RuntimeError: the other end did not come within `timeout` seconds.
    """

    def __init__(self, store: Any, place: int, timeout: float, most: int) -> None:
        self._peer, self._most = 1 - place, most
        self._group = c10d.ProcessGroupGloo(store, place, 2, datetime.timedelta(seconds=timeout))
        _kept.append(self._group)

    def tell(self, message: Message) -> None:
        """Send a message. RuntimeError: the other end is gone."""
        head = torch.tensor([message.kind, message.number, message.body.numel(), 0])
        self._group.send([head], self._peer, TAG).wait()
        if message.body.numel():
            self._group.send([message.body], self._peer, TAG).wait()

    def hear(self) -> Message:
        """The next message. RuntimeError: the other end is gone, or sends what is no message."""
        head = torch.empty(HEADER // 8, dtype=torch.int64)
        self._group.recv([head], self._peer, TAG).wait()
        kind, number, nbytes, _ = head.tolist()
        if kind not in list(Kind) or not 0 <= nbytes <= self._most:
            raise RuntimeError(f"a header of kind {kind} and {nbytes} bytes, at most {self._most}")
        body = EMPTY
        if nbytes:
            body = torch.empty(nbytes, dtype=torch.uint8)
            self._group.recv([body], self._peer, TAG).wait()
        return Message(Kind(kind), number, body)

    def close(self) -> None:
        """Nothing: see `_kept`."""


class Server:
    """Serves a centre to workers over gloo; see above.

        with Server(center, store) as server:
            server.wait(workers)        # until the run is over

    Wait for the workers before the process ends. A thread that waits for one in gloo cannot be
    woken; where its wait ends while the interpreter shuts down (the worker dies, or a timeout),
    python before 3.14 aborts the process, after all is done.

    Args:
        center: the centre. It may be read, saved and changed meanwhile.
        store: of torch.distributed, where workers look for it.
        name: of the centre in the store, for several in one (shards, nodes of a tree).
        timeout: seconds after which a worker that says nothing is dropped.
    """

    def __init__(
        self, center: Center, store: Any, *, name: str = "center", timeout: float = TIMEOUT
    ) -> None:
        self.center, self.name, self.timeout = center, name, timeout
        self._store = store.clone()
        self._lock = threading.Lock()
        self._links: dict[str, int] = {}  # of the workers that are here
        self._left: set[str] = set()
        self._changed = threading.Condition(self._lock)
        self._closed = threading.Event()
        self._most = center.values.nbytes + ROOM
        self._thread = threading.Thread(target=self._accept, name=f"commlib {name}", daemon=True)

    def start(self) -> Server:
        """Begin to serve; returns itself."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Take no more workers in, and answer none of those that are here."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def workers(self) -> tuple[str, ...]:
        """Those that are linked now."""
        with self._lock:
            return tuple(self._links)

    def wait(self, workers: Iterable[str], timeout: float | None = None) -> bool:
        """Block until all these have left by `Link.close`; False after `timeout` seconds."""
        wanted = set(workers)
        with self._changed:
            return self._changed.wait_for(lambda: wanted <= self._left, timeout)

    def _accept(self) -> None:
        """Take workers in as they come; a thread for each."""
        unnamed: list[int] = []  # have arrived, and have not said who they are
        try:
            seen = self._store.add(f"{self.name}/taken", 0)  # by a server of the name before this
            while not self._closed.is_set():
                there = self._store.add(f"{self.name}/arrivals", 0)
                unnamed += range(seen + 1, there + 1)
                self._store.add(f"{self.name}/taken", there - seen)
                seen = there
                for number in list(unnamed):
                    key = f"{self.name}/arrival/{number}"
                    if self._store.check([key]):  # one that was killed before never does
                        unnamed.remove(number)
                        self._take(number, self._store.get(key).decode())
                time.sleep(POLL)
        except RuntimeError as error:
            logger.error("centre %r: its store is gone: %s", self.name, error)

    def _take(self, number: int, worker: str) -> None:
        """Begin to serve the link `number`. In order of arrival, so that the newest is the last."""
        session = self.center.session(worker)
        with self._lock:
            self._links[worker] = number
            self._left.discard(worker)
        args = (number, session, session.open())
        name = f"commlib {worker}"
        threading.Thread(target=self._serve, args=args, name=name, daemon=True).start()

    def _serve(self, number: int, session: Session, link: int) -> None:
        """Answer one worker until it leaves, dies or comes again."""
        worker, left = session.worker, False
        try:
            # a store's client waits with its lock held, for a worker that may be dead by now
            place = c10d.PrefixStore(f"{self.name}/link/{number}", self._store.clone())
            pipe = Pipe(place, CENTER, self.timeout, self._most)
            ended: Message | None = None
            while not left:
                message = pipe.hear()
                if ended is None:
                    reply = self._answer(session, message, link)
                    if reply is not None and reply.kind is Kind.ENDED:
                        ended = reply
                        self._gone(worker, number, left=False)
                if ended is not None:
                    reply = ended if message.kind in ASKS else None  # it waits for none but these
                if reply is not None:
                    pipe.tell(reply)
                if ended is not None and (reply is not None or message.kind is Kind.LEAVE):
                    return
                left = message.kind is Kind.LEAVE
        except (RuntimeError, ValueError) as error:
            if not self._closed.is_set():
                first = str(error).splitlines()[0]
                logger.warning("centre %r: worker %r is gone: %s", self.name, worker, first)
        finally:
            self._gone(worker, number, left=left)

    def _answer(self, session: Session, message: Message, link: int) -> Message | None:
        """The session's answer; ENDED, with the reason, where there are no more."""
        if self._closed.is_set():
            return Message(Kind.ENDED, 0, packed(f"centre {self.name!r} has closed"))
        try:
            return session.answer(message, link)
        except Exception as error:  # of a rule or of `Center.after` too: the worker waits
            text = f"centre {self.name!r}: {type(error).__name__}: {error}"
            logger.warning("%s", text.splitlines()[0])
            return Message(Kind.ENDED, 0, packed(text))

    def _gone(self, worker: str, number: int, *, left: bool) -> None:
        with self._changed:
            if self._links.get(worker) == number:
                del self._links[worker]
                if left:
                    self._left.add(worker)
            self._changed.notify_all()


def connect(
    store: Any,
    params: Iterable[tuple[str, torch.Tensor]],
    worker: str,
    *,
    name: str = "center",
    timeout: float = TIMEOUT,
    state: Mapping[str, Any] | None = None,
) -> Link:
    """Link this process to the centre `name` of `store`, as `worker`.

    Args:
        params: named tensors on the CPU, as the centre's.
        timeout: seconds an answer may take.
        state: of an earlier link's `state_dict()`, to go on from.

    Raises: RuntimeError: nobody serves; ValueError: the centre has other parameters.
    """
    pairs = list(params)
    most = sum(tensor.nbytes for _, tensor in pairs) + ROOM
    store = store.clone()  # another may wait in the caller's with its lock held, for this one too
    number = store.add(f"{name}/arrivals", 1)
    store.set(f"{name}/arrival/{number}", worker)
    pipe = Pipe(c10d.PrefixStore(f"{name}/link/{number}", store), WORKER, timeout, most)
    return Link(pipe, pairs, worker, state)
