"""The demo: its data, its sums, its two tables, and both commands on a small model."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from commlib import cli, demo, emulation
from commlib.demo import data, loss, report
from commlib.demo.model import GPT, SHAPES, WARMUP_STEPS, Shape, optimizer, warm_up
from commlib.demo.train import BF16_HOOK, NO_COMMUNICATION, PLAIN, Config, Run
from commlib.scheme import Scheme

TINY = Shape(layers=1, width=32, heads=2, context=64)


@pytest.fixture(scope="module")
def corpus() -> data.Corpus:
    return data.load()


def test_text_is_split_by_file_and_batches_repeat(corpus: data.Corpus) -> None:
    assert len(corpus.train) > 10 * len(corpus.held_out) > 10**6
    x, y = corpus.batch(2, 16, seed=1, step=3, rank=0)
    assert x.shape == y.shape == (2, 16)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(x, corpus.batch(2, 16, seed=1, step=3, rank=0)[0])
    for other in ({"seed": 2}, {"step": 4}, {"rank": 1}):
        assert not torch.equal(
            x, corpus.batch(2, 16, **{"seed": 1, "step": 3, "rank": 0, **other})[0]
        )


def test_ranks_share_the_evaluation(corpus: data.Corpus) -> None:
    whole, _ = corpus.evaluation(8, 16)
    parts = [corpus.evaluation(2, 16, rank=rank, ranks=4)[0] for rank in range(4)]
    assert {tuple(row.tolist()) for row in torch.cat(parts)} == {tuple(r.tolist()) for r in whole}


def test_model_sizes_and_the_loss_of_an_untrained_model(corpus: data.Corpus) -> None:
    sizes = {name: sum(p.numel() for p in GPT(s).parameters()) for name, s in SHAPES.items()}
    assert sizes == {"10M": 10_893_312, "small": 875_264}
    model = GPT(TINY, seed=3)
    assert all(
        torch.equal(p, q)
        for p, q in zip(model.parameters(), GPT(TINY, 3).parameters(), strict=True)
    )
    assert model(*corpus.batch(8, 64, seed=0, step=0, rank=0)).item() == pytest.approx(
        5.545, abs=0.1
    )


def test_a_byte_does_not_see_the_next(corpus: data.Corpus) -> None:
    model = GPT(TINY)
    x, y = corpus.batch(1, 64, seed=0, step=0, rank=0)
    changed = x.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 256
    assert torch.equal(model(x[:, :-1], y[:, :-1]), model(changed[:, :-1], y[:, :-1]))
    before = torch.autograd.grad(model(x[:, :32], y[:, :32]), model.bytes.weight)[0]
    seen = before.abs().sum(1).nonzero().flatten().tolist()
    assert set(seen) <= set(x[0, :32].tolist())


def test_learning_rate_rises_then_stays() -> None:
    updates = optimizer("sgd", GPT(TINY))
    rates = []
    for step in range(WARMUP_STEPS + 2):
        warm_up(updates, step)
        rates.append(updates.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(rates[-1] / WARMUP_STEPS)
    assert rates[-1] == rates[WARMUP_STEPS - 1] == 0.03
    with pytest.raises(ValueError, match="adamw, sgd"):
        optimizer("adam", GPT(TINY))


def runs() -> list[Run]:
    """Ten steps each: plain takes 2 s and 80 MB, the scheme 0.5 s and 10 MB, the bound 0.4 s."""
    learned = [(0, 5.0), (5, 4.0), (10, 3.0)]
    return [
        Run(PLAIN, [2.0] * 10, [80e6] * 10, [4.0] * 10, learned),
        Run("int4+ef", [0.5] * 9 + [9.0], [10e6] * 10, [4.0] * 10, [*learned[:2], (10, 3.5)]),
        Run(NO_COMMUNICATION, [0.4] * 10, [0.0] * 10, [4.0] * 10, [(0, 5.0)]),
    ]


def test_rows_sum_up_runs() -> None:
    plain, scheme, bound = report.rows(runs(), Config(link="a wire"), 4, 1000)
    assert (plain.ms_p50, scheme.ms_p50, bound.ms_p50) == (2000, 500, 400)
    assert (plain.speedup, scheme.speedup) == (1, 4)
    assert (scheme.of_bound, scheme.wire_ratio, bound.wire_ratio) == (1.25, 8, None)
    assert plain.target == 3.5  # the highest final loss
    assert plain.seconds_to_target == 15  # half way between step 5 (10 s) and step 10 (20 s)
    assert scheme.seconds_to_target == pytest.approx(13.5)  # the slow last step counts
    assert bound.loss is None
    assert bound.curve == []
    text = report.table([plain, scheme, bound])
    assert "s to loss 3.500" in text
    assert "4.00x" in text


def test_one_rank_sends_nothing() -> None:
    alone = [replace(run, bytes=[0.0] * 10) for run in runs()]
    assert [row.wire_ratio for row in report.rows(alone, Config(), 1, 1000)] == [None] * 3


def test_an_image_of_no_kind_is_refused_before_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    small = ["--model", "small", "--rate", "none"]
    for words in (small, [*small, "--method", "easgd"], [*small, "--pipeline"]):
        assert cli.main(["demo", *words, "--plot", "loss.pgn"]) == 1
        assert "--plot loss.pgn: no image is a .pgn; allowed: " in capsys.readouterr().err


def test_a_target_may_be_out_of_reach() -> None:
    plain, scheme, _ = report.rows(runs(), Config(), 4, 1000, target=3.2)
    assert plain.seconds_to_target == pytest.approx(18)
    assert scheme.seconds_to_target is None


def test_json_and_image(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = report.rows(runs(), Config(), 4, 1000)
    report.write_json(tmp_path / "rows.jsonl", found)
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [line["scheme"] for line in lines] == [PLAIN, "int4+ef", NO_COMMUNICATION]
    assert lines[1]["curve"][-1] == [pytest.approx(13.5), 3.5]
    report.plot(tmp_path / "loss.png", found)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_every_scheme_of_the_loss_table_is_accepted() -> None:
    assert len(set(loss.ALL)) == len(loss.ALL) == 17
    for text in loss.ALL:
        assert str(Scheme.parse(text)).startswith(text.split(":")[0].split("+")[0])


def test_loss_table_is_paired(tmp_path: Path) -> None:
    first = loss.Experiment("small", "adamw", 0, "fp32")
    rows = [
        loss.Row(replace(first, seed=seed, scheme=scheme), 60, value, 1.0, sent)
        for scheme, values, sent in (
            ("fp32", (2.0, 4.0), 600_000),
            ("int4+ef", (2.02, 4.12), 80_000),
        )
        for seed, value in enumerate(values)
    ]
    line = loss.table(rows).splitlines()[-1].split()
    assert line == ["int4+ef", "3.0700", "+2.00%", "+1.00", "to", "+3.00", "7.5x"]
    path = tmp_path / "rows.jsonl"
    loss.append(path, rows[:2])
    loss.append(path, rows[2:])
    assert list(loss.read(path).values()) == rows


def test_a_loss_run_repeats_and_a_stopped_table_goes_on(
    tmp_path: Path,
    corpus: data.Corpus,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SHAPES, "small", TINY)
    monkeypatch.setattr(loss, "load", lambda: corpus)
    path = tmp_path / "rows.jsonl"
    words = [
        "--loss",
        "--model",
        "small",
        "--steps",
        "2,3",
        "--optimizers",
        "adamw",
        "--json",
        str(path),
    ]
    assert demo.main([*words, "--schemes", "int4+ef", "--seeds", "1"]) == 0
    first = path.read_text()
    assert demo.main([*words, "--schemes", "core", "--seeds", "1"]) == 0
    assert path.read_text().startswith(first)
    assert "3 runs of 3 steps, 2 of them found" in capsys.readouterr().out
    done = loss.read(path)
    assert len(done) == 6
    experiment = loss.Experiment("small", "adamw", 0, "int4+ef")
    again = loss.run(experiment, (2, 3), corpus)
    assert [row.loss for row in again] == [done[experiment, 2].loss, done[experiment, 3].loss]
    plain = done[replace(experiment, scheme="fp32"), 3].loss
    assert again[-1].loss != plain
    assert again[-1].loss == pytest.approx(plain, rel=0.01)


def test_a_loss_run_of_coded_momentum_begins_as_plain(
    corpus: data.Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHAPES, "small", TINY)
    plain = loss.run(loss.Experiment("small", "adamw", 0, "fp32"), (3, 6), corpus)
    experiment = loss.Experiment("small", "adamw", 0, "momentum:int4+ef", warm_up=3)
    coded = loss.run(experiment, (3, 6), corpus)
    (asked,) = loss.Table("small", ("adamw",), (experiment.scheme,)).experiments(1, "fp32", 15)
    assert asked == experiment
    assert coded[0].loss == pytest.approx(plain[0].loss, rel=1e-5)
    assert coded[1].loss == pytest.approx(plain[1].loss, rel=0.05)
    first, second = coded[0].sent, coded[1].sent
    assert first is not None
    assert second is not None
    assert second - first < 0.5 * first  # three plain steps, then three coded ones


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--schemes", "int9+ef"], "int9"),
        (["--loss", "--schemes", "momentum:int4+ef"], "way of AdamW alone"),
        (["--rate", "fast"], "is not a line rate"),
        (["--rounds", "0"], "at least 1"),
        (["--bucket-mb", "-3"], "'-3' is not a number above 0"),
        (["--loss", "--schemes", "ternary+ef"], "diverges"),
        (["--loss", "--optimizers", "lamb"], "adamw, sgd"),
        (["--schemes", ""], "--schemes: '' is an empty list: give one word or more"),
        (["--loss", "--steps", ","], "--steps: ',' is an empty list"),
        (["--loss", "--steps", "60,\u00b2"], "'\u00b2' is not a whole number"),
        (["--loss", "--optimizers", " , "], "--optimizers: ' , ' is an empty list"),
        (["--target", "nan"], "--target: 'nan' is not a finite number"),
        (["--target", "inf"], "--target: 'inf' is not a finite number"),
        (["--target", "low"], "--target: 'low' is not a finite number"),
    ],
)
def test_bad_words_are_refused(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        demo.main(words)
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.bench
@pytest.mark.processes
@pytest.mark.timeout(240)
def test_demo_over_a_network(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks train by every method; on emulated hosts the interface tells what each sent."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    path = tmp_path / "rows.jsonl"
    rate = "none" if emulation.available() else "1gbit"
    words = ["--model", "small", "--ranks", "2", "--rounds", "2", "--round", "2", "--plot", "none"]
    assert demo.main([*words, "--rate", rate, "--json", str(path)]) == 0
    rows = {row["scheme"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert list(rows) == [PLAIN, BF16_HOOK, "int8+ef", "int4+ef", NO_COMMUNICATION]
    assert "int4+ef" in capfd.readouterr().out
    # Two ranks: each sends half of its gradients and half of the mean, so all bytes of them once.
    # 2% of them are vectors that stay exact; 3% more for headers and acknowledgements.
    whole = 4 * rows[PLAIN]["parameters"]
    for scheme, share in {
        PLAIN: 1,
        BF16_HOOK: 1 / 2,
        "int8+ef": 65 / 256,
        "int4+ef": 33 / 256,
    }.items():
        assert share <= rows[scheme]["bytes_per_step"] / whole <= 1.03 * share + 0.03
        assert rows[scheme]["loss"] == pytest.approx(rows[PLAIN]["loss"], rel=0.02)
