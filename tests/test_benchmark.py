"""The benchmark measures what it says: numbers from clocks, the row schema, real ranks."""

from __future__ import annotations

import json
import math
import os
import re
import time
from dataclasses import fields
from fractions import Fraction
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from bench import show
from commlib.benchmark import line
from commlib.benchmark.codecs import CodecBench
from commlib.benchmark.codecs import run as run_codecs
from commlib.benchmark.collectives import Bench, _measure, _rows, sizes_between
from commlib.benchmark.contestants import (
    COLLECTIVES,
    OPS,
    PAIRS,
    Buffers,
    Contestant,
    Measured,
)
from commlib.benchmark.line import Line
from commlib.benchmark.rows import CodecRow, Row, codec_table, origin, table, write_jsonl
from commlib.benchmark.timing import (
    MAX_ROUNDS,
    MIN_ROUNDS,
    interleave,
    median_interval,
    paired_ratio,
    percentile,
    rounds_within,
)
from commlib.benchmark.units import format_rate, format_size, parse_size
from commlib.doctor import interfaces
from commlib.policy import Policy, Rule, Scheme
from commlib.threads import ThreadTransport, run_ranks
from tests.processes import Pool

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"
SCHEMA = {
    "op", "scheme", "backend", "ranks", "size_bytes", "wire_bytes", "ms_p50", "ms_p80",
    "algbw_GBps", "busbw_GBps", "rel_err", "speedup", "link", "device", "versions", "commit",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("64KiB", 65536),
        ("64kib", 65536),
        ("1.5 MiB", 1572864),
        ("2GB", 2 * 10**9),
        ("12b", 12),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "KiB", "64 kibibytes", "-1", "1e6", "64Ki"])
def test_bad_sizes_name_the_units(text: str) -> None:
    with pytest.raises(ValueError, match="64KiB"):
        parse_size(text)


def test_sizes_and_rates_read_back() -> None:
    for size in (0, 1000, 65536, 1536 << 10, 1 << 30):
        assert parse_size(format_size(size)) == size
    assert format_rate(1e9) == "1 Gbit/s"
    assert format_rate(2.5e6) == "2.5 Mbit/s"


def test_sizes_between_ends_at_the_largest() -> None:
    assert sizes_between(4, 64, 4) == (4, 16, 64)
    assert sizes_between(4, 60, 4) == (4, 16, 60)
    assert sizes_between(8, 8, 2) == (8,)
    for bad in ((0, 8, 2), (9, 8, 2), (1, 8, 1)):
        with pytest.raises(ValueError, match="sizes from"):
            sizes_between(*bad)


def test_percentiles_are_linear_between_neighbours() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([1.0, 2.0], 80) == pytest.approx(1.8)
    assert percentile([5.0], 80) == 5.0


def test_median_interval_is_the_sign_test() -> None:
    # from tables of the sign test: n = 6 -> the range, n = 20 -> 6th and 15th
    six = median_interval([float(i) for i in range(1, 7)])
    assert six == (3.5, 1.0, 6.0)
    twenty = median_interval([float(i) for i in range(1, 21)])
    assert (twenty.low, twenty.high) == (6.0, 15.0)


@pytest.mark.parametrize("n", [10, 100, 1029, 1030, 2000])
def test_the_interval_is_the_widest_whose_tails_hold_a_fortieth(n: int) -> None:
    found = median_interval([float(i) for i in range(1, n + 1)])
    assert found.low is not None
    assert found.low + found.high == n + 1
    assert found.median == (n + 1) / 2

    def below(k: int) -> Fraction:
        return Fraction(sum(math.comb(n, i) for i in range(k)), 2**n)

    assert below(int(found.low)) <= Fraction(1, 40) < below(int(found.low) + 1)


def test_below_six_rounds_there_is_no_interval() -> None:
    for n in range(1, MIN_ROUNDS):
        assert median_interval([2.0] * n) == (2.0, None, None)
    assert "0.500 [-]" in table([row(ratio=0.5)])


def test_median_interval_holds_the_median_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2000, 15, generator=generator).exp()  # skewed; its median is 1
    found = map(median_interval, values.tolist())
    hits = sum(i.low <= 1.0 <= i.high for i in found if i.low is not None and i.high is not None)
    assert 0.95 <= hits / 2000 <= 0.985  # exact coverage at n = 15 is 96.5%


def test_paired_ratio_cancels_what_hits_a_whole_round() -> None:
    base = [1.0, 10.0, 2.0, 7.0, 1.0, 3.0]
    ratio = paired_ratio([2 * t for t in base], base)
    assert ratio == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="paired"):
        paired_ratio([1.0], [1.0, 2.0])


