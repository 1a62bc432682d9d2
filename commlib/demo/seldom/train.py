"""One rank of `commlib demo --method`: learns by every method, and times every method.

No `from __future__ import annotations` here: DDP compares a hook's annotations with the classes.
"""

import argparse
import os
import sys
import time
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from ...emulation import sent_bytes
from ..data import Corpus, Pair, load
from ..model import GPT, SHAPES, optimizer, warm_up
from ..train import PLAIN, gather, sharers

TCPStore: Any = dist.TCPStore  # type: ignore[attr-defined]  # missing from the stubs

CODED = "int4+ef"
BATCH, CONTEXT, WINDOWS, EVERY = 2, 128, 16, 5  # windows: held out; every: so many steps
EASGD_PERIOD = 5
FRAGMENTS, OVERLAP = 4, 5
# What travels, by method. Nearest: a mean over many steps is no noise to be averaged out.
OUTER, ELASTIC = "e3m0:block=256", "rotate|eden2"


class Trainee(Protocol):
    """A GPT in training on this rank. period: steps after which an exchange comes again."""

    period: int
    optimizer: torch.optim.Optimizer

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor: ...
    def step(self) -> None: ...
    def shared(self) -> dict[str, torch.Tensor]: ...
    def close(self) -> None: ...


class EveryStep:
    """DDP, plain or under a scheme."""

    period = 1

    def __init__(self, scheme: str, args: argparse.Namespace) -> None:
        self.model = DDP(GPT(SHAPES[args.model], args.seed), bucket_cap_mb=3.0)
        if scheme != PLAIN:
            from commlib import wrap

            wrap(self.model, scheme, seed=args.seed)
        self.optimizer = optimizer("adamw", self.model.module)

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(x, y)
        return found

    def step(self) -> None:
        self.optimizer.step()

    def shared(self) -> dict[str, torch.Tensor]:
        return dict(self.model.module.named_parameters())

    def close(self) -> None:
        """Nothing to end."""


class Alone:
    """A rank that trains by itself between exchanges."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.model: nn.Module = GPT(SHAPES[args.model], args.seed)
        self.optimizer = optimizer("adamw", self.model)

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(x, y)
        return found


def streaming(period: int) -> dict[str, int]:
    """Fragments and overlap, as many as a period of so few steps has room for."""
    return {"fragments": min(FRAGMENTS, period), "overlap": min(OVERLAP, period - 1)}


class Outer(Alone):
    """DiLoCo, Streaming DiLoCo and averaging."""

    def __init__(self, method: str, args: argparse.Namespace) -> None:
        from commlib import Communicator
        from commlib.optim import DiLoCo, LocalSGD

        super().__init__(args)
        self.period = args.period
        # a group of its own: an exchange may be under way while the ranks meet at a barrier
        self.group = dist.new_group()
        self.communicator = Communicator(self.group, OUTER, seed=args.seed)
        named = list(self.model.named_parameters())
        options: dict[str, Any] = {"period": args.period}
        if method == "streaming":
            options |= streaming(args.period)
        kind = LocalSGD if method == "localsgd" else DiLoCo
        self.outer = kind(named, self.optimizer, self.communicator, **options)

    def step(self) -> None:
        self.outer.step()

    def shared(self) -> dict[str, torch.Tensor]:
        return self.outer.theta

    def close(self) -> None:
        self.outer.finish()
        self.communicator.close()
        dist.destroy_process_group(self.group)


class Elastic(Alone):
    """EASGD: the centre is served by rank 0's process."""

    period = EASGD_PERIOD

    def __init__(self, args: argparse.Namespace) -> None:
        from commlib.optim import EASGD, Center, Server, connect, local

        super().__init__(args)
        named = list(self.model.named_parameters())
        rank, ranks = dist.get_rank(), dist.get_world_size()
        self.center: Any = None
        port: list[Any] = [None]
        if rank == 0:
            self.center = Center(named, push=ELASTIC, seed=args.seed)
            self.store = TCPStore(
                os.environ["MASTER_ADDR"], 0, is_master=True, wait_for_workers=False
            )
            self.server = Server(self.center, self.store).start()
            port = [self.store.port]
        dist.broadcast_object_list(port, 0)
        if rank == 0:
            self.link = local(self.center, named, "rank0")
        else:
            self.store = TCPStore(os.environ["MASTER_ADDR"], port[0], is_master=False)
            self.link = connect(self.store, named, f"rank{rank}")
        rate = 0.9 / ranks
        self.easgd = EASGD(self.optimizer, self.link, moving_rate=rate, period=self.period)

    def step(self) -> None:
        self.easgd.step()

    def shared(self) -> dict[str, torch.Tensor]:
        """The centre; of use on rank 0 only."""
        named = list(self.model.named_parameters())
        if self.center is None:
            return dict(named)
        held = [torch.empty_like(one) for _, one in named]
        self.center.copy_to(held)
        return {name: one for (name, _), one in zip(named, held, strict=True)}

    def close(self) -> None:
        self.link.close()
        dist.barrier()
        if self.center is not None:
            self.server.close()


