"""What the tests of members share: a worker of a small run."""

from __future__ import annotations

from typing import Any

from commlib.optim import ElasticDiLoCo, Members
from tests.optim.diloco import adam
from tests.optim.replicas import backward, model


def worker(members: Members, **how: Any) -> tuple[Any, ElasticDiLoCo]:
    module = model()
    how = {"period": 2, **how}
    return module, ElasticDiLoCo(module.named_parameters(), adam(module), members, **how)


def train(module: Any, one: ElasticDiLoCo, until: int, seed: int) -> None:
    while one.steps < until:
        backward(module, seed, one.steps)
        one.step()
