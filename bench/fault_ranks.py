"""What one rank of a fault trial does: real gloo, the shipped classes, a report of how it ended.

Every rank runs the same fixed program (`exchange`, step by step), so what each residual must be
after each step is known beforehand: `history` runs it on threads. A residual is intact when every
block of it is what it was before the failed step or after it.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from bench.fault_inputs import CASES, CaseReport, run_case
from commlib import Communicator, Policy, Scheme
from commlib.policy import Rule
from commlib.transport import Transport, run_ranks

# Elements per message: one small, one that goes in slices and from peer to peer.
SIZES = {"small.weight": 3_000, "large.weight": 1_000_000}
SCHEMES = ("int4+ef", "int8+ef", "sign+ef", "int2+ef:dtype=int8", "int3+ef@ring")
STEPS = 40
LIFETIME = 90  # seconds after which a rank ends whatever happens: nothing is left behind
PR_SET_PDEATHSIG = 1

Tiles = npt.NDArray[np.uint64]
State = dict[str, Tiles]


@dataclass(frozen=True)
class Trial:
    """One fault: it strikes when the victim has begun `step` and `delay` seconds have passed.

    fault: kill, stop (for good), pause (`pause` seconds, below the timeout), absent (the victim
    stops calling), bad input (every rank, or one of them, passes something wrong).
    """

    number: int
    fault: str
    ranks: int
    scheme: str
    victim: int
    step: int = 1
    delay: float = 0.0
    pause: float = 0.0
    timeout: float = 2.5


@dataclass
class Report:
    """How a rank's trial ended. Times are time.monotonic(), one clock for all processes."""

    rank: int
    step: int = 0
    raised: str = ""  # the error's type; empty: it ran to the end
    text: str = ""
    at: float = 0.0
    state: State = field(default_factory=dict)
    starved: float = 0.0  # seconds it could have run and got no core, in the step it failed in
    again: str = ""  # what a call after the error raised
    again_seconds: float = 0.0
    cases: list[CaseReport] = field(default_factory=list)


def rank_main(rank: int, trial: Trial, port: int, progress: Any, pipe: Any) -> None:
    """A rank's process: sends one Report through `pipe`."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.alarm(LIFETIME)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=trial.ranks,
        timeout=datetime.timedelta(seconds=30),
    )
    try:
        communicator = Communicator(policy=policy(trial.scheme), timeout=trial.timeout)
        dist.barrier()
        if trial.fault == "bad input":
            report = Report(rank, cases=list(bad_input(communicator, trial)))
        else:
            report = until_fault(communicator, trial, progress)
        communicator.close()
    finally:
        dist.destroy_process_group()
    pipe.send(report)
    pipe.close()


def policy(scheme: str) -> Policy:
    """`scheme` for every tensor; Policy.parse would leave vectors exact."""
    return Policy((Rule(Scheme.parse(scheme)),))


def until_fault(communicator: Communicator, trial: Trial, progress: Any) -> Report:
    """Run the program until something raises, or to its end."""
    rank = communicator.rank
    report = Report(rank)
    waited = starved()
    try:
        for step in range(1, STEPS + 1):
            report.step = progress[rank] = step
            if trial.fault == "absent" and rank == trial.victim and step == trial.step:
                report.at = time.monotonic()
                report.text = "stopped calling"
                time.sleep(2 * trial.timeout + 1)  # alive, and the others' store with it
                return report
            waited = starved()
            results = exchange(communicator, step)
        report.state = {**state_of(communicator), **results}
        report.at = time.monotonic()
    except Exception as error:
        report.at = time.monotonic()
        report.starved = starved() - waited
        report.raised, report.text = type(error).__name__, str(error)
        report.state = state_of(communicator)
        try:
            exchange(communicator, trial.step)
        except Exception as later:
            report.again = f"{type(later).__name__}: {later}"
        report.again_seconds = time.monotonic() - report.at
    return report


def starved() -> float:
    """Seconds for which this process was ready to run and other processes had the cores."""
    waits = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has just ended
            waits.append(int((task / "schedstat").read_text().split()[1]))
    return max(waits, default=0) / 1e9


def bad_input(communicator: Communicator, trial: Trial) -> Iterator[CaseReport]:
    """Every case in turn, each followed by a step that must go as if the case had not been."""
    for number, case in enumerate(CASES, 1):
        before = state_of(communicator)
        report = run_case(case, communicator, trial.scheme, trial.victim)
        after = state_of(communicator)
        report.untouched = same(before, after)
        try:
            report.state = {**exchange(communicator, number), **state_of(communicator)}
        except Exception as error:
            report.problems.append(f"no further step works: {error}")
            yield report
            return
        yield report


def exchange(communicator: Communicator, step: int) -> State:
    """One step of the program: all messages on the way at a time; returns the results' tiles."""
    tensors = {
        key: data(communicator.rank, key) * (1 + step % 7)  # a new tensor: it is reduced in place
        for key in SIZES
    }
    works = [
        communicator.all_reduce(x, key, factor="avg", async_op=True) for key, x in tensors.items()
    ]
    for work in works:
        work.wait()
    return {f"result/{key}": tiles(x, 128) for key, x in tensors.items()}


