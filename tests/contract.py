"""The contracts, as checkers over tables: a new codec or backend is one line in a table.

`check_backend` compares every byte and every residual a backend makes with another backend's;
`check_codec` holds what any codec promises, whatever its format.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Literal, NamedTuple

import pytest
import torch

from commlib.codecs import Codec, codec
from commlib_kernels import BACKENDS, Format, Layout, Memory, Tag, load
from commlib_kernels.layout import blocks, nbytes, pieces, stride

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LENGTHS = (0, 1, 7, 8, 9, 127, 128, 129, 1000, 4097)
"""Elements: nothing, less than a byte of codes, around a block, around a run of sums."""

CODECS = [
    *("fp32", "fp16", "bf16", "fp8", "fp8:block=32:round=stochastic"),
    *("int8", "int7", "int6", "int5", "int4", "int3", "int2"),
    *("int8:block=96", "int4:block=32", "int3:block=4096", "int8:round=stochastic"),
    *("int5:block=64:round=stochastic", "int4:round=stochastic"),
    *("sign", "sign:block=40", "sign:block=4096", "sign:block=tensor"),
    *("ternary", "ternary:block=tensor", "qsgd", "qsgd:levels=7:block=512"),
    *("qsgd:levels=127:norm=max", "qsgd:levels=1:block=tensor"),
    *("natural", "natural:round=nearest"),
    *("eden4", "eden3:block=96", "eden2:scale=unbiased", "eden1:block=32", "nf4", "nf4:block=96"),
    *("e2m1", "e3m0:block=32", "eden2:block=4096"),
    *("rotate|int4", "rotate|int8:block=4096:round=stochastic", "rotate|int2", "rotate|sign"),
    *("rotate|eden4", "rotate|eden3:block=512", "rotate|eden2:block=128", "rotate|eden1"),
    *("rotate:seed=5|eden2:scale=unbiased", "rotate|nf4:block=2048", "rotate|fp8:block=256"),
    "rotate|qsgd:block=256",
]
"""Texts that reach every kind, width, scale rule, rounding and odd block size, rotated or not."""

CPU_CODECS = [
    *("mxfp8", "mxfp8:block=96", "mxfp8:round=stochastic", "mxfp4", "mxfp4:block=4096"),
    *("grid4", "grid2:block=96", "grid6:block=4096", "rotate|grid3:block=256", "grid5"),
    *("rotate|mxfp8:block=128:round=stochastic", "rotate|mxfp4:block=256", "sigma8"),
]
"""The same of codecs that have no CUDA kernels yet."""

SPARSE = [
    *("topk|bf16", "topk:density=0.1|int8", "topk:density=0.3:block=96|fp32", "topk|fp16"),
    *("topk:density=0.05:block=1024|int4:round=stochastic", "topk:density=0.8|eden2:block=128"),
    *("randk|bf16", "randk:density=0.1:scale=unbiased|fp32", "randk:density=0.2:block=128|int8"),
    "randk:density=0.5:block=4096:scale=unbiased|fp16",
]
"""Codecs of some elements only: no CUDA kernels yet, and other sizes than all the others."""

KINDS = ("random", "zero", "nonfinite", "tiny", "huge", "mixed")
Residual = Literal["none", "fp32", "bf16", "int8"]
RESIDUALS: dict[Residual, torch.dtype | None] = {
    "none": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
}


@cache
def data(kind: str, numel: int, seed: int = 0) -> torch.Tensor:
    """`numel` fp32 elements of one kind of trouble; "mixed" changes it every 24 elements."""
    g = torch.Generator().manual_seed(1000 * KINDS.index(kind) + seed)
    x = torch.randn(numel, generator=g) * torch.exp(torch.randn(numel, generator=g))
    if kind == "zero":
        return torch.zeros(numel)
    if kind == "tiny":
        powers = torch.tensor([1e-30, 1e-38, 1e-42, 2.0**-100, 2.0**-99, 2.0**-126])
        return x * powers[torch.arange(numel) // 128 % len(powers)]
    if kind == "huge":
        powers = torch.tensor([2.0**124, 2.0**125, 2.0**126, 2.0**126 * (1 - 2.0**-24), 2.0**120])
        return x.clamp(-1, 1) * powers[torch.arange(numel) // 128 % len(powers)]
    if kind == "nonfinite":  # in some blocks; others stay clean
        bad = torch.tensor([float("nan"), float("inf"), -float("inf"), -float("nan")])
        at = torch.arange(5, numel, 211)
        x[at] = bad[torch.arange(at.numel()) % 4]
    if kind == "mixed":
        others = torch.stack([data(k, numel, seed) for k in KINDS[:-1]])
        return others.gather(0, (torch.arange(numel) // 24 % len(others))[None])[0]
    return x


class Case(NamedTuple):
    """One message, and the next of the same key."""

    fmt: Format
    layout: Layout
    kind: str = "random"
    residual: Residual = "none"
    rates: tuple[float, float, float] = (1.0, 1.0, 1.0)
    hold: tuple[int, ...] = ()


class Ground:
    """Hands out tensors with a margin on both sides, and knows when somebody wrote there."""

    MARGIN = 64  # bytes

    def __init__(self) -> None:
        self.lent: list[tuple[torch.Tensor, int]] = []

    def tensor(self, value: torch.Tensor) -> torch.Tensor:
        """A copy of a flat tensor, in the middle of a larger one."""
        size = value.numel() * value.itemsize
        base = torch.full((size + 2 * self.MARGIN + -size % 8,), 0xA5, dtype=torch.uint8)
        self.lent.append((base, size))
        copy = base[self.MARGIN : self.MARGIN + size].view(value.dtype)
        return copy.copy_(value)

    def wire(self, size: int) -> torch.Tensor:
        """A wire whose padding shows when somebody writes it."""
        return self.tensor(torch.full((size,), 0xA5, dtype=torch.uint8))

    def check(self) -> None:
        """Nobody wrote beyond a tensor's ends."""
        for base, size in self.lent:
            around = torch.cat([base[: self.MARGIN], base[self.MARGIN + size :]])
            assert (around == 0xA5).all(), "written beyond the ends of a tensor"


