"""Memory at a pipeline's boundaries does what it promises: `bench/pipelines.py`, shortened."""

from __future__ import annotations

import pytest

from bench.feedback import Row
from bench.pipelines import COLUMNS, boundaries, buffers, lep, show, stores

pytestmark = pytest.mark.bench

pytest.importorskip("sklearn")


def told(rows: list[Row]) -> str:
    return "\n".join(f"{row.what}: {row.value:.3g}, {row.ratio}, {row.setting}" for row in rows)


def test_references_save_a_model_that_direct_coding_ruins() -> None:
    rows = list(boundaries((0,), 6, bits=((2, 4),), columns=COLUMNS, bars=False))
    ratio = {row.what: row.ratio or 0.0 for row in rows}
    assert ratio["AQ-SGD nearest 2/4"] < 1.15, told(rows)
    assert ratio["Clapping-FU 2/4"] < 1.25, told(rows)
    assert ratio["DirectQ nearest 2/4"] > 1.8, told(rows)
    assert ratio["DirectQ stochastic 2/4"] > 1.8, told(rows)
    assert ratio["Clapping-FC 2/4"] < ratio["DirectQ nearest 2/4"], told(rows)
    fewer = {row.what: row.setting["both"] for row in rows}
    assert fewer["fp32"] == pytest.approx(1, rel=1e-2)
    assert fewer["DirectQ nearest 2/4"] == pytest.approx(9.7, abs=0.2)
    assert fewer["Clapping-FU 2/4"] == pytest.approx(1.8, abs=0.2)
    assert rows[0].published == 0.022
    assert "AQ-SGD nearest 2/4" in show(rows)


def test_lep_cuts_the_loss() -> None:
    rows = list(lep((0,), 4))
    assert [row.passed for row in rows] == [None, True, None, True], told(rows)


def test_both_ends_hold_the_same_bytes_over_evictions_and_a_restart() -> None:
    rows = list(stores(60))
    assert [row.passed for row in rows] == [True] * 3
    assert len({row.note for row in rows}) == 1


def test_reuse_holds_a_batch_and_delta_all_samples() -> None:
    reuse, delta = buffers((64, 512))
    assert reuse.passed
    assert delta.note == "16384 bytes, 131072 bytes"
