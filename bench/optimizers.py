"""How `bench/onebit.py` and `bench/ef21.py` train: a shipped optimizer on every rank, a thread.

The loop and the accounts only. What is coded, sent and added to the weights is the optimizer's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from bench.problems import RANKS, Problem
from commlib import Communicator, Policy, Scheme
from commlib.policy import Rule
from commlib.transport import Transport, run_ranks

Named = list[tuple[str, torch.nn.Parameter]]


class Steps(Protocol):
    """What a rank trains with."""

    def step(self) -> object: ...


class Trained(NamedTuple):
    """Weights after the last step, and bytes that rank 0 had sent after each."""

    weights: torch.Tensor
    sent: list[int]

    def per_step(self, start: int, end: int | None = None) -> float:
        """Bytes a rank sends in a step, over steps `start` to `end` (0 is the first)."""
        part = [0, *self.sent][start:][: None if end is None else end - start + 1]
        return (part[-1] - part[0]) / (len(part) - 1)


def optimize(
    problem: Problem,
    scheme: str,
    make: Callable[[Named, Communicator], Steps],
    steps: int,
    *,
    ranks: int = RANKS,
    parts: Sequence[tuple[str, int]] = (),
) -> Trained:
    """Train on `ranks` threads; RuntimeError where their weights are not the same bits at the end.

    Args:
        scheme: of every parameter, vectors too.
        make: a rank's optimizer, from its named parameters and its communicator.
        parts: (name, elements) of the parameters that each of the problem's is cut into.
    """
    named = [
        (f"{key}{name}", n)
        for key, size in zip(problem.keys, problem.sizes, strict=True)
        for name, n in (parts or (("", size),))
    ]
    sizes = [n for _, n in named]

    def one_rank(transport: Transport) -> Trained:
        torch.set_num_threads(1)
        # A rule without conditions: Policy.parse would leave vectors exact.
        communicator = Communicator(transport, Policy((Rule(Scheme.parse(scheme)),)))
        start = problem.start().split(sizes)
        pairs = zip(named, start, strict=True)
        parameters: Named = [(name, torch.nn.Parameter(x.clone())) for (name, _), x in pairs]
        optimizer, sent = make(parameters, communicator), []
        for batch in problem.batches(transport.rank, steps):
            weights = torch.cat([parameter.detach() for _, parameter in parameters])
            gradients = problem.gradient(weights, batch).split(sizes)
            for (_, parameter), gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            sent.append(transport.bytes_sent)
        communicator.close()
        return Trained(torch.cat([parameter.detach() for _, parameter in parameters]), sent)

    first, *others = run_ranks(ranks, one_rank, timeout=1800)
    for rank, other in enumerate(others, 1):
        if not torch.equal(other.weights.view(torch.uint8), first.weights.view(torch.uint8)):
            raise RuntimeError(f"{scheme}: the weights of rank {rank} are not those of rank 0")
    return first