def memory(case: Case, ground: Ground, *, owner: bool) -> Memory | None:
    """A residual of zeros for the whole tensor, or for the owner's chunk."""
    dtype = RESIDUALS[case.residual]
    if dtype is None:
        return None
    layout = case.layout
    if owner or layout.dense:
        cuts = [layout.cut(s, layout.payloads[0]) for s in range(len(layout.sizes))]
        sizes = tuple(b - a for a, b in cuts)
    else:
        sizes = layout.sizes * (layout.ranks if layout.stacked else 1)
    h = ground.tensor(torch.zeros(sum(sizes), dtype=dtype))
    scales = None
    if dtype == torch.int8:
        scales = ground.tensor(torch.zeros(blocks(sizes, case.fmt), dtype=torch.int16))
    return Memory(h, scales, *case.rates, hold=case.hold)


def tag(case: Case, step: int) -> Tag:
    """Big numbers: a counter that is cut to 32 bits in one backend and not in another shows."""
    keys = tuple(0xDEADBEEF + 977 * s for s in range(max(1, len(case.layout.sizes))))
    return Tag((3 << 40) + 5, keys, (1 << 33) + step, 2)


def outputs(backend: ModuleType, case: Case) -> dict[str, torch.Tensor]:
    """Everything that the three ops of a backend write for a case, by name."""
    fmt, layout, ground = case.fmt, case.layout, Ground()
    found: dict[str, torch.Tensor] = {}
    held = memory(case, ground, owner=False)
    wires = []
    for step in range(2):
        before = data(case.kind, layout.extent, step).to(layout.dtype)
        x, wire = ground.tensor(before), ground.wire(nbytes(layout, fmt))
        backend.quantize(fmt, x, wire, layout, tag(case, step), held)
        assert same(x, before), "quantize must not write its input"
        wires.append(wire)
        found[f"wire of step {step}"] = wire
        _note(found, f"after step {step}", held)
    for add in (False, True):
        out = ground.tensor(data("random", layout.extent, 7).to(layout.dtype))
        backend.dequantize(fmt, wires[0], out, layout, add=add)
        found[f"decoded, add={add}"] = out
    size = stride(layout, fmt)
    for index in {0, len(layout.payloads) - 1}:
        rank = layout.payloads[index]
        at = slice(index * size, (index + 1) * size)
        received = torch.cat([wire[at] for wire in (*wires, wires[0])])
        one = layout.only(rank)
        held = memory(case._replace(layout=one, hold=()), ground, owner=True)
        for step in range(1 + (held is not None)):
            wire = ground.wire(size)
            backend.reduce(fmt, received, wire, one, tag(case, step), factor=1 / 3, memory=held)
            found[f"reduced wire of rank {rank}, step {step}"] = wire
        _note(found, f"of owner {rank}", held)
        for dtype in {layout.dtype, torch.float32}:
            dense = ground.tensor(data("random", layout.chunk_numel(rank), 9).to(dtype))
            backend.reduce(fmt, received, dense, one, tag(case, 0), factor=0.3, memory=None)
            found[f"dense chunk of rank {rank} in {dtype}"] = dense
    ground.check()
    return found


