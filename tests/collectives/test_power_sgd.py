"""PowerSGD against its equations in fp64, and what it promises beyond: bits, NaN, memory, bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from commlib import Communicator
from commlib.codecs import codec
from commlib.collectives import ALGORITHMS, Pool, drive, power_sgd
from commlib.feedback import Compressor, ErrorFeedback, Plain
from commlib.scheme import Scheme
from commlib.topology import Link, Topology
from commlib.traffic import Through
from commlib.transport import ThreadTransport, run_ranks
from commlib_kernels.layout import Layout
from tests.communicators import data, on_ranks, only

FP32 = "fp32+ef@power_sgd:rank=2"
KEYS = ("wide", "bias", "tall", "conv")
SHAPES = ((24, 60), (60,), (90, 16), (32, 3, 3, 4))
SIZES = (1440, 60, 1440, 1152)
MATRICES = ((24, 60), (), (90, 16), (32, 36))


def bucket(rank: int, step: int) -> torch.Tensor:
    """Gradients of one rank, with some structure."""
    parts = [data(rank, n, 10 * step + place) for place, n in enumerate(SIZES)]
    common = data(99, 24, 0)[:, None] * data(98, 60, 0)
    parts[0] += 3 * common.flatten()
    return torch.cat(parts)


def send(
    c: Communicator, x: torch.Tensor, which: Sequence[int] = (0, 1, 2, 3), **how: Any
) -> torch.Tensor:
    """Some segments of a bucket; the whole bucket with what arrived."""
    pieces = list(x.split(SIZES))
    flat = torch.cat([pieces[s] for s in which])
    names, sizes = tuple(KEYS[s] for s in which), tuple(SIZES[s] for s in which)
    shapes = tuple(SHAPES[s] for s in which)
    c.all_reduce_segments(flat, names, sizes, shapes=shapes, **how)
    for s, piece in zip(which, flat.split(sizes), strict=True):
        pieces[s] = piece
    return torch.cat(pieces)


def steps_of(c: Communicator, steps: int = 4, **how: Any) -> list[torch.Tensor]:
    return [send(c, bucket(c.rank, step), **how) for step in range(steps)]


def memory(c: Communicator) -> dict[str, Any]:
    """The state of the one compressor that remembers residuals."""
    states = c.state_dict()["compressors"]
    (found,) = [state for text, state in states.items() if "power_sgd" in text]
    return found


def gram_schmidt(rows: torch.Tensor) -> torch.Tensor:
    done: list[torch.Tensor] = []
    for row in rows:
        for other in done:
            row = row - (row @ other) * other
        done.append(row / row.norm())
    return torch.stack(done)


@dataclass
class Equations:
    """The method as the paper has it, in fp64, of one matrix on all ranks."""

    q: torch.Tensor
    ranks: int
    feedback: bool = True
    e: list[torch.Tensor] = field(default_factory=list)

    def step(self, gradients: list[torch.Tensor], factor: float) -> torch.Tensor:
        self.e = self.e or [torch.zeros_like(g) for g in gradients]
        m = [g + e for g, e in zip(gradients, self.e, strict=True)]
        p = sum(gram_schmidt(self.q) @ x.T for x in m) / self.ranks
        base = gram_schmidt(p)
        self.q = sum(base @ x for x in m) / self.ranks
        mean = base.T @ self.q
        if self.feedback:
            self.e = [x - mean for x in m]
        return factor * self.ranks * mean


@pytest.mark.parametrize("factor", ["avg", "sum", 0.3, -2.0])
@pytest.mark.parametrize("scheme", [FP32, "fp32@power_sgd:rank=3"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_it_is_its_equations(ranks: int, scheme: str, factor: Any) -> None:
    """Results, residuals and Q over five steps: a lost residual or cold start shows in the 2nd."""
    how = [(24, 60), (60, 24)]

    def body(c: Communicator) -> Any:
        outs = []
        for step in range(5):
            for n, m in how:
                x = data(c.rank, n * m, step).view(n, m)
                c.all_reduce(x, f"{n}", factor=factor)
                outs.append(x)
        return outs, memory(c)

    results = on_ranks(ranks, only(scheme), body, seed=3)
    number = {"avg": 1 / ranks, "sum": 1.0}.get(factor, factor)
    rank = Scheme.parse(scheme).algorithm.rank  # type: ignore[union-attr]
    starts: dict[str, torch.Tensor] = {}
    for n, m in how:
        compressor = Compressor(codec("fp32"), seed=3)
        starts[f"{n}"] = power_sgd._factor(compressor, f"{n}", rank, (n, m), torch.device("cpu"))
    want = {n: Equations(q.double(), ranks, "ef" in scheme) for n, q in starts.items()}
    for step in range(5):
        for place, (n, m) in enumerate(how):
            given = [data(r, n * m, step).view(n, m).double() for r in range(ranks)]
            expected = want[f"{n}"].step(given, number)
            for outs, _ in results:
                got = outs[2 * step + place].double()
                assert (got - expected).norm() < 1e-5 * expected.norm(), step
    for name, equations in want.items():
        for r, (_, state) in enumerate(results):
            q = state["memories"][f"{name}|Q"].double()
            # the factor is in the scale of P alone: a negative one changes signs of rows
            assert (q.abs() - equations.q.abs()).norm() < 1e-4 * equations.q.norm()
            if equations.feedback:
                e = equations.e[r].flatten()
                assert (state["residuals"][name].double() - e).norm() < 1e-4 * e.norm()
            else:
                assert not state["residuals"]


@pytest.mark.parametrize("scheme", [FP32, "fp16+ef@power_sgd:rank=2", "bf16+ef@power_sgd:rank=4"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_what_did_not_arrive_is_owed(ranks: int, scheme: str) -> None:
    """Given = arrived + residuals, to fp32 rounding, however coarse the factors are."""
    results = on_ranks(
        ranks, scheme, lambda c: (steps_of(c, 12, factor="avg"), memory(c)["residuals"])
    )
    given = sum(bucket(r, step).double() for r in range(ranks) for step in range(12)) / ranks
    arrived = sum(x.double() for x in results[0][0])
    missing = dict(zip(KEYS, (given - arrived).split(SIZES), strict=True))
    for name, difference in missing.items():
        owed = sum(e[name].double() for _, e in results if name in e) / ranks
        assert (difference - owed).norm() < 1e-6 * given.norm(), name
    assert missing["wide"].norm() > 1e-2 * given.norm(), "there is something to owe"
    assert set(results[0][1]) == {"wide", "tall", "conv"}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_mean_of_that_rank_arrives_whole(seed: int) -> None:
    """Up to how well its rows are seen from the first Q (seed 0: a thousandth); then altogether."""

    def given(rank: int) -> torch.Tensor:
        return data(rank, 50)[:, None] * data(10 + rank, 40)

    def body(c: Communicator) -> Any:
        xs = [given(c.rank) for _ in range(3)]
        compressor = Compressor(codec("fp32"), seed=seed)
        q = power_sgd._factor(compressor, "w", 3, (50, 40), torch.device("cpu"))
        for x in xs:
            c.all_reduce(x, "w")
        return xs, q.clone()

    want = sum(given(r).double() for r in range(3))
    rows = torch.linalg.svd(want).Vh[:3]
    for xs, q in on_ranks(3, "fp32+ef@power_sgd:rank=3", body, seed=seed):
        errors = [float((x - want).norm() / want.norm()) for x in xs]
        assert errors[0] < 4 * 2.0**-24 * float(torch.linalg.cond(rows @ q.double().T))
        assert errors[2] < 2e-6


@pytest.mark.parametrize("scheme", [FP32, "fp16+ef@power_sgd:rank=2", "fp32@power_sgd"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_ranks_end_equal(ranks: int, scheme: str) -> None:
    def body(c: Communicator) -> Any:
        return steps_of(c, factor="avg"), memory(c)["memories"], c.transport.bytes_sent

    results = on_ranks(ranks, scheme, body)
    for outs, factors, _ in results[1:]:
        for mine, first in zip(outs, results[0][0], strict=True):
            assert torch.equal(mine.view(torch.int32), first.view(torch.int32))
        for name, q in factors.items():
            assert torch.equal(q.view(torch.int32), results[0][1][name].view(torch.int32))
    if ranks == 1:
        assert all(torch.equal(x, bucket(0, step)) for step, x in enumerate(results[0][0]))
        assert (results[0][1], results[0][2]) == ({}, 0)


def test_grouping_changes_nothing_raw_segments_and_factor_included() -> None:
    """A parameter's bits do not depend on its bucket, through a regrouping too."""

    def regrouped(c: Communicator) -> list[torch.Tensor]:
        outs = []
        for step in range(6):
            x = bucket(c.rank, step)
            groups = ((0, 1, 2, 3),) if step < 2 else ((3, 1), (0,), (2,))
            for which in groups:
                x = send(c, x, which, factor=1.0, async_op=False)
            outs.append(x)
        return outs

    want = on_ranks(3, FP32, lambda c: steps_of(c, 6, factor=1.0))[0]
    for outs in on_ranks(3, FP32, regrouped):
        assert all(torch.equal(a, b) for a, b in zip(outs, want, strict=True))