def test_rounds_keep_to_the_budget_within_bounds() -> None:
    assert rounds_within(10.0, 0.5) == 20
    assert rounds_within(10.0, 100.0) == MIN_ROUNDS
    assert rounds_within(10.0, 0.0) == MAX_ROUNDS


def test_interleave_takes_turns() -> None:
    order: list[str] = []
    times = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 3
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


@pytest.mark.parametrize("op", COLLECTIVES)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_buffers_know_the_exact_result(op: str, world: int) -> None:
    ranks = [Buffers(op, 1000 * 4, rank, world, seed=3) for rank in range(world)]
    exact = sum(buffers.sample()[1] for buffers in ranks)
    assert isinstance(exact, torch.Tensor)
    whole = {
        "all_reduce": sum(b.source for b in ranks),
        "reduce_scatter": sum(b.source for b in ranks),
        "all_gather": torch.cat([b.source for b in ranks]),
    }[op]
    assert isinstance(whole, torch.Tensor)
    covered = torch.zeros(len(exact), dtype=torch.bool)
    for buffers in ranks:
        part = slice(buffers.rank * buffers.part, (buffers.rank + 1) * buffers.part)
        buffers.output.copy_(whole[part] if op == "reduce_scatter" else whole)
        held, result = buffers.result_at(buffers.sample()[0])
        torch.testing.assert_close(result, exact[held], rtol=1e-6, atol=1e-6)
        covered |= held
    assert covered.all()
    assert (
        ranks[0].must_send() == (2 if op == "all_reduce" else 1) * (world - 1) * ranks[0].part * 4
    )


