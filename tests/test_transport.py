"""Transports: what arrives, what is counted, what is refused."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from commlib import traffic
from commlib.transport import ThreadTransport, Transport, run_ranks

SIZES = (1, 2, 3, 4, 7)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [0, 1, 5, 1000])
def test_every_verb_moves_what_it_says(size: int, count: int) -> None:
    def rank(t: Transport) -> None:
        x = torch.arange(count * size, dtype=torch.float32) + 1e4 * t.rank
        rows = torch.arange(count * size, dtype=torch.float32).view(size, count)
        out = torch.empty_like(x)
        t.all_to_all(out, x).wait()
        assert torch.equal(
            out.view(size, count), torch.stack([rows[t.rank] + 1e4 * r for r in range(size)])
        )
        mine = out.view(size, count)[t.rank]
        mine.copy_(x[:count])
        t.all_gather(out, mine).wait()  # the input lies inside the output
        assert torch.equal(
            out.view(size, count), torch.stack([rows[0] + 1e4 * r for r in range(size)])
        )
        t.all_reduce(x).wait()
        assert torch.equal(x, size * rows.view(-1) + 1e4 * sum(range(size)))
        x.fill_(t.rank)
        t.broadcast(x, size - 1).wait()
        assert torch.equal(x, torch.full_like(x, size - 1))
        if size > 1:
            got = torch.empty(count)
            pending = [
                t.send(torch.full((count,), float(t.rank)), (t.rank + 1) % size, tag=3),
                t.recv(got, (t.rank - 1) % size, tag=3),
            ]
            for p in pending:
                p.wait()
            assert torch.equal(got, torch.full((count,), float((t.rank - 1) % size)))
        t.barrier()

    run_ranks(size, rank)


def test_unequal_parts() -> None:
    def rank(t: Transport) -> list[float]:
        # rank r sends r + s elements to rank s
        in_splits = [t.rank + s for s in range(3)]
        x = torch.full((sum(in_splits),), float(t.rank))
        out = torch.empty(sum(in_splits))
        t.all_to_all(out, x, out_splits=in_splits, in_splits=in_splits).wait()
        return out.tolist()

    for r, got in enumerate(run_ranks(3, rank)):
        assert got == [float(s) for s in range(3) for _ in range(r + s)]


def test_bytes_sent_follow_the_formulas() -> None:
    def rank(t: ThreadTransport) -> list[int]:
        counts = []
        x = torch.zeros(4 * 100)
        for call in (
            lambda: t.all_reduce(x),
            lambda: t.all_gather(torch.zeros(1600), x),
            lambda: t.all_to_all(torch.zeros(400), x),
            lambda: t.broadcast(x, 1),
        ):
            before = t.bytes_sent
            call().wait()
            counts.append(t.bytes_sent - before)
        return counts

    results = run_ranks(4, rank)
    assert [r[:3] for r in results] == [[2 * 3 * 1600 // 4, 3 * 1600, 3 * 400]] * 4
    # rank 1 is the root of a binomial tree, rank 2 its first child
    assert [r[3] for r in results] == [0, 2 * 1600, 1600, 0]


@pytest.mark.parametrize("size", range(1, 10))
def test_a_broadcast_reaches_every_rank_once(size: int) -> None:
    for chain in (False, True):
        sent = [traffic.broadcast_bytes(1, r, size // 2, size, chain=chain) for r in range(size)]
        assert sum(sent) == size - 1


def test_sub_groups_have_ranks_and_a_store_of_their_own() -> None:
    """Ranks keep their order, whatever the order they are named in, as in new_group."""

    def rank(t: Transport) -> Any:
        if t.rank == 1:
            return None
        sub = t.sub([3, 0, 2])
        x = torch.tensor([float(t.rank)])
        sub.all_reduce(x).wait()
        sub.post(f"from {sub.rank}", str(t.rank))
        first = torch.tensor([float(t.rank)])
        sub.broadcast(first, 0).wait()
        with pytest.raises(TimeoutError, match="from 0"):
            t.read("from 0", 0.0)
        return sub.rank, sub.ranks, x.item(), first.item(), sub.read("from 0", 5.0)

    results = run_ranks(4, rank)
    assert results == [
        (0, (0, 2, 3), 5.0, 0.0, "0"),
        None,
        (1, (0, 2, 3), 5.0, 0.0, "0"),
        (2, (0, 2, 3), 5.0, 0.0, "0"),
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.all_to_all(torch.zeros(5), torch.zeros(5)), "5 elements, not a multiple of 2"),
        (lambda t: t.all_to_all(torch.zeros(4), torch.zeros(6)), "out has 4 elements, inp 6"),
        (lambda t: t.all_to_all(torch.zeros(4), torch.zeros(4).half()), "must be equal"),
        (
            lambda t: t.all_to_all(
                torch.zeros(4), torch.zeros(4), out_splits=[1, 2], in_splits=[2, 2]
            ),
            r"4 elements and splits \[1, 2\]",
        ),
        (
            lambda t: t.all_to_all(torch.zeros(4), torch.zeros(4), in_splits=[2, 2]),
            "both split sizes or neither",
        ),
        (lambda t: t.all_gather(torch.zeros(5), torch.zeros(3)), "out must hold 2 x inp"),
        (lambda t: t.all_reduce(torch.zeros(4, 4).t()), "not contiguous"),
        (lambda t: t.all_reduce(torch.zeros(4, device="meta")), "on meta"),
        (lambda t: t.broadcast(torch.zeros(4), 2), "rank 2 is not in this group of 2"),
        (lambda t: t.send(torch.zeros(4), -1), "rank -1"),
        (lambda t: t.sub([1 - t.rank]), "is not one of"),
    ],
)
def test_wrong_calls_are_refused_before_anything_moves(call: Any, message: str) -> None:
    t = ThreadTransport.world(2)[0]
    with pytest.raises(ValueError, match=message):
        call(t)
    assert t.bytes_sent == 0


def test_ranks_that_disagree_fail_together() -> None:
    def rank(t: Transport) -> str:
        with pytest.raises(RuntimeError) as caught:
            t.all_reduce(torch.zeros(4 + t.rank)).wait()
        return str(caught.value)

    for text in run_ranks(2, rank):
        assert "all_reduce" in text
        assert "4" in text
        assert "5" in text


def test_a_missing_rank_times_out_by_name() -> None:
    t = ThreadTransport.world(3)[0]
    pending = t.all_reduce(torch.zeros(4))
    assert not pending.done()
    with pytest.raises(RuntimeError, match=r"ranks \[1, 2\] did not come"):
        pending.wait(0.05)


def test_the_store_blocks_until_posted() -> None:
    a, b = ThreadTransport.world(2)
    threading.Timer(0.05, lambda: a.post("k", "v")).start()
    assert b.read("k", 5.0) == "v"
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"'other' within 0\.05 s"):
        b.read("other", 0.05)
    assert time.monotonic() - start < 1.0


def test_run_ranks_raises_the_first_error_and_wakes_the_others() -> None:
    def rank(t: Transport) -> None:
        if t.rank == 1:
            raise KeyError("mine")
        t.barrier()

    start = time.monotonic()
    with pytest.raises(KeyError, match="mine"):
        run_ranks(3, rank)
    assert time.monotonic() - start < 5.0


def test_run_ranks_gives_up_on_the_stuck() -> None:
    event = threading.Event()
    with pytest.raises(RuntimeError, match=r"ranks \[1\] did not finish"):
        run_ranks(2, lambda t: event.wait() if t.rank else None, timeout=0.1)
    event.set()


def test_a_receive_from_any_source_says_whom_it_met() -> None:
    def rank(t: ThreadTransport) -> list[tuple[int | None, float]]:
        if t.rank:
            t.barrier()
            for k in range(2):
                t.send(torch.full((3,), 10.0 * t.rank + k), 0, tag=t.rank % 2).wait()
            return []
        outs = [torch.empty(3) for _ in range(6)]
        named = t.recv(outs[0], 2, tag=0)
        assert named.source == 2
        receiving = [t.recv(out, None, tag=0) for out in outs[1:2]]
        receiving += [t.recv(out, None, tag=1) for out in outs[2:]]
        t.barrier()
        for pending in (named, *receiving):
            pending.wait(10)
        return [
            (pending.source, out[0].item())
            for pending, out in zip((named, *receiving), outs, strict=True)
        ]

    found = run_ranks(4, rank)[0]
    assert found[:2] == [(2, 20.0), (2, 21.0)]  # in the order in which they were posted
    assert sorted(found[2:]) == [(1, 10.0), (1, 11.0), (3, 30.0), (3, 31.0)]


def test_a_receive_from_any_source_that_meets_nobody() -> None:
    (one, _) = ThreadTransport.world(2)
    pending = one.recv(torch.empty(3), None)
    assert pending.source is None
    with pytest.raises(traffic.Timeout, match=r"ranks \['any'\] did not come"):
        pending.wait(0.01)
