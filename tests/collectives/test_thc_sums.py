"""THC as a collective: sums of integers, the same on all ranks, of which nothing is lost."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from commlib import Communicator
from commlib.codecs import codec
from commlib.collectives import ALGORITHMS, Pool, drive, thc
from commlib.feedback import Compressor, ErrorFeedback, Plain
from commlib.scheme import Scheme
from commlib.topology import Link, Topology
from commlib.traffic import Through
from commlib.transport import ThreadTransport, run_ranks
from commlib_kernels.layout import Layout
from tests.collectives.test_thc import WORKERS, vectors
from tests.communicators import data, on_ranks, only

EF = "fp32+ef@thc"
KEYS, SIZES = ("a", "b", "c", "d"), (5000, 60, 1440, 4096)
NDIMS = (2, 1, 2, 2)


def bucket(rank: int, step: int) -> torch.Tensor:
    return torch.cat([data(rank, n, 10 * step + place) for place, n in enumerate(SIZES)])


def send(
    c: Communicator, x: torch.Tensor, which: tuple[int, ...] = (0, 1, 2, 3), **how: Any
) -> Any:
    """Some segments of a bucket; the whole bucket with what arrived."""
    pieces = list(x.split(SIZES))
    flat = torch.cat([pieces[s] for s in which])
    names, sizes = tuple(KEYS[s] for s in which), tuple(SIZES[s] for s in which)
    c.all_reduce_segments(flat, names, sizes, tuple(NDIMS[s] for s in which), **how)
    for s, piece in zip(which, flat.split(sizes), strict=True):
        pieces[s] = piece
    return torch.cat(pieces)


def residuals(c: Communicator) -> dict[str, torch.Tensor]:
    states = c.state_dict()["compressors"]
    (found,) = [state for text, state in states.items() if "thc" in text]
    return dict(found["residuals"])


def same_bits(results: list[Any]) -> None:
    for outs in results[1:]:
        for mine, first in zip(outs, results[0], strict=True):
            assert torch.equal(mine.view(torch.uint8), first.view(torch.uint8))


@pytest.mark.parametrize("scheme", ["fp32@thc:bits=4", EF])
def test_the_published_error_through_the_collective(scheme: str) -> None:
    xs = vectors()

    def body(c: Communicator) -> torch.Tensor:
        x = xs[c.rank].clone()
        c.all_reduce(x, "w", factor="avg")
        return x

    exact = sum(x.double() for x in xs) / WORKERS
    for mean in on_ranks(WORKERS, only(scheme), body):
        nmse = float((mean - exact).square().sum() / exact.square().sum())
        assert 0.8 * 0.0197 < nmse < 1.2 * 0.0197


class Spy(Through):
    """Keeps what is exchanged."""

    def __init__(self, inner: ThreadTransport) -> None:
        super().__init__(inner)
        self.seen: list[tuple[str, torch.Tensor]] = []

    def all_to_all(self, out: Any, inp: torch.Tensor, **how: Any) -> Any:
        self.seen.append(("all_to_all", inp.clone()))
        return super().all_to_all(out, inp, **how)

    def all_gather(self, out: Any, inp: torch.Tensor) -> Any:
        self.seen.append(("all_gather", inp.clone()))
        return super().all_gather(out, inp)


def run(t: Any, x: torch.Tensor, sizes: tuple[int, ...], bits: int, key: Any = None) -> None:
    feedback = Plain() if key is None else ErrorFeedback()
    compressor = Compressor(codec("fp32"), feedback, rank=t.rank)
    drive(ALGORITHMS["thc"].run(x, t, compressor, key, Layout(sizes), Pool(t.device), bits=bits))


@pytest.mark.parametrize(
    ("ranks", "bits"), [(2, 2), (3, 4), (4, 8), (7, 4), (17, 4), (18, 4), (1, 4)]
)
def test_owners_add_integers_and_bytes_are_the_formula(ranks: int, bits: int) -> None:
    """Of constant tensors rotations are as far out as can be: codes at both ends of the grid."""
    sizes = (4096, 300, 5)

    def rank(t: ThreadTransport) -> Any:
        spy, x = Spy(t), torch.full((sum(sizes),), 3.0)
        x[4096:] += data(t.rank, 305)
        run(spy, x, sizes, bits)
        return spy.seen, t.bytes_sent, x

    results = run_ranks(ranks, rank)
    scheme = Scheme.parse(f"fp32@thc:bits={bits}")
    topology, row = Topology(ranks, Link(1e-4, 1e8)), ALGORITHMS["thc"]
    expected = row.wire_bytes(Layout(sizes), scheme, topology)
    assert all(sent == expected for _, sent, _ in results)
    assert (row.seconds(Layout(sizes), scheme, topology) > 3e-4) == (ranks > 1)
    same_bits([[x] for _, _, x in results])
    if ranks == 1:
        assert results[0][0] == []
        return
    for seen, _, _ in results:
        assert [name for name, _ in seen] == ["all_gather", "all_to_all", "all_gather"]
    codes = [thc.unpack(seen[1][1], bits).to(torch.int64) for seen, _, _ in results]
    total = torch.stack(codes).sum(0)
    kind = torch.uint8 if ranks * ((1 << bits) - 1) <= 255 else torch.int16
    assert thc.sum_dtype(ranks, bits) is kind
    sums = torch.cat([seen[2][1].view(kind).to(torch.int64) for seen, _, _ in results])
    assert torch.equal(sums, total)
    if bits < 8:
        assert total.max() == ranks * ((1 << bits) - 1), "the largest sum there can be"
    else:
        assert total.max() > 255
    # payloads as the paper counts them: bits up, a sum down, and padding of a few bytes a part
    values = 4096 + 512 + 8
    payload = (ranks - 1) / ranks * values * (bits / 8 + kind.itemsize)
    assert payload <= expected <= payload + (ranks - 1) * (4 * 3 + 16 * (1 + 8 // bits * 2))


@pytest.mark.parametrize("numel", [1, 5, 8, 9, 1000, 4095, 4096, 4097, 9000])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_ranks_end_equal_and_near_the_sum(ranks: int, numel: int) -> None:
    def rank(t: ThreadTransport) -> list[torch.Tensor]:
        x = data(t.rank, numel)
        run(t, x, (numel,), 8)
        return [x]

    results = run_ranks(ranks, rank)
    same_bits(results)
    xs = [data(r, numel) for r in range(ranks)]
    exact = sum(x.double() for x in xs)
    # Rounding is off by less than a step of 2 clip / 255 rms in every value, so by that share of
    # the norm, the largest of all ranks in each chunk. Of Gaussian values the clip at 3.77 leaves a
    # norm of .005; those of 8 elements lie within sqrt(8) of their rms.
    top = max(float(x.norm()) for x in xs)
    step = 2 * thc.CLIPS[8] / 255 * ranks**0.5
    clipped = 0.02 if numel > 8 else 0.0
    bound = 1e-6 * top if ranks == 1 else ranks * top * (step + clipped)
    assert numel < 1000 or bound < exact.norm() / 3  # zeros would not do
    assert (results[0][0] - exact).norm() <= bound


@pytest.mark.parametrize("factor", ["avg", "sum", -2.0])
@pytest.mark.parametrize("scheme", [EF, "fp32+ef@thc:bits=2", "fp32+ef@thc:bits=8"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_what_did_not_arrive_is_owed(ranks: int, scheme: str, factor: Any) -> None:
    """Given = arrived + residuals, to fp32 rounding."""

    def body(c: Communicator) -> Any:
        return [send(c, bucket(c.rank, s), factor=factor) for s in range(12)], residuals(c)

    results = on_ranks(ranks, scheme, body)
    number = {"avg": 1 / ranks, "sum": 1.0}.get(factor, factor)
    given = number * sum(bucket(r, step).double() for r in range(ranks) for step in range(12))
    missing = given - sum(x.double() for x in results[0][0])
    for name, difference in zip(KEYS, missing.split(SIZES), strict=True):
        owed = number * sum(e[name].double() for _, e in results if name in e)
        assert (difference - owed).norm() < 1e-5 * given.norm(), name
    assert missing.norm() > 1e-3 * given.norm(), "there is something to owe"
    assert set(results[0][1]) == {"a", "c", "d"}, "vectors travel raw"


def test_feedback_stays_bounded_and_makes_means_exact() -> None:
    """Of a constant gradient the mean over T steps tends to it as 1/T."""

    def body(c: Communicator) -> Any:
        total, found = torch.zeros(5000), []
        for step in range(1, 41):
            x = data(c.rank, 5000)
            c.all_reduce(x.view(50, 100), "w", factor="avg")
            total += x
            found.append(total / step)
        return found[9], found[39], residuals(c)["w"]

    for scheme in (EF, "fp32+ef@thc:bits=2"):
        results = on_ranks(4, scheme, body)
        exact = sum(data(r, 5000) for r in range(4)) / 4
        for early, late, residual in results:
            assert (late - exact).norm() < 0.4 * (early - exact).norm()
            assert residual.norm() < data(0, 5000).norm()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e38])
def test_a_nonfinite_step_is_seen_by_all_and_leaves_no_trace(bad: float) -> None:
    """In its chunk; what follows there is, bit by bit, as if the others had sent that step."""

    def body(c: Communicator, spoilt: bool) -> Any:
        outs = [send(c, bucket(c.rank, s), factor="avg") for s in range(2)]
        before, x = residuals(c), bucket(c.rank, 7)
        if spoilt and c.rank == 1:
            x[4096 + 100 : 4096 + 140] = bad  # in the rest of "a"
        seen = send(c, x, factor="avg")
        return outs, before, seen, residuals(c)

    want = on_ranks(3, EF, lambda c: body(c, False))
    got = on_ranks(3, EF, lambda c: body(c, True))
    same_bits([[seen] for _, _, seen, _ in got])
    for (_, before, seen, after), (_, _, clean, healthy) in zip(got, want, strict=True):
        assert seen[4096:5000].isnan().all()
        others = torch.cat([seen[:4096], seen[5000:]])
        assert torch.equal(others, torch.cat([clean[:4096], clean[5000:]]))
        assert torch.equal(after["a"][4096:], before["a"][4096:])
        assert torch.equal(after["a"][:4096], healthy["a"][:4096])
        assert torch.equal(after["d"], healthy["d"])


@pytest.mark.parametrize("scheme", [EF, "fp32@thc:bits=2"])
def test_grouping_changes_nothing(scheme: str) -> None:
    """A parameter's bits depend on neither its bucket nor its neighbours, raw or not."""

    def regrouped(c: Communicator, groups: tuple[tuple[int, ...], ...]) -> list[torch.Tensor]:
        outs = []
        for step in range(4):
            x = bucket(c.rank, step)
            for which in groups if step > 1 else ((0, 1, 2, 3),):
                x = send(c, x, which)
            outs.append(x)
        return outs

    want = on_ranks(3, scheme, lambda c: regrouped(c, ((0, 1, 2, 3),)))[0]
    for outs in on_ranks(3, scheme, lambda c: regrouped(c, ((3, 1), (0,), (2,)))):
        assert all(torch.equal(a, b) for a, b in zip(outs, want, strict=True))


