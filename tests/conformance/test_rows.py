"""The comparison of two backends, given made-up rows: everything that breaks the bar breaks it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.conformance.rows import (
    FAILED,
    MAX_EXCEPTIONS,
    MAX_RETRIED,
    PASSED,
    SKIPPED,
    Row,
    compare,
    read,
    write,
)

TESTS = [f"test_{number:02}" for number in range(100)]
SKIPS = TESTS[:20]  # on both
GLOO = [Row(test, "gloo", SKIPPED if test in SKIPS else PASSED, "no CUDA") for test in TESTS]


def rows(outcome: str = PASSED, *tests: str, **changes: object) -> list[Row]:
    """commlib's: gloo's, but for `tests`, which end in `outcome`."""
    here = [replace(row, backend="commlib", calls=4 if row.ran else None) for row in GLOO]
    return [
        replace(row, outcome=outcome, reason="said why", **changes) if row.test in tests else row
        for row in here
    ]


def test_a_backend_like_the_reference_holds_the_bar() -> None:
    verdict = compare(GLOO, rows(), {})
    assert verdict.missed == ()
    assert (verdict.ran_there, verdict.ran_here, verdict.share) == (80, 80, 1.0)
    assert (verdict.passed_there, verdict.passed_here) == (80, 80)


def test_a_failure_is_missed_unless_it_is_an_exception() -> None:
    here = rows(FAILED, "test_50")
    assert compare(GLOO, here, {}).missed == ("test_50: failed here, passed there: said why",)
    verdict = compare(GLOO, here, {"test_50": "a reason"})
    assert verdict.missed == ()
    assert verdict.excepted == ("test_50",)


def test_a_skip_of_what_passes_there_is_missed() -> None:
    assert compare(GLOO, rows(SKIPPED, "test_50"), {}).missed == (
        "test_50: skipped here, passed there: said why",
    )


@pytest.mark.parametrize(("skipped", "holds"), [(4, True), (5, False)])
def test_95_percent_must_run_even_if_all_skips_are_exceptions(skipped: int, holds: bool) -> None:
    tests = TESTS[20 : 20 + skipped]  # of 80
    verdict = compare(GLOO, rows(SKIPPED, *tests), dict.fromkeys(tests, "a reason"))
    assert (not verdict.missed) is holds
    assert holds or "75 of the 80" in verdict.missed[0]


def test_what_fails_there_may_fail_here_but_counts_as_run() -> None:
    there = [replace(row, outcome=FAILED) if row.test == "test_50" else row for row in GLOO]
    verdict = compare(there, rows(FAILED, "test_50"), {})
    assert (verdict.missed, verdict.ran_there, verdict.passed_there) == ((), 80, 79)


@pytest.mark.parametrize(
    ("exceptions", "said"),
    [
        ({"test_50": "a reason"}, "test_50: an exception, but it passes"),
        ({"test_00": "a reason"}, "test_00: an exception, but it does not pass there either"),
        ({"test_999": "a reason"}, "test_999: an exception for a test that is not there"),
        ({"test_50": " "}, "test_50: an exception without a reason"),
    ],
)
def test_an_exception_that_excuses_nothing_is_missed(exceptions: dict[str, str], said: str) -> None:
    assert said in compare(GLOO, rows(), exceptions).missed


def test_there_are_not_too_many_exceptions() -> None:
    tests = TESTS[20 : 20 + MAX_EXCEPTIONS + 1]
    here = rows(FAILED, *tests)
    assert compare(GLOO, here, dict.fromkeys(tests, "a reason")).missed == (
        f"{MAX_EXCEPTIONS + 1} exceptions, more than {MAX_EXCEPTIONS}",
    )
    assert not compare(GLOO, rows(FAILED, *tests[1:]), dict.fromkeys(tests[1:], "a")).missed


def test_a_test_without_a_row_is_missed() -> None:
    assert compare(GLOO, rows()[:-1], {}).missed == ("test_99: no row of one backend",)
    assert len(compare(GLOO, [], {}).missed) == 101
    assert compare([], [], {}).missed  # nothing ran at all


def test_tests_that_never_called_the_backend_prove_nothing() -> None:
    silent = [replace(row, calls=0 if row.ran else None) for row in rows()]
    assert "80 tests passed" in compare(GLOO, silent, {}).missed[0]


def test_tests_that_pass_only_when_repeated_are_few() -> None:
    few = rows(PASSED, *TESTS[50 : 50 + MAX_RETRIED], retried=True)
    many = rows(PASSED, *TESTS[50 : 51 + MAX_RETRIED], retried=True)
    assert compare(GLOO, few, {}).missed == ()
    assert "second attempt" in compare(GLOO, many, {}).missed[0]


def test_rows_survive_their_file(tmp_path: Path) -> None:
    here = rows(FAILED, "test_50", output="two\nlines")
    write(tmp_path / "new" / "rows.jsonl", here)
    assert read(tmp_path / "new" / "rows.jsonl") == here
