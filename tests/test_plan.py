"""`commlib plan`: whose gradients, what it prints, and the policy that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from commlib.cli import main
from commlib.demo import plan as command
from commlib.demo.data import load
from commlib.demo.model import GPT, SHAPES, Shape, optimizer, warm_up
from commlib.planner import Errors
from commlib.policy import Policy, TensorInfo

TINY = Shape(layers=2, width=64, heads=2, context=128)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "small", TINY)


@pytest.mark.bench
def test_the_gradients_are_those_of_the_ranks_at_the_step() -> None:
    source = command.Source(model="small", step=3, ranks=2, context=16, seed=5)
    found = command.measure(source, ("int2+ef", "int4+ef"))
    corpus, model = load(), GPT(TINY, seed=5)
    updates = optimizer("adamw", model)
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = Errors(found.infos, ("int2+ef", "int4+ef"))
    for step in range(3):
        pairs = [corpus.batch(2, 16, seed=5, step=step, rank=rank) for rank in range(2)]
        ranks = [torch.autograd.grad(model(*pair), parameters) for pair in pairs]
        for parameter, *mine in zip(parameters, *ranks, strict=True):
            parameter.grad = torch.stack(mine).mean(0)
        if step == 2:
            for mine in ranks:
                for name, gradient in zip(names, mine, strict=True):
                    expected.add(name, gradient)
        warm_up(updates, step)
        updates.step()
    assert expected.table.any()
    # other orders of adding make other roundings
    torch.testing.assert_close(found.table, expected.table, rtol=1e-3, atol=0)


@pytest.mark.bench
def test_it_prints_a_plan_and_writes_its_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy_file, rows_file = tmp_path / "plan.json", tmp_path / "rows.jsonl"
    words = ["plan", "--model", "small", "--step", "4", "--ranks", "2", "--rate", "100mbit"]
    words += ["--schemes", "int2+ef,int4+ef,int6+ef,int8+ef"]
    assert main([*words, "--output", str(policy_file), "--json", str(rows_file)]) == 0
    out = capsys.readouterr().out
    assert "gradients of step 4, 2 ranks" in out
    assert "blocks.1.down.weight" in out
    assert "that stay exact" in out
    assert "ms at 100mbit" in out

    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    layers = {row["layer"]: row for row in rows if row["op"] == "plan"}
    fp32, same, mine = (row for row in rows if row["op"] == "plan total")
    # the policy is the plan
    policy = Policy.parse(policy_file)
    assert policy.digest() in out
    for name, parameter in GPT(TINY).named_parameters():
        info = TensorInfo(name, parameter.numel(), parameter.dtype, ndim=parameter.ndim)
        scheme = policy.choose(info)
        assert layers[name]["scheme"] == str(scheme).replace(":round=nearest", "")
        assert layers[name]["nbytes"] == pytest.approx(layers[name]["bits"] * parameter.numel() / 8)
    # totals are sums, within the budget
    assert [row["scheme"] for row in (fp32, same, mine)] == ["fp32", "int4+ef", "plan"]
    assert mine["nbytes"] == sum(row["nbytes"] for row in layers.values())
    assert mine["error"] == pytest.approx(sum(row["error"] for row in layers.values()))
    assert mine["error"] <= same["error"]
    assert mine["nbytes"] <= same["nbytes"] < fp32["nbytes"]
    assert sum(row["error_share"] for row in layers.values()) == pytest.approx(1)
    # 2 (W - 1) / W = 1 of the bytes, at 100 Mbit/s
    for row in (fp32, same, mine):
        wire = row["step_ms"] - row["coding_ms"]
        assert wire == pytest.approx(1e3 * row["nbytes"] * 8 / 100e6)
        assert (row["coding_ms"] > 0) == (row is not fp32)


@pytest.mark.bench
def test_a_larger_alpha_spends_fewer_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    def size(*words: str) -> float:
        assert main(["plan", "--model", "small", "--step", "2", "--ranks", "2", *words]) == 0
        lines = capsys.readouterr().out.splitlines()
        return float(next(line for line in lines if line.split()[:1] == ["plan"]).split()[1])

    assert size("--alpha", "30") < size() < size("--alpha", "0.01")
    # on a slow line seconds are bytes; on a fast one coding decides, never beyond the default
    assert size("--objective", "seconds", "--rate", "100kbit") == size()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--schemes", "int2+ef,int99"), "int99"),
        (("--schemes", ","), "--schemes: ',' is an empty list"),
        (("--schemes", "int2+ef"), "--default int4+ef is not among"),
        (("--default", "ternary+ef"), "ternary"),
        (("--alpha", "0"), "not a number above 0"),
        (("--alpha", "nan"), "not a number above 0"),
        (("--rate", "none"), "such as 1gbit"),
        (("--rate", "fast"), "mbit"),
        (("--step", "0"), "at least 1"),
        (("--ranks", "1"), "one rank sends nothing"),
        (("--output", "plan.txt"), "NAME.json"),
        (("--output", "/nowhere/plan.json"), "cannot be written"),
    ],
)
def test_what_is_refused(
    words: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *words])
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.bench
def test_one_candidate_loses_what_it_loses(tmp_path: Path) -> None:
    def errors(*schemes: str) -> dict[str, float]:
        file = tmp_path / "rows.jsonl"
        words = ["plan", "--model", "small", "--step", "1", "--ranks", "2", "--json", str(file)]
        assert main([*words, "--schemes", ",".join(schemes)]) == 0
        rows = map(json.loads, file.read_text().splitlines())
        return {row["scheme"]: row["error"] for row in rows if row["op"] == "plan total"}

    alone, one_of_two = errors("int4+ef"), errors("int4+ef", "int8+ef")
    assert alone["int4+ef"] == alone["plan"] == pytest.approx(one_of_two["int4+ef"], rel=1e-3)
    assert alone["int4+ef"] > 0 == alone["fp32"]


@pytest.mark.bench
def test_a_budget_that_no_candidate_meets(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "small", "--step", "1", "--ranks", "2", "--schemes", "int2+ef,int4+ef"]
    assert main(["plan", *words, "--alpha", "0.001"]) == 1
    assert "no plan stays within the budget" in capsys.readouterr().err


def test_help_has_units_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(text in out for text in ("--step", "1gbit", "examples:", "line rate"))