def _note(found: dict[str, torch.Tensor], when: str, held: Memory | None) -> None:
    if held is not None:
        found[f"residual {when}"] = held.residual.clone()
        if held.scales is not None:
            found[f"residual scales {when}"] = held.scales.clone()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all bytes are equal, NaN included."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def require(name: str) -> ModuleType:
    """The backend; without it the test is skipped, or fails where COMMLIB_REQUIRE names it."""
    found = _on_host() if name == "cuda_host" else load(name)
    if isinstance(found, ModuleType):
        return found
    if name in os.environ.get("COMMLIB_REQUIRE", "").split(","):
        pytest.fail(f"COMMLIB_REQUIRE names {name}, which cannot be used here: {found}")
    pytest.skip(f"backend {name}: {found}")


def _on_host() -> ModuleType | ImportError:
    """The CUDA C++ kernels on this CPU, where there is a compiler."""
    module = importlib.import_module("tests.cuda_host")
    try:
        module.ready()
    except ImportError as error:
        return error
    return module


def backends() -> list[str]:
    """Every backend for CPU tensors, the oracle last; first the CUDA C++ kernels, on this CPU."""
    return ["cuda_host", *BACKENDS["cpu"]]


def check_backend(candidate: ModuleType, oracle: ModuleType, case: Case) -> None:
    """Every byte that `candidate` writes for a case is the oracle's."""
    want, got = outputs(oracle, case), outputs(candidate, case)
    assert want.keys() == got.keys()
    for name in want:
        if not same(want[name], got[name]):
            a, b = want[name].view(torch.uint8), got[name].view(torch.uint8)
            at = int((a != b).nonzero()[0])
            pytest.fail(
                f"{candidate.name} differs from {oracle.name} in {int((a != b).sum())} of "
                f"{a.numel()} bytes of the {name}, first at byte {at} "
                f"({at // want[name].itemsize} of {want[name].dtype}): "
                f"{b[at : at + 8].tolist()} instead of {a[at : at + 8].tolist()}\n{case}"
            )


