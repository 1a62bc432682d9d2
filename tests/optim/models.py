"""What the tests of pipelines share: a small model in any number of stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from commlib.optim import Pipeline

WIDTH = 12


class Shift(nn.Module):
    """Its parameter's gradient is the very tensor that goes on to the stage before."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(2, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.by


def modules(depth: int = 4) -> list[nn.Module]:
    """Stages with parameters, without, and one that hands on; the same at every call."""
    generator = torch.Generator().manual_seed(0)  # not the global one: ranks are threads
    first = [nn.Linear(WIDTH, WIDTH), Shift(), nn.Sequential(nn.Tanh(), nn.Linear(WIDTH, WIDTH))]
    rest = [nn.Identity() if place % 2 else nn.Linear(WIDTH, WIDTH) for place in range(depth - 3)]
    made = [*first, *rest][:depth]
    with torch.no_grad():
        for parameter in (p for module in made for p in module.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / WIDTH**0.5)
    return made


def data(samples: int = 2) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(2, WIDTH, generator=generator) for _ in range(2 * samples)]
    return made[:samples], made[samples:]


def error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().sum()


def here(depth: int = 4, **how: Any) -> Pipeline:
    """The pipeline of `modules`, all in this process."""
    return Pipeline(modules(depth), loss=error, **how)


def parameters(pipeline: Pipeline) -> list[torch.Tensor]:
    return [p.detach().clone() for stage in pipeline.stages for p in stage.parameters]


def gradients(pipeline: Pipeline) -> list[torch.Tensor]:
    made = [p.grad for stage in pipeline.stages for p in stage.parameters]
    return [one for one in made if one is not None]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.view(torch.int32), b.view(torch.int32))
        for a, b in zip(one, other, strict=True)
    )
