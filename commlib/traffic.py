"""What a transport promises, and what each of its verbs puts on the wire.

Bytes that one rank sends, n bytes per message, W ranks:

    all_reduce   2 (W-1)/W n     ring: every rank forwards its share W-1 times, in two rounds
    all_gather   (W-1) n         n is one rank's contribution; ring and mesh send the same
    all_to_all   n - own split   what stays on this rank costs nothing
    broadcast    n per child     in a binomial tree (gloo) or a chain (`chain=True`, NCCL)

These count payload; TCP headers and acknowledgements add about 1% to what an interface reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch

from .order import Order

# what gloo adds, and NCCL too
SUMMED = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool),
    *(torch.complex128, torch.complex64, torch.complex32),
)


class Timeout(RuntimeError):
    """An exchange took longer than it may."""

    def __init__(self, seconds: float, detail: object = "") -> None:
        super().__init__(f"timed out after {seconds:g} s" + (f": {detail}" if detail else ""))
        self.detail = detail


class Pending(Protocol):
    """An exchange under way. Its buffers may be touched again once `wait` has returned."""

    def wait(self, timeout: float | None = None) -> None:
        """Block until done. Timeout after `timeout` seconds, RuntimeError if it failed."""

    def done(self) -> bool:
        """Whether `wait` would return at once. May say False where the library cannot tell."""

    def poll(self, seconds: float, timeout: float) -> bool:
        """Wait up to `seconds`: True when done, False if it goes on; raises if it failed.

        Where the library cannot wait for less than all (gloo's receives end the connection when
        they time out) this is `wait(timeout)`.
        """


class Post(NamedTuple):
    """A send or a receive that waits to be issued with others; `tag` as the library sees it."""

    is_send: bool
    x: torch.Tensor
    peer: int  # rank in the group
    tag: int


class Receipt(Pending, Protocol):
    """A receive under way."""

    @property
    def source(self) -> int | None:
        """The rank it comes from; None before a receive from any source is done."""


class Transport(Protocol):
    """Moves bytes between the ranks of one group; knows no codecs.

    Ranks are numbered within the group; `ranks[r]` is the global rank of rank r. Tensors are
    contiguous. All ranks issue the same exchanges in the same order. `timeout` is in seconds.
    """

    rank: int
    size: int
    ranks: tuple[int, ...]
    timeout: float
    bytes_sent: int
    device: torch.device
    tagged: bool  # whether sends and receives find each other by tag, not by order alone
    order: Order  # of what is matched by order alone; the group's

    def all_to_all(
        self,
        out: torch.Tensor,
        inp: torch.Tensor,
        *,
        out_splits: Sequence[int] | None = None,
        in_splits: Sequence[int] | None = None,
    ) -> Pending:
        """Part r of `inp` goes to rank r, part r of `out` comes from it; None: equal parts."""

    def all_gather(self, out: torch.Tensor, inp: torch.Tensor) -> Pending:
        """`out` becomes the ranks' `inp`, in rank order."""

    def all_reduce(self, x: torch.Tensor) -> Pending:
        """`x` becomes the sum over ranks, by the library's own collective."""

    def broadcast(self, x: torch.Tensor, src: int) -> Pending:
        """`x` becomes rank `src`'s x."""

    def send(self, x: torch.Tensor, dst: int, tag: int = 0) -> Pending:
        """Send `x` to rank `dst`, which receives with the same tag."""

    def recv(self, x: torch.Tensor, src: int | None, tag: int = 0) -> Receipt:
        """Receive into `x` from rank `src` (None: any), which sends with the same tag."""

    def posting(self) -> AbstractContextManager[None]:
        """A block of several sends and receives: what each does for itself is done once."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def turn(self) -> int:
        """0, 1, 2, ...: how often this was called on the group; alike where ranks call alike."""

    def post(self, key: str, value: str) -> None:
        """Put a text in the group's store, readable by all its ranks."""

    def forget(self, key: str) -> None:
        """Take a text back that this rank posted and nobody reads any more."""

    def read(self, key: str, timeout: float) -> str:
        """The text under `key`; TimeoutError if nobody posted it within `timeout` seconds."""

    def sub(self, ranks: Sequence[int]) -> Transport:
        """The transport of some of these ranks, in their order here; called by exactly those.

        What it sends is counted here too.
        """


