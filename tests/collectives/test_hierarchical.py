"""Hierarchical all-reduce on every kind of topology, as threads that say which host they are on.

Letters are hosts: "aab" is two ranks on one and one on another.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from commlib.codecs import codec
from commlib.collectives import ALGORITHMS, Pool, drive, hierarchical
from commlib.feedback import Compressor, ErrorFeedback, Plain
from commlib.lane import Lane
from commlib.scheme import Scheme
from commlib.topology import Link, Topology, columns_of, nodes_of
from commlib.transport import ThreadTransport, run_ranks
from commlib_kernels.layout import Layout
from tests.communicators import data

# Uneven, interleaved, an odd number of hosts; "abba": the columns are (0, 1) and (3, 2).
TOPOLOGIES = ["aabb", "abab", "aaabbcc", "abbbbbb", "aaaabbb", "abba", "aabbcc", "aab"]


class Counted(ThreadTransport):
    """A rank of threads that knows the hosts, and counts what leaves its own."""

    hosts: str
    left: int

    def send(self, x: torch.Tensor, dst: int, tag: int = 0) -> Any:
        self.left += x.nbytes * (self.hosts[dst] != self.hosts[self.rank])
        return super().send(x, dst, tag)


def reduce(
    hosts: str,
    text: str,
    xs: list[torch.Tensor],
    layout: Layout,
    *,
    key: Any = "x",
    inner: str | None = None,
    steps: int = 1,
    feedback: Plain | ErrorFeedback | None = None,
    name: str = "hierarchical",
    **options: Any,
) -> tuple[list[torch.Tensor], list[Compressor]]:
    """The last of `steps` all-reduces, and what the ranks remember then."""

    def rank(t: ThreadTransport) -> tuple[torch.Tensor, Compressor]:
        pool = Pool(t.device)
        compressor = Compressor(codec(text), feedback or Plain(), seed=5, rank=t.rank)
        how = {"nodes": nodes_of(hosts)} if name == "hierarchical" else {}
        if inner is not None:
            how["inner"] = Compressor(codec(inner), seed=5, rank=t.rank)
        for _ in range(steps):
            x = xs[t.rank].clone()
            run = ALGORITHMS[name].run
            drive(run(x, t, compressor, key, layout, pool, **how, **options))
        return x, compressor

    results = run_ranks(len(hosts), rank)
    return [r[0] for r in results], [r[1] for r in results]


def inputs(size: int, numel: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [data(rank, numel).to(dtype) for rank in range(size)]


def in_order(xs: list[torch.Tensor], nodes: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """The fp32 sum of each node in rank order, and of the nodes in theirs."""
    return sum(sum(xs[rank] for rank in ranks) for ranks in nodes)  # type: ignore[return-value]


def test_nodes_are_ranks_of_equal_hosts_in_the_order_of_their_first() -> None:
    assert nodes_of("aabb") == ((0, 1), (2, 3))
    assert nodes_of("baba") == ((0, 2), (1, 3))
    assert nodes_of("abbbbbb") == ((0,), (1, 2, 3, 4, 5, 6))
    assert Topology(3, Link(0.0, 1.0)).nodes == ((0,), (1,), (2,))
    assert Topology(3, Link(0.0, 1.0), ("x", "y", "x")).nodes == ((0, 2), (1,))


def test_columns_are_as_many_as_the_smallest_node_has_ranks_and_spread_over_the_others() -> None:
    assert columns_of(nodes_of("aabb")) == ((0, 2), (1, 3))
    assert columns_of(nodes_of("abbbbbb")) == ((0, 1),)
    assert columns_of(nodes_of("aabbbbbb")) == ((0, 2), (1, 5))
    assert columns_of(nodes_of("abba")) == ((0, 1), (2, 3))
    for hosts in TOPOLOGIES:
        nodes = nodes_of(hosts)
        for column in columns_of(nodes):
            assert sorted(hosts[rank] for rank in column) == sorted(set(hosts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hosts", TOPOLOGIES)
def test_nothing_is_lost_under_fp32(hosts: str, dtype: torch.dtype) -> None:
    """Sums are fp32 whatever the dtype, in the order of nodes and ranks, and rounded once."""
    xs = inputs(len(hosts), 1200, dtype)
    layout = Layout((700, 5, 400), dtype, offsets=(30, 1190, 740))
    outs, _ = reduce(hosts, "fp32", xs, layout, key=("a", "b", "c"), factor=0.5)
    total = 0.5 * in_order([x.float() for x in xs], nodes_of(hosts))
    for out, x in zip(outs, xs, strict=True):
        for start, size in zip(layout.starts, layout.sizes, strict=True):
            x[start : start + size] = total[start : start + size].to(dtype)
        assert torch.equal(out, x), "and nothing else is touched"


@pytest.mark.parametrize("inner", [None, "bf16"])
def test_on_one_host_it_is_the_sum_in_rank_order(inner: str | None) -> None:
    xs = inputs(3, 3001)
    outs, held = reduce(
        "aaa", "int4", xs, Layout((3001,)), inner=inner, factor=1 / 3, feedback=ErrorFeedback()
    )
    coded = [x.bfloat16().float() if inner else x for x in xs]
    for out in outs:
        assert torch.equal(out, (coded[0] + coded[1] + coded[2]) * torch.tensor(1 / 3))
    assert [one.nbytes() for one in held] == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_one_rank_on_every_host_it_is_two_phase(dtype: torch.dtype) -> None:
    xs = inputs(4, 5000, dtype)
    layout = Layout((2000, 3000), dtype, exact=(False, True))
    how: Any = {"key": ("a", "b"), "steps": 3, "feedback": ErrorFeedback(), "factor": 0.25}
    outs, held = reduce("dbca", "int3", xs, layout, **how)
    want, remembered = reduce("dbca", "int3", xs, layout, name="two_phase", **how)
    assert all(torch.equal(a, b) for a, b in zip(outs, want, strict=True))
    assert [str(one.state_dict()) for one in held] == [str(one.state_dict()) for one in remembered]


@pytest.mark.parametrize("text", ["int4", "int8:round=stochastic", "sign:block=tensor", "bf16"])
@pytest.mark.parametrize("hosts", TOPOLOGIES)
def test_all_ranks_end_equal(hosts: str, text: str) -> None:
    xs = inputs(len(hosts), 3001)
    outs, _ = reduce(hosts, text, xs, Layout((3001,)), steps=2, factor=1 / len(hosts))
    for out in outs[1:]:
        assert torch.equal(out, outs[0])
    total = torch.stack(xs).double().mean(0)
    assert torch.cosine_similarity(outs[0].double(), total, dim=0) > (
        0.5 if "sign" in text else 0.9
    )


@pytest.mark.parametrize("hosts", ["aabb", "abbbbbb", "aaabbcc"])
def test_two_quantizations_whatever_the_ranks_and_hosts(hosts: str) -> None:
    """A code errs by half its step of the largest value of its block: of a host's sum, then of all.

    So the error is that of two_phase between hosts, and does not know how many ranks they have.
    """
    xs, step = inputs(len(hosts), 4000), 0.5 / 127 * 1.02
    outs, _ = reduce(hosts, "int8:round=nearest", xs, Layout((4000,)))
    sums = [torch.stack([xs[r] for r in ranks]).double().sum(0) for ranks in nodes_of(hosts)]
    total = torch.stack(sums).sum(0)
    first = step * sum(float(one.abs().max()) for one in sums)
    assert (outs[0] - total).abs().max() <= first + step * (float(total.abs().max()) + first)


def test_exact_segments_ride_along_exactly() -> None:
    xs = inputs(4, 1000)
    layout = Layout((900, 100), exact=(False, True))
    outs, _ = reduce("aabb", "int2", xs, layout, key=("w", "norm"), steps=2)
    alone, _ = reduce("aabb", "fp32", [x[900:] for x in xs], Layout((100,)), key="norm")
    assert torch.equal(outs[0][900:], alone[0])
    assert torch.equal(outs[0][900:], in_order(xs, nodes_of("aabb"))[900:])


@pytest.mark.parametrize("hosts", ["abab", "aaabbcc"])
def test_residuals_are_of_what_a_rank_owns(hosts: str) -> None:
    """They cover every element once per host, and hold what the owner's codings lost."""
    sizes = (1000, 129, 7)
    xs = inputs(len(hosts), sum(sizes))
    how: Any = {"key": ("a", "b", "c"), "feedback": ErrorFeedback()}
    _, held = reduce(hosts, "int4", xs, Layout(sizes), **how)
    nodes = nodes_of(hosts)
    for ranks in nodes:
        states = [held[rank].state_dict()["residuals"] for rank in ranks]
        for name, size in zip("abc", sizes, strict=True):
            assert sum(state[name].numel() for state in states if name in state) == size
    owners = {rank for column in columns_of(nodes) for rank in column}
    for rank, one in enumerate(held):
        assert (one.nbytes() > 0) == (rank in owners)
    assert {str(one.state_dict()["steps"]) for one in held} == {str(held[0].state_dict()["steps"])}


