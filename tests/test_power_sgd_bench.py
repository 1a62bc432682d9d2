"""`bench/power_sgd.py`, shortened: both PowerSGDs send as much and learn alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.power_sgd import PLAIN, main

pytestmark = [pytest.mark.processes, pytest.mark.bench]


def test_ours_and_pytorch_s(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    ours = "fp32+ef@power_sgd:rank=2"
    arguments = ["--ranks", "2", "--steps", "6", "--evaluate", "2", "--json", str(path)]
    assert main([*arguments, "--methods", "torch rank 2", ours]) == 0
    rows = {row["method"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert list(rows) == [PLAIN, "torch rank 2", ours]
    # the same numbers, and padding of each parameter's parts to 16 bytes
    sent = {name: row["bytes_per_step"] for name, row in rows.items()}
    assert sent["torch rank 2"] <= sent[ours] < 1.02 * sent["torch rank 2"]
    assert sent[PLAIN] > 20 * sent[ours]
    # 4 steps of 6 from other first factors: they differ by less than either from plain
    losses = {name: row["loss"] for name, row in rows.items()}
    assert abs(losses[ours] / losses["torch rank 2"] - 1) < 0.01
    assert abs(losses[ours] / losses[PLAIN] - 1) < 0.1
