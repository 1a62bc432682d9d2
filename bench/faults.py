"""Do broken peers and bad input end in an error that says so, on every living rank, in time?

Trials with real gloo processes. A trial passes when every living rank

    raises within timeout + 5 s (bad input and dead or absent peers) an error that names ranks, key,
    got and expected as far as they apply; a further call raises too; the process then ends cleanly
    has residuals that are, block by block, those of before the failed message or of after it; where
    nothing was sent yet, bitwise those of before
    runs to its end, bitwise as without a fault, where a peer only paused for less than the timeout

    python -m bench.faults --trials 200         (`make faults`) exit code 1 where a trial fails
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import re
import shlex
import signal
import socket
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from bench.fault_inputs import CASES
from bench.fault_ranks import (
    SCHEMES,
    SIZES,
    STEPS,
    Report,
    State,
    Trial,
    blocks_between,
    history,
    rank_main,
    same,
)
from bench.forked import forked
from commlib.benchmark.rows import origin

RESULTS = Path(__file__).parent / "results" / "faults.jsonl"
GRACE = 5.0  # seconds past the timeout in which every living rank must have raised
START = 30.0  # seconds for processes to start and meet; torch's own, no part of the measurement
# Of 100 trials; the bad inputs of one trial are `len(CASES)` in number.
# Rank 0 keeps the store through which the others agree.
MIX = {
    "kill": 40,
    "kill rank 0": 15,
    "stop": 6,
    "stop rank 0": 6,
    "absent": 7,
    "pause": 10,
    "bad input": 16,
}


@dataclass
class Outcome:
    """What a trial showed.

    seconds: from the fault to each living rank's error. starved: for which a rank was ready to run
    and other programs had the cores; the limit counts from there, on an idle machine it is 0.
    """

    trial: Trial
    starved: float = 0.0
    problems: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    residuals: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    names_victim: list[bool] = field(default_factory=list)


def trials(count: int, seed: int, kinds: Mapping[str, int] = MIX) -> Iterator[Trial]:
    """`count` trials at random moments, in the proportions of `kinds`, the same for equal seeds."""
    draw = random.Random(seed)
    faults = [kind for kind, share in kinds.items() for _ in range(share)]
    draw.shuffle(faults)
    for number in range(count):
        fault = faults[number % len(faults)]
        ranks = draw.choice((2, 3, 4))
        first = draw.random() < 0.25  # in the first step ranks agree on what they will send
        yield Trial(
            number,
            fault.removesuffix(" rank 0"),
            ranks,
            draw.choice(SCHEMES),
            victim=0 if fault.endswith(" rank 0") else draw.randrange(ranks),
            step=1 if first else draw.randint(2, STEPS - 10),
            delay=draw.uniform(0, 0.03),
            pause=draw.uniform(0.2, 1.0),
        )


@functools.cache
def _context() -> Any:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # backtraces of every failed read
    return forked("bench.fault_server")


@functools.cache
def expected(scheme: str, ranks: int) -> list[list[State]]:
    """`history`, computed once."""
    return history(scheme, ranks)


def run(trial: Trial) -> Outcome:
    """Start the ranks, let the fault strike, judge what they report; nothing is left running."""
    known = expected(trial.scheme, trial.ranks)
    context = _context()
    progress = context.RawArray("l", trial.ranks)
    port = free_port()
    pipes, processes = [], []
    for rank in range(trial.ranks):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=rank_main, args=(rank, trial, port, progress, theirs))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    outcome = Outcome(trial)
    try:
        struck = strike(trial, processes, progress)
        deadline = time.monotonic() + 3 * (trial.timeout + GRACE) + len(CASES) * trial.timeout
        reports = []
        for rank, pipe in enumerate(pipes):
            if trial.fault in ("kill", "stop") and rank == trial.victim:
                continue
            report = receive(pipe, deadline)
            if report is None:
                outcome.problems.append(f"rank {rank} hangs or died without a report")
            else:
                reports.append(report)
        if trial.fault == "absent":
            struck = next((r.at for r in reports if r.rank == trial.victim), struck)
            reports = [r for r in reports if r.rank != trial.victim]
        outcome.starved = max((report.starved for report in reports), default=0.0)
        for report in reports:
            judge(outcome, report, known[report.rank], struck)
        for rank, process in enumerate(processes):
            if trial.fault in ("kill", "stop") and rank == trial.victim:
                continue
            process.join(10)
            if process.exitcode != 0:
                outcome.problems.append(f"rank {rank} did not end cleanly: {process.exitcode}")
    except RuntimeError as error:
        outcome.problems.append(str(error))
    finally:
        for process in processes:
            process.kill()
            process.join()
            process.close()
        for pipe in pipes:
            pipe.close()
    return outcome


def strike(trial: Trial, processes: Sequence[Any], progress: Sequence[int]) -> float:
    """Wait for the moment, do it, and return when that was."""
    victim = processes[trial.victim]
    if trial.fault in ("kill", "stop", "pause"):
        end = time.monotonic() + START
        while progress[trial.victim] < trial.step:
            if time.monotonic() > end or victim.exitcode is not None:
                raise RuntimeError(f"the ranks did not start (exit code {victim.exitcode})")
            time.sleep(0.0005)
        time.sleep(trial.delay)
    struck = time.monotonic()
    if trial.fault == "kill":
        os.kill(victim.pid, signal.SIGKILL)
    elif trial.fault in ("stop", "pause"):
        os.kill(victim.pid, signal.SIGSTOP)
        if trial.fault == "pause":
            time.sleep(trial.pause)
            os.kill(victim.pid, signal.SIGCONT)
    return struck


def receive(pipe: Any, deadline: float) -> Report | None:
    """A rank's report; None where none came in time or the rank died."""
    try:
        return pipe.recv() if pipe.poll(max(0.0, deadline - time.monotonic())) else None
    except EOFError:
        return None


