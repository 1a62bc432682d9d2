"""What all collectives share: how they take turns, cut themselves into slices and name their costs.

A collective is a generator, so that other messages can be coded while this one is on the wire. It
yields, in this order,

    READY      "my local work so far is done, I want to issue": answered True (it has the turn) or
    PARKED     False (READY: do more local work; PARKED: there is no more until it has the turn)
    a Pending  "I need this exchange done before I go on"; any number
    ISSUED     "I shall issue nothing more": the next message may have the turn

Exchanges of a library are matched by order. They are issued only by the message that has the turn,
and turns follow the order of the calls: so all ranks issue the same exchanges in the same order,
whatever their timing. A message with a lane of its own (lane.py) always has the turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from typing import NamedTuple

import torch
from torch.autograd import profiler

from commlib_kernels.layout import Layout, pieces

from ..algorithms import TwoPhase
from ..codecs.base import Codec
from ..feedback import OWNER, Compressor, Key, Plain, owner_key
from ..scheme import Scheme
from ..topology import Topology
from ..traffic import Pending, Transport
from .pool import Pool

# Bytes of wire (all payloads) per slice. 64 MiB as int4 on 4 hosts that share 2 cores: at 1 Gbit/s
# 1 slice took 167 ms, 2 140, 3 to 12 all 126 to 142; at 10 Gbit/s, where the cores are what limits,
# 1 slice took 72 ms, 2 and 3 83, 6 91: every further exchange costs 1 to 4 ms on busy cores.
SLICE_BYTES = 1 << 20
DEFAULT_SLICES = 4


class Step(Enum):
    """What a collective asks of the one who runs it."""

    READY = "ready"
    PARKED = "parked"
    ISSUED = "issued"


Steps = Generator[Step | Pending, bool, None]


class Exchange(NamedTuple):
    """An exchange under way: what arrives and what leaves."""

    pending: Pending
    got: torch.Tensor
    sent: torch.Tensor


class Algorithm(NamedTuple):
    """A row of the table of collectives.

    run(x, transport, compressor, key, layout, pool, *, factor, hold, **options) -> Steps, with the
    options that the algorithm's config stands for.
    wire_bytes(layout, scheme, topology): bytes a rank sends.
    seconds(layout, scheme, topology): time on the links; coding comes on top.
    Both take the shapes of the segments too where the algorithm goes by matrices.
    """

    run: Callable[..., Steps]
    wire_bytes: Callable[..., int]
    seconds: Callable[..., float]


def drive(steps: Steps, wait: Callable[[Pending], None] = lambda pending: pending.wait()) -> None:
    """Run a collective to its end on this thread, with `wait` for its exchanges."""
    answer: bool | None = None
    try:
        while True:
            step = steps.send(answer)  # type: ignore[arg-type]  # None starts a generator
            if not isinstance(step, Step):
                wait(step)
            answer = True
    except StopIteration:
        return


def span(name: str) -> AbstractContextManager[object]:
    """A `record_function` range commlib.NAME, free while no profiler runs."""
    if profiler._is_profiler_enabled:
        return torch.profiler.record_function(f"commlib.{name}")
    return nullcontext()


def num_slices(codec: Codec, wire_bytes: int, asked: int | None = None) -> int:
    """Slices of a message with `wire_bytes` bytes of wire: a function of what all ranks know."""
    if not codec.sliceable:
        return 1
    return asked or max(1, min(DEFAULT_SLICES, wire_bytes // SLICE_BYTES))


def parts(codec: Codec, layout: Layout, asked: int | None = None) -> list[Layout]:
    """`layout` cut into its slices."""
    count = num_slices(codec, codec.nbytes(layout), asked)
    return [layout] if count == 1 else [layout.slice(s, count) for s in range(count)]


def encode_parts(
    compressor: Compressor,
    key: Key,
    x: torch.Tensor,
    wires: list[torch.Tensor],
    layouts: list[Layout],
    hold: tuple[int, ...],
) -> Generator[Step, bool, int]:
    """Code slices while waiting for the turn; returns how many are coded when it comes.

    The caller codes the rest, each after issuing the one before.
    """
    done = 0
    while True:
        if done < len(layouts):
            with span("encode"):
                compressor.compress(key, x, wires[done], layouts[done], hold=hold)
            done += 1
        if (yield Step.READY if done < len(layouts) else Step.PARKED):
            return done


def reduced_key(key: Key) -> Key:
    """The owner's key; anonymous messages have a stream of random numbers for owners."""
    return OWNER if key is None else owner_key(key)


def begin(compressor: Compressor, key: Key, back: Compressor | None = None) -> None:
    """Start the next message of `key`, on both sides."""
    if key is None and compressor.feedback != Plain():
        raise ValueError(
            f"{compressor.codec}+{compressor.feedback} needs a key: no key, no memory; give the "
            "tensor a name or use the codec without feedback"
        )
    compressor.advance(key)
    (back or compressor).advance(reduced_key(key))


