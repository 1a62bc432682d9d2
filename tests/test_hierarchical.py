"""Hierarchical schemes through a communicator: hosts found, agreed on, connected; memory; refusals.

Threads say which host they are on by a letter each: "aab" is two ranks on one, one on another.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from commlib import Communicator, hosts, planning
from commlib.policy import Policy, Rule, Scheme
from commlib.transport import ThreadTransport, run_ranks
from tests.communicators import data, only
from tests.fake_cuda import FakeCuda, side_streams

SCHEME = "int4+ef@hierarchical"


def say_hosts(monkeypatch: pytest.MonkeyPatch, letters: str) -> None:
    """Rank r, a thread, is on host `letters[r]`."""

    def identity() -> str:
        return letters[int(threading.current_thread().name.removeprefix("rank"))]

    monkeypatch.setattr(planning, "identity", identity)


def on_hosts(
    monkeypatch: pytest.MonkeyPatch,
    letters: str,
    policy: Any,
    body: Callable[[Communicator], Any],
    *,
    tagged: bool = True,
    **how: Any,
) -> list[Any]:
    """`body` of a communicator on every rank, on hosts as `letters` say."""

    say_hosts(monkeypatch, letters)

    def rank(t: ThreadTransport) -> Any:
        t.tagged = tagged
        communicator = Communicator(t, policy, **how)
        try:
            return body(communicator)
        finally:
            communicator.close()

    return run_ranks(len(letters), rank)


def stream(c: Communicator) -> list[torch.Tensor]:
    """Messages of many sizes under way at once, over three steps."""
    outs = []
    for step in range(3):
        works = []
        for i, numel in enumerate((1, 100, 5000, 300_000, 70_000, 4097)):
            outs.append(data(c.rank, numel, 10 * step + i))
            works.append(c.all_reduce(outs[-1], f"k{i}", factor="avg", async_op=i != 2))
        for work in works:
            work.wait()
    return outs


@pytest.mark.parametrize("letters", ["aabb", "abab", "aaabbcc", "abbb"])
def test_a_stream_of_messages(monkeypatch: pytest.MonkeyPatch, letters: str) -> None:
    results = on_hosts(monkeypatch, letters, only(SCHEME), stream)
    for i, outs in enumerate(zip(*results, strict=True)):
        assert all(torch.equal(out, outs[0]) for out in outs)
        step, place = divmod(i, 6)
        inputs = [data(r, outs[0].numel(), 10 * step + place) for r in range(len(letters))]
        mean = torch.stack(inputs).mean(0)
        assert (outs[0] - mean).norm() < 0.5 * mean.norm()


@pytest.mark.parametrize("inner", ["", ":inner=int8"])
def test_lanes_groups_and_stamps_end_with_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, inner: str
) -> None:
    """By tags, by groups of their own as NCCL needs them, and under COMMLIB_CHECK=1."""
    policy, letters = only(SCHEME + inner), "aabab"
    want = on_hosts(monkeypatch, letters, policy, stream)
    groups = on_hosts(monkeypatch, letters, policy, stream, tagged=False)
    monkeypatch.setenv("COMMLIB_CHECK", "1")
    stamped = on_hosts(monkeypatch, letters, policy, stream)
    both = on_hosts(monkeypatch, letters, policy, stream, tagged=False)
    for other in (groups, stamped, both):
        for mine, its in zip(want, other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))


def test_a_stream_of_a_device_is_told_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA the host waits for nothing, and there are groups instead of tags."""

    def body(c: Communicator) -> list[torch.Tensor]:
        outs = [data(c.rank, numel) for numel in (5000, 300_000, 5000)]
        for place, x in enumerate(outs):
            c.all_reduce(x, f"k{place % 2}", factor=0.5)
        return outs

    want = on_hosts(monkeypatch, "aabab", only(SCHEME), body)

    def on_device(c: Communicator, cuda: FakeCuda) -> list[torch.Tensor]:
        c.transport.tagged = False
        return body(c)

    for mine, its in zip(side_streams(5, only(SCHEME), on_device), want, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))


