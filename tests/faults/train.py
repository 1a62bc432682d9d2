"""DDP with compressed gradients that outlives what happens to it: a recipe for checkpoints.

    torchrun --nproc-per-node 2 --max-restarts 3 -m tests.faults.train --checkpoints DIR

Every few steps each rank writes one file: weights, optimizer, and what commlib remembers of its
gradients, which no other rank has. Started again, all go on from the last step whose files are
whole everywhere, and lose nothing: with nearest rounding or with random streams, the losses are
bitwise those of a run that was never interrupted. DIR may be on a disk that all ranks share or on
one of each host's own.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel as DDP

import commlib

POLICY = "int4:round=nearest+ef"
KEEP = 2  # checkpoints; while one is written, the one before must be whole on every rank


class Checkpoints:
    """The checkpoints of one run, as this rank sees them; all ranks make the same calls."""

    def __init__(self, folder: Path, model: DDP, optimizer: torch.optim.Optimizer) -> None:
        self.folder, self.model, self.optimizer = folder, model, optimizer
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, step: int) -> None:
        """Write the state after `step`. If one rank cannot, OSError on all; older ones stay."""
        state = {
            "model": self.model.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "commlib": commlib.of(self.model).state_dict(),
        }
        together(f"the checkpoint of step {step}", lambda: write(self._path(step), state))
        for old in self._steps()[:-KEEP]:
            self._path(old).unlink()

    def load(self) -> int:
        """Take up the last checkpoint that is there on every rank; its step, 0 for none."""
        steps = together("looking for checkpoints", self._steps)
        step = max(set.intersection(*map(set, steps)), default=0)
        if step:
            together(f"the checkpoint of step {step}", lambda: self._restore(self._path(step)))
        for later in self._steps():
            if later > step:  # never whole; next to a file of this run it would pass for that
                self._path(later).unlink()
        print(f"rank {dist.get_rank()} starts after step {step}", flush=True)
        return step

    def _restore(self, path: Path) -> None:
        try:
            state = torch.load(path, weights_only=True)
        except Exception as error:
            raise OSError(f"{path} is damaged, remove it to go on from an older one") from error
        self.model.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        commlib.of(self.model).load_state_dict(state["commlib"])

    def _path(self, step: int) -> Path:
        return self.folder / f"step{step}-rank{dist.get_rank()}.pt"

    def _steps(self) -> list[int]:
        names = self.folder.glob(f"step*-rank{dist.get_rank()}.pt")
        return sorted(int(path.name.removeprefix("step").split("-")[0]) for path in names)


def write(path: Path, state: dict[str, Any]) -> None:
    """The whole file under its name, or nothing: whatever stops this process or the machine."""
    image = io.BytesIO()
    torch.save(state, image)  # into memory: of a full disk it says "unexpected pos 640 vs 598"
    part = path.with_suffix(".part")
    try:
        with part.open("wb") as file:
            file.write(image.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)  # the new name is on the disk with its folder
        os.fsync(folder)
        os.close(folder)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def together(what: str, call: Callable[[], Any]) -> list[Any]:
    """What `call` returned on every rank. If it failed on one, OSError on all."""
    mine: tuple[Any, str] = (None, "")
    try:
        mine = (call(), "")
    except Exception as error:
        mine = (None, f"rank {dist.get_rank()}: {type(error).__name__}: {error}")
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    failed = [text for _, text in every if text]
    if failed:
        raise OSError(f"{what} failed: {'; '.join(failed)}")
    return [answer for answer, _ in every]


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's data of a step: depends on nothing else, so that a step can be done again."""
    draw = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    x = torch.randn(32, 64, generator=draw)
    return x, x[:, :10].argmax(1)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    model = commlib.wrap(DDP(net), args.policy, timeout=args.timeout)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    checkpoints = Checkpoints(args.checkpoints, model, optimizer)
    start = checkpoints.load()
    with (args.losses / f"losses{dist.get_rank()}").open("a") as losses:
        for step in range(start + 1, args.steps + 1):
            x, y = batch(step)
            loss = cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(step, loss.item().hex(), file=losses, flush=True)
            if step % args.every == 0:
                try:
                    checkpoints.save(step)
                except OSError as error:
                    if not args.go_on:
                        raise
                    print(f"WARNING: {error}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--every", type=int, default=5, help="steps from one to the next")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--policy", default=POLICY)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds an exchange may take")
    parser.add_argument("--losses", type=Path, default=Path(), help="folder of their files")
    parser.add_argument("--go-on", action="store_true", help="where a checkpoint fails")
    args = parser.parse_args()
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        train(args)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