def runs(layout: Layout) -> list[slice]:
    """Where the segments of `layout` lie in a flat tensor."""
    if not layout.offsets:
        return [slice(0, sum(layout.sizes))]
    return [slice(a, a + n) for a, n in zip(layout.starts, layout.sizes, strict=True)]


def scale_(x: torch.Tensor, layout: Layout, factor: float) -> None:
    """Multiply the elements that `layout` covers, in place."""
    if factor != 1.0:
        for run in runs(layout):
            x[run].mul_(factor)


def message(
    layout: Layout, codec: Codec, ranks: int, back: Codec | None = None, *, stacked: bool = False
) -> Layout:
    """`layout` as a message of `ranks` payloads under `codec` (and `back`)."""
    align = math.lcm(codec.align, back.align) if back is not None else codec.align
    return Layout(
        layout.sizes,
        layout.dtype,
        ranks=ranks,
        exact=layout.exact,
        offsets=layout.offsets,
        align=align,
        stacked=stacked,
        pitch=layout.pitch,
    )


def silent(x: torch.Tensor, codec: Codec, layout: Layout, hold: tuple[int, ...]) -> tuple[int, ...]:
    """Which of the segments `hold` have nothing but zeros in what a message codes of `x`.

    A rank holds back the residuals of what it has no gradient of. Where it codes what others sent
    too, a sum that is not zero takes the residual along, or what coding loses of it would be gone.
    """
    rows = pieces(layout, codec.format) if hold else ()
    loud = {p.segment for p in rows if p.segment in hold and x[p.x : p.x + p.numel].any()}
    return tuple(segment for segment in hold if segment not in loud)


def sum_up(
    compressor: Compressor,
    back: Compressor | None,
    owner: Key,
    got: torch.Tensor,
    mine: torch.Tensor,
    chunk: Layout,
    pool: Pool,
    *,
    factor: float,
    hold: tuple[int, ...],
) -> int:
    """Code the sum of all ranks' payloads `got` of my `chunk` into `mine`; the bytes used.

    back: codes the sum, if another does than `compressor`. owner: key of the sum. hold: segments
    whose residual stays as it is where their sum is zero.
    """
    with span("reduce"):
        if back is None and not hold:
            return compressor.reduce(owner, got, mine, chunk, factor=factor)
        (rank,) = chunk.payloads
        whole = chunk.only(rank, dense=True)
        buffer = pool.take(chunk.chunk_numel(rank) * chunk.dtype.itemsize)
        dense = buffer.view(chunk.dtype)
        compressor.reduce(owner, got, dense, chunk, factor=factor)
        hold = silent(dense, (back or compressor).codec, whole, hold)
        if back is None:
            used = compressor.reduce(owner, got, mine, chunk, factor=factor, hold=hold)
        else:
            used = back.compress(owner, dense, mine, whole, hold=hold)
        pool.give(buffer)
        return used


@contextmanager
def together(out: torch.Tensor, layout: Layout, pool: Pool) -> Iterator[torch.Tensor]:
    """What sums go to, back to back: `out`, or a buffer where its segments lie apart.

    layout: of one row. What is in the buffer at the end goes to its places.
    """
    if not layout.offsets:
        yield out
        return
    buffer = pool.take(sum(layout.sizes) * out.itemsize)
    dense = buffer.view(out.dtype)
    yield dense
    for place, sums in zip(runs(layout), dense.split(layout.sizes), strict=True):
        out[place].copy_(sums)
    pool.give(buffer)


def fixed_sizes(scheme: Scheme) -> bool:
    """Whether sizes of messages depend on nothing but their layouts."""
    back = scheme.algorithm.back if isinstance(scheme.algorithm, TwoPhase) else None
    return scheme.codec.fixed_size and (back or scheme.codec).fixed_size


def scheme_wires(layout: Layout, scheme: Scheme, topology: Topology) -> tuple[int, int]:
    """Bytes of one payload in the first and in the second exchange of `scheme`.

    Those that are expected where sizes depend on the data.
    """
    config = scheme.algorithm
    back = config.back if isinstance(config, TwoPhase) else None
    whole = message(layout, scheme.codec, topology.size, back)
    first = scheme.codec.expected(whole) // topology.size
    return first, first if back is None else back.expected(whole) // topology.size


__all__ = [
    "Algorithm",
    "Exchange",
    "Pool",
    "Step",
    "Steps",
    "Transport",
    "begin",
    "drive",
    "encode_parts",
    "fixed_sizes",
    "message",
    "num_slices",
    "parts",
    "reduced_key",
    "runs",
    "scale_",
    "scheme_wires",
    "silent",
    "span",
    "sum_up",
    "together",
]
