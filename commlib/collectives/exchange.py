"""Exchanges without a sum: all_to_all and broadcast, compressed, and what travels raw.

all_to_all   the payload for rank r is coded for itself: (W-1) p bytes sent for W equal parts
broadcast    the source codes once, everybody decodes the same bytes, the source too
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from commlib_kernels.layout import Layout, aligned

from ..feedback import Compressor, Key
from ..traffic import Pending, Transport
from . import variable
from .base import Step, Steps, message, parts, span
from .pool import Pool


def all_to_all(
    out: torch.Tensor,
    x: torch.Tensor,
    transport: Transport,
    compressor: Compressor,
    key: Key,
    pool: Pool,
) -> Steps:
    """Part r of flat `x` goes to rank r, part r of `out` comes from it; W equal parts."""
    if transport.size == 1:
        out.copy_(x)
        return
    codec, size = compressor.codec, transport.size
    if not codec.fixed_size:
        yield from variable.all_to_all(out, x, transport, compressor, key, pool)
        return
    layout = message(Layout((x.numel() // size,), x.dtype), codec, size, stacked=True)
    compressor.advance(key)
    wire, got = pool.take(codec.nbytes(layout)), pool.take(codec.nbytes(layout))
    with span("encode"):
        compressor.compress(key, x, wire, layout)
    while not (yield Step.PARKED):
        pass
    with span("exchange"):
        exchange = transport.all_to_all(got, wire)
    yield Step.ISSUED
    yield exchange
    with span("decode"):
        compressor.decompress(key, got, out, layout)
    pool.give(wire, got)


PARTS = "|parts"
"""The key of parts that have none: how many of them a rank codes is its own affair, and must not
move the stream of random numbers that anonymous messages of all ranks share."""


def all_to_all_split(
    out: torch.Tensor,
    x: torch.Tensor,
    out_splits: Sequence[int],
    in_splits: Sequence[int],
    transport: Transport,
    compressor_for: Callable[[int], Compressor | None],
    pool: Pool,
) -> Steps:
    """Like `all_to_all` with parts of any size.

    compressor_for: of a part's number of elements, which both of its ends know; None sends it raw.
    """
    into, from_ = list(out.split(list(out_splits))), list(x.split(list(in_splits)))

    def prepare(part: torch.Tensor) -> tuple[Compressor | None, Layout, int]:
        compressor = compressor_for(part.numel())
        layout = Layout((part.numel(),), x.dtype)
        if compressor is None:
            return None, layout, aligned(part.nbytes)  # or the next one would start anywhere
        layout = message(layout, compressor.codec, 1)
        return compressor, layout, compressor.codec.nbytes(layout)

    sends, receives = [prepare(part) for part in from_], [prepare(part) for part in into]
    in_bytes, out_bytes = [row[2] for row in sends], [row[2] for row in receives]
    wire, got = pool.take(sum(in_bytes)), pool.take(sum(out_bytes))
    with span("encode"):
        for part, place, (compressor, layout, _) in zip(
            from_, wire.split(in_bytes), sends, strict=True
        ):
            if compressor is None:
                place[: part.nbytes].copy_(part.contiguous().view(torch.uint8))
            else:
                compressor.advance(PARTS)
                compressor.compress(PARTS, part, place, layout)
    while not (yield Step.PARKED):
        pass
    with span("exchange"):
        exchange = transport.all_to_all(got, wire, out_splits=out_bytes, in_splits=in_bytes)
    yield Step.ISSUED
    yield exchange
    with span("decode"):
        for part, place, (compressor, layout, _) in zip(
            into, got.split(out_bytes), receives, strict=True
        ):
            if compressor is None:
                part.view(torch.uint8).copy_(place[: part.nbytes])
            else:
                compressor.decompress(PARTS, place, part, layout)
    pool.give(wire, got)


def broadcast(
    x: torch.Tensor, src: int, transport: Transport, compressor: Compressor, key: Key, pool: Pool
) -> Steps:
    """`x` becomes the decoded x of rank `src`, on `src` too."""
    if transport.size == 1:
        return
    codec = compressor.codec
    if not codec.fixed_size:
        yield from variable.broadcast(x, src, transport, compressor, key, pool)
        return
    layouts = parts(codec, message(Layout((x.numel(),), x.dtype), codec, 1))
    compressor.advance(key)
    wires = [pool.take(codec.nbytes(part)) for part in layouts]
    while not (yield Step.PARKED):
        pass
    exchanges = []
    for wire, part in zip(wires, layouts, strict=True):
        if transport.rank == src:
            with span("encode"):
                compressor.compress(key, x, wire, part)
        with span("exchange"):
            exchanges.append(transport.broadcast(wire, src))
    yield Step.ISSUED
    for wire, part, exchange in zip(wires, layouts, exchanges, strict=True):
        yield exchange
        with span("decode"):
            compressor.decompress(key, wire, x, part)
        pool.give(wire)


def raw(issue: Callable[[], Pending], after: Callable[[], None] | None = None) -> Steps:
    """One exchange of the library itself, in its turn; `after` runs when it is done."""
    while not (yield Step.PARKED):
        pass
    with span("exchange"):
        exchange = issue()
    yield Step.ISSUED
    yield exchange
    if after is not None:
        after()


def raw_reduce_scatter(
    out: torch.Tensor, x: torch.Tensor, transport: Transport, factor: float
) -> Steps:
    """Reduce-scatter of any dtype: all-to-all, then the sum in rank order.

    Half the bytes of gloo's own, which all-reduces everything; for floats see `two_phase`.
    """
    got = torch.empty_like(x)

    def add() -> None:
        rows = got.view(transport.size, -1)
        out.copy_(rows[0])
        for row in rows[1:]:
            out.add_(row)
        if factor != 1.0:
            out.mul_(factor)

    yield from raw(lambda: transport.all_to_all(got, x), add)
