"""What a process of `bench/easgd_processes.py` does: a worker, or an inner node of a tree.

Started by a fork server that has imported `bench.easgd_warm`, as a process that imports torch and
scikit-learn and loads its kernels by itself takes seconds, and twenty are killed in a run. A
process says that it is there, and then waits for tasks; it does any number of them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from bench.easgd import Trainee, named
from bench.problems import Digits
from commlib.optim import EASGD, Center, Downpour, Node, Server, connect

LIFETIME = 1800  # seconds after which a process ends whatever happens: nothing is left behind
TIMEOUT = 120.0  # seconds an answer may take
PR_SET_PDEATHSIG = 1


class Task(NamedTuple):
    """Train as worker `rank` of a centre, from step `begin` to `steps`.

    alpha: moving rate of EASGD; None: DOWNPOUR. pause: seconds of sleep after each step.
    """

    center: str
    rank: int
    seeds: tuple[int, ...]
    alpha: float | None
    eta: float
    period: int
    steps: int
    begin: int = 0
    pause: float = 0.0


class Inner(NamedTuple):
    """Be an inner node: serve `children` (names) as centre `name`, under the centre `above`."""

    name: str
    above: str
    seeds: tuple[int, ...]
    push: str
    rate: float
    period: int
    children: tuple[str, ...]


def rank_main(port: int, progress: Any, pipe: Any) -> None:
    """Do tasks until the pipe says None or ends. progress: steps done, by rank of the worker."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.alarm(LIFETIME)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    pipe.send("ready")
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        if task is None:
            return
        if isinstance(task, Inner):
            for said in inner(store, task):
                pipe.send(said)
        else:
            work(store, task, progress)
            pipe.send("done")


def work(store: Any, task: Task, progress: Any) -> None:
    """Train. What a killed process did since its last exchange is gone: the next one of its name
    begins at the centre, with the batches that follow."""
    problem = Digits(task.seeds)
    params = [torch.nn.Parameter(x.clone()) for _, x in named(problem)]
    pairs = zip(problem.keys, params, strict=True)
    link = connect(store, pairs, f"w{task.rank}", name=task.center, timeout=TIMEOUT)
    optimizer = torch.optim.SGD(params, lr=task.eta)
    worker: EASGD | Downpour
    if task.alpha is None:
        worker = Downpour(optimizer, link, period=task.period)
    else:
        worker = EASGD(optimizer, link, moving_rate=task.alpha, period=task.period)
    batches = islice(problem.batches(task.rank, task.steps), task.begin, None)
    one = Trainee(params, worker, batches)
    for step in range(task.begin, task.steps):
        one.step(problem)
        progress[task.rank] = step + 1
        time.sleep(task.pause)
    link.close()


def inner(store: Any, task: Inner) -> Iterator[str]:
    """Serve the children until all have left; says when it serves, and when it is over."""
    problem = Digits(task.seeds)
    center = Center(named(problem), push=task.push)
    above = connect(store, named(problem), task.name, name=task.above, timeout=TIMEOUT)
    Node(center, above, task.rate, task.period)
    with Server(center, store, name=task.name, timeout=TIMEOUT) as server:
        yield "serves"
        if not server.wait(task.children, LIFETIME):
            raise RuntimeError(f"{task.name}: {task.children} have not all left")
    above.close()
    yield "done"
