"""Layouts: every element exactly once, every section aligned, nothing depends on neighbours."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commlib.codecs import codec
from commlib_kernels import Format, Layout, Memory, Tag, nbytes, quantize, reduce, stride
from commlib_kernels.layout import Piece, blocks, pieces, table
from tests.contract import data

FORMATS = [
    codec(t).format for t in ("fp32", "bf16", "int8", "int3:block=32", "sign:block=40", "mxfp4")
]
TENSOR = codec("ternary:block=tensor").format
CHEAP = settings(max_examples=60, deadline=None)


@st.composite
def messages(draw: st.DrawFn) -> tuple[Layout, Format]:
    fmt = draw(st.sampled_from([*FORMATS, TENSOR]))
    sizes = tuple(draw(st.lists(st.integers(0, 700), min_size=1, max_size=6)))
    exact = tuple(draw(st.booleans()) for _ in sizes)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    stacked = draw(st.booleans())
    align = fmt.align * draw(st.integers(1, 2))
    ranks = draw(st.integers(1, 8))
    return Layout(sizes, dtype, ranks, exact, (), align, stacked), fmt


def parts_of(layout: Layout, fmt: Format) -> list[Layout]:
    """The message as slices; one slice where the format has one scale per segment."""
    count = 1 if fmt.per_segment else 3
    return [layout.slice(s, count) for s in range(count)]


@CHEAP
@given(messages())
def test_pieces_cover_every_element_once(message: tuple[Layout, Format]) -> None:
    layout, fmt = message
    for whole in ([layout], parts_of(layout, fmt)):
        counts = np.zeros(layout.extent, int)
        residuals = np.zeros(layout.extent, int)
        for part in whole:
            for p in pieces(part, fmt):
                counts[p.x : p.x + p.numel] += 1
                residuals[p.memory : p.memory + p.numel] += 1
        assert (counts == 1).all()
        assert (residuals == 1).all()


@CHEAP
@given(messages())
def test_chunks_cover_every_element_once(message: tuple[Layout, Format]) -> None:
    layout, fmt = message
    counts = np.zeros(layout.extent, int)
    for rank in range(layout.ranks):
        dense = np.zeros(layout.chunk_numel(rank), int)
        for part in parts_of(layout.only(rank), fmt):
            for p, q in zip(pieces(part, fmt), pieces(part, fmt, owner=True), strict=True):
                counts[p.x : p.x + p.numel] += 1
                dense[q.memory : q.memory + q.numel] += 1
        assert (dense == 1).all()
    assert (counts == 1).all()
    assert sum(map(layout.chunk_numel, range(layout.ranks))) == layout.numel


@CHEAP
@given(messages())
def test_sections_are_aligned_and_do_not_overlap(message: tuple[Layout, Format]) -> None:
    layout, fmt = message
    for part in (layout, layout.only(0), *parts_of(layout, fmt)):
        taken = np.zeros(nbytes(part, fmt), int)
        for p in pieces(part, fmt):
            raw = p.exact
            size = p.numel * layout.dtype.itemsize if raw else fmt.code_bytes(p.numel)
            if p.numel:
                assert p.code % 16 == 0
                taken[p.code : p.code + size] += 1
            if not raw and fmt.scale_count(p.numel):
                assert p.scale % fmt.scale_bytes == 0
                taken[p.scale : p.scale + fmt.scale_bytes * fmt.scale_count(p.numel)] += 1
        assert taken.max(initial=0) <= 1
        assert stride(part, fmt) % 16 == 0
        assert nbytes(part, fmt) == stride(part, fmt) * len(part.payloads)
    assert stride(layout, fmt) == stride(layout.only(layout.ranks - 1), fmt)


@CHEAP
@given(messages(), st.data())
def test_a_parameter_does_not_see_its_neighbours(
    message: tuple[Layout, Format], draw: st.DataObject
) -> None:
    """Its cuts, random numbers and codes are those it would have alone (T1, T31)."""
    layout, fmt = message
    segment = draw.draw(st.integers(0, len(layout.sizes) - 1))
    alone = Layout(
        (layout.sizes[segment],),
        layout.dtype,
        layout.ranks,
        (layout.is_exact(segment),),
        align=layout.align,
        stacked=layout.stacked,
    )
    x = data("random", layout.extent).to(layout.dtype)
    wire = torch.zeros(nbytes(layout, fmt), dtype=torch.uint8)
    keys = tuple(100 + s for s in range(len(layout.sizes)))
    quantize(fmt, x, wire, layout, Tag(1, keys, 2, 3))
    start, total = layout.starts[segment], sum(layout.sizes)
    repeats = layout.ranks if layout.stacked else 1
    mine = torch.cat([x[r * total + start :][: alone.sizes[0]] for r in range(repeats)])
    small = torch.zeros(nbytes(alone, fmt), dtype=torch.uint8)
    quantize(fmt, mine, small, alone, Tag(1, (keys[segment],), 2, 3))
    there = [p for p in pieces(layout, fmt) if p.segment == segment]
    for p, q in zip(there, pieces(alone, fmt), strict=True):
        assert (p.numel, p.base) == (q.numel, q.base)
        assert content(wire, p, layout, fmt) == content(small, q, alone, fmt)


@CHEAP
@given(messages())
def test_slices_hold_the_bytes_of_the_whole(message: tuple[Layout, Format]) -> None:
    layout, fmt = message
    x = data("random", layout.extent).to(layout.dtype)
    tag = Tag(1, (5,), 2, 3)
    wire = torch.zeros(nbytes(layout, fmt), dtype=torch.uint8)
    quantize(fmt, x, wire, layout, tag)
    pieced: dict[tuple[int, int], list[tuple[bytes, bytes]]] = {}
    for part in parts_of(layout, fmt):
        small = torch.zeros(nbytes(part, fmt), dtype=torch.uint8)
        quantize(fmt, x, small, part, tag)
        for index, p in enumerate(pieces(part, fmt)):
            key = divmod(index, len(layout.sizes))
            pieced.setdefault(key, []).append(content(small, p, layout, fmt))
    for index, p in enumerate(pieces(layout, fmt)):
        codes, scales = zip(*pieced[divmod(index, len(layout.sizes))], strict=True)
        assert content(wire, p, layout, fmt) == (b"".join(codes), b"".join(scales))


def content(wire: torch.Tensor, p: Piece, layout: Layout, fmt: Format) -> tuple[bytes, bytes]:
    """The bytes of one piece: codes or raw elements, and scales."""
    if p.exact:
        size, scales = p.numel * layout.dtype.itemsize, 0
    else:
        size, scales = fmt.code_bytes(p.numel), fmt.scale_bytes * fmt.scale_count(p.numel)
    data = wire.numpy().tobytes()
    return data[p.code : p.code + size], data[p.scale : p.scale + scales]


def test_sizes_by_hand() -> None:
    int4 = codec("int4").format
    # 1000 codes of 4 bits are 500 bytes (512 aligned), 8 scales are 16 bytes.
    assert nbytes(Layout((1000,)), int4) == 512 + 16
    # 7 elements are padded to 8: 4 bytes; a scale section of 2.
    assert nbytes(Layout((7,)), int4) == 16 + 16
    assert nbytes(Layout((0,)), int4) == 0
    # 1000 elements have 32 scales of one byte.
    assert nbytes(Layout((1000,)), codec("mxfp4").format) == 512 + 32
    assert nbytes(Layout((7,), exact=(True,)), int4) == 32
    # Four chunks of 256 elements: every payload is as large as the largest.
    assert nbytes(Layout((1000,), ranks=4, align=128), int4) == 4 * (128 + 16)
    assert nbytes(Layout((129,), ranks=4, align=128), int4) == 4 * (64 + 16)
    assert nbytes(Layout((1000,), stacked=True, ranks=4), int4) == 4 * (512 + 16)


def test_odd_widths_are_planes_of_8_4_2_and_1_bits() -> None:
    widths = {bits: Format("uniform", bits=bits).planes for bits in range(1, 10)}
    assert widths[7] == (4, 2, 1)
    assert widths[6] == (4, 2)
    assert widths[5] == (4, 1)
    assert widths[3] == (2, 1)
    assert widths[9] == (8, 1)
    assert all(sum(planes) == bits for bits, planes in widths.items())


def test_blocks_of_an_int8_residual_are_those_of_the_pieces() -> None:
    fmt = codec("int4:block=32").format
    for layout in (Layout((100, 0, 7, 64)), Layout((500, 40), ranks=3, align=64)):
        ends = [p.memory_block + -(-p.numel // fmt.block) for p in pieces(layout, fmt)]
        assert max(ends) == blocks(layout.sizes, fmt)
        starts = sorted(p.memory_block for p in pieces(layout, fmt) if p.numel)
        assert len(set(starts)) == len(starts)


def test_the_table_is_the_pieces() -> None:
    layout, fmt = Layout((300, 9), ranks=2, align=128, exact=(False, True)), FORMATS[2]
    rows = table(layout, fmt)
    assert [tuple(row) for row in rows.tolist()] == [tuple(p) for p in pieces(layout, fmt)]
    with pytest.raises(ValueError, match="read-only"):
        rows[0, 0] = 1


def test_residuals_without_room_are_refused() -> None:
    fmt, layout, tag = codec("int8:block=32").format, Layout((100, 60), ranks=2, align=32), Tag()
    x, wire = torch.zeros(160), torch.zeros(nbytes(layout, fmt), dtype=torch.uint8)
    chunk = layout.only(1)
    sums = torch.zeros(stride(layout, fmt), dtype=torch.uint8)
    int8, scales = torch.zeros(160, dtype=torch.int8), torch.zeros(6, dtype=torch.int16)
    for memory in (Memory(torch.zeros(160)), Memory(int8, scales)):
        quantize(fmt, x, wire, layout, tag, memory)
    reduce(fmt, wire[: 2 * len(sums)], sums, chunk, tag, memory=Memory(torch.zeros(64)))
    cases = [
        (Memory(torch.zeros(159)), "needs 160 flat contiguous elements"),
        (Memory(torch.zeros(320)[::2]), "needs 160 flat contiguous elements"),
        (Memory(int8), "needs 6 flat contiguous scales .*got none"),
        (Memory(int8, scales[:5]), r"needs 6 flat contiguous scales .*got 5 x torch\.int16"),
    ]
    for memory, complaint in cases:
        with pytest.raises(ValueError, match=complaint):
            quantize(fmt, x, wire, layout, tag, memory)
    with pytest.raises(ValueError, match="needs 64 flat contiguous elements"):
        reduce(fmt, wire[: 2 * len(sums)], sums, chunk, tag, memory=Memory(torch.zeros(63)))


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"sizes": (-1,)}, "sizes must be >= 0"),
        ({"sizes": (1,), "ranks": 0}, "ranks and align must be >= 1"),
        ({"sizes": (1,), "exact": (True, False)}, "exact has 2 entries for 1 segments"),
        ({"sizes": (1,), "offsets": (1, 2)}, "offsets has 2 entries for 1 segments"),
        ({"sizes": (1,), "part": (2, 2)}, "part must be"),
        ({"sizes": (1,), "ranks": 2, "chunk": 2}, "chunk 2 is not one of 2"),
        ({"sizes": (1,), "dense": True}, "dense needs a chunk"),
        ({"sizes": (1,), "offsets": (-8,)}, "offsets must be >= 0"),
    ],
)
def test_impossible_layouts_are_refused(given: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Layout(**given)  # type: ignore[arg-type]


def test_impossible_pairs_of_layout_and_format_are_refused() -> None:
    with pytest.raises(ValueError, match=r"align=64 elements.*blocks of 128"):
        nbytes(Layout((500,), ranks=2, align=64), codec("int8").format)
    with pytest.raises(ValueError, match="cannot be cut into slices"):
        nbytes(Layout((500,)).slice(0, 2), TENSOR)


def test_wrong_tensors_are_refused() -> None:
    layout, fmt = Layout((64,)), codec("int8").format
    x, wire = torch.zeros(64), torch.zeros(nbytes(Layout((64,)), fmt), dtype=torch.uint8)
    long = torch.zeros(wire.numel() + 1, dtype=torch.uint8)
    cases = [
        (x.double(), wire, "fp32, fp16 and bf16"),
        (x.half(), wire, "got torch.float16 for a layout of torch.float32"),
        (x[:60], wire, "at least 64 elements"),
        (torch.zeros(128)[::2], wire, "contiguous"),
        (x, wire[:-1], "needs 80 contiguous bytes"),
        (x, wire.float(), "uint8"),
        (x, long[1:], "multiple of 16 bytes"),  # T54
    ]
    for tensor, target, complaint in cases:
        with pytest.raises(ValueError, match=complaint):
            quantize(fmt, tensor, target, layout, Tag())


def test_t54_tensors_at_odd_offsets_are_coded_alike() -> None:
    fmt = codec("int4").format
    x = data("random", 333)
    wires = []
    for offset in range(5):
        shifted = torch.zeros(340)[offset : offset + 333]
        shifted.copy_(x)
        wires.append(torch.zeros(nbytes(Layout((333,)), fmt), dtype=torch.uint8))
        quantize(fmt, shifted, wires[-1], Layout((333,)), Tag())
    assert all(torch.equal(a, b) for a, b in itertools.pairwise(wires))