@pytest.mark.parametrize("scheme", [EF, "fp32@thc"])
def test_resuming_is_the_uninterrupted_run(scheme: str) -> None:
    def whole(c: Communicator) -> Any:
        outs, state = [], None
        for step in range(6):
            if step == 3:
                state = c.state_dict()
            outs.append(send(c, bucket(c.rank, step), async_op=False))
        return outs, state

    first = on_ranks(3, scheme, whole, seed=4)

    def resumed(c: Communicator) -> Any:
        c.load_state_dict(first[c.rank][1])
        return [send(c, bucket(c.rank, step)) for step in range(3, 6)]

    for outs, (want, _) in zip(on_ranks(3, scheme, resumed, seed=4), first, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(outs, want[3:], strict=True))
    other = on_ranks(3, scheme, lambda c: send(c, bucket(c.rank, 0)), seed=5)
    assert not torch.equal(other[0], first[0][0][0])


def test_roundings_are_of_the_rank_rotations_of_all() -> None:
    """Equal tensors: were ranks to round alike, errors would not average."""

    def body(c: Communicator) -> torch.Tensor:
        x = data(0, 4096)
        c.all_reduce(x, factor="avg", scheme="fp32@thc")
        return x

    def error(ranks: int) -> float:
        return float((on_ranks(ranks, "fp32", body)[0] - data(0, 4096)).square().sum())

    # of 0.0155 by rounding a W-th is left, of 0.0045 by clamping, which all ranks share, all
    assert error(8) < 0.75 * error(2)


