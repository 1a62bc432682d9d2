"""Communicator over threads: what calls do, and what is remembered."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from commlib import Communicator, Policy, Scheme, exact, planning
from commlib import policy as policies
from commlib.policy import Role, Rule
from commlib.telemetry import Meter
from commlib.transport import ThreadTransport, run_ranks
from tests.communicators import data, on_ranks, only

SIZES = (1, 2, 3, 7)
SCHEMES = (
    "fp32",
    "bf16",
    "bf16@native",
    "fp16+ef@native",
    "int8+ef",
    "int4:round=stochastic",
    "int4+ef@ring",
    "int8+ef@two_phase:back=int4:slices=2",
    "sign+ef",
    "ternary",
    "natural",
)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("async_op", [False, True])
def test_all_reduce(scheme: str, size: int, async_op: bool) -> None:
    def body(c: Communicator) -> torch.Tensor:
        x = data(c.rank, 2000).view(40, 50)
        work = c.all_reduce(x, "w", factor="avg", async_op=async_op)
        assert work.wait()
        assert work.is_completed()
        assert work.result() is x
        assert work.get_future().wait() is x
        return x

    outs = on_ranks(size, only(scheme), body)
    mean = torch.stack([data(r, 2000) for r in range(size)]).mean(0).view(40, 50)
    assert all(torch.equal(out, outs[0]) for out in outs)
    if size == 1:
        assert torch.equal(outs[0], mean)
    else:
        cosine = torch.cosine_similarity(outs[0].view(-1), mean.view(-1), dim=0)
        assert cosine > (0.3 if scheme in ("sign+ef", "ternary", "natural") else 0.95)


@pytest.mark.parametrize("scheme", ["fp32", "int8", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int32])
def test_the_other_collectives(scheme: str, dtype: torch.dtype) -> None:
    lossy = scheme != "fp32" and dtype in (torch.float32, torch.bfloat16)

    def body(c: Communicator) -> None:
        w, n = c.size, 600
        rows = [(10 * data(r, n * w)).to(dtype) for r in range(w)]

        def near(got: torch.Tensor, want: torch.Tensor) -> None:
            error = (got.double() - want.double()).abs().max().item()
            top = want.double().abs().max().item()
            # int8: half a step of 1/127 of the block's largest; bf16: 2^-8, the tensor's own too
            half = dtype == torch.bfloat16
            assert error <= top * (0.02 if lossy or half else 1e-6), (scheme, dtype, error)

        out = torch.empty(n, dtype=dtype)
        c.reduce_scatter(out, rows[c.rank].clone()).wait()
        total = torch.stack(rows).double().sum(0)
        near(out, total.view(w, n)[c.rank])
        out = torch.empty(n * w, dtype=dtype)
        c.all_gather(out, rows[c.rank][:n].clone(), async_op=True).wait()
        near(out, torch.cat([row[:n] for row in rows]))
        c.all_to_all(out, rows[c.rank].clone()).wait()
        near(out, torch.cat([row.view(w, n)[c.rank] for row in rows]))
        x = rows[c.rank].clone()
        c.broadcast(x, 1).wait()
        near(x, rows[1])
        splits = [n * (c.rank + r) for r in range(w)]
        x, out = torch.ones(sum(splits)).to(dtype), torch.empty(sum(splits), dtype=dtype)
        c.all_to_all(out, x, out_splits=splits, in_splits=splits).wait()
        near(out, x)

    on_ranks(3, scheme, body)


def test_fp32_is_bitwise_the_library_and_a_multiplication() -> None:
    def body(c: Communicator) -> bool:
        x, y = data(c.rank, 999), data(c.rank, 999)
        c.all_reduce(x, "w", factor=0.3)
        c.transport.all_reduce(y).wait()
        z = data(c.rank, 999)
        c.all_reduce_segments(z, ("a", "b"), (900, 99), factor=0.3)
        y.mul_(0.3)
        return torch.equal(x, y) and torch.equal(z, y)

    assert all(on_ranks(3, "fp32", body))


PARTS = {"a": 3000, "b": 70, "c": 2048, "d": 5000, "e": 10}
NDIMS = {"a": 2, "b": 1, "c": 2, "d": 2, "e": 1}


def train(c: Communicator, buckets: list[list[str]], steps: Iterator[int] | range) -> torch.Tensor:
    """Average the PARTS in these buckets; the sum over steps of the results, in order of PARTS."""
    seen = {name: torch.zeros(n) for name, n in PARTS.items()}
    for step in steps:
        works, tensors = [], []
        whole = data(c.rank, sum(PARTS.values()), step).split(list(PARTS.values()))
        by_name = dict(zip(PARTS, whole, strict=True))
        for bucket in buckets:
            flat = torch.cat([by_name[name] for name in bucket])
            sizes = tuple(PARTS[name] for name in bucket)
            ndims = tuple(NDIMS[name] for name in bucket)
            works.append(
                c.all_reduce_segments(
                    flat, tuple(bucket), sizes, ndims, factor="avg", async_op=True
                )
            )
            tensors.append(flat)
        for bucket, work, flat in zip(buckets, works, tensors, strict=True):
            work.wait()
            for name, piece in zip(bucket, flat.split([PARTS[n] for n in bucket]), strict=True):
                seen[name] += piece
    return torch.cat(list(seen.values()))


MIXED = Policy(
    (
        Rule(Scheme.parse("int2+ef"), key="a", min_ndim=2),
        Rule(Scheme.parse("int4:round=stochastic"), key="c"),
        Rule(Scheme.parse("int8+ef"), min_ndim=2),
    )
)


@pytest.mark.parametrize("policy", ["int4+ef", "int8:round=stochastic", "sign+ef", MIXED])
def test_results_do_not_depend_on_buckets(policy: Any) -> None:
    groupings = (
        [["a", "b", "c", "d", "e"]],
        [["a"], ["b"], ["c"], ["d"], ["e"]],
        [["e", "d"], ["c", "a"], ["b"]],
    )
    results = [
        on_ranks(3, policy, lambda c, g=g: train(c, g, range(4)))  # type: ignore[misc]
        for g in groupings
    ]
    for result in results:
        for out in result:
            assert torch.equal(out, results[0][0])


@pytest.mark.parametrize(
    "policy", ["int4+ef", "int3:round=stochastic", "int2+ef:dtype=int8", MIXED]
)
def test_resuming_is_bitwise_going_on(policy: Any) -> None:
    buckets = [["a", "b"], ["c", "d", "e"]]
    whole = on_ranks(
        3, policy, lambda c: (train(c, buckets, range(3)), train(c, buckets, range(3, 6)))
    )

    def first(c: Communicator) -> dict[str, Any]:
        train(c, buckets, range(3))
        return c.state_dict()

    states = on_ranks(3, policy, first)

    def second(c: Communicator) -> torch.Tensor:
        c.load_state_dict(states[c.rank])
        return train(c, [["e", "d"], ["c", "b"], ["a"]], range(3, 6))

    resumed = on_ranks(3, policy, second)
    for out, (_, expected) in zip(resumed, whole, strict=True):
        assert torch.equal(out, expected)


def test_state_is_plain_data(tmp_path: Any) -> None:
    def body(c: Communicator) -> None:
        train(c, [list(PARTS)], range(2))
        path = tmp_path / f"{c.rank}.pt"
        torch.save(c.state_dict(), path)
        c.load_state_dict(torch.load(path, weights_only=True))
        assert c.memory_bytes() >= 4 * sum(n for k, n in PARTS.items() if NDIMS[k] > 1)
        c.reset()
        assert all(
            not r.any()
            for s in c.state_dict()["compressors"].values()
            for r in s["residuals"].values()
        )

    on_ranks(2, "int4+ef", body)


def test_exact_stretches_leave_residuals_alone() -> None:
    def body(c: Communicator) -> None:
        x = data(c.rank, 5000)
        c.all_reduce(x, "w")
        before = c.state_dict()
        y = data(c.rank, 5000)
        barrier.wait()  # the switch is the process's: threads share it
        if c.rank == 0:
            stretch.__enter__()
        barrier.wait()
        c.all_reduce(y, "w")
        z = data(c.rank, 5000)
        c.all_reduce_segments(z, ("w",), (5000,), (2,))
        barrier.wait()
        if c.rank == 0:
            stretch.__exit__(None, None, None)
        barrier.wait()
        want = data(c.rank, 5000)
        c.transport.all_reduce(want).wait()
        assert torch.equal(y, want)
        assert torch.equal(z, want)
        assert not torch.equal(x, want)
        after = c.state_dict()
        for text, saved in before["compressors"].items():
            for name, residual in saved["residuals"].items():
                assert torch.equal(residual, after["compressors"][text]["residuals"][name])
        c.all_reduce(x, "w")

    barrier, stretch = threading.Barrier(2), exact()
    on_ranks(2, "int4+ef", body)


def test_a_profiler_sees_where_the_time_goes() -> None:
    def body(c: Communicator) -> set[str]:
        x = data(c.rank, 3000)
        with torch.profiler.profile() as profiler:
            c.all_reduce(x, "w")
        return {e.name for e in profiler.events() if e.name.startswith("commlib.")}

    def one_at_a_time(c: Communicator) -> set[str]:
        # one profiler per process: rank 1 runs without
        return body(c) if c.rank == 0 else (c.all_reduce(data(1, 3000), "w") and set())

    names = on_ranks(2, only("int4+ef"), one_at_a_time)[0]
    assert {"commlib.encode", "commlib.exchange", "commlib.reduce", "commlib.decode"} <= names


def test_a_policy_may_change_with_the_steps() -> None:
    policy = Policy((Rule(Scheme.parse("int4+ef"), from_step=2), Rule(Scheme.parse("fp32"))))

    def body(c: Communicator) -> list[int]:
        sent = []
        for step in range(4):
            before = c.transport.bytes_sent
            c.all_reduce(data(c.rank, 8000, step), "w")
            sent.append(c.transport.bytes_sent - before)
        return sent

    for sent in on_ranks(2, policy, body):
        assert sent[0] == sent[1] == 32_000
        assert sent[2] == sent[3] < 5000


def test_many_messages_in_flight_come_out_right() -> None:
    """Inline, queued and keyed messages mixed; ranks delayed at random never change the order."""

    def body(c: Communicator) -> list[torch.Tensor]:
        delays = torch.rand(30, generator=torch.Generator().manual_seed(c.rank)).tolist()
        outs, works = [], []
        for i, delay in enumerate(delays):
            x = data(c.rank, 1000 + 500 * (i % 7), i)
            outs.append(x)
            key = None if i % 3 == 0 else f"k{i % 7}"
            works.append(c.all_reduce(x, key, factor="avg", async_op=i % 5 != 0))
            threading.Event().wait(0.004 * delay)
        for work in reversed(works):
            work.wait()
        return outs

    results = on_ranks(4, only("int4+ef"), body)
    for i, outs in enumerate(zip(*results, strict=True)):
        assert all(torch.equal(out, outs[0]) for out in outs)
        mean = torch.stack([data(r, outs[0].numel(), i) for r in range(4)]).mean(0)
        assert (outs[0] - mean).norm() < 0.5 * mean.norm()


def test_futures_complete_from_the_worker() -> None:
    def body(c: Communicator) -> bool:
        x = data(c.rank, 100_000)
        seen = []
        future = c.all_reduce(x, "w", async_op=True).get_future()
        done = future.then(lambda f: seen.append(f.value()))
        done.wait()
        return seen[0] is x

    assert all(on_ranks(2, "int8+ef", body))


def test_integers_travel_raw_where_no_scheme_is_named() -> None:
    def body(c: Communicator) -> list[int]:
        x = torch.arange(4096)
        c.all_reduce(x, "w")
        return x[:3].tolist()

    assert on_ranks(3, "int4+ef", body) == [[0, 3, 6]] * 3


def test_sub_groups() -> None:
    def rank(t: ThreadTransport) -> Any:
        if t.rank == 1:
            return None
        c = Communicator(t.sub([0, 2, 3]), only("int8+ef"))
        x = torch.full((1000,), float(t.rank))
        c.all_reduce(x, "w")
        c.broadcast(x, 1)
        return c.rank, c.size, x[0].item()

    near_five = pytest.approx(5.0, rel=0.01)
    results = run_ranks(4, rank)
    assert results == [(0, 3, near_five), None, (1, 3, near_five), (2, 3, near_five)]


def test_two_communicators_on_one_group_do_not_mix() -> None:
    def rank(t: ThreadTransport) -> None:
        one, two = Communicator(t, only("int8+ef")), Communicator(t, only("int4+ef"))
        for step in range(3):
            one.all_reduce(data(t.rank, 1000, step), "w")
            two.all_reduce(data(t.rank, 2000, step), "w")

    run_ranks(3, rank)


def test_traffic_is_counted_and_errors_sampled() -> None:
    meters = [Meter(sample_every=2), Meter(sample_every=2)]

    def rank(t: ThreadTransport) -> tuple[int, str]:
        c = Communicator(t, "int4+ef", meter=meters[t.rank])
        for step in range(3):
            x = data(t.rank, 5070, step)
            c.all_reduce_segments(x, ("a", "b"), (5000, 70), (2, 1), async_op=True).wait()
        c.all_reduce(torch.ones(8, dtype=torch.float64))
        return t.bytes_sent, c.stats()

    for (sent, table), meter in zip(run_ranks(2, rank), meters, strict=True):
        rows = meter.rows()
        assert sum(row["wire_bytes"] for row in rows) == sent
        assert rows[0]["calls"] == 3
        assert rows[0]["raw_bytes"] == 3 * 4 * 5070
        assert 0.05 < meter.errors()["a", rows[0]["scheme"]] < 0.2
        assert "a +1" in table


def test_auto_measures_and_never_loses_anything() -> None:
    def body(c: Communicator) -> str:
        x = torch.full((100,), float(c.rank))
        c.all_reduce(x, factor="avg")
        assert x[0] == 0.5
        return c.policy.digest()

    digests = on_ranks(2, "auto", body)
    assert digests[0] == digests[1]


def test_roles_reach_the_policy() -> None:
    policy = Policy((Rule(Scheme.parse("int8"), role=Role.PARAMETER),))

    def body(c: Communicator) -> tuple[int, int]:
        c.all_gather(torch.empty(8000), torch.ones(4000))
        first = c.transport.bytes_sent
        c.all_gather(torch.empty(8000), torch.ones(4000), role=Role.OTHER)
        return first, c.transport.bytes_sent - first

    for compressed, plain in on_ranks(2, policy, body):
        assert plain == 16_000
        assert compressed < 4500


def test_a_ring_without_tags_exchanges_in_one_call() -> None:
    """As NCCL has to: a receive and a send one after the other wait for each other."""

    def rank(t: ThreadTransport, tagged: bool) -> torch.Tensor:
        t.tagged = tagged
        c = Communicator(t, only("int4+ef@ring"))
        for step in range(3):
            x = data(t.rank, 3000, step)
            c.all_reduce(x, "w")
        if not tagged:
            assert not any("send" in str(name) for name in t._count)
        sent.append(t.bytes_sent)
        return x

    sent: list[int] = []
    with_tags, without = (run_ranks(3, lambda t, g=g: rank(t, g)) for g in (True, False))
    assert all(torch.equal(x, y) for x, y in zip(with_tags, without, strict=True))
    assert len(set(sent)) == 1


def test_lengths_without_end_leave_a_bounded_number_of_plans(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All ranks let go of the same plans: each goes back to an old length, and they agree."""
    monkeypatch.setattr(planning, "ANONYMOUS_PLANS", 4)
    monkeypatch.setattr(policies, "CHOICES", 4)

    def body(c: Communicator) -> None:
        for numel in (*range(100, 110), *range(109, 99, -1)):
            x = torch.ones(numel)
            c.all_reduce(x, "named")
            c.all_reduce(x, async_op=numel % 2 == 0).wait()
            assert (x == 4).all()
        assert len([plan for plan in c._plans.values() if plan.label != "named"]) == 4
        assert len(c._carrier.captures._ready) < 20
        assert len(c.policy._chosen) <= 4

    on_ranks(2, only("bf16"), body)


def test_a_key_is_a_name() -> None:
    def body(c: Communicator) -> None:
        with pytest.raises(ValueError, match="a key is the tensor's name, such as 'w', got 3"):
            c.all_reduce(torch.ones(8), 3)  # type: ignore[arg-type]

    on_ranks(1, "int8", body)
