"""`auto` with plans beside `auto` without: seconds and bytes of a step on an emulated slow line.

    python -m bench.autoplan                     4 hosts at 200 Mbit/s, the 10.9M GPT, a few minutes
    python -m bench.autoplan --model small --rate 20mbit --ranks 3 --steps 80 --json

Two DDP models in the same processes take turns step by step, in an order that turns too, on the
same batches from the same weights. Plans are made every EVERY steps, more often than by default;
steps count from the first plan on, those that measure and plan among them. Ratios are of the
slowest rank's seconds of a step, from a barrier; `exchange` and `compute` share this machine's
cores.
"""

import argparse
import logging
import os
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import commlib
from bench.feedback import write
from commlib import engine
from commlib.demo.data import load
from commlib.demo.model import GPT, SHAPES, optimizer, warm_up
from commlib.demo.train import gather
from commlib.emulation import spawn
from commlib.integrations import autoplan
from commlib.planner import Profile, measure

RESULTS = Path(__file__).parent / "results" / "autoplan.jsonl"
EVERY = 20
ARMS = ("auto without plans", "auto")


@dataclass(frozen=True)
class Row:
    """One arm from step EVERY on. step_ms: median; ratio: median over steps, to the first arm."""

    arm: str
    model: str
    ranks: int
    rate: str
    steps: int
    step_ms: float
    ratio: float
    megabytes: float  # a rank sends in a step
    losses: list[float]  # of the last EVERY steps' mean, by arm
    schemes: dict[str, int]


class Arm:
    """A model in training."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.seconds, self.losses = name, [], []
        model = GPT(SHAPES[args.model], seed=0)
        self.model = commlib.wrap(DDP(model, bucket_cap_mb=3.0), "auto")
        if name == ARMS[0]:
            commlib.of(self.model).replan(None)
        self.optimizer = optimizer("adamw", model)
        self.sent = 0

    def step(self, pair: tuple[torch.Tensor, torch.Tensor], step: int) -> None:
        warm_up(self.optimizer, step)
        self.optimizer.zero_grad()
        dist.barrier()
        if step == EVERY:
            self.sent = commlib.of(self.model).bytes_sent()
        start = time.perf_counter()
        loss = self.model(*pair)
        loss.backward()
        self.optimizer.step()
        ranks = gather([time.perf_counter() - start, loss.item()])
        self.seconds.append(ranks[:, 0].max().item())
        self.losses.append(ranks[:, 1].mean().item())

    def row(self, first: "Arm", args: argparse.Namespace) -> Row:
        counts: dict[str, int] = {}
        policy = commlib.of(self.model).communicator.policy
        for rule in policy.rules:
            if rule.key != "*":
                counts[str(rule.scheme)] = counts.get(str(rule.scheme), 0) + 1
        mine, theirs = self.seconds[EVERY:], first.seconds[EVERY:]
        sent = commlib.of(self.model).bytes_sent() - self.sent
        return Row(
            self.name,
            args.model,
            dist.get_world_size(),
            args.rate,
            len(mine),
            1e3 * statistics.median(mine),
            statistics.median(a / b for a, b in zip(mine, theirs, strict=True)),
            sent / len(mine) / 1e6,
            [round(statistics.mean(arm.losses[-EVERY:]), 4) for arm in (first, self)],
            counts,
        )


def run(args: argparse.Namespace) -> None:
    """One rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    autoplan.SETTINGS = replace(autoplan.SETTINGS, every=EVERY)
    # both by one measurement: two may choose otherwise
    profiles = []

    def measured(call: Any, transport: Any) -> Profile:
        profiles[:] = profiles or [measure(call, transport)]
        return profiles[0]

    engine.measure = measured
    corpus, arms = load(), [Arm(name, args) for name in ARMS]
    for step in range(args.steps):
        pair = corpus.batch(2, 128, seed=0, step=step, rank=dist.get_rank())
        for arm in arms if step % 2 else arms[::-1]:
            arm.step(pair, step)
    rows = [arm.row(arms[0], args) for arm in arms]
    if dist.get_rank() == 0:
        for row in rows:
            print(row)
        if args.json:
            write(RESULTS, rows, args.command, "autoplan")
    dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    top = argparse.ArgumentParser(prog="python -m bench.autoplan", description=__doc__)
    top.formatter_class = argparse.RawDescriptionHelpFormatter
    top.add_argument("--model", choices=tuple(SHAPES), default="10M")
    top.add_argument("--rate", default="200mbit")
    top.add_argument("--ranks", type=int, default=4)
    top.add_argument("--steps", type=int, default=60)
    top.add_argument("--json", action="store_true", help=f"append to {RESULTS.name}")
    args = top.parse_args(words)
    args.command = shlex.join(["python", "-m", "bench.autoplan", *words])
    if "RANK" in os.environ:
        run(args)
        return 0
    print(args.command)
    env = {"OMP_NUM_THREADS": "1"}
    return spawn(
        [sys.executable, "-m", "bench.autoplan", *words],
        args.ranks, rate=args.rate, env=env, timeout=1500,
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
