"""The library's own all-reduce: the network adds the payloads, viewed as the codec's numbers.

    fp32        sum in place, then times factor: bitwise the library's collective and a product
    fp16, bf16  times factor, coded, summed by the network in 16 bits, decoded
    randk       the same of the elements that all ranks chose alike

Multiplying before coding keeps sums of large gradients inside fp16's range. Bytes a rank sends, for
p bytes of payload: 2 (W-1)/W p (a ring).
"""

from __future__ import annotations

import torch

from commlib_kernels.layout import Layout

from ..feedback import Compressor, Key
from ..scheme import Scheme
from ..topology import Topology
from ..traffic import Transport, all_reduce_bytes
from .base import Step, Steps, message, scale_, span
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
    """Replace flat `x` by `factor` times the sum over ranks; arguments as in `two_phase`.

    Segments that lie apart in x are brought together for the exchange.
    """
    if transport.size == 1:
        scale_(x, layout, factor)
        return
    codec = compressor.codec
    raw = codec.id == "fp32"  # its payload is the tensor's own dtype
    if raw and not layout.offsets:
        while not (yield Step.PARKED):
            pass
        with span("exchange"):
            exchange = transport.all_reduce(x[: layout.numel])
        yield Step.ISSUED
        yield exchange
        scale_(x, layout, factor)
        return
    if not raw:
        scale_(x, layout, factor)
    layout = message(layout, codec, 1)
    compressor.advance(key)
    wire = pool.take(codec.nbytes(layout))
    wire.zero_()  # padding is summed too: garbage could be signalling NaN
    with span("encode"):
        compressor.compress(key, x, wire, layout, hold=hold)
    kept = [(place, wire[place].clone()) for place in codec.not_added(layout)]
    while not (yield Step.PARKED):
        pass
    dtype = layout.dtype if raw else codec.sum_dtype
    assert dtype is not None, "Scheme refuses native for codecs that the network cannot add"
    numbers = wire.view(dtype)
    with span("exchange"):
        exchange = transport.all_reduce(numbers)
    yield Step.ISSUED
    yield exchange
    if raw and factor != 1.0:
        numbers.mul_(factor)
    for place, data in kept:
        wire[place].copy_(data)
    with span("decode"):
        compressor.decompress(key, wire, x, layout)
    pool.give(wire)


def wire_bytes(layout: Layout, scheme: Scheme, topology: Topology) -> int:
    """Bytes a rank sends: 2 (W-1)/W p."""
    whole = layout.numel * layout.dtype.itemsize
    raw = scheme.codec.id == "fp32"
    payload = whole if raw else scheme.codec.nbytes(message(layout, scheme.codec, 1))
    return all_reduce_bytes(payload, topology.size)


def seconds(layout: Layout, scheme: Scheme, topology: Topology) -> float:
    """A ring: 2 (W-1) messages one after the other."""
    hops = 2 * (topology.size - 1)
    return topology.link.seconds(wire_bytes(layout, scheme, topology), messages=hops)
