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

from commlib.optim.center import HEADER, Center, Kind, Message, packed
from commlib.optim.link import EMPTY, Link

logger = logging.getLogger("commlib")

c10d: Any = distributed_c10d  # much of it is missing from the stubs

TIMEOUT = 600.0
POLL = 0.02  # seconds between looks for new workers
TAG = 0x63656E
ROOM = 1 << 20  # bytes of a body beyond the values': names and schemes
CENTER, WORKER = 0, 1

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

    def send(self, message: Message) -> None:
        """Send a message. RuntimeError: the other end is gone."""
        head = torch.tensor([message.kind, message.number, message.body.numel(), 0])
        self._group.send([head], self._peer, TAG).wait()
        if message.body.numel():
            self._group.send([message.body], self._peer, TAG).wait()

    def recv(self) -> Message:
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

    def ask(self, message: Message) -> Message:
        """Send a message and wait for the answer. RuntimeError: the other end is gone."""
        self.send(message)
        return self.recv()

    tell = send

    def close(self) -> None:
        """Nothing: see `_kept`."""


class Server:
    """Serves a centre to workers over gloo; see above.

        with Server(center, store):
            ...                         # until the run is over

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
        served = 0
        while not self._closed.is_set():
            try:
                there = self._store.add(f"{self.name}/arrivals", 0)
            except RuntimeError as error:
                logger.error("centre %r: its store is gone: %s", self.name, error)
                return
            for number in range(served + 1, there + 1):
                worker = self._store.get(f"{self.name}/arrival/{number}").decode()
                target = self._serve
                threading.Thread(
                    target=target, args=(number, worker), name=f"commlib {worker}", daemon=True
                ).start()
            served = there
            time.sleep(POLL)

    def _serve(self, number: int, worker: str) -> None:
        """Answer one worker until it leaves, dies or comes again."""
        with self._lock:
            self._links[worker] = number
            self._left.discard(worker)
        session = self.center.session(worker)
        left = False
        try:
            # a store's client waits with its lock held, for a worker that may be dead by now
            place = c10d.PrefixStore(f"{self.name}/link/{number}", self._store.clone())
            pipe = Pipe(place, CENTER, self.timeout, self._most)
            while not left:
                message = pipe.recv()
                with session.lock:
                    ended = self._ended(worker, number)
                    reply = session.answer(message) if ended is None else ended
                if reply is not None:
                    pipe.send(reply)
                if ended is not None:
                    return
                left = message.kind is Kind.LEAVE
        except (RuntimeError, ValueError) as error:
            if not self._closed.is_set():
                first = str(error).splitlines()[0]
                logger.warning("centre %r: worker %r is gone: %s", self.name, worker, first)
        finally:
            with self._changed:
                if self._links.get(worker) == number:
                    del self._links[worker]
                    if left:
                        self._left.add(worker)
                self._changed.notify_all()

    def _ended(self, worker: str, number: int) -> Message | None:
        """What a link that is no more is answered."""
        if self._closed.is_set():
            return Message(Kind.ENDED, 0, packed(f"centre {self.name!r} has closed"))
        if self._links.get(worker) != number:
            text = f"centre {self.name!r} has a newer link to a worker of the name {worker!r}"
            return Message(Kind.ENDED, 0, packed(text))
        return None


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
