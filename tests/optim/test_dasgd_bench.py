"""Step sizes are ordered by the class of delays, as published: `bench/dasgd.py`, shortened."""

from __future__ import annotations

import pytest
import torch

from bench import dasgd, dasgd_held
from bench.feedback import Row

pytestmark = pytest.mark.bench


def told(rows: list[Row]) -> str:
    return "\n".join(f"{row.table} {row.what} {row.scheme}: {row.value:.3g}" for row in rows)


def test_the_published_figures_are_of_projecting_at_once() -> None:
    """Where the first steps are large and late, lazy projection is far behind."""
    names = ("1/n c=3", "1/(n log n) c=3")
    cases = [case for case in dasgd.CASES if case.name in names]
    rows = list(dasgd.simulated((0,), 4000, cases, ["constant"]))
    found = {(row.table, row.scheme): row.value for row in rows}
    # f falls between here and 20000 updates, by less than 3 for this slow schedule
    assert 3.4 < found["at once", "1/(n log n) c=3"] < 3 * 3.4, told(rows)
    assert found["lazy", "1/(n log n) c=3"] > 10 * 3.4, told(rows)
    table = dasgd.show(rows)
    assert "(0.0054)" in table
    assert "lazy: f (published)" in table


def test_auto_and_the_orderings() -> None:
    names = (
        "1/sqrt n",
        "1/n c=1",
        "1/(n log n loglog n) c=10",
        "1/(n log n loglog n) c=3",
        "auto c=3",
    )
    cases = [case for case in dasgd.CASES if case.name in names]
    rows = list(dasgd.simulated((0,), 1500, cases, ["linear", "polynomial"], ["at once"]))
    bars = {(row.what, row.scheme): row for row in rows if row.passed is not None}
    assert bars["linear", "auto c=3"].passed
    assert bars["polynomial", "auto c=3"].passed
    assert bars["linear", "1/sqrt n"].passed, told(rows)
    assert bars["linear", "1/(n log n loglog n) c=10"].value < 1, told(rows)
    # 1/n is still on its way up
    best = "1/n, best c, over 1/(n log n loglog n), best c"
    assert bars["polynomial", best].value > 3, told(rows)


def test_held_updates_have_their_scheduled_sources() -> None:
    """What comes out of order waits; who pulls an iterate that is not wanted waits too."""
    runs = [
        dasgd_held.Run("polynomial", "auto c=3", "int4+ef", 0),
        dasgd_held.Run("constant", "1/n c=1", "fp32", 1),
    ]
    rows = list(dasgd_held.held(range(2), 150, 2, runs))
    assert [row.passed for row in rows] == [True, True]
    assert rows[0].setting["staleness"] == {"updates": 150, "p50": 66, "p99": 136, "max": 137}
    assert rows[1].setting["staleness"]["max"] == 50  # type: ignore[index]


def test_a_gradient_that_is_not_wanted_is_an_error() -> None:
    center = dasgd_held.HeldCenter(
        dasgd_held.parameters(1), source=lambda n: n - 1, updates=2, rule=None
    )
    center.apply(torch.ones(20), 0)
    assert center.version == 0  # nobody has pulled it
    with pytest.raises(RuntimeError, match=r"gradient of iterate 0, of which no more"):
        center.apply(torch.ones(20), 0)
    center.shown()
    assert center.version == 1


def test_a_miss_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row("at once", "", "none", 1.0, passed=False)
    monkeypatch.setattr(dasgd, "simulated", lambda *_: iter([row]))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of tests after this one
    assert dasgd.main(["--table", "simulated"]) == 1