def test_ranks_of_a_sub_group_are_counted_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 0, 2 and 5 of six: the group knows three ranks on two hosts."""
    say_hosts(monkeypatch, "abbaaa")

    def rank(t: ThreadTransport) -> Any:
        if t.rank not in (0, 2, 5):
            return None
        c = Communicator(t.sub([0, 2, 5]), only("fp32@hierarchical"))
        x = data(t.rank, 3000)
        c.all_reduce(x, "w")
        nodes = c.nodes
        c.close()
        return nodes, x

    found = [result for result in run_ranks(6, rank) if result is not None]
    assert [nodes for nodes, _ in found] == [((0, 2), (1,))] * 3
    want = (data(0, 3000) + data(5, 3000)) + data(2, 3000)
    assert all(torch.equal(x, want) for _, x in found)


def test_the_hosts_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def body(c: Communicator) -> Any:
        tell = c._carrier.tell
        c._carrier.tell = lambda text, mine: asked.append(mine) or tell(text, mine)  # type: ignore[func-returns-value]
        assert c.nodes == ()
        for key in ("v", "w"):
            c.all_reduce(data(c.rank, 3000), key)
        return c.nodes

    assert on_hosts(monkeypatch, "aab", only(SCHEME), body) == [((0, 1), (2,))] * 3
    assert sorted(asked) == ["a", "a", "b"]


def test_ranks_that_see_other_hosts_raise_before_anything_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def body(c: Communicator) -> str:
        if c.rank == 2:
            c.nodes = ((0, 2), (1,))
        else:
            c.nodes = ((0,), (1, 2))
        with pytest.raises(RuntimeError, match="disagree") as caught:
            c.all_reduce(data(c.rank, 3000), "w")
        assert c.transport.bytes_sent == 0
        return str(caught.value)

    for text in on_hosts(monkeypatch, "abb", only(SCHEME), body):
        assert "nodes: rank" in text
        assert "((0, 2), (1,))" in text


def test_ranks_that_mean_other_messages_say_so_when_hosts_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of them may not want to know the hosts at all; the communicator stays usable."""

    def body(c: Communicator) -> str:
        scheme = None if c.rank else "int8"
        with pytest.raises(RuntimeError, match="disagree about all_reduce of key 'w'") as caught:
            c.all_reduce(data(c.rank, 3000), "w", scheme=scheme)
        assert c.transport.bytes_sent == 0
        x = data(c.rank, 3000)
        c.all_reduce(x, "v", scheme="fp32@hierarchical")
        assert torch.equal(x, (data(0, 3000) + data(1, 3000)) + data(2, 3000))
        return str(caught.value)

    for text in on_hosts(monkeypatch, "aab", only(SCHEME), body):
        assert "scheme: rank" in text


def test_what_one_owner_refuses_all_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """A residual of another size is known to owners alone."""

    def body(c: Communicator) -> str:
        c.all_reduce(data(c.rank, 3000), "w")
        before = c.transport.bytes_sent
        with pytest.raises((ValueError, RuntimeError), match="a key names one tensor") as caught:
            c.all_reduce(data(c.rank, 4000), "w")
        assert c.transport.bytes_sent == before
        c.all_reduce(data(c.rank, 3000, 1), "w")
        return str(caught.value)

    texts = on_hosts(monkeypatch, "abbb", only(SCHEME), body)
    assert all("has 3000 elements, this tensor 4000" in text for text in texts)


def test_resumed_is_bitwise_uninterrupted_whatever_the_grouping(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three steps, saved, loaded, three more in other buckets; residuals of owners alone."""
    keys, sizes, cuts = ("a", "b", "norm"), (5000, 3000, 40), (0, 5000, 8000, 8040)
    policy = Policy.parse("int3+ef@hierarchical:inner=int8")

    def step(c: Communicator, number: int, *, apart: bool) -> list[torch.Tensor]:
        xs = [data(c.rank, n, 10 * number + i) for i, n in enumerate(sizes)]
        whole = torch.cat(xs)
        groups = [(0, 1), (1, 3)] if apart else [(0, 3)]
        for first, last in groups:
            bucket, which = whole[cuts[first] : cuts[last]], slice(first, last)
            c.all_reduce_segments(bucket, keys[which], sizes[which], (2, 2, 1)[which])
        return list(whole.split(sizes))

    def body(c: Communicator) -> list[torch.Tensor]:
        first = [step(c, number, apart=False) for number in range(3)]
        saved = c.state_dict()
        rest = [step(c, number, apart=False) for number in range(3, 6)]
        c.load_state_dict(saved)
        again = [step(c, number, apart=True) for number in range(3, 6)]
        assert all(
            torch.equal(x, y)
            for xs, ys in zip(rest, again, strict=True)
            for x, y in zip(xs, ys, strict=True)
        )
        residuals = saved["compressors"]["int3:round=nearest+ef@hierarchical"]["residuals"]
        assert ("a" in residuals) == (c.rank in (0, 1, 2, 4))
        return first[0]

    on_hosts(monkeypatch, "aabab", policy, body)


@pytest.mark.parametrize(("letters", "stays"), [("bbaa", True), ("abab", False), ("abcd", False)])
def test_residuals_saved_on_other_hosts_are_let_go(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, letters: str, stays: bool
) -> None:
    """The part of the sum that a rank owns, and owes of, is another there: of the same size."""

    def step(c: Communicator, number: int) -> torch.Tensor:
        x = data(c.rank, 4096, number)
        c.all_reduce(x, "w")
        return x

    def body(c: Communicator) -> Any:
        step(c, 0)
        saved = c.state_dict()
        return saved, step(c, 1)

    before = on_hosts(monkeypatch, "aabb", SCHEME, body)

    def resumed(c: Communicator) -> Any:
        c.load_state_dict(before[c.rank][0])
        assert c.state_dict()["nodes"] == "((0, 1), (2, 3))"
        return step(c, 1)

    def fresh(c: Communicator) -> torch.Tensor:
        return step(c, 1)

    anew = on_hosts(monkeypatch, letters, SCHEME, fresh)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "commlib"):
        found = on_hosts(monkeypatch, letters, SCHEME, resumed)
    want = [x for _, x in before] if stays else anew
    assert all(map(torch.equal, found, want))
    told = [text for text in caplog.messages if "were ((0, 1), (2, 3))" in text]
    assert len(told) == (0 if stays else 1)
    assert stays or not torch.equal(before[0][1], anew[0])


def test_values_that_stay_exact_are_summed_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Riding along, in a message of their own, or beside another scheme: the same bits."""
    rules = [{"scheme": "int8+ef", "key": "flat*"}, {"scheme": SCHEME, "min_ndim": 2}]
    policy = Policy.parse({"rules": rules})

    def body(c: Communicator) -> list[torch.Tensor]:
        norms = []
        for keys in (("w", "norm"), ("small", "norm"), ("norm",), ("flat", "norm")):
            sizes = tuple({"w": 9000, "small": 300, "flat": 9000}.get(key, 250) for key in keys)
            x = torch.cat([data(c.rank, n) for n in sizes])
            c.all_reduce_segments(x, keys, sizes, tuple(2 if n > 250 else 1 for n in sizes))
            norms.append(x[-250:].clone())
        return norms

    for norms in on_hosts(monkeypatch, "abab", policy, body):
        want = (data(0, 250) + data(2, 250)) + (data(1, 250) + data(3, 250))
        assert all(torch.equal(norm, want) for norm in norms)


def test_collectives_that_know_no_hosts_say_so_and_go_between_all_ranks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def body(c: Communicator) -> list[torch.Tensor]:
        out, rows = torch.empty(3000), torch.empty(9000)
        for step in range(2):
            c.reduce_scatter(out, data(c.rank, 9000, step), "r")
        c.all_gather(rows, data(c.rank, 3000))
        parts = torch.empty(3000)
        c.all_to_all(parts, data(c.rank, 3000), in_splits=[1000] * 3, out_splits=[1000] * 3)
        return [out, rows, parts]

    with caplog.at_level(logging.WARNING, "commlib"):
        got = on_hosts(monkeypatch, "aab", only(SCHEME), body)
    said = [record.getMessage() for record in caplog.records]
    for op in ("reduce_scatter", "all_gather", "all_to_all of parts"):
        lines = [text for text in said if text.startswith(f"{op} knows no hosts: under")]
        assert len(lines) == 1, said
    want = on_hosts(monkeypatch, "aab", only("int4+ef"), body)
    for mine, its in zip(got, want, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))


