"""The oracle: every op in plain NumPy, obvious rather than fast.

Equations are those of kernels/README.md; each backend is tested byte for byte against this one.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from commlib_kernels import squeezed
from commlib_kernels.compact import Chosen, chosen
from commlib_kernels.formats import Format
from commlib_kernels.layout import Layout, Piece, pieces, stride
from commlib_kernels.memory import Memory
from commlib_kernels.philox import lanes
from commlib_kernels.reference import blocks, buckets, elements, entropy, rotation, sparse
from commlib_kernels.reference.elements import F32, Floats
from commlib_kernels.tag import Tag

name = "reference"

Bytes = npt.NDArray[np.uint8]

QUIET = np.errstate(over="ignore", invalid="ignore")
"""Inf - Inf and overflow are data here, not mistakes: they reach the wire as what they are."""


@QUIET
def quantize(
    fmt: Format,
    x: torch.Tensor,
    wire: torch.Tensor,
    layout: Layout,
    tag: Tag,
    memory: Memory | None = None,
) -> None:
    """Code `x` into `wire`, adding and renewing the residual."""

    def source(p: Piece) -> Floats:
        return elements.load(x[p.x : p.x + p.numel])

    raw = elements.raw(x)
    for p in pieces(layout, fmt):
        if p.exact:
            itemsize = layout.dtype.itemsize
            data = raw[p.x * itemsize : (p.x + p.numel) * itemsize]
            elements.raw(wire)[p.code : p.code + data.size] = data
    if fmt.sparse is not None:
        _emit_sparse(fmt, source, elements.raw(wire), chosen(layout, fmt), tag, memory)
        return
    _emit(fmt, source, elements.raw(wire), pieces(layout, fmt), tag, memory)


@QUIET
def dequantize(
    fmt: Format, wire: torch.Tensor, out: torch.Tensor, layout: Layout, *, add: bool = False
) -> None:
    """Decode `wire` into (or add it to) the elements of `out` that its payloads cover."""
    data = elements.raw(wire)
    for p in pieces(layout, fmt):
        here = out[p.x : p.x + p.numel]
        if p.exact and not add:
            elements.raw(here)[:] = data[p.code :][: p.numel * layout.dtype.itemsize]
            continue
        if fmt.sparse is not None and not p.exact:
            continue
        v = _decode(fmt, data, p, layout)
        elements.store(here, elements.load(here) + v if add else v)
    for c in chosen(layout, fmt) if fmt.sparse is not None else ():
        here = out[c.piece.x : c.piece.x + c.piece.numel]
        places, v = _decode_sparse(fmt, data, c)
        if add:
            here[torch.from_numpy(places)] = _stored(elements.load(here)[places] + v, out.dtype)
        else:
            here.zero_()
            here[torch.from_numpy(places)] = _stored(v, out.dtype)


@QUIET
def reduce(
    fmt: Format,
    wires: torch.Tensor,
    out: torch.Tensor,
    layout: Layout,
    tag: Tag,
    *,
    factor: float = 1.0,
    memory: Memory | None = None,
) -> None:
    """Sum the payloads of all ranks, in rank order and fp32, times `factor`.

    `out` is the owner's wire (uint8), or its dense chunk (a float tensor).
    """
    data, size = elements.raw(wires), stride(layout, fmt)

    def total(p: Piece) -> Floats:
        acc = np.zeros(_padded(p, fmt), F32)
        for rank in range(data.size // size if size else 0):
            acc += _decode_as_coded(fmt, data[rank * size :], p, layout)
        return _back(fmt, acc, p) * F32(factor)

    picked = chosen(layout, fmt, owner=True) if fmt.sparse is not None else ()
    choices = {c.piece: c for c in picked}

    def total_sparse(p: Piece) -> Floats:
        acc = np.zeros(p.numel, F32)
        for rank in range(data.size // size if size else 0):
            places, v = _decode_sparse(fmt, data[rank * size :], choices[p])
            acc[places] += v
        return acc * F32(factor)

    rows = pieces(layout, fmt, owner=True)
    if out.dtype != torch.uint8:
        for p in rows:
            sums = total_sparse if p in choices else total
            elements.store(out[p.memory : p.memory + p.numel], sums(p))
        return
    for p in rows:
        if p.exact:
            chunk = torch.empty(p.numel, dtype=layout.dtype)
            elements.store(chunk, total(p))
            elements.raw(out)[p.code : p.code + p.numel * chunk.itemsize] = elements.raw(chunk)
    if fmt.sparse is not None:
        _emit_sparse(fmt, total_sparse, elements.raw(out), picked, tag, memory, first=data)
        return
    _emit(fmt, total, elements.raw(out), rows, tag, memory)


def squeeze(fmt: Format, wire: torch.Tensor, out: torch.Tensor, layout: Layout) -> int:
    """Code the payloads of `wire` losslessly into `out`; the bytes used."""
    return squeezed.squeeze(entropy, fmt, elements.raw(wire), elements.raw(out), layout)


def expand(fmt: Format, data: torch.Tensor, wire: torch.Tensor, layout: Layout) -> None:
    """The inverse of `squeeze`."""
    squeezed.expand(entropy, fmt, elements.raw(data), elements.raw(wire), layout)


def _emit_sparse(
    fmt: Format,
    source: Callable[[Piece], Floats],
    out: Bytes,
    rows: tuple[Chosen, ...],
    tag: Tag,
    memory: Memory | None,
    first: Bytes | None = None,
) -> None:
    """As `_emit`. Of a sum, `first` is the first payload, whose random choice is taken over."""
    assert fmt.sparse is not None
    for c in rows:
        p = c.piece
        v, h = source(p), _residual(memory, p, fmt)
        if memory is not None and h is not None:
            v = v + F32(memory.alpha) * h
        number = sparse.head(tag, p.segment) if first is None else first[p.code : p.code + 8]
        places = sparse.choose(fmt.sparse, v, c.start, number)
        sparse.write(fmt.sparse, places, p.numel, number, out[p.code :])
        values = v[places]
        if fmt.sparse.scaled and first is None:
            values = values * sparse.ratios(fmt.sparse, p.numel)
        if fmt.sparse.rule == "randk" and not np.isfinite(v).all():
            values = np.full(values.size, elements.NAN)
        if fmt.kind == "raw":
            data = values.astype("<f4").view(np.uint8)
            out[c.values.code : c.values.code + data.size] = data
        else:
            source_of = {c.values: values}.__getitem__
            _emit(fmt.values_format, source_of, out, (c.values,), tag, None)
        _, decoded = _decode_sparse(fmt, out, c)
        if memory is None or h is None or not np.isfinite(decoded).all():
            continue
        q = np.zeros_like(v)
        q[places] = decoded
        new = _renewed(memory, v, h, q)
        _keep_piece(memory, p, fmt, np.where(np.isfinite(new), new, h))


def _decode_sparse(fmt: Format, data: Bytes, c: Chosen) -> tuple[npt.NDArray[np.int64], Floats]:
    """Positions and values of a piece; NaN everywhere where one is bad."""
    places = sparse.find(fmt, c, data)
    if fmt.kind == "raw":
        v = data[c.values.code :][: 4 * c.values.numel].copy().view("<f4")
    else:
        v = _decode_as_coded(fmt.values_format, data, c.values, None)
        v = _back(fmt.values_format, v, c.values)
    if places is None or not np.isfinite(v).all():
        everywhere = np.arange(c.piece.numel)
        return everywhere, np.full(c.piece.numel, elements.NAN)
    return places, v


def _stored(v: Floats, dtype: torch.dtype) -> torch.Tensor:
    """fp32 values rounded to `dtype`, as `elements.store` writes them."""
    rounded = torch.empty(v.size, dtype=dtype)
    elements.store(rounded, v)
    return rounded


def _emit(
    fmt: Format,
    source: Callable[[Piece], Floats],
    out: Bytes,
    rows: tuple[Piece, ...],
    tag: Tag,
    memory: Memory | None,
) -> None:
    """Add the residual to what `source` gives, code it into `out`, renew the residual."""
    groups: dict[int, list[Piece]] = {}
    for p in rows:
        if not p.exact:
            groups.setdefault(p.group, []).append(p)
    for members in groups.values():
        values = [source(p) for p in members]
        residuals = [_residual(memory, p, fmt) for p in members]
        if memory is not None:
            values = [
                v if h is None else v + F32(memory.alpha) * h
                for v, h in zip(values, residuals, strict=True)
            ]
        shared = None
        if fmt.per_segment:
            whole = np.concatenate(values)
            shared = blocks.scale_bits(fmt, whole, whole.size)
        for p, v, h in zip(members, values, residuals, strict=True):
            if fmt.kind == "buckets":
                _emit_buckets(fmt, v, h, out, p, memory)
                continue
            _emit_piece(fmt, v, h, out, p, tag, memory, shared)


def _emit_piece(
    fmt: Format,
    v: Floats,
    h: Floats | None,
    out: Bytes,
    p: Piece,
    tag: Tag,
    memory: Memory | None,
    shared: tuple[np.uint32, np.uint32] | None,
) -> None:
    code, scale = p.code, p.scale
    for start, rows, width, numel in _runs(fmt, p.numel):
        grid = np.zeros((rows, width), F32)
        grid.reshape(-1)[:numel] = v[start : start + numel]
        coded, per_row = grid, numel if rows == 1 else width
        if fmt.rotate is not None:
            coded, per_row = rotation.forward(grid, fmt.rotate, p.base + start), width
        if fmt.scale == "none":
            scales, m = np.ones(rows, np.uint32), np.full(rows, blocks.TINY)
        elif shared is not None:
            scales, m = (np.full(rows, s) for s in shared)
        else:
            both = [blocks.scale_bits(fmt, row[:per_row], per_row) for row in coded]
            scales, m = (np.array(c, np.uint32) for c in zip(*both, strict=True))
        random = lanes(tag, p.segment, p.base + start, rows, width) if fmt.stochastic else None
        codes = blocks.code(fmt, coded, scales, random, per_row)
        data = blocks.pack(fmt, codes).reshape(-1)
        out[code : code + data.size] = data
        code += data.size
        if fmt.scale != "none" and (shared is None or start == 0):
            words = blocks.scale_bytes(fmt, scales[: 1 if shared is not None else rows])
            out[scale : scale + words.size] = words
            scale += words.size
        if memory is not None and h is not None:
            old = np.zeros((rows, width), F32)
            old.reshape(-1)[:numel] = h[start : start + numel]
            decoded = blocks.value(fmt, codes, scales)
            if fmt.rotate is not None:
                decoded = rotation.backward(decoded, fmt.rotate, p.base + start)
            new = _renewed(memory, grid, old, decoded)
            held = np.zeros(rows, np.bool_)
            if fmt.scale != "none":
                held = scales == blocks.BAD_SCALE
                new = np.where((m < blocks.TINY)[:, None], F32(0), new)
                new = np.where(held[:, None], old, new)
            else:
                new = np.where(np.isfinite(new), new, old)
            _keep(memory, p, fmt, start, new, numel, held)


def _emit_buckets(
    fmt: Format, v: Floats, h: Floats | None, out: Bytes, p: Piece, memory: Memory | None
) -> None:
    if not p.numel:
        return
    data, m = buckets.encode(v)
    out[p.code : p.code + data.size] = data
    if memory is None or h is None or m >= blocks.HUGE:
        return
    new = _renewed(memory, v, h, buckets.decode(data, p.numel)[: p.numel])
    _keep_piece(memory, p, fmt, np.zeros_like(new) if m < blocks.TINY else new)


def _keep_piece(memory: Memory, p: Piece, fmt: Format, new: Floats) -> None:
    """Store the residual of a whole piece."""
    for start, count, width, numel in _runs(fmt, p.numel):
        grid = np.zeros((count, width), F32)
        grid.reshape(-1)[:numel] = new[start : start + numel]
        _keep(memory, p, fmt, start, grid, numel, np.zeros(count, np.bool_))


def _renewed(memory: Memory, v: Floats, old: Floats, decoded: Floats) -> Floats:
    """``carry h + omega (v - Q(v))``; a factor of 1 and a term of 0 are left out."""
    error = v - decoded
    if memory.omega != 1:
        error = F32(memory.omega) * error
    return error if memory.carry == 0 else F32(memory.carry) * old + error


def _residual(memory: Memory | None, p: Piece, fmt: Format) -> Floats | None:
    if memory is None or p.segment in memory.hold:
        return None
    h = elements.load(memory.residual[p.memory : p.memory + p.numel])
    if memory.scales is None:
        return h
    count = -(-p.numel // fmt.block)
    s = memory.scales[p.memory_block : p.memory_block + count].numpy().view(np.uint16)
    return h * np.repeat(elements.bf16_value(s), fmt.block)[: p.numel]


def _keep(
    memory: Memory,
    p: Piece,
    fmt: Format,
    start: int,
    new: Floats,
    numel: int,
    held: npt.NDArray[np.bool_],
) -> None:
    """Store the renewed residual; blocks that are `held` keep their bits."""
    place = memory.residual[p.memory + start : p.memory + start + numel]
    if memory.scales is None:
        elements.store(place, new.reshape(-1)[:numel])
        return
    new.reshape(-1)[numel:] = 0  # padding has no error: it must not join the scale
    eighth = Format("uniform", bits=8, levels=127, block=fmt.block, scale="absmax")
    both = [blocks.scale_bits(eighth, row, row.size) for row in new]
    # A residual that int8 cannot hold is forgotten rather than kept as NaN.
    scales = np.array([0 if s == blocks.BAD_SCALE else s for s, _ in both], np.uint32)
    codes = blocks.code(eighth, new, scales, None)
    # Coding an int8 residual again is not the identity: where it stays, it stays as it is.
    kept = np.repeat(held, new.shape[1])[:numel]
    place.numpy()[:] = np.where(kept, place.numpy(), codes.reshape(-1)[:numel])
    first = p.memory_block + start // fmt.block
    words = memory.scales[first : first + len(scales)].numpy()
    words[:] = np.where(held, words, scales.astype(np.int16))


def _runs(fmt: Format, numel: int) -> Iterator[tuple[int, int, int, int]]:
    """(start, rows, width, elements): the full blocks, then the short last one."""
    full = numel // fmt.block
    if full:
        yield 0, full, fmt.block, full * fmt.block
    rest = numel - full * fmt.block
    if rest:
        yield full * fmt.block, 1, (rest + 7) // 8 * 8, rest


def _decode(fmt: Format, data: Bytes, p: Piece, layout: Layout) -> Floats:
    return _back(fmt, _decode_as_coded(fmt, data, p, layout), p)


def _padded(p: Piece, fmt: Format) -> int:
    """Elements of a piece as it is coded."""
    return p.numel if p.exact else sum(rows * width for _, rows, width, _ in _runs(fmt, p.numel))


def _back(fmt: Format, v: Floats, p: Piece) -> Floats:
    """What was coded: rotated back, without padding."""
    if p.exact or fmt.rotate is None:
        return v[: p.numel]
    parts = [np.zeros(0, F32)]
    for start, rows, width, numel in _runs(fmt, p.numel):
        grid = v[start : start + rows * width].reshape(rows, width)
        parts.append(rotation.backward(grid, fmt.rotate, p.base + start).reshape(-1)[:numel])
    return np.concatenate(parts)


def _decode_as_coded(fmt: Format, data: Bytes, p: Piece, layout: Layout | None) -> Floats:
    """Values of the codes, with padding and still rotated."""
    if p.exact:
        assert layout is not None
        chunk = torch.empty(p.numel, dtype=layout.dtype)
        elements.raw(chunk)[:] = data[p.code :][: p.numel * chunk.itemsize]
        return elements.load(chunk)
    if fmt.kind == "buckets":
        return buckets.decode(data[p.code :], p.numel) if p.numel else np.zeros(0, F32)
    parts = [np.zeros(0, F32)]
    code = p.code
    count = fmt.scale_bytes * fmt.scale_count(p.numel)
    words = blocks.scales_of(fmt, data[p.scale :][:count])
    for start, rows, width, _ in _runs(fmt, p.numel):
        size = rows * width * fmt.bits // 8
        codes = blocks.unpack(fmt, data[code : code + size].reshape(rows, -1), width)
        code += size
        first = start // fmt.block
        if fmt.scale == "none":
            scales = np.ones(rows, np.uint32)
        else:
            scales = np.repeat(words, rows) if fmt.per_segment else words[first : first + rows]
        parts.append(blocks.value(fmt, codes, scales).reshape(-1))
    return np.concatenate(parts)
