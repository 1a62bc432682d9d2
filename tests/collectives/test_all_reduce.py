"""The contract of every all-reduce: table of algorithm x codec x world size.

Bounds are analytic: a code errs by at most half the step of its block (a whole one with stochastic
rounding), and `STEP` has that as a fraction of the block's largest value. What low rank leaves out
has no such bound: test_power_sgd. So has thc, which takes no codec: test_thc_sums.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from commlib.codecs import codec
from commlib.collectives import ALGORITHMS, Pool, drive
from commlib.feedback import Compressor, ErrorFeedback, Plain
from commlib.scheme import Scheme
from commlib.topology import Link, Topology, nodes_of
from commlib.transport import ThreadTransport, run_ranks
from commlib_kernels.layout import Layout

SIZES = (1, 2, 3, 4, 7)
CODECS = (
    "fp32",
    "bf16",
    "fp16",
    "fp8",
    "int8",
    "int5:block=32",
    "int4:round=stochastic",
    "int3",
    "int2",
    "sign",
    "sign:block=tensor",
    "ternary",
    "qsgd:levels=4:norm=l2",
    "natural",
    "eden2:block=32",
    "rotate|int4",
    "rotate|eden2:block=128",
    "int4|entropy",
    "rotate|grid3:block=128|entropy",
    "topk:density=0.1|int8",
    "randk:density=0.2|bf16",
)
# The host of each rank, for the algorithm that knows hosts: uneven ones, and ranks that alternate.
HOSTS = {1: "a", 2: "ab", 3: "aab", 4: "abab", 7: "aabcbcb"}
# Relative step of a code, as a fraction of the largest value of its block; None: no such bound.
STEP = {
    "fp32": 0.0, "bf16": 2**-8, "fp16": 2**-11, "fp8": 2**-4, "int8": 0.5 / 127,
    "int5:block=32": 0.5 / 15, "int4:round=stochastic": 1 / 7, "int3": 0.5 / 3, "int2": 0.5,
    "int4|entropy": 0.5 / 7,
}  # fmt: skip


def inputs(size: int, numel: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(numel)
    return [torch.randn(numel, generator=generator).to(dtype) for _ in range(size)]


def reduce(
    name: str,
    text: str,
    xs: list[torch.Tensor],
    layout: Layout,
    *,
    key: Any = "x",
    factor: float = 1.0,
    feedback: Any = None,
    back: str | None = None,
    steps: int = 1,
    **options: Any,
) -> tuple[list[torch.Tensor], list[int]]:
    """The last of `steps` all-reduces of `xs`, and the bytes each rank sent in all."""

    def rank(t: ThreadTransport) -> tuple[torch.Tensor, int]:
        pool = Pool(t.device)
        compressor = Compressor(codec(text), feedback or Plain(), seed=5, rank=t.rank)
        how = {"nodes": nodes_of(HOSTS[t.size])} if name == "hierarchical" else {}
        if back is not None:
            how["back"] = Compressor(codec(back), feedback or Plain(), seed=5, rank=t.rank)
        for _ in range(steps):
            x = xs[t.rank].clone()
            run = ALGORITHMS[name].run
            drive(run(x, t, compressor, key, layout, pool, factor=factor, **how, **options))
        return x, t.bytes_sent

    results = run_ranks(len(xs), rank)
    return [r[0] for r in results], [r[1] for r in results]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in ("power_sgd", "thc")])
def test_ranks_end_equal_and_near_the_sum(name: str, text: str, size: int) -> None:
    if name == "native" and codec(text).sum_dtype is None:
        with pytest.raises(ValueError, match="native"):
            Scheme.parse(f"{text}@native")
        return
    if name in ("ring", "hierarchical") and not codec(text).fixed_size:
        with pytest.raises(ValueError, match=f"{name} needs messages whose size is known"):
            Scheme.parse(f"{text}@{name}")
        return
    xs = inputs(size, 3001)
    outs, _ = reduce(name, text, xs, Layout((3001,)), factor=0.5)
    for out in outs[1:]:
        assert torch.equal(out, outs[0])
    total = torch.stack(xs).double().sum(0) * 0.5
    if size == 1:
        assert torch.equal(outs[0], xs[0] * 0.5)
        return
    assert (outs[0] != 0).any()
    if text not in STEP:
        # coarse codecs keep the direction; by chance it would be 0.02
        cosine = torch.cosine_similarity(outs[0].double(), total, dim=0)
        assert cosine > 0.2
        return
    # every input errs by its step, the sum by its own; a ring rounds partial sums at every hop
    step, top = STEP[text], sum(x.abs().max().item() for x in xs)
    hops = {"two_phase": 2, "hierarchical": 2, "ring": size, "native": size + 1}[name]
    bound = 0.5 * hops * step * top * (1 + hops * step) * 1.02 + 1e-6
    assert (outs[0] - total).abs().max() <= bound


@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("numel", [1, 5, 31, 129, 1000])
@pytest.mark.parametrize("name", ["two_phase", "hierarchical", "ring"])
def test_every_element_is_covered_once(name: str, numel: int, size: int) -> None:
    """Integers up to 127 times a power of two are exact in int8 if each block has a 127."""
    x = torch.arange(numel, dtype=torch.float32) % 127 + 1
    x[::8] = 127.0
    xs = [x.clone() if r == 0 else torch.zeros(numel) for r in range(size)]
    outs, _ = reduce(name, "int8:block=32:round=nearest", xs, Layout((numel,)))
    for out in outs:
        assert torch.equal(out, x)


@pytest.mark.parametrize("name", ["two_phase", "hierarchical"])
@pytest.mark.parametrize("text", ["int4", "int8:round=stochastic", "bf16", "rotate|eden3"])
def test_slices_change_nothing(text: str, name: str) -> None:
    xs = inputs(3, 20_000)
    layout = Layout((7000, 12_000, 1000))
    key = ("a", "b", "c")
    whole, _ = reduce(name, text, xs, layout, key=key, slices=1, steps=3)
    for slices in (2, 5):
        cut, _ = reduce(name, text, xs, layout, key=key, slices=slices, steps=3)
        assert torch.equal(cut[0], whole[0])


@pytest.mark.parametrize("back", ["fp32", "int3:block=96"])
def test_slices_change_nothing_where_the_halves_have_other_blocks(back: str) -> None:
    xs = inputs(2, 20_000)
    whole, _ = reduce("two_phase", "int8", xs, Layout((20_000,)), back=back, slices=1)
    cut, _ = reduce("two_phase", "int8", xs, Layout((20_000,)), back=back, slices=3)
    assert torch.equal(cut[0], whole[0])


@pytest.mark.parametrize("name", ["two_phase", "hierarchical", "ring"])
def test_grouping_changes_nothing(name: str) -> None:
    """A parameter's result does not depend on the bucket it travels in, residuals included."""
    xs = inputs(4, 5000)
    both, _ = reduce(
        name, "int3", xs, Layout((2000, 3000)), key=("a", "b"), steps=4, feedback=ErrorFeedback()
    )
    alone = [
        reduce(name, "int3", [x[part] for x in xs], Layout((n,)), key=key, steps=4,
               feedback=ErrorFeedback())[0]
        for key, n, part in (("a", 2000, slice(2000)), ("b", 3000, slice(2000, 5000)))
    ]  # fmt: skip
    assert torch.equal(both[0], torch.cat([alone[0][0], alone[1][0]]))