def test_a_held_segment_keeps_its_residuals() -> None:
    """Parameters that nobody uses: neither a node's owner nor the sum's forgets anything."""
    xs = inputs(4, 2000)
    pools = [Pool(torch.device("cpu")) for _ in xs]

    def rank(t: ThreadTransport) -> tuple[Any, Any]:
        compressor = Compressor(codec("int3"), ErrorFeedback(), rank=t.rank)
        states = []
        for hold in ((), (1,)):
            x = xs[t.rank].clone()
            if hold:
                x[1000:] = 0
            run = hierarchical.all_reduce(
                x, t, compressor, ("a", "b"), Layout((1000, 1000)), pools[t.rank],
                nodes=nodes_of("abab"), hold=hold,
            )  # fmt: skip
            drive(run)
            states.append(compressor.state_dict()["residuals"])
        return states[0], states[1]

    for before, after in run_ranks(4, rank):
        assert set(before) == {"a", "b", "a|reduced", "b|reduced"}
        for name in before:
            assert torch.equal(before[name], after[name]) == name.startswith("b")


def test_a_sum_beyond_fp16_comes_back_into_its_range() -> None:
    xs = [torch.full((400,), 60000.0, dtype=torch.float16) for _ in range(4)]
    outs, _ = reduce("aabb", "int8", xs, Layout((400,), torch.float16), factor=0.25)
    assert outs[0].isfinite().all()
    assert (outs[0].double() - 60000.0).abs().max() <= 60000.0 / 127