def layouts(fmt: Format, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Layout]]:
    """Shapes of messages, by name."""
    sizes, align = (1000, 7, 0, 4097, 129, 64), max(fmt.align, 8)
    segments = Layout(sizes, dtype, align=align, exact=(False, True, True, False, False, True))
    gaps = Layout((129, 40, 300), dtype, offsets=(501, 1, 120))
    cut = Layout(sizes, dtype, ranks=4, align=align, exact=segments.exact)
    repeated = Layout((1031,), dtype, ranks=3, stacked=True)
    yield "one rank", segments
    yield "offsets", gaps
    yield "four ranks", cut
    yield "wider align", Layout((2000, 33), dtype, ranks=3, align=2 * align)
    yield "stacked", repeated
    yield "stacked segments", Layout((140, 9), dtype, ranks=2, stacked=True, exact=(False, True))
    yield (
        "stacked segments apart",
        Layout((129, 40), dtype, ranks=3, stacked=True, offsets=(51, 3), pitch=201),
    )
    yield "more ranks than blocks", Layout((9, 100), dtype, ranks=8, align=align)
    yield "chunk", cut.only(1)
    yield "last chunk", cut.only(3)
    yield "dense chunk", cut.only(2, dense=True)
    yield "chunk of a stack", repeated.only(2)
    yield "dense chunk of a stack", repeated.only(1, dense=True)
    if fmt.sliceable:
        yield "first slice", cut.slice(0, 3)
        yield "last slice", cut.slice(2, 3)
        yield "slice of a chunk", cut.only(0).slice(1, 2)
        yield "slice of a dense chunk", cut.only(1, dense=True).slice(1, 3)
        yield "slice of a stack", repeated.slice(1, 3)


RATES = {"none": (1.0, 1.0, 1.0), "fp32": (1.0, 1.0, 1.0), "bf16": (0.2, 1.0, 1.0)}
RATES["int8"] = (1.0, 1.0, 0.75)  # LoCo keeps its moving average in 8 bits


def cases_of_data(fmt: Format, dtype: torch.dtype) -> Iterator[Case]:
    """Every kind of data and every length, with every residual."""
    layout = Layout(LENGTHS, dtype)
    for kind in KINDS if dtype == torch.float32 else ("mixed",):
        for residual in RESIDUALS if kind in ("random", "mixed") else ("fp32",):
            yield Case(fmt, layout, kind, residual, RATES[residual])


def cases_of_shape(fmt: Format) -> Iterator[Case]:
    """Every shape of message, with residuals, rates and held segments in turn."""
    for index, (_, layout) in enumerate(layouts(fmt)):
        residual = list(RESIDUALS)[index % 4]
        rates = ((1.0, 1.0, 1.0), (0.2, 0.9, 1.0), (1.0, 1.0, 0.5))[index % 3]
        yield Case(fmt, layout, "mixed", residual, rates, (0,) if index % 2 else ())


SQUEEZED = [
    *("fp32", "fp16", "fp8", "int8", "int5:block=64", "int4", "int3:block=96", "int2", "sign"),
    *("ternary:block=tensor", "natural", "eden3", "nf4", "rotate|int4:round=stochastic"),
    *("grid4", "rotate|grid6", "mxfp8", "mxfp4:block=64", "sigma8"),
]
"""Texts of inner codecs that reach every way of making symbols."""


def encoded(c: Codec, x: torch.Tensor, t: Tag = Tag()) -> torch.Tensor:  # noqa: B008  (a value)
    """The wire of one tensor."""
    layout = Layout((x.numel(),), x.dtype)
    wire = torch.zeros(c.nbytes(layout), dtype=torch.uint8)
    assert c.encode(x, wire, layout, t) == wire.numel()
    return wire


