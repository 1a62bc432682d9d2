"""Squeezed payloads: every backend writes the same bytes, and none believes what it reads."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commlib.codecs import codec
from commlib_kernels import Format, Layout, Tag, expand, nbytes, reference, squeeze
from commlib_kernels import squeezed_bound as bound
from commlib_kernels import squeezed_sizes as sizes_of
from commlib_kernels.layout import stride
from commlib_kernels.reference import entropy
from commlib_kernels.squeezed import LANES, PROBLEMS, SPARE, STATES_AT, sections
from tests.contract import DTYPES, SQUEEZED, Ground, data, layouts, require, same

BACKENDS = ("reference", "numba_cpu")


def wire_of(fmt: Format, layout: Layout, kind: str = "random") -> torch.Tensor:
    """A wire as codecs make it, with padding that shows."""
    wire = torch.full((nbytes(layout, fmt),), 0xA5, dtype=torch.uint8)
    keys = tuple(range(max(1, len(layout.sizes))))
    x = data(kind, layout.extent).to(layout.dtype)
    reference.quantize(fmt, x, wire, layout, Tag(5, keys, 1, 0))
    return wire


def cases(fmt: Format) -> list[tuple[Layout, str]]:
    """Shapes of messages, kinds of data, dtypes; and one long enough that all is coded."""
    found = [(layout, "mixed") for _, layout in layouts(fmt)]
    found += [(Layout((1000, 0, 9), dtype), "random") for dtype in DTYPES]
    found += [(Layout((3000,)), kind) for kind in ("zero", "nonfinite", "tiny")]
    exact = (False, True, False)
    found.append((Layout((9000, 5000, 801), ranks=2, align=8 * fmt.align, exact=exact), "random"))
    return found


def squeezed(name: str, fmt: Format, wire: torch.Tensor, layout: Layout) -> torch.Tensor:
    """What a backend makes of a wire."""
    ground = Ground()
    given_, out = ground.tensor(wire), ground.wire(bound(layout, fmt))
    used = require(name).squeeze(fmt, given_, out, layout)
    ground.check()
    assert same(given_, wire), "squeeze must not write its input"
    return out[:used].clone()


def expanded(name: str, fmt: Format, got: torch.Tensor, layout: Layout) -> torch.Tensor:
    """And back."""
    ground = Ground()
    wire = ground.wire(nbytes(layout, fmt))
    try:
        require(name).expand(fmt, ground.tensor(got), wire, layout)
    finally:
        ground.check()
    return wire


@pytest.mark.parametrize("text", SQUEEZED)
def test_same_bytes_and_back(text: str) -> None:
    """Of all shapes; every byte comes back but the padding, which does not travel."""
    fmt = codec(text).format
    for layout, kind in cases(fmt):
        wire = wire_of(fmt, layout, kind)
        want = squeezed("reference", fmt, wire, layout)
        assert want.numel() % 16 == 0
        assert sum(sizes_of(want)) == want.numel() <= bound(layout, fmt)
        assert len(sizes_of(want)) == len(layout.payloads)
        assert same(squeezed("numba_cpu", fmt, wire, layout), want), (layout, kind)
        for name in BACKENDS:
            assert same(expanded(name, fmt, want, layout), wire), (name, layout, kind)


@pytest.mark.parametrize("text", SQUEEZED)
def test_a_payload_is_coded_for_itself(text: str) -> None:
    """So any number of payloads of one chunk may come from anybody, as they do in a reduce."""
    fmt = codec(text).format
    layout = Layout((4000, 300), ranks=3, align=8 * fmt.align, exact=(False, True))
    wire, size = wire_of(fmt, layout), stride(layout, fmt)
    parts = squeezed("numba_cpu", fmt, wire, layout).split(list(sizes_of(wire_parts(fmt, layout))))
    for rank, part in enumerate(parts):
        one, mine = layout.only(rank), wire[rank * size : (rank + 1) * size]
        assert same(squeezed("numba_cpu", fmt, mine.clone(), one), part)
        many = torch.full((3 * size,), 0xA5, dtype=torch.uint8)
        expand(fmt, torch.cat([part] * 3), many, one)
        assert same(many, mine.repeat(3))


def wire_parts(fmt: Format, layout: Layout) -> torch.Tensor:
    out = torch.zeros(bound(layout, fmt), dtype=torch.uint8)
    return out[: squeeze(fmt, wire_of(fmt, layout), out, layout)]


counts = st.lists(st.integers(0, 400), min_size=1, max_size=256).filter(any)


@settings(max_examples=60, deadline=None)
@given(counts, st.integers(0, 255), st.integers(0, 1 << 30))
def test_streams(counts: list[int], first: int, seed: int) -> None:
    """Any symbols come back; frequencies add up; words cost what the entropy says they must."""
    there = np.repeat((first + np.arange(len(counts))) % 256, counts).astype(np.uint8)
    symbols = np.random.default_rng(seed).permutation(there)
    f = entropy.frequencies(symbols)
    occurs = np.bincount(symbols, minlength=256) > 0
    assert sum(f) == 4096
    assert max(f) < 4096
    assert all(n >= 1 for n, o in zip(f, occurs, strict=True) if o)
    assert sum(n > 0 for n in f) == max(2, occurs.sum())
    numba = require("numba_cpu").entropy
    room = 2 * symbols.size + 1024
    outs = [np.full(room, 7, np.uint8) for _ in BACKENDS]
    used = [c.encode(symbols, out) for c, out in zip((entropy, numba), outs, strict=True)]
    assert used[0] == used[1] > 0
    assert np.array_equal(outs[0][: used[0]], outs[1][: used[1]])
    bits = -sum(math.log2(f[s] / 4096) for s in symbols)
    words = int.from_bytes(outs[0][:4].tobytes(), "little")
    # A state has 16 bits at first and up to 32 in the end; dividing rounds by less than 2^-4 of f.
    assert 16 * words <= bits * 1.01 + 8
    assert 16 * (words + LANES) >= bits * 0.99 - 8
    for c in (entropy, numba):
        back = np.zeros_like(symbols)
        assert c.decode(outs[0][: used[0]], back, 256) == used[0]
        assert np.array_equal(back, symbols)
        assert c.encode(symbols, outs[0][: used[0] + SPARE].copy()) == used[0]
        assert c.encode(symbols, outs[0][: used[0] + SPARE - 2].copy()) == 0


def outcome(name: str, fmt: Format, got: torch.Tensor, layout: Layout) -> bytes | None:
    """What a backend decodes; None where it refuses."""
    try:
        return expanded(name, fmt, got, layout).numpy().tobytes()
    except RuntimeError as error:
        return None if "squeezed payload" in str(error) else b"another error"


FUZZED = [(codec(t).format, Layout((700, 60), ranks=2, align=n, exact=(False, True))) for t, n in
          (("int4", 128), ("int3", 128), ("fp32", 8))]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(FUZZED),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=4),
    st.integers(0, 1 << 20),
)
def test_damaged_payloads_are_refused_or_decode_to_something(
    what: tuple[Format, Layout], changes: list[tuple[int, int]], end: int
) -> None:
    fmt, layout = what
    got = wire_parts(fmt, layout)
    for place, byte in changes:
        got[place % (64 if place % 2 else got.numel())] = byte
    got = got[: 16 * (end % 200)] if end % 3 == 0 else got
    assert outcome("numba_cpu", fmt, got, layout) == outcome("reference", fmt, got, layout)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(FUZZED), st.binary(max_size=400), st.integers(0, 7))
def test_any_bytes_are_refused_or_decode_to_something(
    what: tuple[Format, Layout], noise: bytes, coded: int
) -> None:
    """Behind headers that look right, else nothing would get past them."""
    fmt, layout = what[0], what[1].only(0)
    noise += bytes(-len(noise) % 16)
    head = (16 + len(noise)).to_bytes(8, "little") + bytes([coded, *bytes(7)])
    got = torch.tensor(list(head + noise), dtype=torch.uint8)
    assert outcome("numba_cpu", fmt, got, layout) == outcome("reference", fmt, got, layout)


def stream(n: int = 1000) -> tuple[np.ndarray, bytearray]:
    symbols = (np.arange(n) ** 2 % 7).astype(np.uint8)
    out = np.zeros(2 * n, np.uint8)
    return symbols, bytearray(out[: entropy.encode(symbols, out)].tobytes())


def _short(good: bytearray) -> bytearray:
    return good[:-2]


def _zero(good: bytearray) -> bytearray:
    good[STATES_AT] = 0
    return good


def _other(good: bytearray) -> bytearray:
    good[STATES_AT + 1] ^= 1
    return good


def _foreign(good: bytearray) -> bytearray:
    good[4], good[5] = good[4] & 0xFE, good[5] | 1  # symbol 0 is called 8: order stays
    return good


def _turned(good: bytearray) -> bytearray:
    good[-1] ^= 1
    return good


@pytest.mark.parametrize(
    ("damage", "problem"), [(_short, -1), (_zero, -2), (_other, -3), (_foreign, -4), (_turned, -5)]
)
@pytest.mark.parametrize("name", BACKENDS)
def test_problems_of_streams(
    name: str, damage: Callable[[bytearray], bytearray], problem: int
) -> None:
    coder = require(name).entropy
    symbols, good = stream()
    bad = np.frombuffer(bytes(damage(good)), np.uint8).copy()
    assert coder.decode(bad, np.zeros_like(symbols), 8) == problem
    assert problem in PROBLEMS


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda x: x[:8], "payload 0: its header is cut off"),
        (lambda x: torch.cat([x[:1] + 1, x[1:]]), "payload 0 says it has"),
        (lambda x: x[:-16], "payload 0 says it has"),
        (lambda x: torch.cat([x[:8], x[8:9] + 64, x[9:]]), "header has bits that none has"),
        (lambda x: torch.cat([x[:8], 0 * x[8:9], x[9:]]), "is cut off|its sections have"),
    ],
)
def test_refusals(change: Callable[[torch.Tensor], torch.Tensor], complaint: str) -> None:
    fmt, layout = codec("int4").format, Layout((6000,))
    got = change(wire_parts(fmt, layout)).contiguous()
    with pytest.raises(RuntimeError, match=complaint):
        expand(fmt, got, torch.zeros(nbytes(layout, fmt), dtype=torch.uint8), layout)


def test_what_does_not_pay_is_stored() -> None:
    """Random bits: 16 bytes of header, and nothing else."""
    layout = Layout((4096,))
    wire = torch.randint(0, 256, (nbytes(layout, codec("int8").format),)).to(torch.uint8)
    got = squeezed("numba_cpu", codec("int8").format, wire, layout)
    assert got.numel() == wire.numel() + 16
    assert same(got[16:], wire)
    assert [s.symbols for s in sections(layout, codec("int3").format, 0)] == [4096, 32, 0]