class Through:
    """A transport that hands everything on to another: the base of those that change something."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.rank, self.size, self.ranks = inner.rank, inner.size, inner.ranks
        self.timeout, self.device, self.tagged = inner.timeout, inner.device, inner.tagged
        self.order = inner.order
        self.bytes_sent = 0  # counted by `inner`

    def all_to_all(
        self,
        out: torch.Tensor,
        inp: torch.Tensor,
        *,
        out_splits: Sequence[int] | None = None,
        in_splits: Sequence[int] | None = None,
    ) -> Pending:
        return self._inner.all_to_all(out, inp, out_splits=out_splits, in_splits=in_splits)

    def all_gather(self, out: torch.Tensor, inp: torch.Tensor) -> Pending:
        return self._inner.all_gather(out, inp)

    def all_reduce(self, x: torch.Tensor) -> Pending:
        return self._inner.all_reduce(x)

    def broadcast(self, x: torch.Tensor, src: int) -> Pending:
        return self._inner.broadcast(x, src)

    def send(self, x: torch.Tensor, dst: int, tag: int = 0) -> Pending:
        return self._inner.send(x, dst, tag)

    def recv(self, x: torch.Tensor, src: int | None, tag: int = 0) -> Receipt:
        return self._inner.recv(x, src, tag)

    def posting(self) -> AbstractContextManager[None]:
        return self._inner.posting()

    def barrier(self) -> None:
        self._inner.barrier()

    def turn(self) -> int:
        return self._inner.turn()

    def post(self, key: str, value: str) -> None:
        self._inner.post(key, value)

    def forget(self, key: str) -> None:
        self._inner.forget(key)

    def read(self, key: str, timeout: float) -> str:
        return self._inner.read(key, timeout)

    def sub(self, ranks: Sequence[int]) -> Transport:
        return self._inner.sub(ranks)


def all_reduce_bytes(nbytes: int, size: int) -> int:
    """Bytes a rank sends in a ring all-reduce of `nbytes` bytes."""
    return 2 * (size - 1) * nbytes // size


def all_gather_bytes(nbytes: int, size: int) -> int:
    """Bytes a rank sends to gather `nbytes` bytes of every rank."""
    return (size - 1) * nbytes


def all_to_all_bytes(x: torch.Tensor, splits: Sequence[int] | None, rank: int, size: int) -> int:
    """Bytes of `x` that leave this rank."""
    own = x.numel() // size if splits is None else splits[rank]
    return (x.numel() - own) * x.itemsize


def broadcast_bytes(nbytes: int, rank: int, src: int, size: int, *, chain: bool = False) -> int:
    """Bytes a rank sends to broadcast `nbytes` bytes from `src`."""
    place = (rank - src) % size
    if chain:
        return nbytes if place < size - 1 else 0
    bits = range(max(0, (size - 1).bit_length()))
    return nbytes * sum(place < 1 << bit and place + (1 << bit) < size for bit in bits)


def split_by_rank(
    x: torch.Tensor, splits: Sequence[int] | None, size: int
) -> tuple[torch.Tensor, ...]:
    """Flat views of what goes to, or comes from, each rank; None: equal parts."""
    sizes = [x.numel() // size] * size if splits is None else list(splits)
    return torch.split(x.view(-1), sizes)


def check_tensor(verb: str, x: torch.Tensor, device: torch.device) -> None:
    """Refuse a tensor the library would mishandle (ValueError)."""
    if not x.is_contiguous():
        raise ValueError(
            f"{verb}: the tensor of shape {tuple(x.shape)} is not contiguous; pass "
            "x.contiguous(), a copy: what it receives does not get back into x by itself"
        )
    if x.device.type != device.type or (device.index is not None and x.device != device):
        raise ValueError(
            f"{verb}: the tensor is on {x.device}, this group moves {device} tensors; make a "
            f"communicator with device={str(x.device)!r}"
        )


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """Contiguous `x` as flat bytes: what only moves need not be numbers that the library knows."""
    if x.dtype is torch.uint8:
        return x
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)  # a lone value may have any stride


def check_sum(verb: str, x: torch.Tensor) -> None:
    """Refuse numbers that the library would not add (ValueError): it raises amid the exchange."""
    if x.dtype not in SUMMED and not (x.is_cuda and x.is_floating_point()):  # NCCL adds fp8
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in SUMMED)
        raise ValueError(
            f"{verb}: process groups do not add {x.dtype}; allowed: {names}; convert the tensor"
        )


def check_all_to_all(
    out: torch.Tensor,
    inp: torch.Tensor,
    out_splits: Sequence[int] | None,
    in_splits: Sequence[int] | None,
    size: int,
) -> None:
    """Refuse sizes that do not add up: NCCL would move garbage, gloo would abort the process."""
    for name, x, splits in (("out", out, out_splits), ("inp", inp, in_splits)):
        if splits is None:
            if x.numel() % size:
                raise ValueError(
                    f"all_to_all: {name} has {x.numel()} elements, not a multiple of {size} ranks; "
                    "pass split sizes"
                )
        elif len(splits) != size or sum(splits) != x.numel() or min(splits) < 0:
            raise ValueError(
                f"all_to_all: {name} has {x.numel()} elements and splits {list(splits)}; "
                f"give {size} sizes >= 0 that add up to it"
            )
    if out.dtype != inp.dtype:
        raise ValueError(f"all_to_all: out is {out.dtype}, inp is {inp.dtype}; they must be equal")
    if (out_splits is None) != (in_splits is None):
        raise ValueError("all_to_all: give both split sizes or neither")
    if out_splits is None and out.numel() != inp.numel():
        raise ValueError(
            f"all_to_all: out has {out.numel()} elements, inp {inp.numel()}; "
            "with equal parts they must be equal"
        )


def check_all_gather(out: torch.Tensor, inp: torch.Tensor, size: int) -> None:
    """Refuse an output that is not `size` times the input."""
    if out.numel() != size * inp.numel() or out.dtype != inp.dtype:
        raise ValueError(
            f"all_gather: out has {out.numel()} elements of {out.dtype}, inp {inp.numel()} of "
            f"{inp.dtype}; out must hold {size} x inp of the same dtype"
        )


def check_rank(verb: str, rank: int, size: int) -> None:
    """Refuse a rank outside the group."""
    if not 0 <= rank < size:
        raise ValueError(f"{verb}: rank {rank} is not in this group of {size} (0 to {size - 1})")
