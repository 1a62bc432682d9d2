"""Feedback keeps what rounding throws away: `bench/feedback.py`, shortened."""

from __future__ import annotations

import pytest

from bench.feedback import Expected, Row, digits, ecq, guard, refusals

pytestmark = pytest.mark.bench

pytest.importorskip("sklearn")


def told(rows: list[Row]) -> str:
    return "\n".join(f"{row.scheme} {row.what}: {row.value:.3g}, {row.ratio}" for row in rows)


def test_biased_codecs_need_feedback_and_it_is_enough() -> None:
    rows = list(
        digits(
            range(3),
            120,
            (
                Expected("fp32", None),
                Expected("sign+ef", None, "<= 1.15"),
                Expected("int2+ef", None, "<= 1.15"),
                Expected("topk:density=0.05|int8+ef", None, "<= 1.15"),
                Expected("fp32+ef@thc", None, "<= 1.1"),
                Expected("sign", None, ">= 1.8"),
                Expected("topk|fp32", None, ">= 1.8"),
                Expected("int2:round=nearest", None, ">= 1.5"),
            ),
        )
    )
    assert all(row.passed is not False for row in rows), told(rows)


def test_low_rank_learns_as_much_with_feedback_and_little_without() -> None:
    rows = list(
        digits(
            range(3),
            120,
            (
                Expected("fp32", None),
                Expected("fp32+ef@power_sgd", None, "<= 1.15"),
                Expected("fp32+ef@power_sgd:rank=2", None, "<= 1.1"),
                Expected("fp32+ef@power_sgd:rank=4", None, "<= 1.1"),
                Expected("fp32@power_sgd", None, ">= 1.8"),
            ),
        )
    )
    assert all(row.passed is not False for row in rows), told(rows)


def test_the_stability_check_foretells_what_diverges() -> None:
    rows = list(ecq((0,), 400, dims=(256,), backs=("fp32",)))
    judged = [row for row in rows if row.passed is not None]
    assert [row.bar for row in judged] == ["converges", "converges", "gap <= 0.45", "diverges"]
    assert all(row.passed for row in judged), told(rows)


def test_pairs_that_diverge_are_refused_with_their_numbers() -> None:
    rows = [*refusals(), *guard()]
    assert len(rows) == 3
    assert all(row.passed for row in rows), "\n".join(row.note for row in rows)
