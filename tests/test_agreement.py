"""What is refused, what ranks disagree about, and what they say of those that went missing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from commlib import Communicator, Policy, Scheme
from commlib.agreement import Agreement
from commlib.lane import Lane
from commlib.policy import Rule
from commlib.transport import ThreadTransport, run_ranks
from tests.communicators import data, on_ranks, only

BAD = [
    (lambda c: c.all_reduce(torch.ones(60, 50).t(), "w"), r"\(50, 60\) is not contiguous"),
    (lambda c: c.all_reduce(torch.ones(60, device="meta"), "w"), "on meta, this group moves cpu"),
    (lambda c: c.all_reduce(torch.arange(4096), "w", scheme="int8"), r"'int8' got a torch\.int64"),
    (lambda c: c.all_reduce(torch.arange(4096), "w", factor=0.5), r"a floating tensor.*int64"),
    (lambda c: c.all_reduce(torch.ones(4096), scheme="int8+ef"), "remembers residuals under a key"),
    (lambda c: c.all_reduce(torch.ones(4096), "w", factor="mean"), "'mean'; allowed: a number"),
    (lambda c: c.all_reduce(torch.ones(4096), "w", factor=float("nan")), "must be finite"),
    (lambda c: c.all_reduce(torch.ones(4096), "w", scheme="int88"), "unknown codec|int88"),
    (lambda c: c.all_reduce(torch.ones(3001), "known"), "'known' has 3000.*3001"),
    (lambda c: c.all_reduce_segments(torch.ones(10), ("a", "b"), (5, 6)), "adding up to 11.*of 10"),
    (lambda c: c.all_reduce_segments(torch.ones(40), ("a", "a"), (20, 20)), "names one tensor"),
    (lambda c: c.all_reduce_segments(torch.ones(0), (), ()), "needs at least one key"),
    (
        lambda c: c.all_reduce_segments(torch.ones(40), ("a", "b"), (20, 20), hold=(2,)),
        r"hold is \(2,\); allowed: segments 0 to 1",
    ),
    (
        lambda c: c.all_reduce(torch.ones(60, 50), "w", role="gradientt"),
        "unknown role 'gradientt'; allowed: gradient, .*did you mean 'gradient'",
    ),
    (
        lambda c: c.all_reduce_segments(torch.ones(40), ("a",), (40,), role="x"),
        "unknown role 'x'",
    ),
    (lambda c: c.reduce_scatter(torch.ones(3), torch.ones(5)), "must hold 2 x out"),
    (lambda c: c.all_gather(torch.ones(5), torch.ones(3)), "must hold 2 x x"),
    (lambda c: c.all_to_all(torch.ones(5), torch.ones(5)), "not a multiple of 2"),
    (lambda c: c.broadcast(torch.ones(5), 2), "rank 2 is not in this group"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_touches_nothing(call: Callable[[Communicator], Any], message: str) -> None:
    def body(c: Communicator) -> None:
        c.all_reduce(data(c.rank, 3000), "known")
        before, sent = c.state_dict(), c.transport.bytes_sent
        with pytest.raises(ValueError, match=message):
            call(c)
        assert c.transport.bytes_sent == sent
        after = c.state_dict()
        assert str(after) == str(before)
        c.all_reduce(data(c.rank, 3000, 1), "known")

    on_ranks(2, only("int8+ef"), body)


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        (
            [
                lambda c: c.all_reduce(torch.ones(4000), "w"),
                lambda c: c.all_reduce(torch.ones(4001), "w"),
            ],
            ["'w'", "rank 1 has 4001", "rank 0 has 4000", "numel"],
        ),
        (
            [
                lambda c: c.all_reduce(torch.ones(4000), "w"),
                lambda c: c.all_reduce(torch.ones(4000), "v"),
            ],
            ["'w'", "'v'", "key"],
        ),
        (
            [
                lambda c: c.all_reduce(torch.ones(4000), "w"),
                lambda c: c.all_reduce(torch.ones(4000, dtype=torch.float16), "w"),
            ],
            ["dtype", "float16", "float32"],
        ),
        (
            [
                lambda c: c.all_reduce(torch.ones(4000), "w"),
                lambda c: c.all_gather(torch.ones(8000), torch.ones(4000), "w"),
            ],
            ["all_gather", "all_reduce"],
        ),
        (
            [
                lambda c: c.all_reduce(torch.ones(4000), "w", factor="sum"),
                lambda c: c.all_reduce(torch.ones(4000), "w", factor="avg"),
            ],
            ["factor: rank 1 has 0.5, rank 0 has 1.0"],
        ),
        (
            [
                lambda c: c.reduce_scatter_segments(
                    torch.ones(40), torch.ones(80), ("w",), (40,), factor=0.25 + c.rank
                ),
            ]
            * 2,
            ["factor: rank 1 has 1.25, rank 0 has 0.25"],
        ),
    ],
)
def test_mismatched_plans_raise_on_all_ranks_and_send_nothing(calls: Any, words: list[str]) -> None:
    def body(c: Communicator) -> str:
        with pytest.raises(RuntimeError) as caught:
            calls[c.rank](c)
        assert c.transport.bytes_sent == 0
        x = torch.ones(2000, dtype=torch.float64)
        c.all_reduce(x, "after")  # still usable
        assert torch.equal(x, torch.full_like(x, 2.0))
        return str(caught.value)

    texts = on_ranks(2, "int8+ef", body)
    for word in words:
        assert word in texts[0]
    assert "disagree" in texts[1]


def test_a_number_that_changes_by_step_needs_no_new_plan() -> None:
    def body(c: Communicator) -> None:
        for step in range(3):
            x = torch.ones(4000)
            c.all_reduce(x, "w", factor=1 / (step + 3), scheme="fp32")
            assert torch.equal(x, torch.full_like(x, 2 * (1 / (step + 3))))
        assert len(c._plans) == 1

    on_ranks(2, "int8+ef", body)


def test_mismatched_policies_are_named() -> None:
    def rank(t: ThreadTransport) -> str:
        c = Communicator(t, "int8+ef" if t.rank == 0 else "int4+ef")
        with pytest.raises(RuntimeError, match="disagree") as caught:
            c.all_reduce(torch.ones(40, 100), "w")
        c.close()
        return str(caught.value)

    assert "rank 1 has 'int4+ef', rank 0 has 'int8+ef'" in run_ranks(2, rank)[0]


def test_a_missing_rank_is_named_and_the_communicator_aborted() -> None:
    def rank(t: ThreadTransport) -> str:
        c = Communicator(t, "int8+ef", timeout=0.3)
        if t.rank == 2:
            done.wait(20)
            # it comes too late: the others have left
            with pytest.raises(RuntimeError, match="has failed"):
                c.all_reduce(torch.ones(40, 100), "w")
            return ""
        try:
            with pytest.raises(RuntimeError) as caught:
                c.all_reduce(torch.ones(40, 100), "w")
            with pytest.raises(RuntimeError, match="takes no more calls"):
                c.all_reduce(torch.ones(40, 100), "other")
        finally:
            left.wait(20)
            done.set()
        return str(caught.value)

    done, left = threading.Event(), threading.Barrier(2)
    texts = run_ranks(3, rank)
    for text in texts[:2]:
        assert "'w'" in text
        assert "no word from rank 2" in text
        assert "aborted" in text


def test_a_rank_that_stops_calling_is_named_by_all_waiting() -> None:
    """Queued messages fail with the same error; residuals of a lost message are not handed out."""

    def rank(t: ThreadTransport) -> list[str]:
        c = Communicator(t, only("int8+ef"), timeout=0.5)
        x = data(t.rank, 3000)
        c.all_reduce(x, "w")
        if t.rank == 2:
            done.wait(20)
            return []
        works = [c.all_reduce(data(t.rank, 3000, s), "w", async_op=True) for s in (1, 2)]
        texts = []
        for work in works:
            with pytest.raises(RuntimeError) as caught:
                work.wait()
            texts.append(str(caught.value))
            assert isinstance(work.exception(), RuntimeError)
        with pytest.raises(RuntimeError, match=r"residuals of w are"):
            c.state_dict()
        with pytest.raises(RuntimeError, match="takes no more calls"):
            c.all_reduce(x, "w")
        left.wait(20)
        done.set()
        return texts

    done, left = threading.Event(), threading.Barrier(2)
    for texts in run_ranks(3, rank)[:2]:
        for text in texts:
            assert "all_reduce of key 'w' (message 2)" in text
            assert "no answer from rank 2" in text


def test_what_was_heard_before_the_store_went_is_told() -> None:
    """The rank that keeps the store fails like the others, and may be the first to leave."""

    class Leaving(ThreadTransport):
        left = False

        def read(self, key: str, timeout: float) -> str:
            if self.left and key.endswith("report/2"):
                raise RuntimeError("connection reset by peer")
            return super().read(key, timeout)

    def rank(t: ThreadTransport) -> str:
        agreement = Agreement(t, 5.0)
        agreement.agree({"op": "all_reduce", "key": "w"})
        agreed.wait(20)
        if t.rank == 2:
            return ""
        if t.rank == 1:
            t.__class__, t.left = Leaving, True  # type: ignore[assignment, attr-defined]
        return agreement.roll_call("all_reduce of key 'w'", TimeoutError(f"late on {t.rank}"))

    agreed = threading.Barrier(3)
    keeper, other, _ = run_ranks(3, rank)
    assert "no answer from rank 2 (process " in keeper
    assert "rank 1 was in all_reduce of key 'w': late on 1" in keeper
    assert "nothing heard from rank 2 (process " in other
    assert "the group's store does not answer" in other
    assert "connection reset by peer" in other
    assert "rank 0 was in all_reduce of key 'w': late on 0" in other


def test_a_store_that_outlived_ranks_does_not_confuse_those_after_them() -> None:
    """torchrun keeps its store when it starts ranks anew; one of them comes before the others."""

    def before(t: ThreadTransport) -> dict[str, str]:
        agreement = Agreement(t, 5.0)
        agreement.agree({"op": "all_reduce", "key": "old"})
        agreed.wait(20)
        agreement.roll_call("all_reduce of key 'old'", TimeoutError("late"))
        return dict(t._world.store)

    def after(t: ThreadTransport) -> list[str]:
        for key, value in left.items():
            t._world.store.setdefault(key, value)
        ready.wait(20)
        agreement = Agreement(t, 20.0)
        if t.rank == 2:
            time.sleep(0.3)  # the others see whom it succeeds
        agreement.agree({"op": "all_reduce", "key": "new"})
        agreement.look()
        return agreement.gather("names", t.rank)

    agreed, ready = threading.Barrier(3), threading.Barrier(3)
    left = run_ranks(3, before)[2]
    assert any(key.endswith("/failed") for key in left)
    assert run_ranks(3, after) == [[0, 1, 2]] * 3


def test_waiting_with_a_timeout_aborts() -> None:
    def rank(t: ThreadTransport) -> None:
        c = Communicator(t, only("int8"), timeout=20.0)
        c.all_reduce(torch.ones(1000))
        if t.rank == 1:
            done.wait(20)
            return
        work = c.all_reduce(torch.ones(1000), async_op=True)
        with pytest.raises(RuntimeError, match=r"not done after 0\.2 s.*aborted"):
            work.wait(0.2)
        with pytest.raises(RuntimeError, match="takes no more calls"):
            c.all_reduce(torch.ones(1000))
        done.set()

    done = threading.Event()
    run_ranks(2, rank)


def test_a_closed_communicator_says_so() -> None:
    def body(c: Communicator) -> None:
        c.close()
        with pytest.raises(RuntimeError, match="closed"):
            c.all_reduce(torch.ones(10))

    on_ranks(1, "int8", body)


def test_the_environment_is_read_and_validated(monkeypatch: pytest.MonkeyPatch) -> None:
    t = ThreadTransport.world(1)[0]
    assert str(Communicator(t).policy) == "int8+ef"
    monkeypatch.setenv("COMMLIB_POLICY", "int4")
    assert str(Communicator(t).policy) == "int4"
    monkeypatch.setenv("COMMLIB_POLICY", "int44")
    with pytest.raises(ValueError, match="int44"):
        Communicator(t)
    monkeypatch.setenv("COMMLIB_CHECK", "yes")
    with pytest.raises(ValueError, match="COMMLIB_CHECK='yes'; allowed: 0, 1"):
        Communicator(t, "int8")


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        *(({"seed": seed}, "seed is .* whole number >= 0") for seed in (1.5, "a", True, -1)),
        *(
            ({"timeout": t}, "timeout is .* seconds above 0")
            for t in (0, -1.0, float("nan"), float("inf"), "5")
        ),
        *(({"policy": policy}, "policy|scheme") for policy in ("", {}, [], 0)),
    ],
)
def test_what_no_communicator_can_have_is_refused_at_once(how: Any, complaint: str) -> None:
    (transport,) = ThreadTransport.world(1)
    with pytest.raises(ValueError, match=complaint):
        Communicator(transport, **how)


@pytest.mark.parametrize("turned", [False, True])
def test_rules_by_dimensions_know_those_of_each_call(turned: bool) -> None:
    """As many elements under the same name, or none, are not yet the same tensor."""
    cubes = Policy((Rule(Scheme.parse("int8"), min_ndim=3), Rule(Scheme.parse("fp32"))))

    def body(c: Communicator) -> list[bool]:
        exact = []
        for shape in [(16, 16, 16), (64, 64)][:: -1 if turned else 1]:
            for key in ("w", None):
                x = data(c.rank, 4096).view(shape)
                c.all_reduce(x, key)
                exact.append(torch.equal(x.view(-1), data(0, 4096) + data(1, 4096)))
        for ndims in [(3, 2), (2, 3)][:: -1 if turned else 1]:
            x = data(c.rank, 8192)
            c.all_reduce_segments(x, ("a", "b"), (4096, 4096), ndims)
            same = (x == data(0, 8192) + data(1, 8192)).view(2, -1).all(1)
            exact += same.tolist()
        return exact

    found = on_ranks(2, cubes, body)[0]
    tensors, segments = [False, False, True, True], [False, True, True, False]
    assert found == (tensors[::-1] + segments[2:] + segments[:2] if turned else tensors + segments)


def test_lists_name_segments_as_tuples_do() -> None:
    def body(c: Communicator) -> torch.Tensor:
        x = data(c.rank, 3000)
        c.all_reduce_segments(x, ["a", "b"], [1000, 2000], [2, 1], [1000, 2000])  # type: ignore
        return x

    results = on_ranks(2, "int8", body)
    assert torch.equal(*results)


@pytest.mark.parametrize("scheme", ["fp32", "int8+ef", "bf16@native", "int4+ef@ring"])
def test_checked_payloads_pass(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMLIB_CHECK", "1")

    def body(c: Communicator) -> None:
        for step in range(2):
            c.all_reduce(data(c.rank, 3000, step), "w", async_op=True).wait()
        c.all_gather(torch.empty(3000), data(c.rank, 1000)).wait()
        c.all_to_all(torch.empty(3000), data(c.rank, 3000)).wait()
        c.broadcast(data(c.rank, 3000), 1).wait()

    on_ranks(3, only(scheme), body)


def test_a_damaged_payload_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMLIB_CHECK", "1")
    through = Lane.all_to_all

    def damage(self: Lane, out: torch.Tensor, inp: torch.Tensor, **how: Any) -> Any:
        if self.rank == 1 and inp.numel() > 64:
            inp[3] ^= 1
        return through(self, out, inp, **how)

    def rank(t: ThreadTransport) -> str:
        c = Communicator(t, only("int8"), timeout=2.0)
        with pytest.raises(RuntimeError) as caught:
            c.all_reduce(data(t.rank, 3000))
        return str(caught.value)

    monkeypatch.setattr(Lane, "all_to_all", damage)
    assert "payload of rank 1 arrived at rank 0 with crc32" in run_ranks(2, rank)[0]


def test_rounds_leave_nothing_behind() -> None:
    """Every rank takes back what all have read; what differs is gathered, by rank."""

    def rank(t: ThreadTransport) -> list[str]:
        agreement = Agreement(t, 5.0)
        for number in range(20):
            agreement.agree({"op": "test", "key": number})
            assert agreement.gather("ranks", t.rank) == [0, 1, 2]
        t.barrier()
        return sorted(key for key in t._world.store if "plan" in key)

    for left in run_ranks(3, rank):
        assert [key.partition("/plan/")[2] for key in left] == ["39/0", "39/1", "39/2"]


@pytest.mark.parametrize(
    ("scheme", "check"), [("int8+ef", "0"), ("int8+ef", "1"), ("int4@ring", "0"), ("fp32", "1")]
)
def test_who_waits_looks_at_what_others_say(
    scheme: str, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that failed is named long before the exchange with it times out."""
    monkeypatch.setenv("COMMLIB_CHECK", check)
    monkeypatch.setattr("commlib.worker.PATIENCE", 0.1)

    def body(c: Communicator) -> str:
        c.all_reduce(data(c.rank, 3000), "w")
        if c.rank == 2:
            c._carrier.fail(RuntimeError("the disk is full"), [], "reading")
            return ""
        with pytest.raises(RuntimeError) as caught:
            c.all_reduce(data(c.rank, 3000), "w", async_op=c.rank == 1).wait()
        return str(caught.value)

    for text in on_ranks(3, only(scheme), body)[:2]:
        assert "rank 2 has failed in reading" in text
        assert "the disk is full" in text
        assert "timed out" not in text