def test_fp32_native_is_bitwise_the_library_collective() -> None:
    xs = inputs(3, 1001)

    def library(t: ThreadTransport) -> torch.Tensor:
        x = xs[t.rank].clone()
        t.all_reduce(x).wait()
        return x.mul_(1 / 3)

    expected = run_ranks(3, library)
    outs, _ = reduce("native", "fp32", xs, Layout((1001,)), factor=1 / 3)
    assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))


@pytest.mark.parametrize("name", ["two_phase", "hierarchical", "native"])
def test_scattered_and_exact_segments(name: str) -> None:
    """Only the segments are touched; exact ones come out as exact as the dtype allows."""
    xs = inputs(3, 1000)
    if name == "native":
        layout, text = Layout((100, 50), offsets=(10, 500)), "fp32"
    else:
        layout = Layout((100, 50), offsets=(10, 500), exact=(False, True))
        text = "int8"
    outs, _ = reduce(name, text, xs, layout, key=("a", "b"))
    total = torch.stack(xs).double().sum(0)
    covered = torch.zeros(1000, dtype=torch.bool)
    covered[10:110] = covered[500:550] = True
    for out, x in zip(outs, xs, strict=True):
        assert torch.equal(out[~covered], x[~covered])
        assert torch.equal(out[covered], outs[0][covered])
    assert (outs[0][500:550] - total[500:550]).abs().max() < 1e-6
    assert (outs[0][10:110] - total[10:110]).abs().max() < (1e-6 if text == "fp32" else 0.2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "scheme",
    [
        *(("two_phase", "int8"), ("hierarchical", "int8"), ("ring", "int8")),
        *(("native", "bf16"), ("native", "fp32"), ("hierarchical", "fp32")),
    ],
)
def test_half_tensors(scheme: tuple[str, str], dtype: torch.dtype) -> None:
    xs = inputs(4, 1000, dtype)
    outs, _ = reduce(*scheme, xs, Layout((1000,), dtype), factor=0.25)
    total = torch.stack(xs).double().mean(0)
    assert all(torch.equal(o, outs[0]) for o in outs)
    assert outs[0].dtype == dtype
    assert (outs[0].double() - total).abs().max() < 0.06


