"""Hops: how a tensor gets from one stage of a pipeline to the next, in this process or another.

A hop moves tensors one way across one boundary, in order, each with the tick from which it is there
to be used. `Local` hands over, `Sender` and `Receiver` are the two ends over a transport. All count
the same bytes: those of wires, which are a boundary's (`commlib.boundary`) or, without a scheme,

    | the raw tensor, 16-byte aligned | stamp, 16 bytes |

Over a transport the tick follows in 16 bytes more, and the first message is preceded by a header
that tells the tensors' dtype and shape; neither is counted.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from commlib import stamp
from commlib.boundary import Boundary
from commlib.feedback import Compressor
from commlib.modes import Plain, Reuse
from commlib.scheme import Scheme
from commlib.traffic import Pending, Transport
from commlib_kernels.layout import aligned

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TAG = 0x505052  # below the tags of lanes, and hardly a user's own
SIZES = 8  # dimensions that a header can tell
HEADER = 3 + SIZES
CLOCK = 16


class Hop(Protocol):
    """One way across one boundary.

    nbytes: of the wires that went over it so far. ends: those that are here and write wires.
    """

    nbytes: int

    @property
    def ends(self) -> tuple[End, ...]: ...

    def put(self, x: torch.Tensor, ready: int, fresh: bool) -> None:
        """Send `x`, which is there from tick `ready` on.

        fresh: whether what went before is of no use to code it; both ends say the same.
        """

    def take(self, fresh: bool) -> tuple[torch.Tensor, int]:
        """The next tensor, and the tick from which it is there."""

    def begin(self) -> None:
        """Forget what a step that failed has left."""

    def finish(self) -> None:
        """Wait until all that was put has left."""


class End:
    """One end of a hop: the form of its tensors, and their coding.

    key: names the hop, alike at both ends. scheme: None: the tensors travel raw.
    """

    def __init__(self, key: str, scheme: Scheme | None) -> None:
        self.key = key
        self.scheme = scheme
        self.digest = stamp.digest(f"{scheme or 'fp32'} {key}")
        self.shape: tuple[int, ...] | None = None
        self.dtype = torch.float32
        self._boundary: Boundary | None = None
        self._saved: dict[str, Any] | None = None  # of a boundary that the first tensor will make
        self._number = 0

    def state_dict(self) -> dict[str, Any]:
        """How far a coded way is between two steps, the same at both ends.

        It has no batches: what +reuse holds of a step's serves no other, as each begins fresh.
        """
        kept = copy.deepcopy(self._saved)
        if self._boundary is not None:
            kept = self._boundary.state_dict() | {"batches": {}, "checksum": 0}
        return {"scheme": str(self.scheme), "boundary": kept}

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuse what `load_state_dict` cannot go on from (ValueError); nothing has changed."""
        assert self.scheme is not None
        if state.get("scheme") != str(self.scheme):
            raise ValueError(
                f"{self.key}: the state is of scheme {state.get('scheme')!r}, allowed: "
                f"{str(self.scheme)!r}"
            )
        kept = state.get("boundary")
        if kept is not None:  # here, not at the first tensor: others may have been sent by then
            Compressor(self.scheme.codec, Plain()).load_state_dict(kept.get("compressor", {}))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`, at both ends. The first tensor settles the form anew."""
        self._saved = copy.deepcopy(state["boundary"])
        self._boundary, self.shape = None, None

    def fix(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        """Settle the form with the first tensor; ValueError where a later one differs."""
        if self.shape is None:
            if self.scheme is not None:
                self._boundary = Boundary(self.key, self.scheme, shape, dtype, device=device)
                if self._saved is not None:
                    self._boundary.load_state_dict(self._saved)
                    self._saved = None
            self.shape, self.dtype = tuple(shape), dtype
        elif self.shape != tuple(shape) or self.dtype != dtype:
            raise ValueError(
                f"{self.key}: got shape {tuple(shape)} of {dtype}, the first was {self.shape} of "
                f"{self.dtype}; all samples of a pipeline have one form"
            )

    def expect(self, fresh: bool) -> int:
        """Bytes of the next wire; asked once for each."""
        if self._boundary is None:
            return raw_bytes(self._raw())
        assert self.scheme is not None
        self._boundary.begin(fresh=fresh if isinstance(self.scheme.feedback, Reuse) else None)
        return self._boundary.nbytes()

    def write(self, x: torch.Tensor, wire: torch.Tensor) -> None:
        """Code `x` into flat uint8 `wire`."""
        if self._boundary is not None:
            self._boundary.encode(x, wire)
            return
        wire[: self._raw()] = x.contiguous().view(-1).view(torch.uint8)
        stamp.seal(wire, self.digest, self._number)
        self._number += 1

    def read(self, wire: torch.Tensor) -> torch.Tensor:
        """The tensor that `wire` holds; RuntimeError where it is not the next one's."""
        assert self.shape is not None
        out = torch.empty(self.shape, dtype=self.dtype, device=wire.device)
        if self._boundary is not None:
            self._boundary.decode(wire, out)
            return out
        stamp.check(wire, self.digest, self._number, f"message {self._number} of {self.key}")
        self._number += 1
        out.view(-1).view(torch.uint8).copy_(wire[: self._raw()])
        return out

    def _raw(self) -> int:
        assert self.shape is not None
        return math.prod(self.shape) * self.dtype.itemsize


class Local:
    """A hop inside this process; raw tensors are handed over as they are."""

    def __init__(self, key: str, scheme: Scheme | None) -> None:
        self.nbytes = 0
        self._new = (key, scheme)
        self._ends = None if scheme is None else (End(key, scheme), End(key, scheme))
        self._way: deque[tuple[torch.Tensor, int]] = deque()

    @property
    def ends(self) -> tuple[End, ...]:
        return self._ends or ()

    def put(self, x: torch.Tensor, ready: int, fresh: bool) -> None:
        if self._ends is None:
            self.nbytes += raw_bytes(x.nbytes)
        else:
            for end in self._ends:
                end.fix(x.shape, x.dtype, x.device)
            sender = self._ends[0]
            wire = torch.zeros(sender.expect(fresh), dtype=torch.uint8, device=x.device)
            sender.write(x, wire)
            self.nbytes += wire.nbytes
            x = wire
        self._way.append((x, ready))

    def take(self, fresh: bool) -> tuple[torch.Tensor, int]:
        x, ready = self._way.popleft()
        if self._ends is not None:
            receiver = self._ends[1]
            assert receiver.expect(fresh) == x.nbytes
            x = receiver.read(x)
        return x, ready

    def begin(self) -> None:
        if self._way:  # a step has failed: the ends are no longer at one
            self._way.clear()
            key, scheme = self._new
            self._ends = None if scheme is None else (End(key, scheme), End(key, scheme))

    def finish(self) -> None:
        """Nothing waits here."""


class Sender:
    """The end of a hop over a transport that puts."""

    def __init__(self, key: str, scheme: Scheme | None, transport: Transport, peer: int) -> None:
        self.nbytes = 0
        self._end = End(key, scheme)
        self._transport = transport
        self._peer = peer
        self._pending: list[Pending] = []

    @property
    def ends(self) -> tuple[End, ...]:
        return (self._end,)

    def put(self, x: torch.Tensor, ready: int, fresh: bool) -> None:
        if self._end.shape is None:
            header = self._header(x)
            self._end.fix(x.shape, x.dtype, self._transport.device)
            self._send(header)
        self._end.fix(x.shape, x.dtype, self._transport.device)
        message, wire, clock = _message(self._end.expect(fresh), self._transport.device)
        self._end.write(x, wire)
        clock.fill_(ready)
        self.nbytes += wire.nbytes
        self._send(message)

    def take(self, fresh: bool) -> tuple[torch.Tensor, int]:
        raise RuntimeError("this end of the hop sends")

    def begin(self) -> None:
        """What a failed step has left is found by its stamps."""

    def finish(self) -> None:
        pending, self._pending = self._pending, []
        for exchange in pending:
            exchange.wait(self._transport.timeout)

    def _send(self, message: torch.Tensor) -> None:
        self._pending.append(self._transport.send(message, self._peer, TAG))

    def _header(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype not in DTYPES or x.dim() > SIZES:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise ValueError(
                f"{self._end.key}: got shape {tuple(x.shape)} of {x.dtype}; allowed: at most "
                f"{SIZES} dimensions of {allowed}"
            )
        sizes = [*x.shape, *[0] * (SIZES - x.dim())]
        numbers = [self._end.digest, DTYPES.index(x.dtype), x.dim(), *sizes]
        return torch.tensor(numbers, dtype=torch.int64, device=self._transport.device)


class Receiver:
    """The end of a hop over a transport that takes."""

    def __init__(self, key: str, scheme: Scheme | None, transport: Transport, peer: int) -> None:
        self.nbytes = 0
        self._end = End(key, scheme)
        self._transport = transport
        self._peer = peer

    @property
    def ends(self) -> tuple[End, ...]:
        return (self._end,)

    def put(self, x: torch.Tensor, ready: int, fresh: bool) -> None:
        raise RuntimeError("this end of the hop receives")

    def take(self, fresh: bool) -> tuple[torch.Tensor, int]:
        if self._end.shape is None:
            self._read_header()
        message, wire, clock = _message(self._end.expect(fresh), self._transport.device)
        self._receive(message)
        self.nbytes += wire.nbytes
        return self._end.read(wire), int(clock[0].item())

    def begin(self) -> None:
        """What a failed step has left is found by its stamps."""

    def finish(self) -> None:
        """What was taken is here."""

    def _read_header(self) -> None:
        header = torch.empty(HEADER, dtype=torch.int64, device=self._transport.device)
        self._receive(header)
        digest, dtype, dimensions, *sizes = (int(number) for number in header.tolist())
        if digest != self._end.digest:
            raise RuntimeError(
                f"{self._end.key}: rank {self._peer} sends under another scheme than "
                f"{str(self._end.scheme or 'fp32')!r}; give all ranks the same"
            )
        self._end.fix(sizes[:dimensions], DTYPES[dtype], self._transport.device)

    def _receive(self, message: torch.Tensor) -> None:
        self._transport.recv(message, self._peer, TAG).wait(self._transport.timeout)


def raw_bytes(nbytes: int) -> int:
    """Bytes of the wire of a raw tensor of `nbytes`."""
    return aligned(nbytes) + stamp.BYTES


def _message(nbytes: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An empty message, and in it the places of the wire of `nbytes` and of the clock."""
    message = torch.zeros(nbytes + CLOCK, dtype=torch.uint8, device=device)
    return message, message[:nbytes], message[nbytes:].view(torch.int64)
