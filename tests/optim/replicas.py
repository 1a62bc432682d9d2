"""What the tests of replicated optimizers share: a model, batches, and ranks that train."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn

from commlib import Communicator
from tests.communicators import on_ranks
from tests.optim.models import same

Named = list[tuple[str, nn.Parameter]]
Body = Callable[[Communicator], Any]


class Optimizer(Protocol):
    steps: int
    communicator: Communicator

    def step(self) -> object: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Any) -> None: ...


Make = Callable[[Iterable[Any], Communicator], Optimizer]


def model() -> nn.Sequential:
    """Matrices of several blocks, and vectors; the same at every call."""
    generator = torch.Generator().manual_seed(0)  # not the global one: ranks are threads
    made = nn.Sequential(nn.Linear(7, 90), nn.Tanh(), nn.Linear(90, 5))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return made


def backward(module: nn.Module, rank: int, step: int) -> None:
    """The gradient of a rank's own batch."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    x, y = torch.randn(8, 7, generator=generator), torch.randn(8, 5, generator=generator)
    module.zero_grad()
    (module(x) - y).square().mean().backward()


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def train(make: Make, steps: int) -> Body:
    """A body for `on_ranks`: the weights after so many steps."""

    def body(communicator: Communicator) -> list[torch.Tensor]:
        module = model()
        optimizer = make(module.named_parameters(), communicator)
        for step in range(steps):
            backward(module, communicator.rank, step)
            optimizer.step()
        return weights(module)

    return body


def alike(size: int, policy: Any, make: Make, steps: int) -> list[torch.Tensor]:
    """The weights after so many steps, which are the same bits on all ranks."""
    first, *others = on_ranks(size, policy, train(make, steps))
    assert all(same(first, other) for other in others)
    return list(first)


def drawn(rank: int, step: int, *shape: int) -> torch.Tensor:
    """A gradient that depends on no weights."""
    generator = torch.Generator().manual_seed(1000 + 100 * step + rank)
    return torch.randn(*shape, generator=generator)


def resumed(size: int, policy: Any, make: Make, before: int, after: int) -> None:
    """Train, save to a file's bytes, load into new objects, go on: as if nothing had been."""

    def body(communicator: Communicator) -> tuple[bytes, list[torch.Tensor], list[torch.Tensor]]:
        import io

        module = model()
        optimizer = make(module.named_parameters(), communicator)
        for step in range(before):
            backward(module, communicator.rank, step)
            optimizer.step()
        file, reached = io.BytesIO(), weights(module)
        torch.save(optimizer.state_dict(), file)
        for step in range(before, before + after):
            backward(module, communicator.rank, step)
            optimizer.step()
        return file.getvalue(), reached, weights(module)

    saved = on_ranks(size, policy, body)

    def again(communicator: Communicator) -> list[torch.Tensor]:
        import io

        data, reached, _ = saved[communicator.rank]
        module = model()
        with torch.no_grad():
            for parameter, value in zip(module.parameters(), reached, strict=True):
                parameter.copy_(value)
        optimizer = make(module.named_parameters(), communicator)
        optimizer.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))
        assert optimizer.steps == before
        for step in range(before, before + after):
            backward(module, communicator.rank, step)
            optimizer.step()
        return weights(module)

    for found, (_, _, whole) in zip(on_ranks(size, policy, again), saved, strict=True):
        assert same(found, whole)
