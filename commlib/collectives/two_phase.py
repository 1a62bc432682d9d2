"""Two-phase all-reduce: compressed reduce-scatter, then compressed all-gather.

    1  rank r codes its W chunks into one wire          | c0 | c1 | .. |   W payloads
       all-to-all: the owner of chunk j gets W payloads of it
    2  the owner decodes them, sums in fp32 in rank order, times factor, codes the sum
       all-gather: everybody gets the owners' W payloads and decodes them, the owner too

Two quantizations whatever W is, and the same bits on every rank. Bytes a rank sends, with payloads
of p and q bytes in the two exchanges: (W-1) p + (W-1) q. Payloads whose size depends on the data go
the same way by `variable`.
"""

from __future__ import annotations

from collections.abc import Generator

import torch

from commlib_kernels.layout import Layout

from ..feedback import Compressor, Key
from ..scheme import Scheme
from ..topology import Topology
from ..traffic import Pending, Transport
from . import variable
from .base import (
    Exchange,
    Step,
    Steps,
    begin,
    encode_parts,
    fixed_sizes,
    message,
    parts,
    reduced_key,
    runs,
    scale_,
    scheme_wires,
    span,
    sum_up,
    together,
)
from .pool import Pool


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
    """Replace flat `x` by `factor` times the sum over ranks, on all ranks alike.

    layout: of x (any `ranks`). hold: segments that this rank has nothing of: its residual stays as
    it is, and as an owner its sum's where that is zero. back: codes the second half; None is
    `compressor`. With one rank x is only multiplied.
    """
    if transport.size == 1:
        scale_(x, layout, factor)
        return
    codec = compressor.codec
    second = back or compressor
    if not (codec.fixed_size and second.codec.fixed_size):
        how = (transport, compressor, key, layout, pool)
        yield from variable.all_reduce(x, *how, factor=factor, hold=hold, back=back, slices=slices)
        return
    layout = message(layout, codec, transport.size, back.codec if back else None)
    begin(compressor, key, back)
    owner = reduced_key(key)
    layouts = parts(codec, layout, slices if second.codec.sliceable else 1)
    wires = [pool.take(codec.nbytes(part)) for part in layouts]
    done = yield from encode_parts(compressor, key, x, wires, layouts, hold)

    shares = []
    for number, part in enumerate(layouts):
        if number >= done:
            with span("encode"):
                compressor.compress(key, x, wires[number], part, hold=hold)
        shares.append(scatter(transport, wires[number], pool))
    sums = yield from gather_sums(
        shares, transport, compressor, key, layouts, pool, factor=factor, hold=hold, back=back
    )
    yield Step.ISSUED

    for part, (pending, gathered, mine) in zip(layouts, sums, strict=True):
        yield pending
        with span("decode"):
            second.decompress(owner, gathered, x, part)
        pool.give(gathered, mine)


def scatter(transport: Transport, wire: torch.Tensor, pool: Pool) -> Exchange:
    """Every payload of a wire to its owner."""
    got = pool.take(wire.numel())
    with span("exchange"):
        return Exchange(transport.all_to_all(got, wire), got, wire)


