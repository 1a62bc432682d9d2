"""Two-phase collectives of codecs whose payloads have any size: sizes travel before payloads.

    all_to_all   8 bytes per rank say how long my payload for it is; then the payloads, back to back
    all_gather   8 bytes say how long mine is; then slots of the largest size of all
    broadcast    8 bytes, then the payload

The sizes of a slice travel while the next slice is coded; its payloads follow behind. A payload is
as long as its header says, and a size that none can have is refused before a buffer is made for it.
What comes out is bit for bit what the same codec with a fixed size would give. Bytes a rank sends,
with payloads of p and q bytes: (W-1) (p + 8) + (W-1) (q + 8).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import torch

from commlib_kernels.layout import SECTION, Layout

from ..codecs.base import Codec
from ..feedback import Compressor, Key
from ..traffic import Pending, Transport
from .base import (
    Exchange,
    Step,
    Steps,
    begin,
    encode_parts,
    message,
    parts,
    reduced_key,
    span,
    sum_up,
    together,
)
from .pool import Pool

WORD = 8
"""Bytes of a size."""


class Announced(NamedTuple):
    """A slice whose sizes are under way: what follows, and what it is coded in."""

    pending: Pending
    theirs: torch.Tensor  # sizes by rank, as bytes
    mine: torch.Tensor
    wire: torch.Tensor  # payloads back to back
    layout: Layout


def all_reduce(
    x: torch.Tensor,
    transport: Transport,
    compressor: Compressor,
    key: Key,
    layout: Layout,
    pool: Pool,
    *,
    factor: float = 1.0,
    hold: tuple[int, ...] = (),
    back: Compressor | None = None,
    slices: int | None = None,
) -> Steps:
    """Arguments as in `two_phase.all_reduce`; of more than one rank."""
    second, rank = back or compressor, transport.rank
    layout = message(layout, compressor.codec, transport.size, back.codec if back else None)
    begin(compressor, key, back)
    owner = reduced_key(key)
    layouts = parts(compressor.codec, layout, slices if second.codec.sliceable else 1)
    shares = yield from _scatter(x, transport, compressor, key, layouts, pool, hold)

    def add_up(number: int) -> Announced:
        share, chunk = shares[number], layouts[number].only(rank)
        mine = pool.take(second.codec.nbytes(chunk))
        used = sum_up(
            compressor, back, owner, share.got, mine, chunk, pool, factor=factor, hold=hold
        )
        pool.give(share.got, share.sent)
        return _announce_own(transport, mine[:used], chunk)

    def send(slot: Announced) -> Exchange:
        return _gather(transport, slot, second.codec, pool)

    arrivals = [share.pending for share in shares]
    sums = yield from _one_behind(len(layouts), add_up, send, arrivals)
    yield Step.ISSUED
    for part, exchange in zip(layouts, sums, strict=True):
        yield exchange.pending
        _decode(second, owner, exchange, x, part, pool)


def reduce_scatter(
    out: torch.Tensor,
    x: torch.Tensor,
    transport: Transport,
    compressor: Compressor,
    key: Key,
    layout: Layout,
    pool: Pool,
    *,
    factor: float = 1.0,
    slices: int | None = None,
) -> Steps:
    """Arguments as in `two_phase.reduce_scatter`; of more than one rank."""
    layout = message(layout, compressor.codec, transport.size, stacked=True)
    begin(compressor, key)
    layouts = parts(compressor.codec, layout, slices)
    shares = yield from _scatter(x, transport, compressor, key, layouts, pool, ())
    yield Step.ISSUED
    with together(out, layout, pool) as dense:
        for part, share in zip(layouts, shares, strict=True):
            yield share.pending
            mine = part.only(transport.rank)
            with span("reduce"):
                compressor.reduce(reduced_key(key), share.got, dense, mine, factor=factor)
            pool.give(share.got, share.sent)


def all_gather(
    out: torch.Tensor,
    x: torch.Tensor,
    transport: Transport,
    compressor: Compressor,
    key: Key,
    layout: Layout,
    pool: Pool,
    *,
    slices: int | None = None,
    add: bool = False,
) -> Steps:
    """Arguments as in `two_phase.all_gather`; of more than one rank."""
    codec = compressor.codec
    one = message(layout, codec, 1)
    rows = message(layout, codec, transport.size, stacked=True)
    compressor.advance(key)
    count = len(parts(codec, rows, slices))
    layouts = parts(codec, one, count)
    wires = [pool.take(codec.nbytes(part)) for part in layouts]
    done = yield from encode_parts(compressor, key, x, wires, layouts, ())

    def code(number: int) -> Announced:
        part, wire = layouts[number], wires[number]
        if number >= done:
            with span("encode"):
                compressor.compress(key, x, wire, part)
        return _announce_own(transport, wire[: sum(codec.sizes(wire, part))], part)

    def send(slot: Announced) -> Exchange:
        return _gather(transport, slot, codec, pool)

    gathers = yield from _one_behind(count, code, send)
    yield Step.ISSUED
    for part, exchange in zip(parts(codec, rows, count), gathers, strict=True):
        yield exchange.pending
        _decode(compressor, key, exchange, out, part, pool, add=add)


def all_to_all(
    out: torch.Tensor,
    x: torch.Tensor,
    transport: Transport,
    compressor: Compressor,
    key: Key,
    pool: Pool,
) -> Steps:
    """Arguments as in `exchange.all_to_all`; of more than one rank."""
    codec, size = compressor.codec, transport.size
    layout = message(Layout((x.numel() // size,), x.dtype), codec, size, stacked=True)
    compressor.advance(key)
    shares = yield from _scatter(x, transport, compressor, key, [layout], pool, ())
    yield Step.ISSUED
    yield shares[0].pending
    with span("decode"):
        compressor.decompress(key, shares[0].got, out, layout)
    pool.give(shares[0].got, shares[0].sent)


def broadcast(
    x: torch.Tensor, src: int, transport: Transport, compressor: Compressor, key: Key, pool: Pool
) -> Steps:
    """Arguments as in `exchange.broadcast`; of more than one rank."""
    codec = compressor.codec
    layouts = parts(codec, message(Layout((x.numel(),), x.dtype), codec, 1))
    compressor.advance(key)
    while not (yield Step.PARKED):
        pass

    def code(number: int) -> Announced:
        part, wire, used = layouts[number], pool.take(codec.nbytes(layouts[number])), 0
        if transport.rank == src:
            with span("encode"):
                used = compressor.compress(key, x, wire, part)
        size = _numbers(used)
        with span("exchange"):
            return Announced(transport.broadcast(size, src), size, size, wire, part)

    def send(slot: Announced) -> Exchange:
        (used,) = _checked((transport.ranks[src],), codec, slot.layout, slot.theirs)
        wire = slot.wire[:used]
        with span("exchange"):
            return Exchange(transport.broadcast(wire, src), wire, wire)

    exchanges = yield from _one_behind(len(layouts), code, send)
    yield Step.ISSUED
    for part, exchange in zip(layouts, exchanges, strict=True):
        yield exchange.pending
        with span("decode"):
            compressor.decompress(key, exchange.got, x, part)
        pool.give(exchange.got)


def _scatter(
    x: torch.Tensor,
    transport: Transport,
    compressor: Compressor,
    key: Key,
    layouts: Sequence[Layout],
    pool: Pool,
    hold: tuple[int, ...],
) -> Generator[Step | Pending, bool, list[Exchange]]:
    """Code all slices; every payload to its owner."""
    codec, rank = compressor.codec, transport.rank
    wires = [pool.take(codec.nbytes(part)) for part in layouts]
    done = yield from encode_parts(compressor, key, x, wires, list(layouts), hold)

    def code(number: int) -> Announced:
        part, wire = layouts[number], wires[number]
        if number >= done:
            with span("encode"):
                compressor.compress(key, x, wire, part, hold=hold)
        sizes = codec.sizes(wire, part)
        mine, theirs = _numbers(*sizes), _numbers(*sizes)
        with span("exchange"):
            pending = transport.all_to_all(theirs, mine)
        return Announced(pending, theirs, mine, wire[: sum(sizes)], part)

    def send(slot: Announced) -> Exchange:
        into = _checked(transport.ranks, codec, slot.layout.only(rank), slot.theirs)
        got = pool.take(sum(into))
        with span("exchange"):
            pending = transport.all_to_all(
                got, slot.wire, out_splits=into, in_splits=_read(slot.mine)
            )
        return Exchange(pending, got, slot.wire)

    return (yield from _one_behind(len(layouts), code, send))


def _one_behind(
    count: int,
    code: Callable[[int], Announced],
    send: Callable[[Announced], Exchange],
    arrivals: Sequence[Pending] = (),
) -> Generator[Step | Pending, bool, list[Exchange]]:
    """Slice k is coded and its sizes leave; then the payloads of slice k - 1, whose sizes came.

    arrivals: of what the slices are coded from, if that comes from others.
    """
    sent: list[Exchange] = []
    before: Announced | None = None
    for number in range(count):
        if arrivals:
            yield arrivals[number]
        now = code(number)
        if before is not None:
            yield before.pending
            sent.append(send(before))
        before = now
    if before is not None:
        yield before.pending
        sent.append(send(before))
    return sent


def _announce_own(transport: Transport, payload: torch.Tensor, layout: Layout) -> Announced:
    """Tell all ranks how long my payload is."""
    mine, theirs = _numbers(payload.numel()), _numbers(*[0] * transport.size)
    with span("exchange"):
        pending = transport.all_gather(theirs, mine)
    return Announced(pending, theirs, mine, payload, layout)


def _gather(transport: Transport, slot: Announced, codec: Codec, pool: Pool) -> Exchange:
    """The ranks' payloads, each in a slot of the largest size."""
    largest = max(_checked(transport.ranks, codec, slot.layout, slot.theirs))
    # what was taken from the pool may be shorter than a slot, where others' payloads are longer
    mine = pool.take(largest)
    mine[: slot.wire.numel()] = slot.wire
    mine[slot.wire.numel() :] = 0
    pool.give(slot.wire)
    got = pool.take(largest * transport.size)
    with span("exchange"):
        return Exchange(transport.all_gather(got, mine), got, mine)