@pytest.mark.parametrize("world", [2, 3, 4, 5])
def test_pairs_know_who_sends_what(world: int) -> None:
    ranks = [Buffers(PAIRS, 1000 * 4, rank, world, seed=3) for rank in range(world)]
    exact = sum(buffers.sample()[1] for buffers in ranks)
    assert isinstance(exact, torch.Tensor)
    places = ranks[0].sample()[0]
    covered = torch.zeros(len(exact), dtype=torch.bool)
    for rank, buffers in enumerate(ranks):
        assert buffers.numel == 1000
        assert buffers.must_send() == 4000
        if rank % 2 == 1:
            buffers.reset()
            assert buffers.result_at(places)[1].isnan().all()
            buffers.output.copy_(ranks[rank - 1].source)
        else:
            assert buffers.source.numel() == (1000 if rank + 1 < world else 0)
        held, result = buffers.result_at(places)
        assert held.sum() == (len(places) // (world // 2) if rank % 2 else 0)
        torch.testing.assert_close(result, exact[held], rtol=1e-6, atol=1e-6)
        covered |= held
    assert covered.all()
    with pytest.raises(RuntimeError, match="pairs of ranks, and there is 1"):
        Buffers(PAIRS, 64, 0, 1, seed=0)


def test_reset_spoils_what_an_idle_contestant_would_leave() -> None:
    buffers = Buffers("all_gather", 64, 0, 2, seed=0)
    buffers.output.zero_()
    buffers.reset()
    assert buffers.output.isnan().all()


def row(**changes: object) -> Row:
    values: dict[str, object] = {
        "op": "all_reduce", "scheme": "int8+ef", "backend": "numba_cpu", "ranks": 2,
        "size_bytes": 65536, "wire_bytes": 16640, "ms_p50": 1.5, "ms_p80": 2.0,
        "algbw_GBps": 0.04, "busbw_GBps": 0.04, "rel_err": 0.01, "speedup": 2.0,
        "link": "loopback", **changes,
    }  # fmt: skip
    return Row(**values)  # type: ignore[arg-type]


def test_a_row_carries_the_schema_and_where_it_comes_from(tmp_path: Path) -> None:
    assert {f.name for f in fields(Row)} >= SCHEMA
    assert {f.name for f in fields(CodecRow)} >= {
        "op", "scheme", "size_bytes", "wire_bytes", "bits", "nmse", "rd_gap", "of_copy",
    }  # fmt: skip
    file = tmp_path / "made" / "rows.jsonl"
    write_jsonl(file, [row(), row(rel_err=None)])
    write_jsonl(file, [row(scheme="auto", chosen="int8")])
    first, second, third = map(json.loads, file.read_text().splitlines())
    assert first["device"] == origin().device
    assert first["versions"]["torch"]
    assert second["rel_err"] is None
    assert third["chosen"] == "int8"


def test_a_table_shows_what_applies_and_a_dash_where_nothing_does() -> None:
    text = table([row(scheme="auto", chosen="int8"), row(rel_err=None, ratio=0.5,
                  ratio_ci_low=0.4, ratio_ci_high=0.6)])  # fmt: skip
    assert "auto (int8)" in text
    assert "0.500 [0.400, 0.600]" in text
    assert "64KiB" in text


def test_a_row_names_the_scheme_that_ran() -> None:
    """Under a rule that compresses large tensors: a collective is planned by what this rank has."""
    large = Policy((Rule(Scheme.parse("int8"), min_numel=1 << 12), Rule(Scheme.parse("fp32"))))

    def ran(transport: ThreadTransport, op: str, scheme: str, policy: Policy | None) -> str | None:
        one = Measured("fp32" if policy else scheme, transport, seed=0)
        if policy is not None:
            one.communicator.take_policy(policy)
        buffers = Buffers(op, 32 << 10, transport.rank, 4, seed=0)  # 8192 elements, 2048 a part
        contestant = one.contestant(scheme, buffers)
        contestant.run()
        one.close()
        sent, must = contestant.sent(), buffers.must_send()
        assert sent == must if contestant.chosen() == "fp32" else sent < must
        return contestant.chosen()

    for op, scheme, policy, expected in (
        ("all_reduce", "auto", large, "int8:round=stochastic"),
        ("reduce_scatter", "auto", large, "int8:round=stochastic"),
        ("all_gather", "auto", large, "fp32"),
        ("all_gather", "int8+ef", None, "int8:round=nearest"),
        ("all_reduce", "int8+ef", None, None),
        ("reduce_scatter", "int8+ef", None, None),
        ("reduce_scatter", "int8+ef@hierarchical", None, "int8:round=nearest+ef"),
    ):
        call = partial(ran, op=op, scheme=scheme, policy=policy)
        found = run_ranks(4, call)
        assert found == [expected] * 4, (op, scheme)


def test_where_ranks_share_hosts_the_table_shows_what_leaves_one() -> None:
    assert "host sent" not in table([row()])
    text = table([row(host_bytes=2 << 20), row()])
    assert "host sent" in text
    assert "2MiB" in text


def test_the_interface_is_the_one_that_gloo_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for found, expected in (("eth7", "eth7"), ("lo", None), (None, None)):
        monkeypatch.setattr(interfaces, "gloo", lambda name=found: (name, "of the host's name"))
        assert line.interface("cpu") == expected
        assert line.interface("cuda") is None  # NCCL's bytes pass another one
    monkeypatch.setattr(interfaces, "gloo", lambda: ("eth7", "named"))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7,eth8")
    assert line.interface("cpu") is None  # gloo takes both in turns


def lines(hosts: str) -> list[Line]:
    """By ranks on the `hosts`: with an interface on all, with none on the last rank, on CUDA."""
    rank = dist.get_rank()
    with patch.dict(os.environ, NCCL_HOSTID=hosts[rank]):
        del os.environ["GLOO_SOCKET_IFNAME"]
        with patch.object(interfaces, "gloo", lambda: ("eth7", "")):
            known, cuda = line.of_job("cpu"), line.of_job("cuda")
        with patch.object(interfaces, "gloo", lambda: ("lo" if rank == 2 else "eth7", "")):
            return [known, line.of_job("cpu"), cuda]


@pytest.mark.processes
def test_only_ranks_that_share_hosts_count_an_interface(pool: Pool) -> None:
    shared, unknown = Line(2, True, "eth7"), Line(2, True, None)
    assert pool.run(lines, "aab", ranks=3) == [[shared, unknown, unknown]] * 3
    assert pool.run(lines, "abc", ranks=3) == [[Line(3)] * 3] * 3
    assert pool.run(lines, "aaa", ranks=3) == [[Line(1)] * 3] * 3
    assert unknown.sent() == 0


def counted(file: str) -> list[int | None]:
    """What two contestants sent, where the file is as long as what the host of all ranks sent."""
    rank = dist.get_rank()

    def sent(_: str) -> int:
        time.sleep(0.05 * rank)  # the later a rank looks, the more others could have sent
        return Path(file).stat().st_size

    def send() -> None:
        with Path(file).open("ab") as host:
            host.write(b"x" * 100)

    def nothing() -> None:
        pass

    players = [
        Contestant(name, "gloo", run, lambda: 0, checked=False)
        for name, run in (("noop", nothing), ("a sender", send))
    ]
    buffers = Buffers("all_reduce", 64, rank, dist.get_world_size(), seed=0)
    with patch.object(line, "sent_bytes", sent):
        bench = Bench("all_reduce", (), (64,), iters=3)
        return _measure(bench, Line(2, True, "eth7"), buffers, players, False)[2]


@pytest.mark.processes
def test_a_host_sent_what_its_ranks_did_and_nothing_of_the_next(pool: Pool, tmp_path: Path) -> None:
    file = tmp_path / "host"
    file.touch()
    assert pool.run(counted, str(file), ranks=3) == [[0, 300]] * 3


@pytest.mark.parametrize(
    ("where", "left", "efficiency"),
    [(Line(2), None, 0.5), (Line(1, True), None, None), (Line(2, True, "eth7"), 1000, 0.8)],
)
def test_wire_efficiency_is_of_what_leaves_a_host(
    where: Line, left: int | None, efficiency: float | None
) -> None:
    bench = Bench("all_reduce", (), (2500,), rate=1e6)
    buffers = Buffers("all_reduce", 2500, 0, 2, seed=0)
    ran = Contestant("gloo fp32", "gloo", lambda: None, lambda: 0)
    (found,) = _rows(bench, where, buffers, [ran], [[0.01]], [None], [625.0], [left])
    assert found.wire_efficiency == efficiency
    assert (found.rate, found.hosts, found.host_bytes) == (1e6, where.hosts, left)


def test_json_never_holds_a_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_jsonl(tmp_path / "rows.jsonl", [row(rel_err=math.nan)])


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.jsonl")), ids=lambda file: file.stem)
def test_rows_of_every_bench_are_shown(file: Path) -> None:
    rows = show.read(file)
    text = show.markdown(rows)
    assert rows
    for row in rows:
        assert show.conditions(row) in text
        if isinstance(row, dict):
            about = row.get("experiment", row)
            for name in ("method", "scheme", "what", "codec", "fault", "call"):
                assert str(about.get(name, "")).replace("|", "\\|") in text
        else:
            assert row.scheme in text


def test_rows_of_other_benches_are_shown_with_all_they_tell(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    about = {"device": "a CPU", "versions": {"torch": "2.13"}, "commit": "abc", "bench": "b"}
    rows = [
        {"method": "rotate|int4", "loss": 0.1234567, "setting": {"seeds": 3, "losses": [1]}},
        {"method": "plain", "loss": 2, "passed": True, "note": "", "setting": {"seeds": 3}},
    ]
    file.write_text("".join(json.dumps({**row, **about}) + "\n" for row in rows))
    head, same, *lines = show.markdown(show.read(file)).replace("\n\n", "\n").splitlines()
    assert head == "a CPU; torch 2.13, commit abc"
    assert same == "setting.seeds: 3; bench: b"
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert cells[0] == ["method", "loss", "passed"]
    assert cells[2:] == [["rotate\\|int4", "0.12346", "-"], ["plain", "2", "True"]]


def test_codec_rows_are_measured_on_the_shipped_codecs() -> None:
    bench = CodecBench(codecs=("fp32", "int4", "ternary"), size=64 << 10, iters=6, peers=False)
    rows = run_codecs(bench)
    by = {(r.scheme, r.op): r for r in rows}
    assert {op for scheme, op in by if scheme == "int4"} == {
        "copy", "encode", "encode+ef", "stochastic", "decode", "decode+add", "reduce4",
        "reduce4+ef",
    }  # fmt: skip
    assert ("ternary", "encode+ef") not in by  # refused: it would diverge
    int4 = by["int4", "encode"]
    assert int4.bits == pytest.approx(4.125, abs=0.01)
    assert int4.nmse is not None
    assert 1e-3 < int4.nmse < 3e-2
    assert int4.rd_gap == pytest.approx(int4.bits - 0.5 * math.log2(1 / int4.nmse))
    assert int4.rd_gap > 0  # nothing beats the bound
    fp32 = by["fp32", "encode"]
    assert fp32.nmse == 0.0
    assert fp32.rd_gap is None
    assert by["int4", "copy"].of_copy == 1.0
    assert all(r.iters == 6 and r.threads == 1 for r in rows)
    text = codec_table(rows, ("encode", "encode+ef", "decode"))
    assert "int4" in text
    assert "4.125" in text


def test_torch_is_a_peer_like_any_other() -> None:
    from commlib.benchmark.peers import PEERS

    x = torch.randn(1 << 12)
    peer = PEERS["torch int8 eager"](x)
    for run in peer.operations.values():
        run()
    assert peer.nbytes == 4096 + 4 * 32
    assert float((peer.decoded() - x).norm() / x.norm()) < 0.01


def test_an_unknown_collective_is_refused() -> None:
    assert set(OPS) == {*COLLECTIVES, PAIRS}
    with pytest.raises(ValueError, match=r"all_reduce.*send_recv"):
        Buffers("allreduce", 64, 0, 2, seed=0)
    assert Bench("all_reduce", ("int8",), (64,)).iters is None
