"""All-reduces of topk and randk: equal on all ranks, exact where they claim it, nothing lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from commlib import Communicator
from commlib.codecs import codec
from commlib.collectives import ALGORITHMS, Pool, drive
from commlib.feedback import Compressor, ErrorFeedback, Plain
from commlib.transport import ThreadTransport, run_ranks
from commlib_kernels.layout import Layout
from tests.communicators import data, on_ranks, only

SIZES = (1, 2, 3, 4, 7)
LAYOUT = Layout((3000, 70, 1000), exact=(False, True, False))
KEY = ("a", "b", "c")


def summed(name: str, text: str, size: int, steps: int, feedback: Any = None) -> Any:
    """What every rank has after each of `steps` all-reduces of the same integers, and these."""
    xs = [
        torch.randint(-99, 100, (4070,), generator=torch.Generator().manual_seed(r)).float()
        for r in range(size)
    ]

    def rank(t: ThreadTransport) -> torch.Tensor:
        pool, seen = Pool(t.device), []
        compressor = Compressor(codec(text), feedback or Plain(), seed=5, rank=t.rank)
        layout = LAYOUT if name == "two_phase" else Layout(LAYOUT.sizes)
        for _ in range(steps):
            x = xs[t.rank].clone()
            drive(ALGORITHMS[name].run(x, t, compressor, KEY, layout, pool))
            seen.append(x)
        return torch.stack(seen)

    found = run_ranks(size, rank)
    for other in found[1:]:
        assert torch.equal(other, found[0])
    return found[0], torch.stack(xs).sum(0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("text", ["topk:density=0.05|int8", "topk:density=0.1:block=128|bf16"])
def test_topk_with_feedback_loses_nothing_over_steps(text: str, size: int) -> None:
    steps = 120
    means, total = summed("two_phase", text, size, steps, ErrorFeedback())
    assert torch.equal(means[0][3000:3070], total[3000:3070])  # exact ones are
    first = (means[0] - total).norm() / total.norm()
    if size > 1:
        assert first > 0.5
    assert (means.mean(0) - total).norm() / total.norm() < 0.35


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["two_phase", "native"])
def test_randk_is_the_exact_sum_of_what_was_chosen(name: str, size: int) -> None:
    """Integers are exact in fp32: where something came it is the sum, and elsewhere nothing is."""
    steps = 12
    outs, total = summed(name, "randk:density=0.1|fp32", size, steps)
    if size == 1:
        return
    lossy = torch.ones(4070, dtype=torch.bool)
    if name == "two_phase":
        lossy[3000:3070] = False
        assert torch.equal(outs[:, ~lossy], total[~lossy].expand(steps, -1))
    sent = outs != 0
    assert torch.equal(outs[sent], total.expand(steps, -1)[sent])
    share = sent[:, lossy].float().mean()
    assert 0.08 < share < 0.13
    # Each step chooses anew: nothing is left out for ever.
    assert sent[:, lossy].any(0).float().mean() > 0.6


@pytest.mark.parametrize("name", ["two_phase", "native"])
def test_randk_is_unbiased_through_both_halves(name: str) -> None:
    steps = 300
    outs, total = summed(name, "randk:density=0.25:scale=unbiased|fp32", 3, steps)
    power = total.square().sum()
    one = (outs - total).square().sum() / steps / power
    assert 2.5 < one < 3.5  # 1 / density - 1: scaled once, not twice
    assert (outs.mean(0) - total).square().sum() / power < 1.5 * one / steps


@pytest.mark.parametrize(
    "scheme", ["randk|bf16", "randk|fp32", "topk|int8+ef", "randk|bf16+ef@native"]
)
def test_a_bad_element_reaches_all_ranks_and_heals(scheme: str) -> None:
    def body(c: Communicator) -> list[bool]:
        finite = []
        for step in range(3):
            x = data(c.rank, 5000, step)
            if step == 1 and c.rank == 1:
                x[1234] = float("nan")
            c.all_reduce(x, "w").wait()
            finite.append(bool(x.isfinite().all()))
        return finite

    assert on_ranks(3, only(scheme), body) == [[True, False, True]] * 3


@pytest.mark.parametrize("scheme", ["randk:density=0.2|fp32", "randk:density=0.2|bf16"])
def test_messages_in_flight_keep_their_own_choices(scheme: str) -> None:
    """Anonymous messages share one stream; the next may begin before the last is decoded."""

    def body(c: Communicator) -> list[torch.Tensor]:
        xs = [torch.full((4000,), 1.0) for _ in range(8)]
        works = [c.all_reduce(x, async_op=True) for x in xs]
        for work in works:
            work.wait()
        return xs

    found = on_ranks(3, only(scheme), body)
    choices = set()
    for xs in zip(*found, strict=True):
        assert all(torch.equal(x, xs[0]) for x in xs)
        values = set(xs[0].tolist())
        assert values == {0.0, 15.0}  # three ranks, times 1 / density
        choices.add(tuple((xs[0] != 0).tolist()))
    assert len(choices) == 8


def test_messages_keep_the_choices_of_their_second_half() -> None:
    def body(c: Communicator) -> list[torch.Tensor]:
        xs = [torch.ones(4000) for _ in range(8)]
        works = [c.all_reduce(x, async_op=True) for x in xs]
        for work in works:
            work.wait()
        return xs

    scheme = "bf16@two_phase:back=(randk:density=0.2:scale=none|fp32)"
    runs = [on_ranks(3, only(scheme), body) for _ in range(2)]
    for one, two in zip(runs[0][0], runs[1][2], strict=True):
        assert torch.equal(one, two)
    assert len({tuple((x != 0).tolist()) for x in runs[0][0]}) == 8


@pytest.mark.parametrize("algorithm", ["native", "two_phase"])
def test_ranks_choose_alike_after_parts_that_only_some_of_them_code(algorithm: str) -> None:
    """Small parts travel raw, so the ranks code different numbers of them."""

    def body(c: Communicator) -> torch.Tensor:
        mine = [[4000, 1], [1, 1]][c.rank]
        theirs = [[4000, 1], [1, 1]][c.rank]
        out, x = torch.empty(sum(theirs)), torch.ones(sum(mine))
        c.all_to_all(out, x, out_splits=theirs, in_splits=mine).wait()
        total = torch.arange(4000.0) + 1
        c.all_reduce(total).wait()
        return total

    scheme = f"randk:density=0.1:scale=none|fp32@{algorithm}"
    found = on_ranks(2, only(scheme), body)
    assert torch.equal(found[0], found[1])
    kept = found[0] != 0
    assert torch.equal(found[0][kept], 2 * (torch.arange(4000.0) + 1)[kept])


@pytest.mark.parametrize("scheme", ["topk:density=0.3|bf16", "randk:density=0.3:scale=none|int8"])
def test_the_other_collectives_carry_them(scheme: str) -> None:
    """Rows of a gather and of a reduce_scatter decode to what was chosen of them."""

    def body(c: Communicator) -> tuple[torch.Tensor, torch.Tensor]:
        rows, row = torch.empty(3 * 1500), torch.empty(1500)
        c.all_gather(rows, data(c.rank, 1500), "g").wait()
        c.reduce_scatter(row, data(0, 4500), "r").wait()
        return rows, row

    found = on_ranks(3, only(scheme), body)
    for r, (rows, row) in enumerate(found):
        assert torch.equal(rows, found[0][0])
        for rank, part in enumerate(rows.split(1500)):
            x = data(rank, 1500)
            kept = part != 0
            assert 0.25 < kept.float().mean() < 0.35
            torch.testing.assert_close(part[kept], x[kept], rtol=0.05, atol=0.05)
        mine, kept = data(0, 4500)[r * 1500 : (r + 1) * 1500], row != 0
        torch.testing.assert_close(row[kept], 3 * mine[kept], rtol=0.05, atol=0.1)