def _decode(
    compressor: Compressor,
    key: Key,
    exchange: Exchange,
    out: torch.Tensor,
    layout: Layout,
    pool: Pool,
    *,
    add: bool = False,
) -> None:
    """Decode the slots of all ranks."""
    with span("decode"):
        for rank, slot in enumerate(exchange.got.view(layout.ranks, -1)):
            one = layout.only(rank)
            own = slot[: sum(compressor.codec.sizes(slot, one))]
            compressor.decompress(key, own, out, one, add=add)
    pool.give(exchange.got, exchange.sent)


def _checked(ranks: Sequence[int], codec: Codec, layout: Layout, sizes: torch.Tensor) -> list[int]:
    """Sizes that came from `ranks`. RuntimeError where a payload of `layout` cannot have one."""
    found = _read(sizes)
    most = codec.nbytes(layout)
    least = most if codec.fixed_size else SECTION  # of a header alone
    for rank, size in zip(ranks, found, strict=True):
        if not least <= size <= most or size % SECTION:
            raise RuntimeError(
                f"rank {rank} announced a payload of {size} bytes under {codec}; it may have "
                f"{least} to {most}, a multiple of {SECTION}: ranks do not send the same message, "
                "or one is broken"
            )
    return found


def _numbers(*values: int) -> torch.Tensor:
    """Numbers of 8 bytes each, as bytes."""
    return torch.tensor(values, dtype=torch.int64).view(torch.uint8)


def _read(numbers: torch.Tensor) -> list[int]:
    found: list[int] = numbers.view(torch.int64).tolist()
    return found
