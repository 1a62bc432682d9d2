"""topk|inner and randk|inner: what is chosen, where it is, what is left for the residual."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commlib.codecs import RandK, TopK, codec
from commlib.feedback import Compressor, ErrorFeedback
from commlib.scheme import Role, Scheme
from commlib_kernels import Layout, Memory, Tag, load, nbytes, reference
from commlib_kernels.compact import chosen
from commlib_kernels.sparse import Sparse
from tests.codecs.measures import D, lognormal, mean_nmse, nmse, student
from tests.contract import Ground, data, round_trip, same

BACKENDS = ("numba_cpu", "reference")


def best(x: torch.Tensor, k: int) -> torch.Tensor:
    """x at its k largest magnitudes, of equal ones the first, else 0."""
    order = torch.sort(x.abs(), descending=True, stable=True).indices[:k]
    return torch.zeros_like(x).index_copy_(0, order, x[order])


def awkward(kind: str, numel: int) -> torch.Tensor:
    """Data that is hard on a guessed threshold."""
    g = torch.Generator().manual_seed(numel)
    steps = torch.arange(1, numel + 1, dtype=torch.float32)
    if kind == "few values":
        return torch.randint(-2, 3, (numel,), generator=g).float()
    if kind == "periodic":  # in step with a sample
        return 1 + (steps % 64 == 0) * steps
    kinds = {"ascending": steps, "descending": steps.flip(0), "equal": torch.ones(numel)}
    kinds["one spike"] = torch.zeros(numel).index_fill_(0, torch.tensor([numel // 2]), 3.0)
    kinds["large at the end"] = torch.where(steps > numel - numel // 50, 1e6, 1.0) * steps
    return kinds[kind] if kind in kinds else torch.randn(numel, generator=g)


KINDS = ("random", "few values", "periodic", "ascending", "descending", "equal", "one spike")
KINDS += ("large at the end",)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("numel", [1, 31, 1000, 8191, 100_003])
@pytest.mark.parametrize("density", [0.001, 0.01, 0.3, 1])
def test_topk_keeps_exactly_the_k_largest(kind: str, numel: int, density: float) -> None:
    x = awkward(kind, numel)
    k = math.ceil(density * numel - 1e-9)
    assert torch.equal(round_trip(f"topk:density={density}|fp32", x), best(x, k))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_topk_of_any_floats_and_blocks(draw: st.DataObject) -> None:
    """Of every block of B, a short last one included; subnormals and zeros are numbers too."""
    floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
    values = draw.draw(st.lists(floats, min_size=1, max_size=300))
    x = torch.tensor(values, dtype=torch.float32)
    block = draw.draw(st.sampled_from([32, 64, 104]))
    c = TopK(codec("fp32"), density=draw.draw(st.sampled_from([0.01, 0.1, 0.5])), block=block)
    want = [best(part, math.ceil(c.density * part.numel() - 1e-9)) for part in x.split(block)]
    assert torch.equal(round_trip(c, x), torch.cat(want))


@pytest.mark.parametrize("text", ["topk:density=0.1|fp32", "topk:density=0.1:block=64|int8"])
def test_what_is_sent_and_what_stays_are_the_input(text: str) -> None:
    x, layout = data("random", 5000), Layout((5000,))
    c, h = codec(text), torch.zeros(5000)
    wire, q = torch.zeros(c.nbytes(layout), dtype=torch.uint8), torch.empty(5000)
    total = torch.zeros(5000)
    for step in range(5):
        before = h.clone()
        c.encode(x, wire, layout, Tag(step=step), Memory(h))
        c.decode(wire, q, layout, Tag())
        v = x + before
        assert torch.equal(h, v - q)
        assert torch.equal(h[q == 0], v[q == 0])
        total += q
    # Nothing is lost: what came and what is still owed are five inputs, but for roundings of h.
    torch.testing.assert_close(total + h, 5 * x, rtol=1e-5, atol=1e-5)


def test_nmse_of_the_top_percent() -> None:
    for vectors, want in ((lognormal, 0.63), (student, 0.66)):
        assert mean_nmse("topk|fp32", vectors) == pytest.approx(want, abs=0.02)
        for inner in ("fp32", "bf16", "int8"):
            c = codec(f"topk|{inner}")
            assert nmse(c, vectors(1)) <= c.gamma() <= 1
    k = math.ceil(0.01 * D)
    equal = torch.ones(D)
    assert nmse("topk|fp32", equal) == pytest.approx(1 - k / D)  # the worst there is


@pytest.mark.parametrize("density", [0.001, 0.01, 0.1, 0.5])
def test_positions_take_two_bits_more_than_their_logarithm(density: float) -> None:
    for numel in (100, 4096, 1_000_000):
        s = Sparse("topk", density)
        k = s.taken(numel)
        bound = k * (math.log2(numel / k) + 2) + 2
        assert 8 * (s.index_bytes(numel) - 17) <= bound
    assert codec("topk|fp16").bits_per_element == pytest.approx(0.01 * (16 + 8.57), abs=0.002)


@pytest.mark.parametrize("run", [0, 128])
def test_every_element_is_drawn_as_often_as_any_other(run: int) -> None:
    """Chi-square over 600 draws; k are distinct, ascending and of the asked number."""
    s, numel, draws = Sparse("randk", 0.1, run=run), 500, 600
    counts = np.zeros(numel)
    for step in range(draws):
        head = reference.sparse.head(Tag(3, (4,), step, rank=step % 5), 0)
        places = reference.sparse.random(s, numel, 1000, head)
        assert (np.diff(places) > 0).all()
        assert 0 <= places[0] <= places[-1] < numel
        assert len(places) == s.taken(numel)
        counts[places] += 1
    share = np.concatenate([np.full(m, k / m) for _, m, k in reference.sparse.runs(s, numel)])
    chi = float(((counts - draws * share) ** 2 / (draws * share * (1 - share))).sum())
    assert abs(chi - numel) < 6 * math.sqrt(2 * numel)


@pytest.mark.parametrize("text", ["randk:density=0.25:scale=unbiased|fp32"])
def test_randk_is_unbiased_over_steps(text: str) -> None:
    x, n = lognormal(0, 1024), 400
    many = torch.stack([round_trip(text, x, step).double() for step in range(n)])
    power = float(x.double().square().sum())
    one = float((many - x.double()).square().sum()) / n / power
    assert one == pytest.approx(codec(text).gamma(), rel=0.1)  # 1 / density - 1, exactly on average
    error = float((many.mean(0) - x.double()).square().sum()) / power
    assert error <= 1.5 * one / n
    biased = torch.stack([round_trip("randk:density=0.25|fp32", x, s) for s in range(40)])
    assert float((biased.mean(0) - x).square().sum()) / power > 0.4


def test_randk_is_the_same_on_all_ranks_and_new_in_every_step() -> None:
    x = torch.ones(1000)

    def kept(step: int, rank: int, key: int = 2, seed: int = 1) -> tuple[bool, ...]:
        layout, c = Layout((1000,)), codec("randk:density=0.1|bf16")
        wire, out = torch.zeros(c.nbytes(layout), dtype=torch.uint8), torch.empty(1000)
        c.encode(x, wire, layout, Tag(seed, (key,), step, rank))
        c.decode(wire, out, layout, Tag())
        return tuple((out != 0).tolist())

    assert len({kept(5, rank) for rank in range(4)}) == 1
    assert len({kept(0, 0), kept(1, 0), kept(0, 0, key=3), kept(0, 0, seed=2)}) == 4


def test_scales_follow_the_feedback() -> None:
    """Unbiased for gradients without feedback, a contraction with it; the user's word wins."""

    def scale(text: str, role: Role = Role.GRADIENT) -> object:
        chosen = Scheme.parse(text).resolve(role).codec
        assert isinstance(chosen, RandK)
        return chosen.scale

    assert scale("randk|bf16") == "unbiased"
    assert scale("randk|bf16+ef") == "none"
    assert scale("randk|bf16", Role.ACTIVATION) == "none"
    assert scale("randk:scale=none|bf16") == "none"
    assert codec("randk|bf16").sum_dtype is torch.bfloat16
    assert codec("randk|int8").sum_dtype is None