def test_zeros_tiny_and_half_gradients() -> None:
    def body(c: Communicator, dtype: torch.dtype, scale: float) -> list[torch.Tensor]:
        outs = []
        for step in range(3):
            x = (scale * bucket(c.rank, step)).to(dtype)
            outs.append(send(c, x, factor="avg"))
        return outs

    for scale in (0.0, 1e-35):  # nothing arrives of what is this small, and it is owed
        (zeros, *_), *_ = on_ranks(2, EF, lambda c, s=scale: body(c, torch.float32, s))
        a = zeros[:5000]
        assert torch.equal(a, torch.zeros_like(a))
    for dtype in (torch.float16, torch.bfloat16):
        half = on_ranks(3, EF, lambda c, d=dtype: body(c, d, 1.0))
        same_bits(half)
        exact = sum(bucket(r, 0).to(dtype).double() for r in range(3)) / 3
        assert half[0][0].dtype == dtype
        assert (half[0][0] - exact).norm() < 0.3 * exact.norm()


def test_a_residual_on_hold_is_neither_sent_nor_lost() -> None:
    def body(c: Communicator) -> Any:
        arrived = torch.zeros(sum(SIZES)).double()
        for step in range(4):
            x, hold = bucket(c.rank, step), ()
            if step == 2 and c.rank == 0:  # did not use this one
                x[:5000] = 0
                hold = (0,)
            arrived += send(c, x, factor="avg", hold=hold).double()
        return arrived, residuals(c)

    results = on_ranks(3, EF, body)
    given = sum(bucket(r, step).double() for r in range(3) for step in range(4))
    given[:5000] -= bucket(0, 2)[:5000]
    missing = (given / 3 - results[0][0])[:5000]
    owed = sum(e["a"].double() for _, e in results) / 3
    assert (missing - owed).norm() < 1e-5 * given.norm()


