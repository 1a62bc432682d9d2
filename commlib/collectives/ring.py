"""A ring that codes again at every hop: for comparison, its error grows with W.

    reduce-scatter   W-1 hops: decode the chunk that arrives, add my own, code it, pass it on
    all-gather       W-1 hops: the owners' payloads go round unchanged, then all decode them

Each rank codes each chunk once, so error feedback works per hop: the residual of a chunk is what
this rank's coding threw away. Chunk c starts at rank c and ends at rank c-1, its owner. Bytes a
rank sends, with payloads of p bytes: 2 (W-1) p.
"""

from __future__ import annotations

import torch

from commlib_kernels.layout import Layout

from ..feedback import Compressor, Key
from ..scheme import Scheme
from ..topology import Topology
from ..traffic import Pending, Transport
from .base import Step, Steps, message, scale_, scheme_wires, silent, span
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
) -> Steps:
    """Replace flat `x` by `factor` times the sum over ranks; arguments as in `two_phase`."""
    size, rank, codec = transport.size, transport.rank, compressor.codec
    scale_(x, layout, factor)  # before the first coding: a later factor would meet rounded values
    if size == 1:
        return
    layout = message(layout, codec, size)
    compressor.advance(key)
    stride = codec.nbytes(layout) // size
    full = pool.take(stride * size)
    wire, arrived = pool.take(stride), pool.take(stride)

    before, after = (rank - 1) % size, (rank + 1) % size

    def hop(send: torch.Tensor, into: torch.Tensor) -> tuple[Pending, ...]:
        with span("exchange"):
            if transport.tagged:
                return transport.recv(into, before), transport.send(send, after)
            # NCCL runs them one after the other: two ranks that both receive first wait for ever
            from_, to = ([stride * (r == peer) for r in range(size)] for peer in (before, after))
            return (transport.all_to_all(into, send, out_splits=from_, in_splits=to),)

    while not (yield Step.PARKED):
        pass
    for step in range(size - 1):
        chunk = layout.only((rank - step) % size)
        with span("encode"):
            still = silent(x, codec, chunk, hold)
            compressor.compress(key, x, wire, chunk, hold=still)
        for pending in hop(wire, arrived):
            yield pending
        with span("reduce"):
            compressor.decompress(key, arrived, x, layout.only((rank - step - 1) % size), add=True)

    own = (rank + 1) % size
    payloads = full.view(size, stride)
    with span("encode"):
        chunk = layout.only(own)
        still = silent(x, codec, chunk, hold)
        compressor.compress(key, x, payloads[own], chunk, hold=still)
    for step in range(size - 1):
        for pending in hop(payloads[(own - step) % size], payloads[(own - step - 1) % size]):
            yield pending
    yield Step.ISSUED
    with span("decode"):
        compressor.decompress(key, full, x, layout)
    pool.give(full, wire, arrived)


def wire_bytes(layout: Layout, scheme: Scheme, topology: Topology) -> int:
    """Bytes a rank sends: 2 (W-1) p."""
    return 2 * (topology.size - 1) * scheme_wires(layout, scheme, topology)[0]


def seconds(layout: Layout, scheme: Scheme, topology: Topology) -> float:
    """2 (W-1) messages one after the other."""
    hops = 2 * (topology.size - 1)
    return topology.link.seconds(wire_bytes(layout, scheme, topology), messages=hops)
