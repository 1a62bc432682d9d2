"""The commands that measure the backend run, and judge by their bars."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import ddp_backend
from commlib.emulation import available


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(600)
def test_one_script_on_two_backends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The script is not changed, the loss is the same, and the kernel counts fewer bytes."""
    if reason := available():
        pytest.skip(reason)
    assert "import commlib" not in ddp_backend.SCRIPT.read_text()
    rows = tmp_path / "rows.jsonl"
    assert ddp_backend.main(["--ranks", "2", "--steps", "14", "--json", str(rows)]) == 0
    assert "x fewer" in capfd.readouterr().out
    (row,) = map(json.loads, rows.read_text().splitlines())
    assert row["passed"]
    assert row["fewer"] >= 3.8


@pytest.mark.parametrize(
    ("loss", "sent", "passed"), [(2.0, 25, True), (2.0, 27, False), (2.03, 25, False)]
)
def test_bars(loss: float, sent: int, passed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {"gloo": (2.0, 100), "commlib": (loss, sent)}
    monkeypatch.setattr(ddp_backend, "run", lambda backend, *_: runs[backend])
    assert ddp_backend.compare(2, "1gbit", 14).passed is passed
