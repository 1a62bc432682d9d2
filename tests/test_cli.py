"""The command line: what it accepts, what it refuses and how, and one real run of each kind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from commlib import __version__, emulation
from commlib.cli import main, parser
from commlib.emulation import network

GROUND = {"gloo fp32", "gloo bf16", "noop", "raw a2a"}


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def rows_of(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    out = capsys.readouterr().out
    assert f"commlib {__version__}" in out
    assert "torch 2." in out


def test_without_a_command_it_shows_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out = capsys.readouterr().out
    assert all(command in out for command in ("bench", "demo", "warmup", "doctor"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--help",), ("commlib doctor", "commlib bench")),
        (("bench", "--help"), ("all_reduce", "codecs")),
        (("bench", "all_reduce", "--help"), ("64KiB", "GB/s = 1e9", "--rate", "examples:")),
        (("bench", "send_recv", "--help"), ("0 to 1, 2 to 3", "fp32,bf16,int8,int4", "--rate")),
        (("bench", "codecs", "--help"), ("R-D gap", "examples:", "64MiB")),
        (("warmup", "--help"), ("Compiles every kernel",)),
        (("doctor", "--help"), ("exit 1 on a FAULT", "--json")),
        (("demo", "--help"), ("--rate",)),
    ],
)
def test_help_has_units_and_examples(
    words: tuple[str, ...], expected: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(text in out for text in expected)


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from commlib.cli import parser; parser().format_help(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("bench", "all_reduce", "--min", "64Ki"), "write 64KiB"),
        (("bench", "all_reduce", "--rate", "fast"), "mbit"),
        (("bench", "all_reduce", "--schemes", "int4+ef,int99"), "int99"),
        (("bench", "all_reduce", "--schemes", "ternary+ef"), "ternary"),
        (("bench", "all_reduce", "--ranks", "0"), "at least 1"),
        (("bench", "all_reduce", "--ranks", "\u00b2"), "'\u00b2' is not a whole number"),
        (("bench", "all_reduce", "--schemes", ""), "--schemes: '' is an empty list"),
        (("bench", "codecs", "--codecs", ","), "--codecs: ',' is an empty list"),
        (("warmup", "--codecs", ""), "--codecs: '' is an empty list"),
        (("bench", "all_reduce", "--ranks", "2", "--hosts", "3"), "--hosts 3 is more than --ranks"),
        (("bench", "all_reduce", "--min", "2MiB", "--max", "1MiB"), "larger than --max"),
        (("bench", "all_reduce", "--min", "0"), "--min is at least 1"),
        (("bench", "all_reduce", "--factor", "1"), "--factor 2"),
        (("bench", "send_recv", "--schemes", "int8,int4+ef"), "int4+ef: messages have no memory"),
        (("bench", "send_recv", "--ranks", "1"), "pairs of ranks, at least 2"),
        (("bench", "all_reduce", "--schemes", "int8,int8+lep"), "no memory such as lep"),
        (("bench", "reduce_scatter", "--schemes", "int8+delta"), "no memory such as delta"),
        (("bench", "all_reduce", "--timeout", "0"), "'0' is not a number above 0"),
        (("bench", "all_reduce", "--budget", "nan"), "'nan' is not a number above 0"),
        (("bench", "codecs", "--size", "0"), "at least 4"),
        (("bench", "allreduce"), "all_reduce"),
        (("bench", "codecs", "--codecs", "int44"), "did you mean"),
        (("doctro",), "doctor"),
    ],
)
def test_bad_words_are_refused_with_what_is_allowed(
    words: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refused(capsys, *words)


def test_options_become_values() -> None:
    args = parser().parse_args(
        ["bench", "all_gather", "--schemes", "int8, auto", "--min", "4KiB", "--rate", "1gbit"]
    )
    assert args.op == "all_gather"
    assert args.schemes == ("int8", "auto")
    assert args.min == 4096
    assert args.rate == "1gbit"
    assert args.ranks == 4


def test_bench_alone_means_all_reduce(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def spawn(argv: list[str], ranks: int, **options: object) -> int:
        seen.extend([argv, ranks, options["rate"]])
        return 3

    monkeypatch.setattr(emulation, "spawn", spawn)
    assert main(["bench", "--ranks", "2"]) == 3  # the ranks' exit code is the command's
    assert seen[0][3:5] == ["bench", "all_reduce"]  # type: ignore[index]
    assert seen[1:] == [2, None]


def test_where_hosts_cannot_be_emulated_it_says_so_and_uses_loopback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[object] = []

    def spawn(argv: list[str], ranks: int, **options: object) -> int:
        seen.extend([argv, options["rate"]])
        return 0

    monkeypatch.setattr(network, "available", lambda: "unshare is not permitted")
    monkeypatch.setattr(emulation, "spawn", spawn)
    assert main(["bench", "all_reduce", "--rate", "1gbit"]) == 0
    assert "unshare is not permitted" in capsys.readouterr().err
    assert seen[1] is None
    assert "--rate" not in seen[0]  # type: ignore[operator]
    assert "loopback" in seen[0]  # type: ignore[operator]
    assert main(["bench", "all_reduce", "--rate", "1gbit", "--link", "4 hosts, 1gbit"]) == 0
    assert "4 hosts, 1gbit, loopback" in seen[2]  # type: ignore[operator]


def test_ranks_share_the_hosts_that_were_asked_for_or_nothing_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[object] = []

    def spawn(argv: list[str], ranks: int, **options: object) -> int:
        seen.extend([argv, ranks, options["hosts"], options["rate"]])
        return 0

    monkeypatch.setattr(emulation, "available", lambda: None)
    monkeypatch.setattr(network, "available", lambda: None)
    monkeypatch.setattr(emulation, "spawn", spawn)
    words = ["bench", "--ranks", "4", "--hosts", "2"]
    assert main([*words, "--rate", "1gbit"]) == 0
    assert "2 emulated hosts, 1gbit" in seen[0]  # type: ignore[operator]
    assert "--hosts" not in seen[0]  # type: ignore[operator]
    assert seen[1:] == [4, 2, "1gbit"]
    monkeypatch.setattr(emulation, "available", lambda: "unshare is not permitted")
    assert main(words) == 1
    assert "--hosts 2: cannot emulate hosts here (unshare" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RuntimeError, match="a job's have their hosts"):
        main(words)


def test_what_the_world_refuses_is_one_line_and_exit_code_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spawn(*_: object, **__: object) -> int:
        raise RuntimeError("cannot emulate hosts here: no ip")

    monkeypatch.setattr(emulation, "spawn", spawn)
    assert main(["bench"]) == 1
    assert capsys.readouterr().err == "commlib: cannot emulate hosts here: no ip\n"


def test_cuda_is_measured_by_a_jobs_own_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", "all_reduce", "--device", "cuda"]) == 1
    assert "torch sees no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert main(["bench", "all_reduce", "--device", "cuda"]) == 1
    assert "torchrun --nproc-per-node" in capsys.readouterr().err


def test_bench_codecs_prints_a_table_and_writes_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "codecs.jsonl"
    file.write_text("an older run\n")
    words = ["bench", "codecs", "--codecs", "int8,sign", "--size", "16KiB", "--iters", "2"]
    assert main([*words, "--no-peers", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "R-D gap" in out
    assert "int8" in out
    rows = rows_of(file)
    assert {row["scheme"] for row in rows} == {"int8", "sign"}
    assert all(row["size_bytes"] == 16384 for row in rows)


def test_warmup_compiles_and_names_the_cache(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warmup", "--codecs", "int8"]) == 0
    assert "the cache is" in capsys.readouterr().out


@pytest.mark.bench
@pytest.mark.parametrize("op", ["all_reduce", "reduce_scatter", "all_gather"])
def test_two_real_ranks_make_rows(op: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    words = ["bench", op, "--schemes", "fp32,int8+ef", "--min", "8KiB", "--max", "32KiB"]
    words += ["--ranks", "2", "--iters", "3", "--timeout", "60", "--json", str(file)]
    assert main(words) == 0
    rows = rows_of(file)
    assert {row["scheme"] for row in rows} == GROUND | {"fp32", "int8+ef"}
    assert [row["size_bytes"] for row in rows] == [8192] * 6 + [32768] * 6
    by = {row["scheme"]: row for row in rows[6:]}
    halves = 2 if op == "all_reduce" else 1
    assert by["gloo fp32"]["wire_bytes"] == halves * 16384
    assert by["fp32"]["wire_bytes"] == by["gloo fp32"]["wire_bytes"]
    assert 3.5 < by["int8+ef"]["wire_ratio"] < 4.0  # type: ignore[operator]
    errors = {name: by[name]["rel_err"] for name in ("gloo fp32", "gloo bf16", "fp32", "int8+ef")}
    assert errors["gloo fp32"] < 1e-6  # type: ignore[operator]
    assert errors["fp32"] == errors["gloo fp32"]  # bitwise the library's own
    assert 1e-4 < errors["gloo bf16"] < 1e-2  # type: ignore[operator]
    assert 1e-3 < errors["int8+ef"] < 3e-2  # type: ignore[operator]
    # what is gathered has no feedback, and the row says so
    assert by["int8+ef"]["chosen"] == ("int8:round=nearest" if op == "all_gather" else None)
    assert by["noop"]["rel_err"] is None
    assert by["gloo fp32"]["ratio"] is None
    assert by["int8+ef"]["ratio"] > 0  # type: ignore[operator]
    assert by["int8+ef"]["ratio_ci_low"] is None  # of 3 rounds
    assert all(row["hosts"] == 1 and row["rate"] is None for row in rows)
    assert all(row["iters"] == 3 and row["ranks"] == 2 for row in rows)
    assert all(row["link"] == "loopback" for row in rows)


@pytest.mark.bench
@pytest.mark.parametrize("ranks", [2, 3])
def test_pairs_of_real_ranks_make_rows(ranks: int, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    words = ["bench", "send_recv", "--schemes", "fp32,int8,auto", "--min", "8KiB", "--max", "8KiB"]
    words += ["--ranks", str(ranks), "--iters", "3", "--timeout", "60", "--json", str(file)]
    assert main(words) == 0
    by = {row["scheme"]: row for row in rows_of(file)}
    assert set(by) == {"gloo fp32", "gloo bf16", "noop", "fp32", "int8", "auto"}
    assert all(row["op"] == "send_recv" and row["ranks"] == ranks for row in by.values())
    assert by["gloo fp32"]["wire_bytes"] == by["fp32"]["wire_bytes"] == 8192
    assert by["gloo bf16"]["wire_bytes"] == 4096
    assert by["int8"]["wire_bytes"] == 2048 + 2 * 2048 // 128 + 16  # codes, scales, stamp
    assert by["auto"]["chosen"] == "fp32"
    assert by["gloo fp32"]["busbw_GBps"] == by["gloo fp32"]["algbw_GBps"]
    assert by["fp32"]["rel_err"] == by["auto"]["rel_err"] == 0
    assert 1e-3 < by["int8"]["rel_err"] < 3e-2  # type: ignore[operator]


@pytest.mark.processes
def test_a_rank_that_fails_fails_the_command() -> None:
    words = ["bench", "--schemes", "fp32", "--min", "1KiB", "--max", "1KiB", "--ranks", "2"]
    assert main([*words, "--iters", "1", "--timeout", "1e-9"]) != 0


@pytest.mark.parametrize("words", [["bench"], ["bench", "codecs"], ["demo"], ["demo", "--loss"]])
@pytest.mark.parametrize("where", [".", "missing/rows.jsonl"])
def test_results_that_could_not_be_written_are_refused_before_the_run(
    words: list[str], where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*words, "--json", str(tmp_path / where)])
    assert caught.value.code == 2
    assert "cannot be written: name a file in a folder that exists" in capsys.readouterr().err