def test_where_nothing_passes_between_hosts_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def body(c: Communicator) -> torch.Tensor:
        x = data(c.rank, 3000)
        c.all_reduce(x, "w")
        return x

    with caplog.at_level(logging.WARNING, "commlib"):
        for x in on_hosts(monkeypatch, "aaa", only(SCHEME), body):
            assert torch.equal(x, data(0, 3000) + data(1, 3000) + data(2, 3000))
    (text,) = [record.getMessage() for record in caplog.records]
    assert text.startswith("w is NOT compressed: under int4")
    assert "all 3 ranks of the group are on one host" in text


def test_bytes_of_parts_are_counted_with_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(c: Communicator) -> tuple[int, int]:
        c.all_reduce(data(c.rank, 9000), "w")
        return c.transport.bytes_sent, sum(row["wire_bytes"] for row in c.meter.rows())

    by_tags = on_hosts(monkeypatch, "aabb", only(SCHEME), body)
    by_groups = on_hosts(monkeypatch, "aabb", only(SCHEME), body, tagged=False)
    assert by_tags == by_groups
    assert all(sent == metered > 0 for sent, metered in by_tags)


def test_policies_and_rules_take_the_scheme() -> None:
    policy = Policy.parse("int4+ef@hierarchical:inner=bf16")
    assert Policy.parse(policy.to_json()) == policy
    assert policy.rules[0] == Rule(
        Scheme.parse("int4+ef@hierarchical:inner=bf16"), min_numel=1024, min_ndim=2
    )


def test_a_host_is_a_name_a_boot_and_a_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("NCCL_HOSTID", raising=False)
    here = hosts.identity()
    assert here == hosts.identity()
    assert here.startswith(f"{socket.gethostname()}#")
    boot = tmp_path / "boot_id"
    boot.write_text("another")
    with monkeypatch.context() as patch:
        patch.setattr(hosts, "BOOT_ID", boot)
        rebooted = hosts.identity()
    with monkeypatch.context() as patch:
        patch.setattr(hosts, "NETWORK", boot)
        elsewhere = hosts.identity()
    with monkeypatch.context() as patch:
        patch.setattr(hosts, "BOOT_ID", tmp_path / "missing")
        sandboxed = hosts.identity()
    assert len({here, rebooted, elsewhere, sandboxed}) == 4
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, str(os.getpid()))
    assert hosts.identity() == here
    monkeypatch.setenv("NCCL_HOSTID", "rack7")
    assert hosts.identity() == "rack7"
