"""PowerSGD: the mean of matrices by two thin factors (Vogels et al. 2019, arXiv 1905.13727).

On W ranks, of an n x m matrix G_r, its residual E_r and the m x rank factor Q of the last message:

    M_r = G_r + E_r
    P   = mean_r(M_r orth(Q))          first exchange, with the raw segments
    Q   = mean_r(M_r^T orth(P))        second exchange
    D   = orth(P) Q^T                  the mean of M_r, as all ranks decode it
    E_r = M_r - D
    out = factor W D

orth is Gram-Schmidt. P spans what M maps Q to whatever the scale of either, so Q is made orthogonal
first, which keeps P within fp16's range. The first Q is Gaussian, from the run's seed and the key,
and later ones a subspace iteration: the warm start. Both exchanges are `two_phase` without
memory, whose sums run in rank order: so the result of a parameter depends on neither its bucket nor
its neighbours, and ends with the same bits on all ranks (`low_rank`). Where the mean of the factors
was rounded, and where it is not of full rank, E_r has all that D misses.

Where Q comes out non-finite (a NaN or Inf on any rank) the parameter ends as NaN on all ranks, and
its residuals and Q stay. A row of zeros in Q, as of a gradient of zeros, would never come back:
there the last one stays.

Bytes a rank sends: 2 (W-1)/W ((n + m) rank) elements of the codec, and raw segments in fp32.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator, Sequence
from functools import lru_cache

import torch

from commlib_kernels.layout import Layout

from ..algorithms import PowerSGD
from ..feedback import Compressor, Key, Plain, names_of
from ..scheme import Scheme
from ..topology import Topology
from ..traffic import Pending, Transport
from . import two_phase
from .base import Step, Steps, begin, scale_, span
from .low_rank import orthonormal, product
from .pool import Pool

Shapes = tuple[tuple[int, ...], ...]
"""(n, m) of each segment of a message; () where it travels raw."""

FACTOR = "Q"  # the name of what is remembered of a key, beside its residual
# Q from here on is no more trusted than Inf: D, a sum of up to MAX_RANK = 2^8 products with |P| at
# most 1, stays below 2^126, where codecs end too.
LIMIT = 2.0**118
ALIGN = 16  # fp32 numbers: a product may round otherwise where its matrix lies at other addresses
# Elements that are decoded at a time on a CPU: what a chain of operations works on stays in cache.
# 1024 x 1024 at rank 4 take 1.5 ms so, 8.6 whole, 2.8 by 1 << 14.
BLOCK = 1 << 16


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
    rank: int = 1,
    shapes: Shapes = (),
    plain: Compressor | None = None,
) -> Steps:
    """Replace flat `x` by `factor` times the sum over ranks; arguments as in `two_phase`.

    rank, shapes: of the factors and the matrices; segments without a shape travel raw. hold:
    segments of which this rank's residual is not sent. plain: codes the factors, without memory.

    Raises: ValueError: there is no key, or Q of another shape under it.
    """
    if transport.size == 1:
        scale_(x, layout, factor)
        return
    shapes = shapes or ((),) * len(layout.sizes)
    places = [segment for segment, shape in enumerate(shapes) if shape]
    if places:
        if key is None:
            raise ValueError("power_sgd starts from the last message of a key: give one")
        begin(compressor, key)
    plain = plain or Compressor(compressor.codec, device=x.device)
    first, second = exchanges(layout, shapes, rank, raw=compressor.codec.id == "fp32")
    segments = _segments(x, layout)
    names = names_of(key)
    factors = [_factor(compressor, names[s], rank, shapes[s], x.device) for s in places]
    residuals = [
        None
        if compressor.feedback == Plain()
        else compressor.residual(names[s], layout.sizes[s], transport.size, factor)
        for s in places
    ]

    with span("encode"):
        room, matrices = _matrices(pool, [shapes[s] for s in places])
        for s, matrix, residual in zip(places, matrices, residuals, strict=True):
            matrix.copy_(segments[s].view_as(matrix))
            if residual is not None and s not in hold:
                matrix.add_(residual.view_as(matrix))
        sent = pool.take(4 * first.numel)
        ps = _segments(sent.view(torch.float32), first)
        for segment, place in enumerate(ps):
            if not shapes[segment]:
                place.copy_(segments[segment])
        for s, matrix, q in zip(places, matrices, orthonormal(factors), strict=True):
            ps[s].view(rank, -1).copy_(q @ matrix.T)
    summed = two_phase.all_reduce(
        sent.view(torch.float32), transport, plain, None, first, pool, factor=factor
    )
    yield from _unfinished(summed) if places else summed
    for segment, place in enumerate(ps):
        if not shapes[segment]:
            segments[segment].copy_(place)
    if not places:
        pool.give(room, sent)
        return

    with span("encode"):
        bases = orthonormal([ps[s].view(rank, -1) for s in places])
        back = pool.take(4 * second.numel)
        qs = [q.view(rank, -1) for q in _segments(back.view(torch.float32), second)]
        for q, p, matrix in zip(qs, bases, matrices, strict=True):
            q.copy_(p @ matrix)
    pool.give(sent)
    yield from two_phase.all_reduce(
        back.view(torch.float32), transport, plain, None, second, pool, factor=1 / transport.size
    )

    with span("decode"):
        for index, s in enumerate(places):
            q, old, residual = qs[index], factors[index], residuals[index]
            largest = q.abs().amax(1, keepdim=True)
            good = (largest < LIMIT).all()  # which no NaN is
            out = segments[s].view_as(matrices[index])
            scale = torch.where(good, factor * transport.size, float("nan"))
            _decode(out, matrices[index], bases[index], q, residual, good, scale, held=s in hold)
            old.copy_(torch.where(good & (largest > 0), q, old))
    pool.give(room, back)


def _decode(
    out: torch.Tensor,
    matrix: torch.Tensor,
    p: torch.Tensor,
    q: torch.Tensor,
    residual: torch.Tensor | None,
    good: torch.Tensor,
    scale: torch.Tensor,
    *,
    held: bool,
) -> None:
    """out = scale D, and where `good` the residual becomes M - D.

    A residual that was held is still owed beside that.
    """
    n, m = matrix.shape
    rows = n if out.is_cuda else min(n, max(1, BLOCK // m))
    kept = None if residual is None else residual.view(n, m)
    both = torch.empty(2, rows, m, dtype=torch.float32, device=out.device)
    for a in range(0, n, rows):
        part = slice(a, min(n, a + rows))
        d, left = both[:, : part.stop - a]
        product(p[:, part], q, d, left)
        if kept is not None:
            torch.sub(matrix[part], d, out=left)
            if held:
                left.add_(kept[part])
            torch.where(good, left, kept[part], out=kept[part])
        torch.mul(d, scale, out=out[part])


def _factor(
    compressor: Compressor, name: str, rank: int, shape: Sequence[int], device: torch.device
) -> torch.Tensor:
    """The (rank, m) factor that the next message of `name` starts from."""

    def start() -> torch.Tensor:
        # one number of 32 bits: a CPU generator takes no more of its seed
        seed = zlib.crc32(f"{compressor.seed},{name}".encode())
        return torch.randn(
            rank, shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float32
        )

    like = torch.empty(rank, shape[1], dtype=torch.float32, device=device)
    return compressor.memory(name, FACTOR, like, start)


def check(compressor: Compressor, key: Key, shapes: Shapes, rank: int) -> None:
    """Refuse matrices that what is remembered under their names does not fit (ValueError)."""
    for name, shape in zip(names_of(key), shapes, strict=True):
        if shape:
            _factor(compressor, name, rank, shape, compressor.device)


@lru_cache(maxsize=1024)
def exchanges(
    layout: Layout, shapes: Shapes, rank: int, *, raw: bool = False
) -> tuple[Layout, Layout]:
    """The two messages of a message, in fp32: P and raw segments, and Q.

    raw: the codec loses nothing, so that no segment need be kept from it.
    """
    shapes = shapes or ((),) * len(layout.sizes)
    sizes = tuple(
        rank * shape[0] if shape else size for shape, size in zip(shapes, layout.sizes, strict=True)
    )
    exact = tuple(not shape for shape in shapes)
    first = Layout(sizes, exact=exact if any(exact) and not raw else ())
    return first, Layout(tuple(rank * shape[1] for shape in shapes if shape))


def _segments(x: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    return [x[a : a + n] for a, n in zip(layout.starts, layout.sizes, strict=True)]


def _matrices(
    pool: Pool, shapes: Sequence[tuple[int, ...]]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A buffer with room for matrices, each at an address of its own kind, and the matrices."""
    starts, end = [], 0
    for n, m in shapes:
        starts.append(end)
        end += -(-n * m // ALIGN) * ALIGN
    room = pool.take(4 * end)
    flat = room.view(torch.float32)
    found = [flat[a : a + n * m].view(n, m) for a, (n, m) in zip(starts, shapes, strict=True)]
    return room, found


def _unfinished(steps: Steps) -> Generator[Step | Pending, bool, None]:
    """`steps` of a collective that is not the last of its message: it does not give up the turn."""
    answer: bool | None = None
    while True:
        try:
            step = steps.send(answer)  # type: ignore[arg-type]  # None starts a generator
        except StopIteration:
            return
        answer = True if step is Step.ISSUED else (yield step)


def wire_bytes(layout: Layout, scheme: Scheme, topology: Topology, shapes: Shapes = ()) -> int:
    """Bytes a rank sends: those of two messages by `two_phase`."""
    config = scheme.algorithm
    assert isinstance(config, PowerSGD)
    raw = scheme.codec.id == "fp32"
    plain = Scheme(scheme.codec)
    return sum(
        two_phase.wire_bytes(part, plain, topology)
        for part in exchanges(layout, shapes, config.rank, raw=raw)
        if part.sizes
    )


def seconds(layout: Layout, scheme: Scheme, topology: Topology, shapes: Shapes = ()) -> float:
    """Four exchanges one after the other, of W-1 payloads each; two where nothing is a matrix."""
    if topology.size == 1:
        return 0.0
    messages = 4 if any(shapes) else 2
    nbytes = wire_bytes(layout, scheme, topology, shapes)
    return topology.link.seconds(nbytes, messages=messages)
