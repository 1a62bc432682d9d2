"""Run the suite on gloo and on commlib, and compare.

Rows go to bench/results/local/conformance/BACKEND.jsonl; a run of one backend is compared with the
stored rows of the other. Exit code 1 where the bar does not hold, or a test named by -k fails.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path

from tests.conformance.exceptions import EXCEPTIONS
from tests.conformance.rows import FAILED, PASSED, SKIPPED, Row, Verdict, compare, read, write
from tests.conformance.worker import Worker

REFERENCE, TESTED = "gloo", "commlib"
RESULTS = Path("bench/results/local/conformance")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("-k", metavar="NAME", help="only tests of this name; * and ? match")
    parser.add_argument("--backend", choices=(REFERENCE, TESTED), help="only on this one")
    parser.add_argument("-s", action="store_true", help="show the ranks' output as it comes")
    parser.add_argument("--jobs", type=int, default=2, help="tests side by side (default 2)")
    parser.add_argument("--policy", default="fp32", help="commlib's (default fp32)")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default {RESULTS}")
    options = parser.parse_args(arguments)
    os.environ["COMMLIB_POLICY"] = options.policy
    backends = [options.backend] if options.backend else [REFERENCE, TESTED]
    jobs = 1 if options.s else options.jobs

    failed = False
    for backend in backends:
        rows = []
        for row, done, total, seconds in run(backend, options.k, jobs, show=options.s):
            rows.append(row)
            print(f"{seconds:4.0f} s {done:3}/{total} {backend:8}{line(row)}", flush=True)
            if row.outcome == FAILED and options.k:
                print(row.reason, row.output, sep="\n", flush=True)
        failed |= any(row.outcome == FAILED for row in rows)
        if not rows:
            parser.error(f"-k {options.k}: no such test")
        if not options.k:
            write(options.results / f"{backend}.jsonl", rows)
        print(f"{backend}: {summary(rows)}", flush=True)
    if options.k:
        return int(failed)

    stored = [options.results / f"{backend}.jsonl" for backend in (REFERENCE, TESTED)]
    if not all(path.exists() for path in stored):
        print(f"not compared: {', '.join(map(str, stored))} are not both there")
        return int(failed)
    verdict = compare(read(stored[0]), read(stored[1]), EXCEPTIONS)
    print(report(verdict))
    return int(bool(verdict.missed))


def run(
    backend: str, pattern: str | None, jobs: int, *, show: bool
) -> Iterator[tuple[Row, int, int, float]]:
    """Each test's row as it is done, with its number, their number and the seconds so far.

    A test that fails beside another runs once more, alone: the suite has timeouts of a second.
    """
    began = time.monotonic()
    with ExitStack() as stack:
        workers = [
            stack.enter_context(closing(Worker(backend, show=show))) for _ in range(max(1, jobs))
        ]
        tests = [name for name in workers[0].names if fnmatch.fnmatch(name, pattern or "*")]
        again, done = [], 0
        for row in rows_of(workers, tests):
            if row.outcome == FAILED and jobs > 1:
                again.append(row.test)
                continue
            done += 1
            yield row, done, len(tests), time.monotonic() - began
        for row in rows_of(workers[:1], again):
            done += 1
            yield replace(row, retried=True), done, len(tests), time.monotonic() - began


def rows_of(workers: Sequence[Worker], tests: Sequence[str]) -> Iterator[Row]:
    """The rows of `tests`, from the first done to the last."""
    waiting, idle = list(tests), list(workers)
    busy: list[Worker] = []
    while waiting or busy:
        while waiting and idle:
            busy.append(idle.pop())
            busy[-1].run(waiting.pop(0))
        ready = wait([worker.pipe for worker in busy], timeout=5.0)
        for worker in [worker for worker in busy if worker.pipe in ready or worker.late()]:
            busy.remove(worker)
            yield worker.answer()
            idle.append(worker)


def line(row: Row) -> str:
    calls = "" if row.calls is None else f" {row.calls:4} calls"
    again = " at the second attempt" if row.retried else ""
    why = "" if row.outcome == PASSED else f": {row.why[:120]}"
    return f"{row.outcome}{again} {row.seconds:5.1f} s{calls} {row.test}{why}"


def summary(rows: Sequence[Row]) -> str:
    count = Counter(row.outcome for row in rows)
    silent = [row.test for row in rows if row.outcome == PASSED and row.calls == 0]
    again = [row.test for row in rows if row.outcome == PASSED and row.retried]
    parts = [f"{len(rows)} tests, {count[PASSED]} passed, {count[FAILED]} failed"]
    parts.append(f"{count[SKIPPED]} skipped (most need two GPUs, NCCL or MPI)")
    if again:
        parts.append(f"passed at the second attempt, alone: {', '.join(again)}")
    if silent:
        parts.append(f"passed without a call into a process group: {', '.join(silent)}")
    return "; ".join(parts)


def report(verdict: Verdict) -> str:
    lines = [
        f"of {verdict.ran_there} tests that run on {REFERENCE}, {verdict.ran_here} run on "
        f"{TESTED}: {verdict.share:.1%}",
        f"of {verdict.passed_there} that pass there, {verdict.passed_here} pass here",
        *(f"  exception  {test}: {EXCEPTIONS[test]}" for test in verdict.excepted),
        *(f"  MISSED  {what}" for what in verdict.missed),
        "the bar does not hold" if verdict.missed else "the bar holds",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
