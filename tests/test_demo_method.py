"""`commlib demo --method`: what it accepts, what it makes of the figures, and one short run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from commlib import demo
from commlib.demo import seldom
from commlib.demo.seldom import report, train
from commlib.demo.train import PLAIN


def options(*words: str) -> argparse.Namespace:
    return seldom.parser().parse_args(["--method", "diloco", *words])


LEARNED = {
    PLAIN: [(0, 5.0), (2, 4.0), (4, 3.0)],
    train.CODED: [(0, 5.0), (5, 3.5), (10, 2.9)],
    "diloco": [(0, 5.0), (8, 3.0)],
    "easgd": [(0, 5.0), (8, 3.1)],
}
CLOCKS = {
    "20mbit": {PLAIN: (2.0, 4e6), train.CODED: (0.4, 1e6), "diloco": (0.1, 1e5), "easgd": (1, 1)}
}


def test_steps_times_seconds() -> None:
    rows = {row.method: row for row in report.rows(LEARNED, CLOCKS, options("--target", "4"))}
    assert list(rows) == list(LEARNED)
    diloco, easgd = rows["diloco"], rows["easgd"]
    assert diloco.steps == 8
    assert diloco.goal == 3.0
    assert (diloco.seconds, diloco.to_plain, diloco.to_coded) == pytest.approx((0.8, 10.0, 5.0))
    assert (easgd.steps, easgd.seconds, easgd.to_plain, easgd.to_coded) == (None,) * 4
    assert rows[PLAIN].to_plain == 1.0
    lines = report.table(list(rows.values())).splitlines()
    assert [word in lines[4] for word in ("diloco", "100", "0.100", "10.00x", "5.00x")] == [
        True
    ] * 5
    assert lines[5].split()[2] == "-"


def test_rows_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = report.rows(LEARNED, {**CLOCKS, "100mbit": CLOCKS["20mbit"]}, options())
    report.plot(tmp_path / "loss.png", rows)
    assert (tmp_path / "loss.png").stat().st_size > 1000
    report.write_rows(tmp_path / "rows.jsonl", rows)
    read = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["rate"], row["method"]) for row in read[::4]] == [
        ("20mbit", PLAIN), ("100mbit", PLAIN),
    ]  # fmt: skip
    assert read[2]["curve"] == [[0, 5.0], [8, 3.0]]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--method", "dilco"], "'dilco' is no method; allowed: easgd, diloco"),
        (["--method=easgd", "--rate", "20furlongs"], "20furlongs"),
        (["--method", "easgd", "--target", "300"], "--target 300 is above --steps 200"),
        (["--method", "easgd", "--period", "0"], "not a whole number"),
        (["--method="], "--method: '' is an empty list"),
        (["--method", "easgd", "--rate", ","], "--rate: ',' is an empty list"),
        (["--method", "easgd", "--json", "/nowhere/rows.jsonl"], "/nowhere"),
    ],
)
def test_words_that_are_refused(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        demo.main(words)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_it_is_not_for_the_ranks_of_a_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every one of them would start ranks of its own."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(seldom, "_lead", lambda *_: pytest.fail("started ranks"))
    with pytest.raises(SystemExit) as ended:
        demo.main(["--method", "diloco"])
    assert ended.value.code == 2
    assert "without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("period", [1, 2, 4, 6, 25])
def test_streaming_fits_into_any_period(period: int) -> None:
    from tests.communicators import on_ranks
    from tests.optim.diloco import outer
    from tests.optim.replicas import model

    how = {"period": period, **train.streaming(period)}
    on_ranks(1, "fp32", lambda c: outer(model(), c, **how))


@pytest.mark.bench
@pytest.mark.processes
@pytest.mark.timeout(300)  # two processes that start torch, twice
def test_every_method_learns_and_is_timed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    words = ["--method", ",".join(seldom.CHOICES), "--ranks", "2", "--rate", "none", "--plot"]
    words += ["none", "--target", "6", "--steps", "12", "--period", "6", "--timed", "1"]
    assert demo.main([*words, "--json", str(out)]) == 0
    rows = {row["method"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == [PLAIN, train.CODED, *seldom.CHOICES]
    start = rows[PLAIN]["curve"][0]
    for row in rows.values():
        assert row["curve"][0] == start  # the same weights
        assert row["curve"][-1][1] < start[1] - 0.2
        assert row["ms_per_step"] > 0
    # loopback's counter sees two ranks: fp32 both ways every step, int4 and 4 bits in 6 steps
    sent = {method: row["bytes_per_step"] for method, row in rows.items()}
    assert sent[PLAIN] > 6 * sent[train.CODED] > 20 * sent["diloco"]
    assert "loopback" in capfd.readouterr().out
