"""What the tests of DiLoCo share: ranks that train by themselves, in several ways."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from commlib import Communicator
from commlib.optim import DiLoCo
from tests.optim.replicas import backward


def adam(module: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(module.parameters(), 0.01, foreach=False)


def outer(module: nn.Module, c: Communicator, **how: Any) -> DiLoCo:
    how = {"period": 4, **how}
    return DiLoCo(module.named_parameters(), adam(module), c, **how)


def shared(one: DiLoCo) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in one.theta.values()]


def train(module: nn.Module, one: DiLoCo, steps: int, rank: int) -> None:
    for _ in range(steps):
        backward(module, rank, one.steps)
        one.step()


STREAMING = {"period": 4, "fragments": 2, "overlap": 1}
WAYS: list[tuple[str, dict[str, Any]]] = [
    ("fp32", {}),
    ("sigma8", {}),
    ("e3m0", STREAMING),
    ("int4", {"period": 6, "fragments": 3, "overlap": 5}),  # rounds at random; two under way
    ("sign+ef", {"fragments": 2, "momentum": 0.0}),
]
