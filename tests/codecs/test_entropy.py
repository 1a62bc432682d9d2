"""inner|entropy: the inner codec's bits in fewer bytes; grid: few bits once they are squeezed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commlib.codecs import Entropy, Grid, Int, Rotated, codec
from commlib.demo.data import load
from commlib.demo.model import GPT, SHAPES, optimizer
from commlib.feedback import Compressor, ErrorFeedback
from commlib.scheme import Scheme
from commlib_kernels import Layout, Tag
from tests.codecs.measures import nmse, student
from tests.contract import DTYPES, LENGTHS, SQUEEZED, data, same

Floats = {2: torch.int16, 4: torch.int32}


def squeezed(c: Entropy, x: torch.Tensor, layout: Layout | None = None) -> torch.Tensor:
    """What travels of a tensor."""
    layout = layout or Layout((x.numel(),), x.dtype)
    wire = torch.zeros(c.nbytes(layout), dtype=torch.uint8)
    return wire[: c.encode(x, wire, layout, Tag(1, (2,), 3, 4))]


def entropy(text: str) -> Entropy:
    c = codec(f"{text}|entropy")
    assert isinstance(c, Entropy)
    return c


@pytest.mark.parametrize("text", SQUEEZED)
class TestContract:
    """Every tensor decodes, adds and reduces to what it does without."""

    def test_is_a_value(self, text: str) -> None:
        c = entropy(text)
        assert str(c) == f"{codec(text)}|entropy"
        assert codec(str(c)) == c
        assert hash(codec(str(c))) == hash(c)
        assert c.inner == codec(text)
        for same_ in ("format", "unbiased", "align", "sliceable"):
            assert getattr(c, same_) == getattr(c.inner, same_)
        assert c.gamma(100) == c.inner.gamma(100)
        assert (c.sum_dtype, c.fixed_size) == (None, False)

    def test_decodes_and_adds(self, text: str) -> None:
        c = entropy(text)
        for n in LENGTHS:
            for dtype in DTYPES:
                x, layout = data("mixed" if n > 5 else "random", n).to(dtype), Layout((n,), dtype)
                plain = torch.zeros(c.inner.nbytes(layout), dtype=torch.uint8)
                c.inner.encode(x, plain, layout, Tag(1, (2,), 3, 4))
                wire = squeezed(c, x)
                assert same(wire, squeezed(c, x)), "the same tag gives the same bytes"
                assert c.sizes(wire, layout) == (wire.numel(),)
                for add in (False, True):
                    outs = torch.ones(2, n, dtype=dtype)
                    c.decode(wire, outs[0], layout, Tag(), add=add)
                    c.inner.decode(plain, outs[1], layout, Tag(), add=add)
                    assert same(outs[0], outs[1])

    def test_reduces(self, text: str) -> None:
        c = entropy(text)
        layout = Layout((1000, 20, 9), ranks=3, align=c.align)
        chunks: dict[tuple[bool, int], list[torch.Tensor]] = {}
        for rank in range(3):
            x = data("random", layout.extent, rank)
            for each in (c, c.inner):
                wire = torch.zeros(each.nbytes(layout), dtype=torch.uint8)
                used = each.encode(x, wire, layout, Tag(rank=rank))
                for r, part in enumerate(wire[:used].split(list(each.sizes(wire, layout)))):
                    chunks.setdefault((each is c, r), []).append(part)
        for r in range(3):
            one, found = layout.only(r), []
            for each in (c, c.inner):
                dense = torch.empty(layout.chunk_numel(r))
                wires = torch.cat(chunks[each is c, r])
                each.reduce(wires, dense, one, Tag(), factor=0.5)
                wire = torch.zeros(each.nbytes(one), dtype=torch.uint8)
                used = each.reduce(wires, wire, one, Tag(), factor=0.5)
                again = torch.zeros(layout.extent)
                each.decode(wire[:used], again, one, Tag())
                found += [dense, again]
            assert same(found[0], found[2])
            assert same(found[1], found[3])

    def test_residuals_are_the_same(self, text: str) -> None:
        c = entropy(text)
        try:
            ErrorFeedback().check(c.inner)
        except ValueError:
            with pytest.raises(ValueError, match="diverges"):
                ErrorFeedback().check(c)
            return
        kept = []
        for each in (c, c.inner):
            compressor = Compressor(each, ErrorFeedback())
            x, layout = data("random", 500), Layout((500,))
            for _ in range(3):
                wire = torch.zeros(each.nbytes(layout), dtype=torch.uint8)
                compressor.compress("x", x, wire, layout)
            kept.append(compressor.state_dict()["residuals"]["x"])
        assert same(kept[0], kept[1])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DTYPES), st.integers(0, 5000), st.integers(0, 2), st.integers(0, 1 << 30))
def test_fp32_entropy_loses_no_bit(dtype: torch.dtype, n: int, kind: int, seed: int) -> None:
    """Of any patterns: NaN with their payloads, infinities, subnormals."""
    g = torch.Generator().manual_seed(seed)
    bits = 8 * dtype.itemsize
    x = torch.randint(-(1 << bits - 1), 1 << bits - 1, (n,), generator=g).to(Floats[dtype.itemsize])
    x = x.view(dtype)
    if kind == 1:
        x = torch.randn(n, generator=g).to(dtype)
    if kind == 2 and n:
        special = [
            0.0,
            -0.0,
            float("inf"),
            -float("inf"),
            float("nan"),
            torch.finfo(dtype).tiny / 2,
        ]
        x = torch.tensor(special).to(dtype)[torch.randint(0, 6, (n,), generator=g)]
    c, out = entropy("fp32"), torch.zeros(n, dtype=dtype)
    c.decode(squeezed(c, x), out, Layout((n,), dtype), Tag())
    assert same(out, x)


def weights() -> torch.Tensor:
    """Of a small GPT after some steps."""
    corpus, model = load(), GPT(SHAPES["small"])
    adam = optimizer("adamw", model)
    for step in range(10):
        adam.zero_grad()
        model(*corpus.batch(4, 64, seed=0, step=step, rank=0)).backward()
        adam.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_bf16_weights_take_two_thirds() -> None:
    """An exponent of normal numbers has an entropy of 2.6 bits: 10.6 of 16."""
    normal = 0.02 * torch.randn(1 << 19, generator=torch.Generator().manual_seed(0))
    for x in (normal, weights()):
        share = squeezed(entropy("fp32"), x.bfloat16()).numel() / (2 * x.numel())
        assert 0.6 < share <= 0.70
        assert squeezed(entropy("fp32"), x).numel() / (4 * x.numel()) < 0.86


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_grids_are_near_the_bound(bits: int) -> None:
    """0.25 bits above it, plus scales and tables; about `bits` bits; the same on all data."""
    n = 1 << 19
    c = entropy(f"rotate|grid{bits}")

    def gap(x: torch.Tensor) -> tuple[float, float]:
        cost = 8 * squeezed(c, x).numel() / n
        return cost, cost - 0.5 * math.log2(1 / nmse(c.inner, x))

    g = torch.Generator().manual_seed(bits)
    normal = torch.randn(n, generator=g)
    cost, above = gap(normal)
    assert above <= 0.30
    assert abs(cost - bits) < 0.12
    assert c.bits_per_element == pytest.approx(cost, abs=0.01)
    laplace = torch.empty(n).exponential_(generator=g) * torch.randn(n, generator=g).sign()
    for x in (laplace, student(1, n)):
        assert gap(x)[1] <= above + 0.05


def test_expected_sizes() -> None:
    """Of normal data; other data and short messages differ, but never beyond `nbytes`."""
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(1))
    for text in ("int4", "rotate|grid3", "fp32"):
        c = entropy(text)
        layout = Layout((x.numel(),), ranks=2, align=c.align)
        assert squeezed(c, x, layout).numel() == pytest.approx(c.expected(layout), rel=0.02)
        assert c.expected(Layout((8,))) <= c.nbytes(Layout((8,)))
        assert c.inner.expected(layout) == c.inner.nbytes(layout)


def test_text_and_fields() -> None:
    assert codec("int4|entropy") == Entropy(Int(4))
    assert codec("rotate|int4:block=256|entropy") == Entropy(Rotated(Int(4, block=256)))
    assert codec("rotate:seed=3|grid4 | entropy") == Entropy(Rotated(Grid(4), seed=3))
    assert codec("int4|entropy").rounded("stochastic") == codec("int4:round=stochastic|entropy")
    assert str(Scheme.parse("int4:block=64|entropy+ef")) == "int4:block=64|entropy+ef"
    assert codec("rotate|int4|entropy").id == "rotate|int4|entropy"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("entropy|int4", "stage 'entropy' stands last: write int4|entropy"),
        ("int4|entropy|entropy", "already squeezed"),
        ("int4|entropy:speed=3", "option 'speed=3' is not known; allowed: none"),
        ("int4|entrop", "stage 'entrop' does not exist; allowed: entropy; did you mean 'entropy'"),
        ("int4|rotate", "stage 'rotate' does not exist; allowed: entropy"),
        ("|entropy", "codec '' does not exist"),
        ("entropy", "codec 'entropy' does not exist"),
        ("grid7", "codec 'grid7' does not exist"),
        ("grid4:block=33", "block=33; allowed"),
        ("int4|entropy@native", "network cannot add"),
        ("int2:round=stochastic|entropy+ef", "diverges"),
    ],
)
def test_refusals(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint.replace("|", r"\|")):
        Scheme.parse(text)


def test_more_payloads_than_ranks_are_refused() -> None:
    c, layout = entropy("int4"), Layout((500,), ranks=2, align=128)
    one = layout.only(0)
    wires = squeezed(c, torch.ones(500), one).repeat(3)
    with pytest.raises(RuntimeError, match="3 squeezed payloads arrived for a sum over 2 ranks"):
        c.reduce(wires, torch.zeros(layout.chunk_numel(0)), one, Tag())


def test_rotation_stands_before() -> None:
    with pytest.raises(ValueError, match="squeeze the rotation"):
        Rotated(Entropy(Int(4)))


def test_cuda_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"kernels for the CPU only; use int4:block=64$"):
        entropy("int4:block=64").warmup(torch.device("cuda:0"))