def test_fp16_sums_that_would_overflow_do_not() -> None:
    xs = [torch.full((64,), 60000.0) for _ in range(4)]
    outs, _ = reduce("native", "fp16", xs, Layout((64,)), factor=0.25)
    assert torch.equal(outs[0], torch.full((64,), 60000.0, dtype=torch.float16).float())


def test_another_codec_for_the_second_half() -> None:
    xs = inputs(3, 5000)
    total = torch.stack(xs).double().sum(0)

    def error(**how: Any) -> float:
        outs, _ = reduce("two_phase", "int8", xs, Layout((2000, 3000)), key=("a", "b"), **how)
        assert all(torch.equal(o, outs[0]) for o in outs)
        return float((outs[0] - total).norm() / total.norm())

    assert error(back="fp32") < error() < error(back="int4")
    sent = [reduce("two_phase", "int8", xs, Layout((5000,)), back=b)[1][0] for b in (None, "int4")]
    assert sent[1] < sent[0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "text", ["int4", "fp32", "bf16@native", "int8@ring", "int8@two_phase:back=int4", "sign"]
)
def test_the_cost_formula_is_what_is_sent(text: str, size: int) -> None:
    scheme, layout = Scheme.parse(text), Layout((3001, 70))
    config: Any = scheme.algorithm
    back = str(config.back) if getattr(config, "back", None) else None
    xs = inputs(size, 3071)
    _, sent = reduce(config.id, str(scheme.codec), xs, layout, key=("a", "b"), back=back)
    topology = Topology(size, Link(1e-4, 1e8))
    row = ALGORITHMS[config.id]
    assert sent == [row.wire_bytes(layout, scheme, topology)] * size
    assert row.seconds(layout, scheme, topology) >= sent[0] / 1e8


def test_error_of_a_ring_grows_with_the_ranks_and_of_two_phase_does_not() -> None:
    errors: dict[tuple[str, int], float] = {}
    for size in (2, 7):
        xs = inputs(size, 20_000)
        total = torch.stack(xs).double().sum(0)
        for name in ("two_phase", "ring"):
            outs, _ = reduce(name, "int4:round=nearest", xs, Layout((20_000,)))
            errors[name, size] = float((outs[0] - total).norm() / total.norm())
    assert errors["two_phase", 7] < 1.15 * errors["two_phase", 2]
    assert errors["ring", 7] > 1.3 * errors["ring", 2]


@pytest.mark.parametrize("name", ["two_phase", "hierarchical", "ring"])
def test_feedback_makes_the_mean_over_steps_exact(name: str) -> None:
    """Sums of what was sent differ from sums of what was given by the residuals alone."""
    xs, steps = inputs(3, 1000), 64

    def rank(t: ThreadTransport) -> torch.Tensor:
        pool, seen = Pool(t.device), torch.zeros(1000)
        how = {"nodes": nodes_of(HOSTS[3])} if name == "hierarchical" else {}
        compressor = Compressor(codec("int2:round=nearest"), ErrorFeedback(), rank=t.rank)
        for _ in range(steps):
            x = xs[t.rank].clone()
            drive(ALGORITHMS[name].run(x, t, compressor, "x", Layout((1000,)), pool, **how))
            seen += x
        return seen / steps

    total = torch.stack(xs).sum(0)
    once, _ = reduce(name, "int2:round=nearest", xs, Layout((1000,)))
    plain = (once[0] - total).norm() / total.norm()
    for mean in run_ranks(3, rank):
        assert (mean - total).norm() / total.norm() < 0.15 * plain


def test_feedback_needs_a_key() -> None:
    t = ThreadTransport.world(2)[0]
    compressor = Compressor(codec("int8"), ErrorFeedback())
    run = ALGORITHMS["two_phase"].run
    with pytest.raises(ValueError, match="no key, no memory"):
        drive(run(torch.zeros(64), t, compressor, None, Layout((64,)), Pool(t.device)))


def test_nonfinite_blocks_reach_all_ranks_and_heal() -> None:
    def rank(t: ThreadTransport) -> list[bool]:
        compressor = Compressor(codec("int4"), ErrorFeedback(), rank=t.rank)
        pool, finite = Pool(t.device), []
        for step in range(3):
            x = torch.ones(512)
            if step == 1 and t.rank == 1:
                x[200] = float("nan")
            drive(ALGORITHMS["two_phase"].run(x, t, compressor, "x", Layout((512,)), pool))
            finite.append(bool(x.isfinite().all()))
        return finite

    assert run_ranks(3, rank) == [[True, False, True]] * 3