@pytest.mark.parametrize("hosts", ["aaaa", "abcd", *TOPOLOGIES])
@pytest.mark.parametrize("text", ["int4@hierarchical", "int8@hierarchical:inner=bf16"])
def test_the_cost_formulas_are_what_is_sent(hosts: str, text: str) -> None:
    """The rank that sends most, and what leaves a host: counted on the ways between them."""
    scheme, layout = Scheme.parse(text), Layout((3001, 70, 20_000))
    topology = Topology(len(hosts), Link(1e-4, 1e8), tuple(hosts))
    config: Any = scheme.algorithm

    def rank(t: ThreadTransport) -> tuple[int, int]:
        t.__class__ = Counted
        counted: Any = t
        counted.hosts, counted.left = hosts, 0
        x, compressor = data(t.rank, layout.numel), Compressor(scheme.codec, rank=t.rank)
        inner = config.inner and Compressor(config.inner)
        run = hierarchical.all_reduce(
            x, Lane(t, 0, 1), compressor, ("a", "b", "c"), layout, Pool(t.device),
            nodes=topology.nodes, inner=inner,
        )  # fmt: skip
        drive(run)
        return t.bytes_sent, counted.left

    results = run_ranks(len(hosts), rank)
    assert max(sent for sent, _ in results) == hierarchical.wire_bytes(layout, scheme, topology)
    left = {host: sum(r[1] for r, h in zip(results, hosts, strict=True) if h == host)
            for host in hosts}  # fmt: skip
    assert set(left.values()) == {hierarchical.host_bytes(layout, scheme, topology)}
    bound = hierarchical.seconds(layout, scheme, topology)
    assert bound >= max(left.values()) / 1e8
    if 1 < len(left) < len(hosts):
        flat = Topology(len(hosts), topology.link)
        assert bound < hierarchical.seconds(layout, scheme, flat)
