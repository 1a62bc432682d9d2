"""Point to point: a tensor from one rank to another, coded and sent in slices.

    sender      code 0 | code 1 | code 2
    wire               | 0 .......| 1 .......| 2 .......|
    receiver    posts 0, 1, 2     | decode 0 | decode 1 | decode 2

The sender codes on the calling thread and issues each slice as soon as it is coded. The receiver
posts its buffers at once and decodes in `wait`: any number of receives may be outstanding and none
keeps a send from leaving. Every slice ends in a stamp, checked before the slice is decoded. Nothing
is remembered from one message to the next: no feedback.

Both ends know the cut and its sizes from (elements, dtype, codec). Gloo matches sends and receives
by tag; a receive that meets fewer bytes than it has room for keeps its old bytes behind them, one
that meets more ends the process. So the sizes are in the tag, and other sizes do not meet (but for
one chance in 2^27):

    tag, 31 bits: | 11 | 0 | later slice, 1 bit | user's tag xor hash of the sizes, 27 bits |

Later slices have the number of their message in it too: a receive from any source learns from the
first slice which message of whom it is, and then posts the others.
"""

from __future__ import annotations

import re
import threading
import time
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from commlib_kernels.layout import Layout

from .. import stamp
from ..codecs.base import Codec
from ..feedback import Compressor
from ..scheme import check_fixed_size
from ..traffic import Pending, Timeout, Transport, check_rank, check_tensor
from .base import SLICE_BYTES, message, parts, span
from .pool import Pool

MAX_SLICES = 8
FIRST_TAG = 3 << 29  # lane.py's end at 2 << 29
LATER = 1 << 27
NUMBERED = 1 << 16  # tags below have counts of their own; who names every message anew has none
SPREAD = 0x9E3779B1  # odd, so that equal products modulo LATER mean equal numbers
PLACE = re.compile(r"^\[[^]]*\.cc:\d+\] ")  # where in its sources gloo raised

Record = Callable[[str, int, int, float], None]
"""record(codec, raw bytes, wire bytes, seconds) of a send that is done."""


class Cut(NamedTuple):
    """How a tensor travels; alike at both ends."""

    layouts: tuple[Layout, ...]
    sizes: tuple[int, ...]  # bytes of each slice on the wire, its stamp included
    about: str  # for errors, and for the digest
    codec: str
    mark: int  # of the sizes, for the tag


