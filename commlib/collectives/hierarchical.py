"""Hierarchical all-reduce: sums inside every host, then two-phase between hosts.

A node is the ranks of one host. Every parameter is cut into as many chunks as the smallest node has
ranks; in each node every chunk has an owner, and the owners of a chunk are its column.

    1  a node sums its chunks at their owners, in rank order and fp32: sent raw, or coded by `inner`
    2  a column does what `two_phase` does, with residuals under the same names
    3  the owners hand the column's payloads to their node, and everybody decodes the same bytes

Between hosts travel two quantizations, whatever the number of ranks and hosts. Which elements a
rank owns depends on (parameter, nodes, scheme) alone, and so do the residuals, which are of what it
owns: a rank that owns nothing has none. With one rank on every host this is two_phase, bit by bit;
on one host it is the sum in rank order, which nothing quantizes but `inner`.

With N hosts and c bytes of the whole tensor as the codec has it, a host sends the others
2 (N-1)/N c bytes, whatever its ranks; under two_phase every one of its ranks sends that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch

from commlib_kernels.layout import Layout

from ..algorithms import Hierarchical, TwoPhase
from ..codecs import Codec, codec
from ..feedback import Compressor, Key
from ..scheme import Scheme
from ..topology import Ranks, Topology, columns_of
from ..traffic import Transport
from . import two_phase
from .base import (
    Exchange,
    Step,
    Steps,
    begin,
    encode_parts,
    message,
    num_slices,
    reduced_key,
    silent,
    span,
)
from .pool import Pool

Nodes = tuple[Ranks, ...]

# What carries the values of a tensor inside a node, where they are added in fp32, and loses none.
LOSSLESS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


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
    nodes: Nodes,
    inner: Compressor | None = None,
    slices: int | None = None,
) -> Steps:
    """Replace flat `x` by `factor` times the sum over ranks; arguments as in `two_phase`.

    nodes: the ranks of each host (`topology.nodes_of`). inner: codes inside a node, without memory;
    None sends raw there. transport: its `sub` is asked for this rank's node and its column.
    """
    if len(nodes) == 1:
        raw = Compressor(codec("fp32"), device=x.device)
        yield from two_phase.all_reduce(
            x, transport, inner or raw, key, layout, pool,
            factor=factor, back=raw if inner else None, slices=slices,
        )  # fmt: skip
        return
    if len(nodes) == transport.size:
        yield from two_phase.all_reduce(
            x, transport, compressor, key, layout, pool, factor=factor, hold=hold, slices=slices
        )
        return
    inner = inner or Compressor(inside(None, layout.dtype), device=x.device)
    how = (transport, compressor, key, replace(layout, dtype=torch.float32), pool)
    if layout.dtype == torch.float32:
        yield from _all_reduce(x, *how, factor, hold, nodes, inner, slices)
        return
    buffer = pool.take(4 * layout.extent)  # sums of 16-bit numbers have more digits, and range
    wide = buffer.view(torch.float32)
    wide.copy_(x[: layout.extent])
    yield from _all_reduce(wide, *how, factor, hold, nodes, inner, slices)
    for start, size in zip(layout.starts, layout.sizes, strict=True):
        x[start : start + size].copy_(wide[start : start + size])
    pool.give(buffer)


def _all_reduce(
    x: torch.Tensor,
    transport: Transport,
    compressor: Compressor,
    key: Key,
    layout: Layout,
    pool: Pool,
    factor: float,
    hold: tuple[int, ...],
    nodes: Nodes,
    inner: Compressor,
    slices: int | None,
) -> Steps:
    """`all_reduce` of fp32 on several hosts, not all of one rank.

    An owner sums in its own part of `x`, which is in the wires by then.
    """
    begin(compressor, key)
    inner.advance(key)
    columns = columns_of(nodes)
    ranks = next(ranks for ranks in nodes if transport.rank in ranks)
    owned = [next((c for c, column in enumerate(columns) if r in column), None) for r in ranks]
    mine = owned[ranks.index(transport.rank)]
    node = transport.sub(ranks)
    rows = _rows(layout, compressor.codec, inner.codec, nodes, slices)

    def of_owners(sizes: Sequence[int]) -> list[int]:
        """Bytes by rank of the node: an owner's are its column's."""
        return [0 if column is None else sizes[column] for column in owned]

    # 1: chunks to their owners. A slice has one wire, with a part for each.
    sizes = [[inner.codec.nbytes(part) for part in row] for row in rows]
    wires = [pool.take(sum(row)) for row in sizes]
    into = [place for wire, row in zip(wires, sizes, strict=True) for place in wire.split(row)]
    flat = [part for row in rows for part in row]
    done = yield from encode_parts(inner, key, x, into, flat, ())
    inside: list[Exchange] = []
    for number, row in enumerate(sizes):
        for place in range(max(done, number * len(row)), (number + 1) * len(row)):
            with span("encode"):
                inner.compress(key, x, into[place], flat[place])
        own = 0 if mine is None else row[mine]
        got = pool.take(own * node.size)
        with span("exchange"):
            pending = node.all_to_all(
                got, wires[number], out_splits=[own] * node.size, in_splits=of_owners(row)
            )
        inside.append(Exchange(pending, got, wires[number]))

    # 2: two_phase with the owners in other nodes
    sums: list[Exchange] = []
    if mine is not None:
        column, chunks, shares = transport.sub(columns[mine]), [row[mine] for row in rows], []
        for chunk, (pending, got, wire) in zip(chunks, inside, strict=True):
            yield pending
            with span("reduce"):
                for place, payload in enumerate(got.view(node.size, -1)):
                    inner.decompress(key, payload, x, chunk, add=place > 0)
            pool.give(got, wire)
            shared = pool.take(compressor.codec.nbytes(chunk))
            with span("encode"):
                still = silent(x, compressor.codec, chunk, hold)
                compressor.compress(key, x, shared, chunk, hold=still)
            shares.append(two_phase.scatter(column, shared, pool))
        sums = yield from two_phase.gather_sums(
            shares, column, compressor, key, chunks, pool, factor=factor, hold=hold
        )

    # 3: what the column ended with, to the node
    sizes = [[compressor.codec.nbytes(part) for part in row] for row in rows]
    hands: list[Exchange] = []
    for number, row in enumerate(sizes):
        own = 0 if mine is None else row[mine]
        copies, got = pool.take(own * node.size), pool.take(sum(row))
        if sums:
            yield sums[number].pending
            copies.view(node.size, -1).copy_(sums[number].got)
            pool.give(sums[number].got, sums[number].sent)
        with span("exchange"):
            pending = node.all_to_all(
                got, copies, out_splits=of_owners(row), in_splits=[own] * node.size
            )
        hands.append(Exchange(pending, got, copies))
    yield Step.ISSUED

    if mine is None:
        for pending, got, wire in inside:
            yield pending
            pool.give(got, wire)
    for parts, row, (pending, got, copies) in zip(rows, sizes, hands, strict=True):
        yield pending
        with span("decode"):
            for part, payloads in zip(parts, got.split(row), strict=True):
                compressor.decompress(reduced_key(key), payloads, x, part)
        pool.give(got, copies)


@lru_cache(maxsize=1024)
def _rows(
    layout: Layout, outer: Codec, inner: Codec, nodes: Nodes, asked: int | None = None
) -> tuple[tuple[Layout, ...], ...]:
    """The slices of a message, each as the messages of all columns between hosts."""
    chunks = _chunks(layout, outer, inner, nodes)
    count = 1
    if inner.sliceable:
        count = num_slices(outer, sum(outer.nbytes(chunk) for chunk in chunks), asked)
    if count == 1:
        return (chunks,)
    return tuple(tuple(chunk.slice(s, count) for chunk in chunks) for s in range(count))


def _chunks(layout: Layout, outer: Codec, inner: Codec, nodes: Nodes) -> tuple[Layout, ...]:
    """What each column has of `layout`, as a message of a payload per host."""
    count = min(len(node) for node in nodes)
    whole, found = message(layout, outer, count, inner), []
    for column in range(count):
        cuts = [whole.cut(segment, column) for segment in range(len(layout.sizes))]
        found.append(
            Layout(
                tuple(end - begin for begin, end in cuts),
                layout.dtype,
                ranks=len(nodes),
                exact=layout.exact,
                offsets=tuple(
                    start + begin for start, (begin, _) in zip(layout.starts, cuts, strict=True)
                ),
                align=whole.align,
            )
        )
    return tuple(found)


def inside(inner: Codec | None, dtype: torch.dtype) -> Codec:
    """The codec of what travels inside a node; `inner` None: one that loses nothing of `dtype`."""
    return inner or codec(LOSSLESS[dtype])


def owned(layout: Layout, scheme: Scheme, nodes: Nodes, rank: int) -> Layout | None:
    """What `rank` remembers residuals of, with the segments of `layout`; None: of nothing."""
    assert isinstance(scheme.algorithm, Hierarchical)
    if len(nodes) == 1:
        return None
    if max(len(node) for node in nodes) == 1:
        return layout
    inner = inside(scheme.algorithm.inner, layout.dtype)
    for chunk, ranks in zip(
        _chunks(layout, scheme.codec, inner, nodes), columns_of(nodes), strict=True
    ):
        if rank in ranks:
            return chunk
    return None


def wire_bytes(layout: Layout, scheme: Scheme, topology: Topology) -> int:
    """Bytes that the rank which sends most sends, inside its host and to others.

    Where nodes are uneven that is a rank of the largest: an owner, or one that owns nothing.
    """
    config, nodes = scheme.algorithm, topology.nodes
    assert isinstance(config, Hierarchical)
    if len(nodes) == topology.size:
        return two_phase.wire_bytes(layout, scheme, topology)
    if len(nodes) == 1:
        raw = codec("fp32")
        alone = Scheme(config.inner or raw, algorithm=TwoPhase(back=raw))
        return two_phase.wire_bytes(layout, alone, topology)
    inner = inside(config.inner, layout.dtype)
    wide = replace(layout, dtype=torch.float32)
    chunks = _chunks(wide, scheme.codec, inner, nodes)
    first = [inner.nbytes(chunk) for chunk in chunks]
    coded = [scheme.codec.nbytes(chunk) for chunk in chunks]
    largest, columns = max(len(node) for node in nodes), len(chunks)
    others = (largest - 1) + 2 * (len(nodes) - 1) / len(nodes)  # times its payloads, an owner sends
    sent = [round(others * mine) - own for own, mine in zip(first, coded, strict=True)]
    return sum(first) + max(sent + [0] * (largest - columns))


def host_bytes(layout: Layout, scheme: Scheme, topology: Topology) -> int:
    """Bytes that a host sends to the others: what its NIC has to carry, headers apart."""
    config, nodes = scheme.algorithm, topology.nodes
    assert isinstance(config, Hierarchical)
    if len(nodes) == topology.size:
        return two_phase.wire_bytes(layout, scheme, topology)
    inner = inside(config.inner, layout.dtype)
    wide = replace(layout, dtype=torch.float32)
    payloads = sum(
        scheme.codec.nbytes(chunk) // len(nodes)
        for chunk in _chunks(wide, scheme.codec, inner, nodes)
    )
    return 2 * (len(nodes) - 1) * payloads


def seconds(layout: Layout, scheme: Scheme, topology: Topology) -> float:
    """Two exchanges of a host's payloads on its link; what stays inside a host costs nothing.

    On one host the link is the one between its ranks.
    """
    if topology.size == 1:
        return 0.0
    if len(topology.nodes) == 1:
        return topology.link.seconds(wire_bytes(layout, scheme, topology), messages=2)
    return topology.link.seconds(host_bytes(layout, scheme, topology), messages=2)
