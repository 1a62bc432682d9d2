"""torch.compile around a whole step: graphs break at commlib's optimizers, which do what they did.

Dynamo followed their steps into kernels: one never came back, one failed, one ended the process.
Replicas that it compiles differently on two ranks would drift apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import commlib
from commlib import Communicator
from commlib.optim import (
    DASGD,
    EASGD,
    EF21,
    Center,
    DiLoCo,
    Downpour,
    OneBitAdam,
    Projected,
    local,
    schedules,
)
from commlib.transport import ThreadTransport
from tests.communicators import only
from tests.optim.replicas import backward, model, weights
from tests.processes import Pool

Make = Callable[[nn.Module], Any]


def alone(scheme: str) -> Communicator:
    return Communicator(ThreadTransport.world(1)[0], only(scheme))


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=1e-2)


def linked(module: nn.Module, **how: Any) -> Any:
    named = list(module.named_parameters())
    return local(Center(named, push="int4", **how), named, "worker")


MAKERS: dict[str, Make] = {
    "EASGD": lambda m: EASGD(sgd(m), linked(m), moving_rate=0.2, period=2),
    "Downpour": lambda m: Downpour(sgd(m), linked(m), period=2),
    "DASGD": lambda m: DASGD(m.parameters(), linked(m, rule=Projected(schedules.Auto(0.01)))),
    "DiLoCo": lambda m: DiLoCo(m.named_parameters(), sgd(m), alone("int8"), period=2),
    "OneBitAdam": lambda m: OneBitAdam(m.named_parameters(), alone("sign+ef"), 1e-3, warmup=1),
    "EF21": lambda m: EF21(m.named_parameters(), alone("int8:round=nearest"), 1e-2),
}


@pytest.fixture(autouse=True)
def _dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def none_of_ours(graph: Any, inputs: Any) -> Any:
    """A compiler that refuses what comes from commlib, and runs the rest as it is."""
    home = str(Path(commlib.__file__).parent)
    assert not [node for node in graph.graph.nodes if home in (node.stack_trace or "")]
    return graph.forward


@pytest.mark.parametrize("name", MAKERS)
def test_a_compiled_step_is_the_step(name: str) -> None:
    def trained(*, compiled: bool) -> list[torch.Tensor]:
        module = model()
        optimizer = MAKERS[name](module)

        def step(number: int) -> None:
            backward(module, 0, number)
            optimizer.step()

        run = torch.compile(step, backend=none_of_ours) if compiled else step
        for number in range(4):
            run(number)
        return weights(module)

    assert all(map(torch.equal, trained(compiled=True), trained(compiled=False)))


def sharded_parameters_are_refused() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for make in MAKERS.values():
        module = model()
        fully_shard(module, mesh=mesh)
        with pytest.raises(ValueError, match=r"is a DTensor .*allowed: plain tensors"):
            make(module)


@pytest.mark.processes
def test_sharded_parameters_are_refused(pool: Pool) -> None:
    pool.run(sharded_parameters_are_refused, ranks=2)
