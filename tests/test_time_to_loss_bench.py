"""`bench/time_to_loss.py`, shortened: steps and seconds of every method, and the product."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.time_to_loss import PLAIN, Row, main, verdicts

pytestmark = pytest.mark.bench


@pytest.mark.processes
@pytest.mark.timeout(300)  # four processes that each start torch
def test_steps_times_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench.time_to_loss as bench

    # the lines are emulated elsewhere
    spawn = bench.spawn
    monkeypatch.setattr(bench, "spawn", lambda *a, rate=None, **k: spawn(*a, **k))
    path = tmp_path / "rows.jsonl"
    words = ["--model", "small", "--ranks", "2", "--target", "6", "--most", "30", "--timed", "1"]
    words += ["--rates", "loopback", "--evaluate", "2", "--json", str(path)]
    assert main([*words, "--methods", "int8"]) == 0
    rows = {row["method"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert list(rows) == [PLAIN, "int8"]
    assert rows[PLAIN]["steps"] == [6]
    (steps,) = rows["int8"]["steps"]
    assert steps in (5, 10, 15)  # the loss falls at every step, and int8 costs next to nothing
    assert rows["int8"]["seconds"] == pytest.approx(steps * rows["int8"]["ms"] / 1e3)


def test_the_best_of_each_kind_meet() -> None:
    rows = [
        Row(PLAIN, "1gbit", [150], 9.0, 9.0, 1.0),
        Row("torch rank 1", "1gbit", [150], 2.0, 2.0, 4.5),
        Row("fp32+ef@power_sgd:rank=2", "1gbit", [150], 4.0, 4.0, 2.25),
        Row("rotate|eden2", "1gbit", [150], 3.0, 3.0, 3.0),
        Row("sign", "1gbit", [None], 1.0, None, None),
    ]
    assert verdicts(rows) == ["1gbit: rotate|eden2 3.0 s, torch rank 1 2.0 s (0.67x): MISSED"]
    assert "holds" in verdicts([*rows, Row("int2", "1gbit", [140], 1.0, 1.9, 4.7)])[0]
