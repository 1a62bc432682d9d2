"""DASGD with real processes and delays to order, for `bench/dasgd.py`.

Workers are processes that pull, make a gradient and push, over gloo. The centre holds each gradient
until the update that it is scheduled for, and keeps a worker that pulls waiting while no gradient
of the present iterate is wanted any more. So every update has exactly its scheduled source,
whatever the processes' speed, and nobody sleeps; which worker makes which gradient is left open.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from bench.dasgd import BOX, BY_NAME, CURVATURE, NOISE, SOURCES, START, Source, objective
from bench.feedback import Row, holds
from commlib.optim import DASGD, Center, Projected, Server, connect, staleness

SECONDS = 300.0  # after which a process that says nothing is given up


class HeldCenter(Center):
    """A centre whose n-th update is made on iterate source(n); it is done after `updates`."""

    def __init__(self, *args: Any, source: Source, updates: int, **how: Any) -> None:
        super().__init__(*args, **how)
        self.updates = updates
        self._source = source
        self._wanted = Counter(source(n) for n in range(1, updates + 1))
        self._given: Counter[int] = Counter()  # how often an iterate was pulled
        self._held: dict[int, deque[torch.Tensor]] = {}
        self._moved = threading.Condition(self.lock)

    def shown(self) -> tuple[torch.Tensor, int]:
        """The iterate, for as many gradients as are wanted of it. RuntimeError: it stands still."""
        with self._moved:
            self._go_on()
            if not self._moved.wait_for(self._open, SECONDS):
                raise RuntimeError(f"no update in {SECONDS:g} s, at version {self.version}")
            self._given[self.version] += 1
            shown = super().shown()
            self._go_on()
            return shown

    def apply(self, update: torch.Tensor, source: int) -> None:
        """Hold a gradient, and do the updates that are due by now."""
        with self._moved:
            if self._wanted[source] <= 0:
                raise RuntimeError(f"a gradient of iterate {source}, of which no more are wanted")
            self._wanted[source] -= 1
            self._held.setdefault(source, deque()).append(update)
            self._go_on()

    def _missing(self) -> bool:
        """Whether gradients of this iterate are wanted that nobody makes yet."""
        held = len(self._held.get(self.version, ()))
        return self._given[self.version] < self._wanted[self.version] + held

    def _open(self) -> bool:
        return self.version >= self.updates or self._missing()

    def _go_on(self) -> None:
        while self.version < self.updates and not self._missing():
            due = self._held.get(self._source(self.version + 1))
            if not due:
                break
            super().apply(due.popleft(), self._source(self.version + 1))
        self._moved.notify_all()


class Run(NamedTuple):
    """One run of all processes; its name is the centre's, its place the noise's."""

    delay: str
    schedule: str
    push: str
    place: int

    @property
    def name(self) -> str:
        return f"run{self.place}"


def parameters(seeds: int) -> list[tuple[str, torch.nn.Parameter]]:
    """A parameter of 20 values for every seed."""
    return [(f"x{s}", torch.nn.Parameter(torch.full((20,), START))) for s in range(seeds)]


def worker(port: int, rank: int, runs: Sequence[Run], seeds: int, updates: int) -> None:
    """A process: take part in all runs."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=SECONDS))
    curvature = CURVATURE.float()
    for run in runs:
        generator = torch.Generator().manual_seed(1000 * run.place + rank)
        named = parameters(seeds)
        link = connect(store, named, f"w{rank}", name=run.name, timeout=SECONDS)
        mine = DASGD([x for _, x in named], link)
        while link.version < updates:
            for _, x in named:
                x.grad = curvature * x.detach() + NOISE * torch.randn(20, generator=generator)
            mine.step()
        link.close()


def held(
    seeds: Sequence[int], updates: int, workers: int, runs: Sequence[Run] | None = None
) -> Iterator[Row]:
    """The rows of all runs, and the bars on them."""
    runs = RUNS if runs is None else runs
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(
            target=worker, args=(store.port, rank, list(runs), len(seeds), updates), daemon=True
        )
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
    found = {}
    try:
        for run in runs:
            row = one(store, run, len(seeds), updates, workers)
            if run.push == "fp32":
                found[run.delay, run.schedule] = row.value
            yield row
        for process in processes:
            process.join(SECONDS)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    yield from ordering(found)


def one(store: Any, run: Run, seeds: int, updates: int, workers: int) -> Row:
    """One run: f after the last update, and whether all delays were those scheduled."""
    began = time.perf_counter()
    source = SOURCES[run.delay]
    rule = Projected(BY_NAME[run.schedule].make(), BOX)
    center = HeldCenter(
        parameters(seeds), rule=rule, push=run.push, pull="fp32", source=source, updates=updates
    )
    with Server(center, store, name=run.name, timeout=SECONDS) as server:
        if not server.wait([f"w{rank}" for rank in range(workers)], SECONDS):
            raise RuntimeError(f"{run}: workers {server.workers} are still there, {SECONDS:g} s on")
    values = objective(center.shown()[0], seeds)
    scheduled = Counter(n - 1 - source(n) for n in range(1, updates + 1))
    setting: dict[str, object] = {"seeds": seeds, "steps": updates, "workers": workers}
    setting |= {"values": values, "push": run.push}
    setting["staleness"] = staleness(center.delays)._asdict()
    return Row(
        "processes, lazy",
        f"{run.schedule}, {run.push}",
        run.delay,
        sum(values) / seeds,
        bar="delays as scheduled",
        passed=center.delays == scheduled and center.version == updates,
        seconds=time.perf_counter() - began,
        setting=setting,
    )


def ordering(found: dict[tuple[str, str], float]) -> Iterator[Row]:
    """What the table says, after fewer updates: by how much one schedule is behind another."""
    last = "1/(n log n loglog n)"
    for delay, worse, better, bar in (
        ("linear", ("1/sqrt n",), ("1/(n log n) c=10",), ">= 10"),
        ("linear", ("1/sqrt n",), (f"{last} c=10",), ">= 100"),
        ("polynomial", ("1/n c=1", "1/n c=3"), (f"{last} c=3", f"{last} c=10"), ">= 3"),
    ):
        if all((delay, name) in found for name in (*worse, *better)):
            ratio = min(found[delay, n] for n in worse) / min(found[delay, n] for n in better)
            what = f"{', '.join(worse)} over {', '.join(better)}"
            yield Row("bars, processes", what, delay, ratio, bar=bar, passed=holds(ratio, bar))


CHOSEN: Iterable[tuple[str, str, str]] = (
    ("linear", "1/sqrt n", "fp32"),
    ("linear", "1/(n log n) c=10", "fp32"),
    ("linear", "1/(n log n loglog n) c=10", "fp32"),
    ("linear", "1/(n log n loglog n) c=10", "int4+ef"),
    ("linear", "auto c=3", "fp32"),
    ("polynomial", "1/n c=1", "fp32"),
    ("polynomial", "1/n c=3", "fp32"),
    ("polynomial", "1/(n log n loglog n) c=3", "fp32"),
    ("polynomial", "1/(n log n loglog n) c=10", "fp32"),
    ("polynomial", "auto c=3", "fp32"),
)
RUNS = tuple(Run(*chosen, place) for place, chosen in enumerate(CHOSEN))
