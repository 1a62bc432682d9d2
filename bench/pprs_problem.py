"""What `bench/pprs.py` minimises: f(x) = max_i |a_i . x - b_i|, as a pipeline of any depth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from commlib.optim import GD, Nesterov, Pipeline
from commlib.optim.noise import normals
from commlib.optim.pprs import grown

ROWS, D, TARGET = 50, 50, 0.02


class Slice(nn.Module):
    """One stage: some coordinates of x, and what they add to A x - b."""

    columns: torch.Tensor

    def __init__(self, columns: torch.Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(columns.shape[1]))
        self.register_buffer("columns", columns.contiguous())

    def forward(self, so_far: torch.Tensor) -> torch.Tensor:
        return so_far + torch.mv(self.columns, self.x)


class Problem:
    """50 rows a_i of unit norm, d = 50, b = A x* with |x*| = 1: f(0) = 0.250, f(x*) = 0."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        a = generator.standard_normal((ROWS, D))
        a /= np.linalg.norm(a, axis=1, keepdims=True)
        best = generator.standard_normal(D)
        best /= np.linalg.norm(best)
        self.a = torch.tensor(a, dtype=torch.float32)
        self.b = torch.tensor(a @ best, dtype=torch.float32)

    def pipeline(self, depth: int, activations: str | None = None) -> Pipeline:
        """Stage s holds a slice of x; stages beyond d hand on, the last takes the maximum."""
        parts = self.a.tensor_split(min(depth, D), dim=1)
        empty = (nn.Identity() for _ in range(depth - len(parts)))
        stages = [*(Slice(part) for part in parts), *empty]
        return Pipeline(stages, loss=lambda r: r.abs().max(), activations=activations)

    def value(self, x: torch.Tensor) -> float:
        """f(x)."""
        return float((self.a @ x - self.b).abs().max())

    def plain(
        self,
        draws: Draws,
        copies: int,
        gamma: float,
        eta: float,
        cap: int,
        *,
        momentum: bool = True,
    ) -> int | None:
        """Iterations of PPRS without a pipeline, all copies at once: quick, to choose by."""
        x = y = torch.zeros(D)
        growth = 0.0
        for step in range(cap + 1):
            if self.value(x) < TARGET:
                return step
            residuals = (x + gamma * draws.of(step)[:copies]) @ self.a.T - self.b
            worst = residuals.abs().argmax(dim=1, keepdim=True)
            signs = residuals.gather(1, worst).sign()
            moved = x - eta * (signs * self.a[worst[:, 0]]).mean(dim=0)
            growth = grown(growth)
            mu = (growth - 1) / grown(growth) if momentum else 0.0
            x, y = (1 + mu) * moved - mu * y, moved
        return None


class Draws:
    """The perturbations that the stages of a pipeline of `depth` make from `seed`, kept."""

    def __init__(self, depth: int, seed: int, copies: int) -> None:
        self.sizes = [len(part) for part in torch.arange(D).tensor_split(min(depth, D))]
        self.seed = seed
        self.copies = range(copies)
        self._steps: list[torch.Tensor] = []

    def of(self, step: int) -> torch.Tensor:
        """(copies, d), of one step."""
        while len(self._steps) <= step:
            parts = [
                normals(size, self.copies, seed=self.seed, step=len(self._steps), stage=stage)
                for stage, size in enumerate(self.sizes)
            ]
            self._steps.append(torch.cat(parts, dim=1))
        return self._steps[step]


@dataclass(frozen=True)
class Run:
    """How a run ended.

    iterations: to the target; None: not reached. ticks: of all steps, counted from the logs; exact:
    whether every step's are 2 (mK + depth - 1). path: the first iterates.
    """

    iterations: int | None
    ticks: int
    exact: bool
    path: tuple[torch.Tensor, ...]


def run(problem: Problem, optimizer: GD | Nesterov, cap: int) -> Run:
    """Steps until f < TARGET, at most `cap`."""
    pipeline, passes = optimizer.pipeline, getattr(optimizer, "K", 1)
    ticks, exact, path = 0, True, []
    reached = None
    for steps in range(cap + 1):
        x = position(pipeline)
        if problem.value(x) < TARGET:
            reached = steps
            break
        if steps < 3:
            path.append(x)
        if steps < cap:
            optimizer.step([-problem.b])
            ticks += pipeline.ticks
            exact &= pipeline.ticks == 2 * (passes + pipeline.depth - 1)
    exact &= ticks == pipeline.stages[0].clock  # steps follow one another without a gap
    return Run(reached, ticks, exact, tuple(path))


def position(pipeline: Pipeline) -> torch.Tensor:
    """x, gathered from the stages."""
    with torch.no_grad():
        return torch.cat([p for stage in pipeline.stages for p in stage.parameters])


def same_path(one: Run, other: Run) -> bool:
    """Whether the iterates that both have are bitwise the same."""
    pairs = list(zip(one.path, other.path, strict=False))
    return len(pairs) > 1 and all(torch.equal(a, b) for a, b in pairs)