def judge(outcome: Outcome, report: Report, states: list[State], struck: float) -> None:
    """Hold one rank's report against the bars."""
    trial = outcome.trial

    def problem(text: str) -> None:
        outcome.problems.append(f"rank {report.rank}: {text}")

    if trial.fault == "bad input":
        for number, case in enumerate(report.cases, 1):
            outcome.seconds.append(case.seconds)
            outcome.residuals.append("before" if case.untouched else "corrupt")
            outcome.errors.append(f"{case.name}: {case.raised}: {case.text}")
            for text in case.problems:
                problem(f"{case.name}: {text}: {case.raised} {case.text!r}")
            if not case.untouched:
                problem(f"{case.name}: changed a residual")
            if case.seconds > trial.timeout + GRACE:
                problem(f"{case.name}: took {case.seconds:.1f} s")
            if not same(case.state, states[number]):
                problem(f"{case.name}: the step after it is not what it would have been")
        return
    finished = not report.raised
    if finished:
        if trial.fault != "pause" and report.step < STEPS:
            problem("raised nothing")
        if not same(report.state, states[STEPS]):
            problem("results or residuals are not those of a run without the fault")
        outcome.residuals.append("after")
        return
    if trial.fault == "pause":
        problem(f"raised though the peer came back in time: {report.text}")
    seconds = report.at - struck
    outcome.seconds.append(seconds)
    outcome.errors.append(f"{report.raised}: {report.text}")
    if report.raised != "RuntimeError":
        problem(f"raised {report.raised}, not RuntimeError: {report.text}")
    if seconds > trial.timeout + GRACE + outcome.starved:
        problem(f"raised after {seconds:.1f} s: {report.text}")
    if not re.search(r"\branks?\b", report.text) or not any(k in report.text for k in SIZES):
        problem(f"does not name ranks and key: {report.text!r}")
    outcome.names_victim.append(bool(re.search(rf"\branks? .*\b{trial.victim}\b", report.text)))
    verdict, where = blocks_between(report.state, states[report.step - 1], states[report.step])
    outcome.residuals.append(verdict)
    if verdict == "corrupt":
        problem(f"residual corrupt in step {report.step}: {where}")
    if not report.again.startswith("RuntimeError") or report.again_seconds > GRACE:
        problem(f"a call afterwards: {report.again!r} after {report.again_seconds:.1f} s")


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def summary(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row per kind of fault."""
    kinds: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        kind = f"{outcome.trial.fault} rank {outcome.trial.victim}"
        kinds[kind if kind in MIX else outcome.trial.fault].append(outcome)
    rows = []
    for kind, some in sorted(kinds.items()):
        seconds = [s for outcome in some for s in outcome.seconds]
        residuals = Counter(r for outcome in some for r in outcome.residuals)
        named = [n for outcome in some for n in outcome.names_victim]
        rows.append(
            {
                "fault": kind,
                "trials": len(some),
                "passed": sum(not outcome.problems for outcome in some),
                "errors": len(seconds),
                "seconds_p50": statistics.median(seconds) if seconds else None,
                "seconds_max": max(seconds, default=None),
                "starved_max": max(outcome.starved for outcome in some),
                "limit": some[0].trial.timeout + GRACE,
                "names_victim": sum(named) / len(named) if named else None,
                "residual_before": residuals["before"],
                "residual_after": residuals["after"],
                "residual_part": residuals["both"],
                "residual_corrupt": residuals["corrupt"],
            }
        )
    return rows


def show(rows: Sequence[Mapping[str, Any]]) -> str:
    """The summary as a table."""
    header = {
        "fault": "fault", "trials": "trials", "passed": "passed", "errors": "errors",
        "seconds_p50": "p50 s", "seconds_max": "max s", "starved_max": "starved s",
        "limit": "limit s",
        "names_victim": "names the rank", "residual_before": "residual before",
        "residual_after": "after", "residual_part": "in part", "residual_corrupt": "corrupt",
    }  # fmt: skip
    return tabulate(rows, header, floatfmt=".2f", missingval="-")


def write(path: Path, outcomes: Sequence[Outcome], command: str) -> None:
    """Append the summary and every failed trial to `path` as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"bench": "faults", "command": command, **origin()._asdict()}
    with path.open("a", encoding="utf-8") as file:
        for row in summary(outcomes):
            file.write(json.dumps({**row, **about}) + "\n")
        for outcome in outcomes:
            if outcome.problems:
                row = {"failed": str(outcome.trial), "problems": outcome.problems}
                file.write(json.dumps({**row, **about}) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.faults", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims")
    parser.add_argument("--only", choices=sorted(MIX), help="trials of one kind")
    parser.add_argument("--json", type=Path, nargs="?", const=RESULTS, help="append result rows")
    parser.add_argument("--verbose", action="store_true", help="print what each error said")
    args = parser.parse_args(argv)
    kinds = {args.only: 1} if args.only else MIX
    outcomes = []
    for trial in tqdm(list(trials(args.trials, args.seed, kinds)), unit=" trials", disable=None):
        outcome = run(trial)
        outcomes.append(outcome)
        if outcome.problems:
            tqdm.write("\n    ".join([f"FAIL {trial}", *outcome.problems]))
        if args.verbose:
            tqdm.write("\n".join(f"{trial.fault}: {text}" for text in outcome.errors))
    print(show(summary(outcomes)))
    failed = sum(bool(outcome.problems) for outcome in outcomes)
    print(f"{len(outcomes) - failed} of {len(outcomes)} trials passed")
    if args.json:
        command = shlex.join(["python", "-m", "bench.faults", *(argv or sys.argv[1:])])
        write(args.json, outcomes, command)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
