"""What the tests did on one backend, and whether another backend holds the bar they set.

The bar: of the tests that run on the reference, at least 95% run on the backend; all that pass
there pass here, but for a table of at most 15 exceptions, each with its reason, none of which
passes here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"
ERROR = re.compile(r"[\w.]*(Error|Exception|Interrupt|Exit)\w*:")  # in a traceback
RUN_AT_LEAST = 0.95
MAX_EXCEPTIONS = 15
MAX_RETRIED = 3  # a race that shows now and then must not hide behind second attempts
CALLING_AT_LEAST = 0.75  # of the tests that pass: some are about names, files, options


@dataclass(frozen=True)
class Row:
    """One test on one backend.

    reason: of a skip, or the traceback of a failure. calls: of all ranks into the backend's process
    groups, None where nobody counts. retried: it failed at first, beside another test. output: what
    the ranks printed, of failures only.
    """

    test: str
    backend: str
    outcome: str
    reason: str = ""
    seconds: float = 0.0
    world_size: int = 0
    calls: int | None = None
    retried: bool = False
    output: str = ""

    @property
    def ran(self) -> bool:
        return self.outcome != SKIPPED

    @property
    def why(self) -> str:
        """The line of the reason that says most: of a traceback, the last error's."""
        lines = [line.strip() for line in self.reason.splitlines() if line.strip()]
        errors = [line for line in lines if ERROR.match(line)]
        return (errors or lines or [""])[-1]


def write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))


def read(path: Path) -> list[Row]:
    return [Row(**json.loads(line)) for line in path.read_text().splitlines()]


@dataclass(frozen=True)
class Verdict:
    """`missed`: what breaks the bar, one line each; empty where it holds."""

    ran_there: int
    ran_here: int
    passed_there: int
    passed_here: int
    excepted: tuple[str, ...]
    missed: tuple[str, ...]

    @property
    def share(self) -> float:
        return self.ran_here / self.ran_there if self.ran_there else 0.0


def compare(
    reference: Sequence[Row], rows: Sequence[Row], exceptions: Mapping[str, str]
) -> Verdict:
    """Hold `rows` to `reference`; `exceptions`: test -> why it may fail here."""
    there, here = by_test(reference), by_test(rows)
    missed = [f"{test}: no row of one backend" for test in sorted(there.keys() ^ here.keys())]
    both = sorted(there.keys() & here.keys())
    ran = [test for test in both if there[test].ran]
    runs = [test for test in ran if here[test].ran]
    passed = [test for test in ran if there[test].outcome == PASSED]
    passes = [test for test in passed if here[test].outcome == PASSED]
    short = [test for test in passed if here[test].outcome != PASSED]

    if len(runs) < RUN_AT_LEAST * len(ran) or not ran:
        missed.append(
            f"{len(runs)} of the {len(ran)} tests that run there run here, not "
            f"{RUN_AT_LEAST:.0%}; skipped: {_reasons(here[test] for test in ran)}"
        )
    missed += [
        f"{test}: {here[test].outcome} here, passed there: {here[test].why}"
        for test in short
        if test not in exceptions
    ]
    if len(exceptions) > MAX_EXCEPTIONS:
        missed.append(f"{len(exceptions)} exceptions, more than {MAX_EXCEPTIONS}")
    for test, why in exceptions.items():
        if not why.strip():
            missed.append(f"{test}: an exception without a reason")
        if test not in here:
            missed.append(f"{test}: an exception for a test that is not there")
        elif here[test].outcome == PASSED:
            missed.append(f"{test}: an exception, but it passes")
        elif test not in short and test in there:
            missed.append(f"{test}: an exception, but it does not pass there either")
    calling = [test for test in passes if here[test].calls]
    if len(calling) < CALLING_AT_LEAST * len(passes):
        missed.append(
            f"{len(passes)} tests passed, but only {len(calling)} called the backend's groups"
        )
    retried = [test for test in passes if here[test].retried]
    if len(retried) > MAX_RETRIED:
        missed.append(f"passed at the second attempt only: {', '.join(retried)}")
    excepted = tuple(test for test in short if test in exceptions)
    return Verdict(len(ran), len(runs), len(passed), len(passes), excepted, tuple(missed))


def by_test(rows: Iterable[Row]) -> dict[str, Row]:
    return {row.test: row for row in rows}


def _reasons(rows: Iterable[Row]) -> str:
    counts = Counter(row.why for row in rows if not row.ran)
    return "; ".join(f"{count} x {why}" for why, count in counts.most_common()) or "none"