@pytest.mark.parametrize("text", ["topk|bf16", "topk|int8", "randk|fp32", "randk:block=64|int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16, torch.int8])
def test_a_bad_piece_is_seen_and_keeps_its_residual(
    text: str, bad: float, residual: torch.dtype
) -> None:
    """Of two parameters one is bad: all of it is NaN, and the step after it is clean."""
    c, layout = codec(text), Layout((700, 300))
    fmt, x = c.format, data("random", 1000)
    h = torch.zeros(1000, dtype=residual)
    scales = torch.zeros(20, dtype=torch.int16) if residual == torch.int8 else None
    memory = Memory(h, scales)
    wire, q = torch.zeros(c.nbytes(layout), dtype=torch.uint8), torch.empty(1000)
    c.encode(x, wire, layout, Tag(), memory)
    before, s_before = h.clone(), None if scales is None else scales.clone()
    wrong = x.clone()
    wrong[650] = bad
    c.encode(wrong, wire, layout, Tag(step=1), memory)
    c.decode(wire, q, layout, Tag())
    assert set(q[:700].view(torch.int32).tolist()) == {0x7FC00000}
    assert q[700:].isfinite().all()
    assert same(h[:700], before[:700])
    assert not same(h[700:], before[700:])
    if scales is not None and s_before is not None:
        count = -(-700 // fmt.block)
        assert same(scales[:count], s_before[:count])
    c.encode(x, wire, layout, Tag(step=2), memory)
    c.decode(wire, q, layout, Tag())
    assert q.isfinite().all()


def test_more_bad_elements_than_travel() -> None:
    x = data("random", 1000).clone()
    x[100:200] = float("inf")
    for text in ("topk|bf16", "topk:block=64|int8", "randk|fp16"):
        assert round_trip(text, x).isnan().all()
    out = torch.zeros(1000)
    c, layout = codec("topk|bf16"), Layout((1000,)).only(0)
    wire = torch.zeros(c.nbytes(layout), dtype=torch.uint8)
    c.encode(x, wire, layout, Tag())
    again = torch.zeros_like(wire)
    c.reduce(torch.cat([wire, wire]), again, layout, Tag())
    c.decode(again, out, layout, Tag())
    assert out.isnan().all()


def test_overflow_of_fp16_is_seen_and_does_not_stay() -> None:
    """What fp16 cannot hold must not enter the residual: it would be infinite for ever."""
    x, h = torch.full((1000,), 1e5), torch.zeros(1000)
    c, layout = codec("topk|fp16"), Layout((1000,))
    wire, q = torch.zeros(c.nbytes(layout), dtype=torch.uint8), torch.empty(1000)
    c.encode(x, wire, layout, Tag(), Memory(h))
    c.decode(wire, q, layout, Tag())
    assert q.isnan().all()
    assert h.eq(0).all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("text", ["topk|bf16", "topk:density=0.3:block=64|int8", "randk|fp32"])
def test_random_bytes_never_write_outside(name: str, text: str) -> None:
    """And every piece is finite or wholly NaN, alike from both backends."""
    backend, fmt = load(name), codec(text).format
    layout, g = Layout((700, 33, 2)), torch.Generator().manual_seed(0)
    size = nbytes(layout, fmt)
    for trial in range(40):
        wire = torch.randint(0, 256, (size,), generator=g, dtype=torch.uint8)
        if trial % 2:  # else nearly all have the wrong number of positions
            reference.quantize(fmt, data("random", 735), wire, layout, Tag())
            flips = torch.randint(0, size, (1 + trial // 8,), generator=g)
            wire[flips] ^= torch.randint(1, 256, flips.shape, generator=g, dtype=torch.uint8)
        found = []
        for decoder, add in itertools.product((backend, reference), (False, True)):
            ground = Ground()
            out = ground.tensor(torch.ones(735))
            decoder.dequantize(fmt, ground.tensor(wire), out, layout, add=add)
            ground.check()
            for part in out.split((700, 33, 2)):
                assert part.isfinite().all() or part.isnan().all()
            found.append(out)
        assert same(found[0], found[2])
        assert same(found[1], found[3])


def test_positions_that_are_none_are_nan() -> None:
    """One bit more, one bit less, and a position beyond the end."""
    c, layout = codec("topk:density=0.1|fp32"), Layout((100,))
    wire, out = torch.zeros(c.nbytes(layout), dtype=torch.uint8), torch.empty(100)
    c.encode(data("random", 100), wire, layout, Tag())
    (piece,) = chosen(layout, c.format)
    assert piece.values.numel == 10
    low = Sparse("topk", 0.1).low_bits(100)
    upper = -(-10 * low // 8)  # the first byte of the unary part
    for at, value in ((upper, 0xFF), (upper, 0), (0, 0)):
        broken = wire.clone()
        broken[at] = value
        if at == 0:  # equal low bits: the same position twice, or one that is not ascending
            broken[upper : upper + 3] = torch.tensor([0xFF, 0x03, 0], dtype=torch.uint8)
            broken[:upper] = 0
        c.decode(broken, out, layout, Tag())
        assert out.isnan().all()


def test_what_was_chosen_may_be_rotated() -> None:
    x = lognormal(0, 50_000)
    plain, rotated = (nmse(f"topk:density=0.1|{inner}", x) for inner in ("int3", "rotate|int3"))
    assert rotated < plain
    fmt, layout = codec("topk:density=0.1|rotate|eden2").format, Layout((5000, 77))
    wires = []
    for name in BACKENDS:
        wires.append(torch.zeros(nbytes(layout, fmt), dtype=torch.uint8))
        load(name).quantize(fmt, x[:5077], wires[-1], layout, Tag())
    assert same(*wires)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("topk", "topk stands before a codec"),
        ("topk:density=0|int8", r"density=0; allowed: above 0, at most 1"),
        ("topk:density=1.5|int8", r"density=1\.5; allowed"),
        ("topk:density=few|int8", "density='few'"),
        ("topk:block=33|int8", "block=33; allowed: multiples of 8 from 32 to 65536"),
        ("topk:block=131072|int8", "block=131072"),
        ("topk|sign:block=tensor", "give sign a block size"),
        ("topk|topk|int8", "sparse already"),
        ("rotate|topk|int8", r"write topk\|rotate\|CODEC"),
        ("randk:scale=fit|int8", "scale='fit'; allowed: unbiased, none"),
        ("topk:scale=none|int8", "option 'scale=none' is not known"),
        ("randk:scale=unbiased|bf16+ef", r"diverges.*gamma = 99"),
        ("randk:scale=unbiased|bf16+delta", "diverges.*100 times too large"),
        ("randk|bf16@ring", "chosen again"),
        ("randk|bf16@two_phase:back=(randk|bf16)", "chosen again"),
        ("randk|fp32@power_sgd", "takes fp32, fp16 and bf16"),
        ("topk|bf16@native", "cannot add"),
    ],
)
def test_what_does_not_go_together_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Scheme.parse(text)


AT_THE_END = """
import ctypes, mmap, torch
from commlib.codecs import codec
from commlib_kernels import Layout, Tag
page, n = mmap.PAGESIZE, 16448
room = -(-4 * n // page) * page
memory = mmap.mmap(-1, room + page)
first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(first + room), page, 0) == 0
x = torch.frombuffer(memory, dtype=torch.float32, count=n, offset=room - 4 * n)
x.copy_(torch.randn(n))
c, layout = codec("topk|fp32"), Layout((n,))
c.encode(x, torch.empty(c.nbytes(layout), dtype=torch.uint8), layout, Tag())
print("through")
"""


def test_nothing_is_read_behind_the_end_of_a_tensor() -> None:
    """A page that may not be read begins there."""
    run = subprocess.run([sys.executable, "-c", AT_THE_END], capture_output=True, text=True)
    assert run.stdout == "through\n", run.stderr


@pytest.mark.parametrize("inner", ["int2:round=nearest", "nf4", "sign"])
def test_gamma_of_scaled_values_that_are_coded_with_a_bias(inner: str) -> None:
    text = f"randk:density=0.1:scale=unbiased|{inner}"
    x = lognormal(0, 1024)
    errors = [(round_trip(text, x, s).double() - x.double()).square().sum() for s in range(200)]
    mean = float(sum(errors) / len(errors) / x.double().square().sum())
    assert mean <= codec(text).gamma()


def test_feedback_is_stable_at_any_density() -> None:
    for text in ("topk:density=0.0001|bf16+ef", "topk|int4+ef", "randk|int8+ef", "topk|int2+ef"):
        Scheme.parse(text)
    Scheme.parse("topk|int8+ef:omega=0.75:dtype=int8")
    assert codec("topk:density=0.1|fp32").gamma() == pytest.approx(0.9)
    # An inner codec that may make a vector longer would make the residual grow.
    with pytest.raises(ValueError, match="diverges"):
        Scheme.parse("topk|qsgd+ef")


def test_segments_of_a_message_are_chosen_from_apart_whatever_their_neighbours() -> None:
    """Regrouping parameters changes none of their bytes."""
    c = codec("topk:density=0.1|int8")
    parts = [data("random", n, seed=n) for n in (1000, 40, 300)]
    whole, layout = torch.cat(parts), Layout((1000, 40, 300))
    wire, out = torch.zeros(c.nbytes(layout), dtype=torch.uint8), torch.empty(1340)
    c.encode(whole, wire, layout, Tag())
    c.decode(wire, out, layout, Tag())
    assert torch.equal(out, torch.cat([round_trip(c, part) for part in parts]))
    assert not c.sliceable


def test_messages_of_a_key_draw_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over some steps of feedback everything has been sent, and the residual stays bounded."""
    c, layout = codec("randk:density=0.1|fp32"), Layout((1000,))
    compressor = Compressor(c, ErrorFeedback())
    x, total = data("random", 1000), torch.zeros(1000)
    wire, q = torch.zeros(c.nbytes(layout), dtype=torch.uint8), torch.empty(1000)
    for _ in range(100):
        compressor.advance("x")
        compressor.compress("x", x, wire, layout)
        compressor.decompress("x", wire, q, layout)
        total += q
    assert float((total / 100 - x).norm() / x.norm()) < 0.25
    assert replace(c, scale="none") != c