@lru_cache(maxsize=4096)
def slices(numel: int, dtype: torch.dtype, codec: Codec) -> Cut:
    """How `numel` elements are cut: about SLICE_BYTES of wire or more a slice, MAX_SLICES of it."""
    check_fixed_size(codec, "a message from one rank to another", "")
    layout = message(Layout((numel,), dtype), codec, 1)
    count = max(1, min(MAX_SLICES, codec.nbytes(layout) // SLICE_BYTES))
    layouts = tuple(parts(codec, layout, count))
    sizes = tuple(codec.nbytes(part) + stamp.BYTES for part in layouts)
    about = f"{numel} {str(dtype).removeprefix('torch.')} values as {codec}"
    return Cut(layouts, sizes, about, str(codec), zlib.crc32(repr(sizes).encode()))


def wire_bytes(numel: int, dtype: torch.dtype, codec: Codec) -> int:
    """Bytes of a message on the wire, stamps included."""
    return sum(slices(numel, dtype, codec).sizes)


def first_tag(cut: Cut, tag: int) -> int:
    """The transport's tag of a message's first slice."""
    return FIRST_TAG | (tag ^ cut.mark) % LATER


def later_tag(cut: Cut, tag: int, number: int) -> int:
    """The transport's tag of the others; they arrive in order."""
    return FIRST_TAG | LATER | (tag ^ cut.mark ^ number * SPREAD) % LATER


class Mail:
    """The point-to-point messages of this rank on one transport; safe to use from threads.

    Messages stay here until they are done, whether the caller keeps them or not: gloo forgets an
    exchange that nobody holds, and the other end would wait for ever.
    """

    def __init__(self, transport: Transport, record: Record | None = None) -> None:
        self.transport, self.record = transport, record
        on_device = transport.device.type == "cuda"
        # Callers have CUDA streams of their own: only the allocator knows who may have a buffer.
        self.pool = Pool(transport.device, lambda: on_device)
        self.lock = threading.RLock()  # of a whole message: a thread must not slip in between
        self._sent: dict[tuple[int, int | None], int] = {}  # messages by (peer, stream)
        self._received: dict[tuple[int, int | None], int] = {}
        self._unordered: set[int] = set()  # tags that are also received from any source
        self._kept: set[_Message] = set()
        self._many = 16  # messages kept before those that are done are looked for

    def check(self, verb: str, x: torch.Tensor, peer: int | None, compressor: Compressor) -> Cut:
        """How a message travels; ValueError where it cannot. Nothing is sent or counted."""
        check_tensor(verb, x, self.transport.device)
        if peer is not None:
            check_rank(verb, peer, self.transport.size)
        elif not self.transport.tagged:
            raise ValueError(f"{verb}: NCCL does not receive from any source; name src")
        return slices(x.numel(), x.dtype, compressor.codec)

    def isend(
        self,
        x: torch.Tensor,
        dst: int,
        compressor: Compressor,
        tag: int = 0,
        via: Transport | None = None,
    ) -> Sending:
        """Send contiguous `x` to rank `dst`. via: what issues, if not the transport."""
        cut = self.check("send", x, dst, compressor)
        with self.lock, torch.no_grad():
            self._settle()
            stream = dst, self._stream(tag)
            number = self._sent.get(stream, 0)
            self._sent[stream] = number + 1
            work = Sending(self, x, cut, dst, tag, number)
            self._kept.add(work)
            work.start(lambda: work.issue(compressor, via or self.transport))
        return work

    def irecv(
        self,
        x: torch.Tensor,
        src: int | None,
        compressor: Compressor,
        tag: int = 0,
        via: Transport | None = None,
    ) -> Receiving:
        """Receive into contiguous `x` from rank `src` (None: any). via: as in `isend`."""
        cut = self.check("recv", x, src, compressor)
        with self.lock, torch.no_grad():
            self._settle()
            number = None
            if src is None:
                self._unordered.add(tag)
            elif tag not in self._unordered and self._stream(tag) is not None:
                stream = src, self._stream(tag)
                number = self._received.get(stream, 0)
                self._received[stream] = number + 1
            work = Receiving(self, x, cut, src, tag, number)
            self._kept.add(work)
            work.start(lambda: work.post(compressor, via or self.transport))
        return work

    @property
    def outstanding(self) -> int:
        """Messages under way, or done without anybody having waited."""
        return len(self._kept)

    def _stream(self, tag: int) -> int | None:
        """Which messages are in one order, of those with a peer; None: not known."""
        if not self.transport.tagged:
            return 0
        return tag if tag < NUMBERED else None

    def let_go(self, work: _Message) -> None:
        """A message is done."""
        self._kept.discard(work)  # without the lock: who sends may wait for this message's

    def _settle(self) -> None:
        """Let go of what nobody waits for: sends, where the library tells that they are done, and
        messages that failed while other slices of theirs were under way."""
        if len(self._kept) < self._many:
            return
        for work in list(self._kept):
            if isinstance(work, Sending):
                work.is_completed()
            if work.spent():
                self.let_go(work)
        self._many = 16 + 2 * len(self._kept)


class _Message:
    """What both ends of a message have."""

    verb = ""

    def __init__(
        self, mail: Mail, x: torch.Tensor, cut: Cut, peer: int | None, tag: int, number: int | None
    ) -> None:
        self.tensor = x
        self._mail, self._cut, self._tag, self._number = mail, cut, tag, number
        self._peer = peer
        self._flat = x.detach().view(-1)
        self._wires: list[torch.Tensor] = []
        self._pending: list[Pending] = []
        self._lock = threading.RLock()
        self._done = 0  # slices
        self._error: RuntimeError | None = None

    @property
    def source(self) -> int | None:
        """The rank it comes from, of a receive; None before one from any source has met it."""
        return None

    def start(self, issue: Callable[[], None]) -> None:
        """Issue it. RuntimeError where the other rank is gone already."""
        try:
            issue()
        except RuntimeError as error:
            self._fail(error)
            assert self._error is not None
            raise self._error from error

    def is_completed(self) -> bool:
        """Whether it is done, well or not. May say False where the library cannot tell."""
        if not self._lock.acquire(blocking=False):
            return False  # another thread waits for it
        try:
            while not self._over() and self._pending[self._done].done():
                try:
                    self._step(None)
                except RuntimeError as error:
                    self._fail(error)
            return self._over()
        finally:
            self._lock.release()

    def exception(self) -> RuntimeError | None:
        """What went wrong, once completed."""
        return self._error

    def wait(self, timeout: float | None = None) -> None:
        """Block until done; on CUDA the current stream waits, and not the host.

        Raises: RuntimeError after `timeout` seconds (None: the group's own), where the other rank
        is gone, and where it sent another message.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            while not self._over():
                try:
                    self._step(None if end is None else max(1e-3, end - time.monotonic()))
                except Timeout as error:  # of this wait: the next may have more luck
                    late = Timeout(timeout or 0.0, error.detail)  # not what was left for a slice
                    raise RuntimeError(self._failure(late)) from error
                except RuntimeError as error:
                    self._fail(error)
            if self._error is not None:
                raise self._error

    def _over(self) -> bool:
        return self._error is not None or self._done == len(self._cut.sizes)

    def _arrived(self, place: int) -> None:
        """The exchange of a slice is done."""

    def _last(self) -> None:
        """The last slice is done."""

    def _step(self, timeout: float | None) -> None:
        """Wait for one slice."""
        place = self._done
        with torch.no_grad():
            self._pending[place].wait(timeout)
            self._arrived(place)
        wire = self._wires[place]
        if wire.is_cuda:  # it may have been another stream's
            wire.record_stream(torch.cuda.current_stream(wire.device))
        self._mail.pool.give(wire)
        self._done += 1
        if self._over():
            self._last()

    def _fail(self, error: RuntimeError) -> None:
        self._error = RuntimeError(self._failure(error))
        self._error.__cause__ = error
        if self.spent():
            self._mail.let_go(self)

    def spent(self) -> bool:
        """Whether it has failed, and no slice after that which failed is under way."""
        return self._error is not None and all(p.done() for p in self._pending[self._done + 1 :])

    def _failure(self, error: BaseException) -> str:
        mine, peer = self._mail.transport.rank, self._peer
        whom = "any rank" if peer is None else f"rank {peer}"
        number = "" if self._number is None else f", message {self._number}"
        return (
            f"{self.verb} {whom} of {self._cut.about} on rank {mine} (tag {self._tag}{number}, "
            f"{sum(self._cut.sizes)} bytes in {len(self._cut.sizes)} slices) failed: "
            f"{PLACE.sub('', str(error))}. "
            "Both ends must name the same number of elements, dtype, scheme and tag, in one order"
        )


class Sending(_Message):
    """A send under way."""

    verb = "send to"

    def issue(self, compressor: Compressor, via: Transport) -> None:
        """Code and issue slice by slice."""
        assert self._peer is not None
        assert self._number is not None
        self._start = time.perf_counter()
        compressor.advance(None)
        for place, (layout, size) in enumerate(
            zip(self._cut.layouts, self._cut.sizes, strict=True)
        ):
            wire = self._mail.pool.take(size)
            with span("encode"):
                compressor.compress(None, self._flat, wire[: -stamp.BYTES], layout)
                stamp.seal(wire, _digest(self._cut, self._tag, place), self._number)
            tag = (
                later_tag(self._cut, self._tag, self._number)
                if place
                else first_tag(self._cut, self._tag)
            )
            self._wires.append(wire)
            with span("exchange"):
                self._pending.append(via.send(wire, self._peer, tag))

    def _last(self) -> None:
        self._mail.let_go(self)
        if self._mail.record is not None:
            seconds, wire = time.perf_counter() - self._start, sum(self._cut.sizes)
            self._mail.record(self._cut.codec, self._flat.nbytes, wire, seconds)


class Receiving(_Message):
    """A receive under way."""

    verb = "recv from"

    @property
    def source(self) -> int | None:
        return self._peer

    def post(self, compressor: Compressor, via: Transport) -> None:
        """Post the buffers of all slices; of an unknown message only the first."""
        self._compressor, self._via = compressor, via
        self._wires = [self._mail.pool.take(size) for size in self._cut.sizes]
        with span("exchange"):
            tag = first_tag(self._cut, self._tag)
            self._first = via.recv(self._wires[0], self._peer, tag)
            self._pending.append(self._first)
            if self._number is not None:
                self._post_others(self._number)

    def _post_others(self, number: int) -> None:
        tag = later_tag(self._cut, self._tag, number)
        for wire in self._wires[1:]:
            self._pending.append(self._via.recv(wire, self._peer, tag))

    def _arrived(self, place: int) -> None:
        wire, count = self._wires[place], len(self._wires)
        what = f"slice {place + 1} of {count}"
        if self._peer is None:
            self._peer = self._first.source
        number = stamp.check(wire, _digest(self._cut, self._tag, place), self._number, what)
        if place == 0 and len(self._pending) < count:
            self._number = number
            self._post_others(number)
        with span("decode"):
            layout = self._cut.layouts[place]
            self._compressor.decompress(None, wire[: -stamp.BYTES], self._flat, layout)

    def _last(self) -> None:
        self._mail.let_go(self)


def _digest(cut: Cut, tag: int, place: int) -> int:
    return stamp.digest(f"{cut.about}, tag {tag}, slice {place}")