def test_asynchronous_messages_follow_one_another() -> None:
    def body(c: Communicator, asynchronous: bool) -> Any:
        xs = [bucket(c.rank, step) for step in range(4)]
        works = [c.all_reduce_segments(x, KEYS, SIZES, NDIMS, async_op=asynchronous) for x in xs]
        for work in works:
            work.wait()
        return xs

    want = on_ranks(3, EF, lambda c: body(c, False))
    for xs in on_ranks(3, EF, lambda c: body(c, True)):
        assert all(torch.equal(a, b) for a, b in zip(xs, want[0], strict=True))


@given(st.sampled_from([2, 4, 8]), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_packing_is_undone(bits: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << bits, (8 * count,), generator=generator).to(torch.uint8)
    packed = thc.pack(codes, bits)
    assert packed.numel() == codes.numel() * bits // 8
    assert torch.equal(thc.unpack(packed, bits), codes)


@given(st.lists(st.integers(0, 9000), min_size=1, max_size=5))
def test_pieces_cover_every_element_once(sizes: list[int]) -> None:
    code = chunk = 0
    covered = [0] * len(sizes)
    for p in thc.pieces(tuple(sizes)):
        assert (p.code, p.chunk, p.start) == (code, chunk, covered[p.segment])
        assert p.width & (p.width - 1) == 0
        assert thc.LEAST <= p.width <= thc.CHUNK
        assert (p.rows - 1) * p.width < p.numel <= p.rows * p.width
        assert p.rows * p.width < 2 * p.numel + thc.LEAST
        code, chunk = code + p.rows * p.width, chunk + p.rows
        covered[p.segment] += p.numel
    assert covered == sizes