@pytest.mark.parametrize("scheme", [FP32, "fp16+ef@power_sgd:rank=2"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
def test_a_nonfinite_step_is_seen_by_all_and_leaves_no_trace(bad: float, scheme: str) -> None:
    """1e38 overflows in the sums. What follows is, bit by bit, a run without that step."""

    def body(c: Communicator, spoilt: bool) -> Any:
        outs, seen = steps_of(c, 2, factor="avg"), None
        if spoilt:
            x = bucket(c.rank, 7)
            if c.rank == 1:
                x[100:140] = bad
            seen = send(c, x, factor="avg")
        return outs + [send(c, bucket(c.rank, s), (0, 2, 3), factor="avg") for s in (2, 3)], seen

    want = on_ranks(3, scheme, lambda c: body(c, False))
    got = on_ranks(3, scheme, lambda c: body(c, True))
    for (outs, seen), (clean, _) in zip(got, want, strict=True):
        wide, *others = seen.split(SIZES)
        assert wide.isnan().all()
        assert all(x.isfinite().all() for x in others), "other parameters are other parameters"
        for x, y in zip(outs, clean, strict=True):
            assert torch.equal(x[:1440], y[:1440])


def test_large_gradients_stay_within_fp16() -> None:
    """As under a loss scale: a norm of 3e4. Q has that norm too, and P would have its square."""

    def body(c: Communicator, scheme: str) -> list[torch.Tensor]:
        outs = []
        for step in range(4):
            x = data(7, 40)[:, None] * data(8, 40) + 0.1 * data(c.rank, 1600, step).view(40, 40)
            x *= 3e4 / x.norm()
            c.all_reduce(x, "w", factor="avg", scheme=scheme)
            outs.append(x)
        return outs

    fine = on_ranks(2, "fp32", lambda c: body(c, "fp32+ef@power_sgd"))
    half = on_ranks(2, "fp32", lambda c: body(c, "fp16+ef@power_sgd"))
    for x, want in zip(half[0], fine[0], strict=True):
        assert (x - want).norm() < 8 * 2**-11 * want.norm()


def test_first_factors_are_of_the_run_and_the_key() -> None:
    """The same on all ranks, others for another seed and another key."""

    def body(c: Communicator) -> dict[str, torch.Tensor]:
        x = torch.zeros(2 * 1440)
        c.all_reduce_segments(x, ("a", "b"), (1440, 1440), shapes=((24, 60), (24, 60)))
        return memory(c)["memories"]

    first, other = on_ranks(2, FP32, body, seed=1)
    again, _ = on_ranks(2, FP32, body, seed=2)
    for name, q in first.items():
        assert torch.equal(q, other[name])
        assert not torch.equal(q, again[name])
        assert 0.7 < q.std() < 1.3
    assert not torch.equal(first["a|Q"], first["b|Q"])


def test_raw_segments_ride_along_and_messages_of_a_key_follow_one_another() -> None:
    def body(c: Communicator, asynchronous: bool) -> Any:
        xs = [bucket(c.rank, step) for step in range(4)]
        works = [
            c.all_reduce_segments(x, KEYS, SIZES, shapes=SHAPES, async_op=asynchronous) for x in xs
        ]
        for work in works:
            work.wait()
        return xs, [(row["scheme"], row["calls"]) for row in c.meter.rows()]

    for scheme in (FP32, "fp32@power_sgd:rank=2"):
        want = on_ranks(3, scheme, lambda c: body(c, False))
        for xs, rows in on_ranks(3, scheme, lambda c: body(c, True)):
            assert rows == [(scheme, 4)], "one message per call"
            assert all(torch.equal(a, b) for a, b in zip(xs, want[0][0], strict=True))


def test_zeros_in_between_do_not_end_it() -> None:
    """Q of a zero gradient is zero, and would stay so for ever."""

    def body(c: Communicator) -> list[torch.Tensor]:
        outs = []
        for step in range(4):
            x = torch.zeros(40, 30) if step < 2 else data(0, 40)[:, None] * data(1, 30)
            c.all_reduce(x, "w", factor="avg")
            outs.append(x)
        return outs

    for first, second, third, fourth in on_ranks(2, FP32, body):
        want = data(0, 40)[:, None] * data(1, 30)
        assert not first.any()
        assert not second.any()
        assert (third - want).norm() < 1e-5 * want.norm()
        assert (fourth - want).norm() < 1e-5 * want.norm()


def test_a_residual_on_hold_is_neither_sent_nor_lost() -> None:
    def body(c: Communicator) -> Any:
        arrived = torch.zeros(sum(SIZES)).double()
        for step in range(4):
            x, hold = bucket(c.rank, step), ()
            if step == 2 and c.rank == 0:  # did not use these two
                x[:1440], x[1500:2940] = 0, 0
                hold = (0, 2)
            arrived += send(c, x, factor="avg", hold=hold).double()
        return arrived, memory(c)["residuals"]

    results = on_ranks(3, FP32, body)
    given = sum(bucket(r, step).double() for r in range(3) for step in range(4))
    unused = bucket(0, 2).double()
    given[:1440] -= unused[:1440]
    given[1500:2940] -= unused[1500:2940]
    missing = dict(zip(KEYS, (given / 3 - results[0][0]).split(SIZES), strict=True))
    for name in ("wide", "tall", "conv"):
        owed = sum(e[name].double() for _, e in results) / 3
        assert (missing[name] - owed).norm() < 1e-6 * given.norm()

    def all_hold(c: Communicator) -> Any:
        steps_of(c, 2)
        before = memory(c)
        x = bucket(c.rank, 2)
        x[:1440] = 0
        return send(c, x, hold=(0,))[:1440], before, memory(c)

    for x, before, after in on_ranks(2, FP32, all_hold):
        assert not x.any()
        assert torch.equal(before["residuals"]["wide"], after["residuals"]["wide"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_gradients(dtype: torch.dtype) -> None:
    """Residuals and factors are fp32; results are rounded once."""

    def body(c: Communicator, wide: bool) -> list[torch.Tensor]:
        outs = []
        for step in range(3):
            x = bucket(c.rank, step).to(dtype)
            outs.append(send(c, x.float() if wide else x, factor="avg"))
        return outs

    want = on_ranks(3, FP32, lambda c: body(c, True))[0]
    for outs in on_ranks(3, FP32, lambda c: body(c, False)):
        for x, exact in zip(outs, want, strict=True):
            assert x.dtype == dtype
            assert torch.equal(x, exact.to(dtype))


class Counted(Through):
    """Counts exchanges."""

    def __init__(self, inner: ThreadTransport) -> None:
        super().__init__(inner)
        self.calls: list[str] = []

    def all_to_all(self, *args: Any, **how: Any) -> Any:
        self.calls.append("all_to_all")
        return super().all_to_all(*args, **how)

    def all_gather(self, *args: Any) -> Any:
        self.calls.append("all_gather")
        return super().all_gather(*args)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("text", ["fp32", "fp16"])
@pytest.mark.parametrize("shapes", [MATRICES, ((), (), (), ())], ids=["matrices", "raw"])
def test_exchanges_and_the_cost_formula(shapes: Any, text: str, ranks: int) -> None:
    """Four exchanges whatever the number of matrices, and the bytes that the formula says."""
    layout = Layout(SIZES)

    def rank(t: ThreadTransport) -> Any:
        counted, x = Counted(t), bucket(t.rank, 0)
        compressor = Compressor(codec(text), ErrorFeedback(), rank=t.rank)
        run = ALGORITHMS["power_sgd"].run
        drive(run(x, counted, compressor, KEYS, layout, Pool(t.device), rank=2, shapes=shapes))
        return counted.calls, t.bytes_sent, x

    calls = ["all_to_all", "all_gather"] * (2 if any(shapes) else 1)
    scheme = Scheme.parse(f"{text}+ef@power_sgd:rank=2")
    topology, row = Topology(ranks, Link(1e-4, 1e8)), ALGORITHMS["power_sgd"]
    expected = row.wire_bytes(layout, scheme, topology, shapes)
    for seen, sent, x in run_ranks(ranks, rank):
        assert seen == (calls if ranks > 1 else [])
        assert sent == expected
        if not any(shapes):
            assert (x - sum(bucket(r, 0) for r in range(ranks))).abs().max() < 1e-5
    assert (row.seconds(layout, scheme, topology, shapes) > len(calls) * 1e-4) == (ranks > 1)
    if ranks == 4 and text == "fp32" and any(shapes):
        factors = sum(2 * sum(shape) for shape in shapes) + 60
        assert expected <= 2 * 3 / 4 * 4 * factors + 3 * 2 * 4 * 16, "and padding of parts"


def test_every_matrix_needs_a_key() -> None:
    t = ThreadTransport.world(2)[0]
    run = ALGORITHMS["power_sgd"].run
    layout, x = Layout((1440,)), torch.zeros(1440)
    for feedback in (Plain(), ErrorFeedback()):
        compressor = Compressor(codec("fp32"), feedback)
        steps: Callable[..., Any] = run(
            x, t, compressor, None, layout, Pool(t.device), shapes=((24, 60),)
        )
        with pytest.raises(ValueError, match="key"):
            drive(steps)  # type: ignore[arg-type]
    assert t.bytes_sent == 0
