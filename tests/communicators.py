"""What the tests of the communicator share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from commlib import Communicator, Policy, Scheme
from commlib.policy import Rule
from commlib.transport import ThreadTransport, run_ranks


def only(scheme: str) -> Policy:
    """`scheme` for every tensor, vectors and small ones too."""
    return Policy((Rule(Scheme.parse(scheme)),))


def data(rank: int, numel: int, step: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(1000 * step + rank))


def on_ranks(size: int, policy: Any, body: Callable[[Communicator], Any], **how: Any) -> list[Any]:
    def rank(t: ThreadTransport) -> Any:
        communicator = Communicator(t, policy, **how)
        try:
            return body(communicator)
        finally:
            communicator.close()

    return run_ranks(size, rank)