def gather_sums(
    shares: list[Exchange],
    transport: Transport,
    compressor: Compressor,
    key: Key,
    layouts: list[Layout],
    pool: Pool,
    *,
    factor: float,
    hold: tuple[int, ...],
    back: Compressor | None = None,
) -> Generator[Step | Pending, bool, list[Exchange]]:
    """As the shares of a slice arrive, sum them, code the sum, and gather everybody's."""
    owner, rank = reduced_key(key), transport.rank
    second, sums = back or compressor, []
    for part, (pending, got, wire) in zip(layouts, shares, strict=True):
        yield pending
        chunk = part.only(rank)
        mine = pool.take(second.codec.nbytes(chunk))
        sum_up(compressor, back, owner, got, mine, chunk, pool, factor=factor, hold=hold)
        pool.give(got, wire)
        gathered = pool.take(mine.numel() * transport.size)
        with span("exchange"):
            sums.append(Exchange(transport.all_gather(gathered, mine), gathered, mine))
    return sums


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
    """`out` becomes `factor` times the sum over ranks of their row r of `x`, on rank r.

    x: W rows like `out`, flat. layout: of one row (segments that lie apart need its `pitch`). One
    quantization: the sum stays dense.
    """
    places = runs(layout)
    if transport.size == 1:
        for place in places:
            torch.mul(x[place], factor, out=out[place])
        return
    codec, rank = compressor.codec, transport.rank
    if not codec.fixed_size:
        how = (transport, compressor, key, layout, pool)
        yield from variable.reduce_scatter(out, x, *how, factor=factor, slices=slices)
        return
    layout = message(layout, codec, transport.size, stacked=True)
    begin(compressor, key)
    layouts = parts(codec, layout, slices)
    wires = [pool.take(codec.nbytes(part)) for part in layouts]
    done = yield from encode_parts(compressor, key, x, wires, layouts, ())
    got, exchanges = [], []
    for number, part in enumerate(layouts):
        if number >= done:
            with span("encode"):
                compressor.compress(key, x, wires[number], part)
        got.append(pool.take(wires[number].numel()))
        with span("exchange"):
            exchanges.append(transport.all_to_all(got[-1], wires[number]))
    yield Step.ISSUED
    with together(out, layout, pool) as dense:
        for number, part in enumerate(layouts):
            yield exchanges[number]
            share, mine = got[number], part.only(rank)
            with span("reduce"):
                compressor.reduce(reduced_key(key), share, dense, mine, factor=factor)
            pool.give(share, wires[number])


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
    """`out` becomes the ranks' `x`, in rank order, the same bits on all ranks; or `add` to it.

    x may lie inside `out`. layout: of x (segments that lie apart: with a row of `out` as `pitch`).
    With one rank `out` is a copy.
    """
    if transport.size == 1:
        out.copy_(x)
        return
    codec = compressor.codec
    if not codec.fixed_size:
        how = (transport, compressor, key, layout, pool)
        yield from variable.all_gather(out, x, *how, slices=slices, add=add)
        return
    one = message(layout, codec, 1)
    rows = message(layout, codec, transport.size, stacked=True)
    compressor.advance(key)
    # slices by the bytes of all rows: what the exchange moves
    count = len(parts(codec, rows, slices))
    layouts = parts(codec, one, count)
    wires = [pool.take(codec.nbytes(part)) for part in layouts]
    done = yield from encode_parts(compressor, key, x, wires, layouts, ())
    gathered, gathers = [], []
    for number, part in enumerate(layouts):
        if number >= done:
            with span("encode"):
                compressor.compress(key, x, wires[number], part)
        gathered.append(pool.take(wires[number].numel() * transport.size))
        with span("exchange"):
            gathers.append(transport.all_gather(gathered[-1], wires[number]))
    yield Step.ISSUED
    for number, part in enumerate(parts(codec, rows, count)):
        yield gathers[number]
        with span("decode"):
            compressor.decompress(key, gathered[number], out, part, add=add)
        pool.give(gathered[number], wires[number])


def wire_bytes(layout: Layout, scheme: Scheme, topology: Topology) -> int:
    """Bytes a rank sends in `all_reduce`: (W-1) (p + q).

    What it probably sends where sizes depend on the data: that of normal numbers, and the sizes.
    """
    sizes = 0 if fixed_sizes(scheme) else 2 * variable.WORD
    return (topology.size - 1) * (sum(scheme_wires(layout, scheme, topology)) + sizes)


def seconds(layout: Layout, scheme: Scheme, topology: Topology) -> float:
    """Two exchanges of W-1 payloads each, one latency per exchange."""
    if topology.size == 1:
        return 0.0
    messages = 2 if fixed_sizes(scheme) else 4
    return topology.link.seconds(wire_bytes(layout, scheme, topology), messages=messages)
