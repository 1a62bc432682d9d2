"""1-bit Adam and EF21 do what was published: `bench/onebit.py` and `bench/ef21.py`, shortened."""

from __future__ import annotations

import pytest

from bench import ef21, onebit
from bench.feedback import Row

pytestmark = pytest.mark.bench

pytest.importorskip("sklearn")


def told(rows: list[Row]) -> str:
    return "\n".join(f"{row.what}: {row.value:.3g}, {row.ratio}, {row.note}" for row in rows)


def test_onebit() -> None:
    names = ("Adam", "1-bit Adam", "1-bit Adam, one scale", "naive", "no mask, eps 1e-8")
    cases = [case for case in onebit.CASES if case.name in names]
    assert len(cases) == 7
    # in half the steps gradients through Adam fall behind by half as much
    cases = [case._replace(bar=case.bar.replace(">= 4", ">= 2")) for case in cases]
    rows = list(onebit.loss(range(2), 300, cases))
    judged = [row for row in rows if row.passed is not None]
    assert len(judged) == 7
    assert all(row.passed for row in judged), told(rows)
    # a fifth of the steps exact, the others at a 27.6th or 30th of the bytes
    whole = [row.ratio for row in rows if row.what.startswith("all")]
    assert whole == [pytest.approx(1 / (0.2 + 0.8 / fewer), rel=0.01) for fewer in (27.6, 30.3)]
    table = onebit.show(rows)
    assert "phase 2, 1-bit Adam, one scale" in table
    assert "step 61 would move" in table


def test_big_parameters_reach_what_their_scales_leave() -> None:
    assert [row.passed for row in onebit.big()] == [True, True]


def test_ef21_converges_where_error_feedback_does_not() -> None:
    rows = list(ef21.logistic((0,), 1500))
    assert [row.passed for row in rows] == [None, True, True], told(rows)
    assert "EF21" in ef21.show(rows)


def test_momentum_does_not_stall() -> None:
    cases = [ef21.CASES[0], *(case for case in ef21.CASES if case.topk and case.bar)]
    # two seeds and fewer steps: of 1.5, which three seeds keep to, a little more
    cases = [case._replace(bar=case.bar.replace("<= 1.5", "<= 2")) for case in cases]
    rows = list(ef21.digits(range(2), 500, cases))
    assert [row.what.partition(",")[0] for row in rows[1:]] == ["EF21", "EF21-SGDM", "EF21"]
    assert all(row.passed for row in rows[1:]), told(rows)


def test_a_miss_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ef21, "digits", lambda *_: iter([Row("digits", "", "x", 1.0, passed=False)])
    )
    monkeypatch.setattr(ef21, "show", lambda rows: "")
    assert ef21.main(["--table", "digits"]) == 1