def trainee(method: str, args: argparse.Namespace) -> Trainee:
    """The method of this name; all ranks together."""
    if method in (PLAIN, CODED):
        return EveryStep(method, args)
    return Elastic(args) if method == "easgd" else Outer(method, args)


def names(args: argparse.Namespace) -> list[str]:
    """All methods of the table."""
    return [PLAIN, CODED, *args.method]


def learn(args: argparse.Namespace) -> dict[str, list[tuple[int, float]]]:
    """Every method alone, until plain DDP's loss at --target or --steps: (step, held-out loss).

    The shared model is measured on rank 0 where it may have changed: at every EVERY steps, of
    methods that exchange less often at their exchanges.
    """
    corpus, found, goal = load(), {}, float("-inf")
    pair = corpus.evaluation(WINDOWS, CONTEXT)
    model = GPT(SHAPES[args.model])
    for method in names(args):
        one = trainee(method, args)
        curve = [(0, _measured(model, one, pair))]
        often = EVERY if method in (PLAIN, CODED, "easgd") else args.period
        for step in range(args.target if method == PLAIN else args.steps):
            _step(one, corpus, step, args)
            if (step + 1) % often == 0 or step + 1 == args.target:
                dist.barrier()
                curve.append((step + 1, _measured(model, one, pair)))
                if method != PLAIN and curve[-1][1] <= goal:
                    break
        goal = curve[-1][1] if method == PLAIN else goal
        one.close()
        found[method] = curve
        if dist.get_rank() == 0:
            print(f"{method}: loss {curve[-1][1]:.4f} after {curve[-1][0]} steps", file=sys.stderr)
    return found


def clock(args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Seconds and bytes of a step of every method: means over --timed steps or a whole period.

    The slowest rank's seconds, the busiest rank's bytes at its interface.
    """
    corpus, found = load(), {}
    for method in names(args):
        one = trainee(method, args)
        for step in range(one.period if one.period > 1 else 2):  # plans, kernels, raw first copies
            _step(one, corpus, step, args)
        dist.barrier()
        steps = args.timed if one.period == 1 else one.period
        sent, start = sent_bytes(), time.perf_counter()
        for step in range(steps):
            _step(one, corpus, step, args)
        seconds = time.perf_counter() - start
        dist.barrier()
        mine = [seconds / steps, (sent_bytes() - sent) / sharers() / steps]
        seconds, nbytes = gather(mine).max(0).values.tolist()
        found[method] = (seconds, nbytes)
        one.close()
    return found


def _step(one: Trainee, corpus: Corpus, step: int, args: argparse.Namespace) -> None:
    warm_up(one.optimizer, step)
    x, y = corpus.batch(BATCH, CONTEXT, seed=args.seed, step=step, rank=dist.get_rank())
    one.loss(x, y).backward()
    one.step()
    one.optimizer.zero_grad()


@torch.no_grad()
def _measured(model: nn.Module, one: Trainee, pair: Pair) -> float:
    """Held-out loss of the shared model, measured on rank 0 and told to all."""
    loss = torch.zeros(1, dtype=torch.float64)
    shared = one.shared()
    if dist.get_rank() == 0:
        for name, parameter in model.named_parameters():
            parameter.copy_(shared[name].view_as(parameter))
        parts = [float(model(x[None], y[None])) for x, y in zip(*pair, strict=True)]
        loss.fill_(sum(parts) / len(parts))
    dist.broadcast(loss, 0)
    return float(loss)
