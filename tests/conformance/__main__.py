"""Run the suite on gloo and on commlib, and compare.

In two parts: "suite", as it is, where the tests that ask for GPUs skip; and "gpus", these tests
with the CPU in the place of the GPUs. Rows go to bench/results/local/conformance; a run of one
backend is compared with the stored rows of the other. Exit code 1 where the bar does not hold, or
a test named by -k fails.

    python -m tests.conformance --verdicts bench/results/conformance.jsonl
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from multiprocessing.connection import wait
from pathlib import Path

from commlib.benchmark.rows import origin
from tests.conformance.exceptions import EXCEPTIONS
from tests.conformance.rows import FAILED, PASSED, SKIPPED, Row, Verdict, compare, read, write
from tests.conformance.worker import Worker

REFERENCE, TESTED = "gloo", "commlib"
RESULTS = Path("bench/results/local/conformance")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-k", metavar="NAME", help="only tests of this name; * and ? match")
    parser.add_argument("--backend", choices=(REFERENCE, TESTED), help="only on this one")
    parser.add_argument("--part", choices=tuple(EXCEPTIONS), help="only this one")
    parser.add_argument("-s", action="store_true", help="show the ranks' output as it comes")
    parser.add_argument("--jobs", type=int, default=2, help="tests side by side (default 2)")
    parser.add_argument("--policy", default="fp32", help="commlib's (default fp32)")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default {RESULTS}")
    parser.add_argument("--verdicts", type=Path, help="append one JSON line per part to this file")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("expecttest") is None:
        parser.error("torch's suite needs expecttest; `make conformance` installs it")
    os.environ["COMMLIB_POLICY"] = options.policy

    holds = True
    for part in [options.part] if options.part else list(EXCEPTIONS):
        stored = {name: options.results / f"{name}-{part}.jsonl" for name in (REFERENCE, TESTED)}
        for backend in [options.backend] if options.backend else list(stored):
            rows = run_and_print(backend, part, options)
            if options.k:
                holds &= all(row.outcome != FAILED for row in rows)
            else:
                write(stored[backend], rows)
        if options.k:
            continue
        if not all(path.exists() for path in stored.values()):
            print(f"{part}: not compared, one backend has not run")
            continue
        verdict = compare(read(stored[REFERENCE]), read(stored[TESTED]), EXCEPTIONS[part])
        print(report(part, verdict), flush=True)
        if options.verdicts:
            record(options.verdicts, part, options.policy, verdict)
        holds &= not verdict.missed
    return int(not holds)


def run_and_print(backend: str, part: str, options: argparse.Namespace) -> list[Row]:
    rows = []
    began = time.monotonic()
    jobs = 1 if options.s else max(1, options.jobs)
    with ExitStack() as stack:
        workers = [
            stack.enter_context(closing(Worker(backend, pretend=part == "gpus", show=options.s)))
            for _ in range(jobs)
        ]
        tests = [name for name in workers[0].names if fnmatch.fnmatch(name, options.k or "*")]
        for row in run(workers, tests):
            rows.append(row)
            done = f"{time.monotonic() - began:4.0f} s {len(rows):3}/{len(tests)}"
            print(f"{done} {part} {backend:8}{line(row)}", flush=True)
            if row.outcome == FAILED and options.k:
                print(row.reason, row.output, sep="\n", flush=True)
    print(f"{part} {backend}: {summary(rows)}", flush=True)
    return rows


def run(workers: Sequence[Worker], tests: Sequence[str]) -> Iterator[Row]:
    """The rows of `tests` as they are done.

    A test that fails beside another runs once more, alone: the suite has timeouts of a second.
    """
    again = []
    for row in side_by_side(workers, tests):
        if row.outcome == FAILED and len(workers) > 1:
            again.append(row.test)
        else:
            yield row
    for row in side_by_side(workers[:1], again):
        yield replace(row, retried=True)


def side_by_side(workers: Sequence[Worker], tests: Sequence[str]) -> Iterator[Row]:
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
    passed = [row for row in rows if row.outcome == PASSED]
    listed = {
        "at the second attempt, alone": [row.test for row in passed if row.retried],
        "without a call into a process group": [row.test for row in passed if row.calls == 0],
    }
    return "; ".join(
        [
            f"{len(rows)} tests, {count[PASSED]} passed, {count[FAILED]} failed",
            f"{count[SKIPPED]} skipped (most need GPUs, NCCL or MPI)",
            *(f"passed {how}: {', '.join(tests)}" for how, tests in listed.items() if tests),
        ]
    )


def report(part: str, verdict: Verdict) -> str:
    lines = [
        f"of {verdict.ran_there} tests that run on {REFERENCE}, {verdict.ran_here} run on "
        f"{TESTED}: {verdict.share:.1%}",
        f"of {verdict.passed_there} that pass there, {verdict.passed_here} pass here",
        *(f"  exception  {test}: {EXCEPTIONS[part][test]}" for test in verdict.excepted),
        *(f"  MISSED  {what}" for what in verdict.missed),
        "the bar does not hold" if verdict.missed else "the bar holds",
    ]
    return "\n".join(f"{part}: {text}" for text in lines)


def record(path: Path, part: str, policy: str, verdict: Verdict) -> None:
    said = {"suite": "torch distributed_test.py", "part": part, "policy": policy}
    facts = {**said, **asdict(verdict), "share": verdict.share, **origin()._asdict()}
    with path.open("a") as file:
        file.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    sys.exit(main())
