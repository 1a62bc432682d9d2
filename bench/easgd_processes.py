"""Does EASGD train over real processes, does it survive kills, and does a tree of processes train?

Worker processes, linked over gloo on loopback to a centre in this one, through the shipped classes
(`Server`, `connect`, `EASGD`, `Downpour`, `Node`). The problem is that of `bench/easgd.py`, but
workers run as fast as they go, so no two runs are alike.

    processes  four workers, tau = 16, 600 steps each; EASGD under fp32 and int4, DOWNPOUR beside
    kills      four workers, more steps; SIGKILL for a random worker, twenty times, at random
               moments. A process that waited takes its place, under its name, from the centre (no
               saved state), and goes on with the batches after those its predecessor had done: both
               runs do the same number of worker steps in all. A killed worker's way since its last
               exchange is lost. Every step sleeps a little in both runs, so that kills spread.
               Which workers run at once is another in a run with kills, and the loss with it: so
               beside it the same in turns (round robin, one process), where nothing else differs
    tree       a root here, two inner nodes and four leaves, each a process

    python -m bench.easgd_processes [--table processes kills turns tree] [--json]

Exit code 1 where a bar fails. Processes are forked by a server that has loaded what they need.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tabulate import tabulate
from tqdm import tqdm

from bench.easgd import BETA, RATE, STEPS, WORKERS, Trainee, elastic, named, trainee
from bench.easgd_ranks import Inner, Task, rank_main
from bench.feedback import Row, conclude, holds, number, verdict
from bench.forked import forked
from bench.problems import Digits
from commlib.optim import Center, Server
from commlib.optim.tree import moving_rate

RESULTS = Path(__file__).parent / "results" / "easgd_processes.jsonl"
PERIOD = 16
KILLS, KILL_STEPS, PAUSE = 20, 1600, 0.002
START = 120.0  # seconds for a process to be there
STALL = 120.0  # seconds without any step after which a run has failed
NODES, DEGREE, LEAF_PERIOD, NODE_PERIOD = 2, 2, 10, 6


@dataclass
class Seat:
    """A process, and our end of its pipe."""

    process: Any
    pipe: Connection
    ready: bool = False

    def hear(self, seconds: float) -> str:
        """What it says next. RuntimeError: it has ended, or says nothing."""
        try:
            if self.pipe.poll(seconds):
                return str(self.pipe.recv())
        except (EOFError, OSError):
            raise RuntimeError(f"process {self.process.pid} has ended") from None
        raise RuntimeError(f"process {self.process.pid} says nothing for {seconds} s")


class Crew:
    """Processes that wait for tasks. progress: steps done, by rank of the worker."""

    def __init__(self) -> None:
        self._context = forked("bench.easgd_warm")
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.progress: Any = self._context.RawArray("q", WORKERS)
        self._idle: list[Seat] = []

    def hire(self) -> None:
        """Start one more, without waiting for it."""
        mine, theirs = self._context.Pipe()
        args = (self.store.port, self.progress, theirs)
        process = self._context.Process(target=rank_main, args=args, daemon=True)
        process.start()
        theirs.close()  # so that its end is seen here
        self._idle.append(Seat(process, mine))

    def gather(self, count: int) -> None:
        """Have so many there, waiting."""
        while len(self._idle) < count:
            self.hire()
        for seat in self._idle:
            if not seat.ready:
                seat.hear(START)
                seat.ready = True

    def take(self, task: Task | Inner) -> Seat:
        """Give a task to the one that has waited longest."""
        self.gather(1)
        seat = self._idle.pop(0)
        seat.pipe.send(task)
        return seat

    def back(self, seat: Seat) -> None:
        """One that has done its task waits for the next."""
        self._idle.append(seat)

    def close(self) -> None:
        """End those that wait."""
        for seat in self._idle:
            seat.pipe.close()
        for seat in self._idle:
            seat.process.join(10)
            if seat.process.is_alive():
                seat.process.kill()


class Run(NamedTuple):
    """What a run showed: loss of the centre, kills, whether all workers ended."""

    loss: float
    kills: int
    ended: bool
    finite: bool
    nbytes: int
    seconds: float


def train(crew: Crew, tasks: Sequence[Task], kills: int, rng: random.Random) -> int:
    """Have all tasks done, by others where a process is killed; returns how many were.

    Moments are drawn as a number of steps of all workers, and a delay of up to 10 ms, so that they
    do not depend on how fast the machine is, and strike in the middle of whatever comes.
    """
    total = sum(task.steps for task in tasks)
    moments = sorted(rng.uniform(0.02, 0.95) * total for _ in range(kills))
    crew.progress[:] = [0] * WORKERS
    crew.gather(len(tasks))
    seats = {task.rank: crew.take(task) for task in tasks}
    task_of = {task.rank: task for task in tasks}
    killed, moved, before = 0, time.monotonic(), 0
    while seats:
        done = sum(crew.progress)
        if done > before:
            before, moved = done, time.monotonic()
        if time.monotonic() - moved > STALL:
            raise RuntimeError(f"no step for {STALL} s, after {done} of {total}")
        busy = [rank for rank in seats if crew.progress[rank] < task_of[rank].steps]
        if moments and done >= moments[0] and busy:
            moments.pop(0)
            time.sleep(rng.uniform(0, 0.01))
            seats[rng.choice(busy)].process.kill()
            killed += 1
            crew.hire()
        for pipe in wait([seat.pipe for seat in seats.values()], 0.002):
            rank = next(r for r, seat in seats.items() if seat.pipe is pipe)
            seat = seats.pop(rank)
            try:
                seat.pipe.recv()
                crew.back(seat)
            except (EOFError, OSError):
                seat.process.join()
                if seat.process.exitcode != -9:
                    raise RuntimeError(f"worker {rank} ended: {seat.process.exitcode}") from None
                begin = int(crew.progress[rank])
                seats[rank] = crew.take(task_of[rank]._replace(begin=begin))
    return killed


def star(
    crew: Crew, number_: int, seeds: Sequence[int], steps: int, *, alpha: float | None, eta: float,
    push: str, pause: float = 0.0, kills: int = 0,
) -> Run:  # fmt: skip
    """Four workers of one centre."""
    problem = Digits(seeds)
    center, name = Center(named(problem), push=push), f"run{number_}"
    began = time.perf_counter()
    with Server(center, crew.store, name=name) as server:
        tasks = [
            Task(name, rank, tuple(seeds), alpha, eta, PERIOD, steps, 0, pause)
            for rank in range(WORKERS)
        ]
        killed = train(crew, tasks, kills, random.Random(number_))
        left = server.wait([f"w{rank}" for rank in range(WORKERS)], 10.0)
    seconds = time.perf_counter() - began
    losses = problem.losses(center.values)
    return Run(
        math.fsum(losses) / len(losses), killed,
        left and list(crew.progress) == [steps] * WORKERS, bool(center.values.isfinite().all()),
        center.bytes_sent + center.bytes_received, seconds,
    )  # fmt: skip


def processes(crew: Crew, seeds: Sequence[int], args: argparse.Namespace) -> Iterator[Row]:
    """tau = 16: EASGD under two schemes, and DOWNPOUR."""
    setting: dict[str, object] = {"seeds": len(seeds), "steps": args.steps}
    for place, (what, alpha, eta, push, bar, published) in enumerate((
        ("EASGD", BETA / WORKERS, RATE, "fp32", "<= 0.05", 0.0199),
        ("EASGD", BETA / WORKERS, RATE, "int4", "<= 0.05", 0.0215),
        ("DOWNPOUR eta .0125", None, 0.0125, "fp32", "", 0.384),
        ("DOWNPOUR eta .025", None, 0.025, "fp32", "", None),
    )):  # fmt: skip
        one = star(crew, place, seeds, args.steps, alpha=alpha, eta=eta, push=push)
        passed = holds(one.loss, bar) and one.ended if bar else None
        yield Row("processes", push, what, one.loss, None, published, bar, passed, one.seconds,
                  f"{one.nbytes / 1e6:.2f} MB", {**setting, "bytes": one.nbytes})  # fmt: skip


def kills(crew: Crew, seeds: Sequence[int], args: argparse.Namespace) -> Iterator[Row]:
    """Medians of some runs without kills and with them, one after the other in turn."""
    for push in ("int4", "int2"):
        found: dict[int, list[Run]] = {0: [], args.kills: []}
        for run in range(args.runs):
            for count, runs in found.items():
                # the same numbers for both schemes would be the same kills
                number_ = 1000 + 100 * (push == "int2") + 10 * (count > 0) + run
                runs.append(
                    star(crew, number_, seeds, args.kill_steps, alpha=BETA / WORKERS, eta=RATE,
                         push=push, pause=PAUSE, kills=count)
                )  # fmt: skip
        calm, hit = found.values()
        base, loss = (statistics.median(run.loss for run in runs) for runs in (calm, hit))
        for what, runs, median in (("undisturbed", calm, base), ("killed", hit, loss)):
            setting: dict[str, object] = {
                "seeds": len(seeds), "steps": args.kill_steps, "pause": PAUSE,
                "losses": [run.loss for run in runs], "kills": [run.kills for run in runs],
            }  # fmt: skip
            note = ", ".join(f"{run.loss:.4f}" for run in runs)
            row = Row("kills", push, what, median, median / base, None, note=note,
                      seconds=sum(run.seconds for run in runs), setting=setting)  # fmt: skip
            yield row
        alive = all(run.ended and run.finite for run in hit)
        everywhere = all(run.kills == args.kills for run in hit)
        yield Row("kills", push, f"{args.kills} kills a run: all end, finite", float(alive), None,
                  None, "1", alive and everywhere)  # fmt: skip
        yield Row("kills", push, "killed / undisturbed", loss / base, None, None, "<= 1.1",
                  holds(loss / base, "<= 1.1"))  # fmt: skip


def in_turns(seeds: Sequence[int], args: argparse.Namespace, push: str, seed: int | None) -> float:
    """Loss of the centre after workers that take turns; seed: of the kills, None: without."""
    problem, steps, rng = Digits(seeds), args.kill_steps, random.Random(seed)
    center = Center(named(problem), push=push)

    def come(rank: int, begin: int) -> Trainee:
        one = trainee(problem, center, rank, elastic(PERIOD), RATE, 0.0, steps)
        return one._replace(batches=islice(one.batches, begin, None))

    moments = rng.sample(range(WORKERS * steps), args.kills if seed is not None else 0)
    struck, trainees = set(moments), [come(rank, 0) for rank in range(WORKERS)]
    for step in range(steps):
        for rank in range(WORKERS):
            if step * WORKERS + rank in struck:
                trainees[rank] = come(rank, step)
            trainees[rank].step(problem)
    losses = problem.losses(center.values)
    return math.fsum(losses) / len(losses)


def turns(crew: Crew, seeds: Sequence[int], args: argparse.Namespace) -> Iterator[Row]:
    """What kills alone do to the loss: three draws of moments, against none."""
    del crew
    push, began = "int4", time.perf_counter()
    base = in_turns(seeds, args, push, None)
    found = [in_turns(seeds, args, push, seed) for seed in range(args.runs)]
    ratio = statistics.median(found) / base
    yield Row("turns", push, "undisturbed", base)
    yield Row("turns", push, "killed / undisturbed", ratio, None, None, "<= 1.1",
              holds(ratio, "<= 1.1"), time.perf_counter() - began,
              ", ".join(f"{loss:.5f}" for loss in found),
              {"seeds": len(seeds), "steps": args.kill_steps, "kills": args.kills,
               "losses": found})  # fmt: skip


def tree(crew: Crew, seeds: Sequence[int], args: argparse.Namespace) -> Iterator[Row]:
    """A root, two inner nodes, four leaves."""
    problem, rate = Digits(seeds), moving_rate(DEGREE)
    setting: dict[str, object] = {"seeds": len(seeds), "steps": args.steps}
    for push in ("fp32", "int4"):
        root = Center(named(problem), push=push)
        began = time.perf_counter()
        with Server(root, crew.store, name=f"root {push}"):
            crew.gather(NODES + WORKERS)
            nodes = []
            for place in range(NODES):
                children = tuple(f"w{rank}" for rank in range(WORKERS) if rank % NODES == place)
                inner = Inner(f"node{place} {push}", f"root {push}", tuple(seeds), push, rate,
                              NODE_PERIOD, children)  # fmt: skip
                nodes.append(crew.take(inner))
            for node in nodes:
                node.hear(START)
            tasks = [
                Task(f"node{rank % NODES} {push}", rank, tuple(seeds), rate, RATE, LEAF_PERIOD,
                     args.steps)
                for rank in range(WORKERS)
            ]  # fmt: skip
            train(crew, tasks, 0, random.Random(0))
            for node in nodes:
                node.hear(START)
                crew.back(node)
        seconds = time.perf_counter() - began
        losses = problem.losses(root.values)
        loss = math.fsum(losses) / len(losses)
        yield Row("tree", push, "root, 2 nodes, 4 leaves", loss, None, None, "<= 0.05",
                  holds(loss, "<= 0.05"), seconds, f"{root.version} exchanges at the root",
                  setting)  # fmt: skip


TABLES: dict[str, Callable[[Crew, Sequence[int], argparse.Namespace], Iterator[Row]]] = {
    "processes": processes,
    "kills": kills,
    "turns": turns,
    "tree": tree,
}
HEADERS = ("table", "scheme", "", "figure", "published", "seconds", "", "bar", "")


def show(rows: Sequence[Row]) -> str:
    """The rows, the published figures beside the measured ones."""
    body = [
        [row.table, row.scheme, row.what, number(row.value), number(row.published),
         f"{row.seconds:.1f}", row.note, row.bar, verdict(row)]
        for row in rows
    ]  # fmt: skip
    return tabulate(body, HEADERS, disable_numparse=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--kill-steps", type=int, default=KILL_STEPS, help="of a worker")
    parser.add_argument("--kills", type=int, default=KILLS, help="in a run")
    parser.add_argument("--runs", type=int, default=3, help="whose median is taken")
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS, help=f"append rows (to {RESULTS.name})"
    )
    args = parser.parse_args(argv)
    # of all processes: workers of digits have nothing to share out
    os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    torch.set_num_threads(1)
    logging.getLogger("commlib").setLevel(logging.ERROR)  # workers that are gone are meant to be
    rows = []
    crew = Crew()
    try:
        with tqdm(desc="runs", unit=" rows", disable=None) as progress:
            for table in args.table:
                for row in TABLES[table](crew, range(args.seeds), args):
                    rows.append(row)
                    progress.update()
    finally:
        crew.close()
    return conclude(rows, show(rows), args.json, "easgd_processes", argv)


if __name__ == "__main__":
    sys.exit(main())