@functools.cache
def data(rank: int, key: str) -> torch.Tensor:
    """What `rank` contributes under `key`, up to a factor."""
    return torch.randn(SIZES[key], generator=torch.Generator().manual_seed(rank + len(key)))


def history(scheme: str, ranks: int) -> list[list[State]]:
    """By rank and step: residuals and results of a run without faults, on threads."""

    def one_rank(transport: Transport) -> list[State]:
        communicator = Communicator(transport, policy(scheme))
        states = [state_of(communicator)]
        for step in range(1, STEPS + 1):
            results = exchange(communicator, step)
            states.append({**state_of(communicator), **results})
        communicator.close()
        return states

    return run_ranks(ranks, one_rank, timeout=300)


def state_of(communicator: Communicator) -> State:
    """A hash of every block of every tensor that the communicator remembers."""
    # Not through its state_dict: after a failure that refuses to hand out what may not be resumed.
    memory = communicator._compressors.state_dict()
    return {
        path: tiles(tensor, 1 if "scales" in path else 128)
        for path, tensor in leaves(memory, "residual")
    }


def leaves(tree: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested dicts, with the path to each."""
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for name, branch in tree.items():
            yield from leaves(branch, f"{path}/{name}")


def tiles(x: torch.Tensor, elements: int) -> Tiles:
    """One 64-bit hash for every `elements` elements; zeros give 0."""
    words = x.detach().contiguous().view(-1).view(torch.uint8).numpy()
    words = np.pad(words, (0, len(words) % 2)).view(np.uint16)
    width = max(1, elements * x.element_size() // 2)
    words = np.pad(words, (0, -len(words) % width)).reshape(-1, width).astype(np.uint64)
    weights = np.random.default_rng(0).integers(1, 2**63, width, np.uint64) | np.uint64(1)
    return words @ weights


def same(a: State, b: State) -> bool:
    """Whether two states are bitwise equal."""
    return a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


def blocks_between(now: State, before: State, after: State) -> tuple[str, str]:
    """Whether every block is as before or as after: ("before" | "after" | "both", "" or where not).

    What is not there yet is zero.
    """
    seen = set()
    for path in now.keys() | {p for p in before if not p.startswith("result/")}:
        here, old, new = (s.get(path, np.zeros(1, np.uint64)) for s in (now, before, after))
        if not np.all((here == old) | (here == new)):
            return (
                "corrupt",
                f"{path}: {np.sum((here != old) & (here != new))} of {len(here)} tiles",
            )
        if np.any(here != old):
            seen.add("after")
        if np.any(here != new):
            seen.add("before")
    return (seen.pop() if len(seen) == 1 else "both"), ""


def warm() -> None:
    """Load and compile all that a rank needs, so that forks of this process have it ready."""
    torch.set_num_threads(1)
    for scheme in SCHEMES:
        run_ranks(2, functools.partial(_one_message, scheme=scheme), timeout=300)


def _one_message(transport: Transport, scheme: str) -> None:
    communicator = Communicator(transport, policy(scheme))
    communicator.all_reduce(torch.ones(4096), "warm.weight").wait()
    communicator.close()
