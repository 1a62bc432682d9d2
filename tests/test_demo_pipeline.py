"""The pipeline demo: stages, calibration, tables, and both commands on a small model."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from commlib import demo, emulation
from commlib.demo import data
from commlib.demo.model import GPT
from commlib.demo.pipeline import line, loss, report
from commlib.demo.pipeline.stages import SHAPES, Alone, Stage, parameters
from commlib.demo.pipeline.stages import loss as cross_entropy
from commlib.demo.pipeline.train import ALONE, METHODS, UNCOMPRESSED, Config, Feed, Method, Run

SMALL = SHAPES["small"]


@pytest.fixture(scope="module")
def corpus() -> data.Corpus:
    return data.load()


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_stages_are_the_model(corpus: data.Corpus, stages: int) -> None:
    x, y = corpus.batch(2, SMALL.context, seed=0, step=0, rank=0)
    parts = [Stage(SMALL, index, stages, seed=3) for index in range(stages)]
    assert sum(p.numel() for s in parts for p in s.parameters()) == parameters(SMALL)
    hidden = x
    for part in parts:
        hidden = part(hidden)
    assert torch.equal(cross_entropy(hidden, y), GPT(SMALL, seed=3)(x, y))


def test_more_stages_than_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="4 blocks"):
        Stage(SMALL, 4, 5)


def test_compute_only_sends_one_element_and_computes_all(corpus: data.Corpus) -> None:
    x, y = corpus.batch(2, SMALL.context, seed=0, step=0, rank=0)
    size = (2, SMALL.context, SMALL.width)
    stages = [Alone(Stage(SMALL, index, 3), index, 3, size) for index in range(3)]
    first = stages[0](x)
    second = stages[1](first.detach().requires_grad_())
    arrived = second.detach().requires_grad_()
    last = cross_entropy(stages[2](arrived), y)
    last.backward()
    assert first.shape == second.shape == (1,)
    assert arrived.grad is not None
    assert arrived.grad.shape == (1,)
    second.backward(arrived.grad)
    for stage in stages[1:]:
        for parameter in stage.parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
            assert parameter.grad.abs().max() > 1e-30  # neither zeros nor subnormals are cheaper


def test_an_epoch_visits_every_sequence_once(corpus: data.Corpus) -> None:
    feed = Feed(corpus, Config(microbatches=4, sequences=12, shape=SMALL))
    epochs = [[i for step in range(3) for i in feed.ids(3 * epoch + step)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1]
    with pytest.raises(ValueError, match="not a multiple"):
        Feed(corpus, Config(microbatches=4, sequences=13, shape=SMALL))


def test_methods_know_what_a_step_must_say() -> None:
    told = {text: (Method.parse(text).by_sample, Method.parse(text).lazy) for text in METHODS}
    assert told["int4/int8"] == told["int4/int4+lep"] == (False, False)
    assert told["int4+delta/int4"] == (True, False)
    assert told["int4+reuse/int4+reuse"] == (False, True)
    assert Method.parse(UNCOMPRESSED).forward is None
    assert str(Method.parse("bf16").backward) == "bf16"
    with pytest.raises(ValueError, match="int9"):
        Method.parse("int4/int9")


class Wire:
    """A step takes `alone` without a network and `waits` + bytes / rate more with one."""

    def __init__(self, sent: float, alone: float = 0.5, waits: float = 0.1) -> None:
        self.sent, self.alone, self.waits = sent, alone, waits
        self.asked: list[int] = []

    def __call__(self, bits: int) -> tuple[float, float]:
        self.asked.append(bits)
        wire = 8 * self.sent / bits if bits else 0.0
        return self.alone, 0.8 * self.alone + self.waits + wire


@pytest.mark.parametrize("guess", [0.3, 1.0, 3.0])
def test_calibration_finds_the_rate(guess: float) -> None:
    wire = Wire(3e6)
    found = line.calibrate(wire, guess * wire.sent)
    assert found.ratio == pytest.approx(line.TARGET, rel=line.WITHIN)
    assert wire.asked[0] == 0
    assert found.bits == wire.asked[-1]
    assert len(wire.asked) <= 6


def test_a_dial_turns_the_rate_and_says_what_it_refuses() -> None:
    class Network:
        rate = ""

        def set_rate(self, rate: str) -> None:
            emulation.parse_rate(rate)
            self.rate = rate

    network = Network()
    with line.dial(network) as folder:  # type: ignore[arg-type]
        line.turn(folder, line.rate_text(19_000_400))
        assert network.rate == "19000kbit"
        with pytest.raises(RuntimeError, match="is not a line rate"):
            line.turn(folder, "fast")
        line.turn(folder, "1mbit")
        assert network.rate == "1mbit"
    assert not folder.exists()


def runs() -> list[Run]:
    """Four steps each; with a memory the first one is slow."""

    def run(name: str, seconds: list[float], sent: float, loss: float) -> Run:
        held_out = [(0, 5.5), (4, loss)] if loss else []
        both = {"forward": [sent / 4] * 4, "backward": [sent / 2] * 4}
        return Run(name, seconds, [sent] * 4, [4.0] * 4, held_out, **both, memory=sent)

    return [
        run(UNCOMPRESSED, [8.0] * 4, 80e3, 4.0),
        run("int4/int8", [2.0] * 4, 16e3, 4.04),
        run("int4/int4+lep", [2.0] * 4, 10e3, 4.2),
        run("int4+reuse", [8.0, 1.0, 1.0, 1.0], 10e3, 5.0),
        run(ALONE, [1.0] * 4, 1e3, 0.0),
    ]


def test_rows_and_bars_sum_up_runs() -> None:
    rows = report.rows(runs(), Config(link="a wire"), 4, 1000, bits=10**7)
    plain, good, lep, reuse, bound = rows
    assert (plain.speedup, good.speedup, reuse.speedup, bound.speedup) == (1, 4, 8, 8)
    assert reuse.run_speedup == pytest.approx(32 / 11)
    assert (good.wire_ratio, good.forward_bytes, good.backward_bytes) == (5, 4e3, 8e3)
    assert good.loss_over_plain == pytest.approx(0.01)
    assert (lep.forward, lep.backward) == ("int4", "int4+lep")
    assert (bound.loss, bound.wire_ratio, bound.curve) == (None, None, [])
    assert plain.curve == [(0, 5.5), (32, 4.0)]
    met = {bar.what: bar.met for bar in report.bars(rows)}
    assert list(met.values()) == [True, False, True, False]  # two of steps, two of losses
    text = report.table(rows) + report.bar_table(report.bars(rows))
    assert "MISSED" in text
    assert "+5.00%" in text


def test_on_loopback_neither_directions_nor_speed_are_judged() -> None:
    rows = report.rows(runs(), Config(), 4, 1000, apart=False)
    assert (rows[0].forward_bytes, rows[0].bytes_per_step, rows[0].wire_ratio) == (None,) * 3
    assert all("loss" in bar.what for bar in report.bars(rows))
    assert " - " in report.table(rows)


def test_image(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "loss.png", report.rows(runs(), Config(), 4, 1000))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_loss_rows_are_paired_by_seed() -> None:
    first = loss.Row(UNCOMPRESSED, 0, 8, 256, 16, 64, 64, 0, 2.0, 3.0, 0.0)
    rows = [
        replace(first, method=method, seed=seed, loss=value)
        for method, values in ((UNCOMPRESSED, (2.0, 4.0)), ("int2+delta/int4", (2.02, 4.08)))
        for seed, value in enumerate(values)
    ]
    assert loss.overs(rows, "int2+delta/int4", "loss") == pytest.approx([0.01, 0.02])
    (bar,) = loss.bars(rows)
    assert (bar.found, bar.met) == ("+1.50%", False)
    assert "+1.00 to +2.00" in loss.table(rows)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--schemes", "int9"], "int9"),
        (["--schemes", ","], "--schemes: ',' is an empty list"),
        (["--schemes", "int4+lep"], "does not take +lep"),
        (["--rate", "fast"], "is not a line rate"),
        (["--stages", "5"], "2 to 4"),
        (["--microbatches", "3"], "at least one for each stage"),
        (["--loss", "--sequences", "100"], "not a multiple"),
    ],
)
def test_bad_words_are_refused(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        demo.main(["--pipeline", *words])
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.fixture
def for_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))


@pytest.mark.bench
@pytest.mark.processes
@pytest.mark.timeout(240)
@pytest.mark.usefixtures("for_ranks")
def test_two_stages_train_by_every_method(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    apart = emulation.available() is None  # others, too, send over this machine's loopback
    path = tmp_path / "rows.jsonl"
    words = ["--stages", "2", "--model", "small", "--microbatches", "4", "--rounds", "2"]
    words += ["--round", "2", "--rate", "1gbit" if apart else "none", "--plot", "none"]
    words += ["--json", str(path)]
    assert demo.main(["--pipeline", *words]) == 0
    rows = {row["method"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert list(rows) == [UNCOMPRESSED, *METHODS, ALONE]
    assert "to uncompressed" in capfd.readouterr().out
    plain = rows[UNCOMPRESSED]
    for method, row in rows.items():
        if method not in (ALONE, "int4+reuse/int4+reuse"):  # that one trains on other data
            assert row["loss"] == pytest.approx(plain["loss"], rel=0.01)
    if apart:
        one_way = 4 * 4 * SMALL.context * SMALL.width  # 4 micro-batches of 4 bytes an element
        shares = {UNCOMPRESSED: (1, 1), "bf16": (1 / 2, 1 / 2), "int4/int8": (33 / 256, 65 / 256)}
        for method, pair in shares.items():
            for name, share in zip(("forward", "backward"), pair, strict=True):
                sent = rows[method][f"{name}_bytes"]
                assert share * one_way <= sent <= 1.1 * share * one_way + 10_000
        assert rows[ALONE]["bytes_per_step"] < 20_000
    remember = ("int4/int4+lep", "int4+delta/int4", "int4+reuse/int4+reuse")
    assert {m for m, row in rows.items() if row["memory_bytes"]} == set(remember)
    # references of 8 samples at both ends of one boundary
    references = 2 * 8 * 4 * SMALL.context * SMALL.width
    assert rows["int4+delta/int4"]["memory_bytes"] == references


@pytest.mark.bench
@pytest.mark.processes
@pytest.mark.timeout(240)
@pytest.mark.usefixtures("for_ranks")
def test_loss_after_epochs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    words = ["--stages", "2", "--model", "small", "--microbatches", "4", "--epochs", "2"]
    words += ["--sequences", "8", "--seeds", "1", "--schemes", "int2+delta/int4"]
    words += ["--pretrain", "2"]
    assert demo.main(["--pipeline", "--loss", *words, "--json", str(path)]) == 0
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    assert [row["method"] for row in rows] == [UNCOMPRESSED, "int2+delta/int4"]
    assert all(len(row["epoch_losses"]) == 2 for row in rows)
    assert rows[1]["loss"] == pytest.approx(rows[0]["loss"], rel=0.02)
    assert "int2+delta/int4: training loss" in capfd.readouterr().out


@pytest.mark.bench
@pytest.mark.processes
@pytest.mark.timeout(240)
@pytest.mark.usefixtures("for_ranks")
def test_the_line_rate_is_set_from_within(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if reason := emulation.available():
        pytest.skip(reason)
    path = tmp_path / "rows.jsonl"
    words = ["--stages", "2", "--model", "small", "--microbatches", "4", "--rounds", "1"]
    words += ["--round", "2", "--schemes", "int4/int8", "--plot", "none", "--json", str(path)]
    assert demo.main(["--pipeline", *words]) == 0
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    assert len({row["bits_per_second"] for row in rows}) == 1
    assert rows[0]["bits_per_second"] > 0
    out = capfd.readouterr().out
    assert "line rate" in out
    assert "step shorter than uncompressed" in out