def decoded(c: Codec, wire: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What a wire says."""
    out = torch.full_like(like, 7.0)
    c.decode(wire, out, Layout((like.numel(),), like.dtype), Tag())
    return out


def round_trip(c: Codec | str, x: torch.Tensor, step: int = 0, rank: int = 0) -> torch.Tensor:
    """Q(x)."""
    c = codec(c) if isinstance(c, str) else c
    return decoded(c, encoded(c, x, Tag(1, (2,), step, rank)), x)


def check_codec(c: Codec) -> None:
    """What every codec promises.

    A value with one text; exact sizes; errors below gamma; zeros stay zeros; NaN is seen; the same
    bytes for the same tag; adding is decoding and adding; a reduce is the fp32 sum in rank order.
    """
    assert codec(str(c)) == c
    assert hash(codec(str(c))) == hash(c)
    names = {type(part).__name__: type(part) for part in (c, getattr(c, "inner", c))}
    assert eval(repr(c), names) == c
    assert c.align == c.format.align
    for n in LENGTHS:
        for dtype in DTYPES:
            _check_length(c, data("random", n, seed=n).to(dtype))
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = data("random", 300).clone()
        x[130] = bad
        out = round_trip(c, x)
        # Casts of an infinite value keep it; every format with a scale loses its whole block.
        assert not out[130].isfinite()
    _check_reduce(c)


def _check_length(c: Codec, x: torch.Tensor) -> None:
    layout = Layout((x.numel(),), x.dtype)
    wire = encoded(c, x)
    assert wire.numel() == c.nbytes(layout)
    assert wire.numel() % 16 == 0
    assert same(wire, encoded(c, x)), "the same tag gives the same bytes"
    q = decoded(c, wire, x)
    one = torch.ones_like(x)
    c.decode(wire, one, layout, Tag(), add=True)
    # The sum is rounded to the tensor's dtype once, and a decoded value once before that.
    close = 2 * torch.finfo(x.dtype).eps
    torch.testing.assert_close(one, q + 1, rtol=close, atol=close)
    if not x.numel():
        return
    assert torch.equal(round_trip(c, torch.zeros_like(x)), torch.zeros_like(x))
    v, error = x.double(), (q.double() - x.double())
    # A random codec's error is below gamma on average; one draw of a short tensor may exceed it.
    slack = 9.0 if c.format.draws or c.unbiased else 1.0
    storage = torch.finfo(x.dtype).eps
    bound = slack * (c.gamma(x.numel()) + 1e-6) + (storage + storage**2)
    assert float(error @ error) <= bound * float(v @ v), (str(c), x.numel(), x.dtype)


def _check_reduce(c: Codec) -> None:
    for layout in (Layout((300, 20), ranks=1), Layout((1000, 20, 9), ranks=3, align=c.align)):
        xs = [data("random", layout.extent, seed) for seed in range(3)]
        wires = []
        for rank, x in enumerate(xs):
            wires.append(torch.zeros(c.nbytes(layout), dtype=torch.uint8))
            c.encode(x, wires[-1], layout, Tag(rank=rank))
        values = []
        for x, wire in zip(xs, wires, strict=True):
            values.append(torch.empty_like(x))
            c.decode(wire, values[-1], layout, Tag())
        want = ((torch.zeros_like(values[0]) + values[0]) + values[1] + values[2]) * 0.5
        total = torch.empty_like(want)
        size = c.nbytes(layout) // layout.ranks
        for r in range(layout.ranks):
            one = layout.only(r)
            received = torch.cat([wire[r * size : (r + 1) * size] for wire in wires])
            dense = torch.empty(layout.chunk_numel(r))
            c.reduce(received, dense, one, Tag(), factor=0.5)
            for p, q in zip(pieces(one, c.format), pieces(one, c.format, owner=True), strict=True):
                total[p.x : p.x + p.numel] = dense[q.memory : q.memory + q.numel]
            coded = torch.zeros(size, dtype=torch.uint8)
            c.reduce(received, coded, one, Tag(), factor=0.5)
            again = torch.zeros(size, dtype=torch.uint8)
            c.encode(dense, again, layout.only(r, dense=True), Tag())
            if not (c.format.sparse and c.format.sparse.scaled):  # a sum is not scaled again
                assert same(coded, again), "a reduce into a wire codes what it gives densely"
        if c.format.rotate is None:
            assert same(total, want), "a reduce is the fp32 sum in rank order, times factor"
        else:  # summed before it is rotated back: log2 n more roundings of sums as large as |v|
            near = 16 * torch.finfo(torch.float32).eps * float(torch.stack(values).norm())
            assert float((total - want).abs().max()) <= near
