"""What `bench/feedback.py` trains: two small models, and the loop that trains them on four ranks.

Models and data only. Quantizers, residuals and the reduction are `Communicator`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from commlib import Communicator, Policy, Scheme
from commlib.policy import Rule
from commlib.transport import Transport, run_ranks

RANKS = 4


class Problem(Protocol):
    """What is trained: one flat vector of weights, cut into named segments."""

    keys: tuple[str, ...]
    sizes: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...] | None  # where segments are matrices
    rate: float  # of SGD

    def start(self) -> torch.Tensor: ...
    def batches(self, rank: int, steps: int) -> Iterator[object]: ...
    def gradient(self, weights: torch.Tensor, batch: object) -> torch.Tensor: ...


def train(problem: Problem, scheme: Scheme, steps: int) -> torch.Tensor:
    """Weights after `steps` steps of SGD on four ranks, whose gradients travel under `scheme`."""

    def one_rank(transport: Transport) -> torch.Tensor:
        torch.set_num_threads(1)
        # A rule without conditions: Policy.parse would leave vectors exact.
        communicator = Communicator(transport, Policy((Rule(scheme),)))
        weights = problem.start()
        for batch in problem.batches(transport.rank, steps):
            gradient = problem.gradient(weights, batch)
            communicator.all_reduce_segments(
                gradient, problem.keys, problem.sizes, shapes=problem.shapes, factor="avg"
            ).wait()
            weights.sub_(gradient, alpha=problem.rate)
        communicator.close()
        return weights

    first, *others = run_ranks(RANKS, one_rank, timeout=1800)
    for rank, weights in enumerate(others, 1):
        if not torch.equal(weights.view(torch.int32), first.view(torch.int32)):
            raise RuntimeError(f"{scheme}: the weights of rank {rank} are not those of rank 0")
    return first


class Digits:
    """MLP 64-64-64-10, ReLU, softmax loss; one model per seed, 16 images per rank and step.

    skewed: each rank has digits of few classes (sorted shards) instead of a share of all.
    layered: every matrix and bias is a segment of its own, instead of every model.
    """

    layers = ((64, 64), (64, 64), (64, 10))
    numel = sum(fan_in * fan_out + fan_out for fan_in, fan_out in layers)
    rate = 0.2
    batch = 16

    def __init__(
        self, seeds: Sequence[int], *, skewed: bool = False, layered: bool = False
    ) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(images))[:1400]
        if skewed:
            order = order[np.argsort(labels[order], kind="stable")]
        self.images = torch.tensor(images[order] / 16, dtype=torch.float32)
        self.labels = torch.tensor(labels[order])
        self.seeds = tuple(seeds)
        self.skewed = skewed
        self.keys = tuple(f"seed{seed}" for seed in seeds)
        self.sizes: tuple[int, ...] = (self.numel,) * len(seeds)
        self.shapes: tuple[tuple[int, ...], ...] | None = None
        if layered:
            shapes = [shape for fans in self.layers for shape in (fans, fans[1:])]
            self.keys = tuple(f"{key}/{n}" for key in self.keys for n in range(len(shapes)))
            self.shapes = tuple(shapes * len(seeds))
            self.sizes = tuple(map(math.prod, self.shapes))

    def start(self) -> torch.Tensor:
        weights = torch.zeros(len(self.seeds), self.numel)
        for row, seed in zip(weights, self.seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            for matrix, _ in self.views(row[None]):
                he = math.sqrt(2 / matrix.shape[1])
                matrix[0] = he * torch.randn(matrix.shape[1:], generator=generator)
        return weights.view(-1)

    def batches(self, rank: int, steps: int) -> Iterator[torch.Tensor]:
        low, high = 0, len(self.labels)
        if self.skewed:
            low, high = rank * high // RANKS, (rank + 1) * high // RANKS
        drawn = [
            torch.randint(
                low,
                high,
                (steps, self.batch),
                generator=torch.Generator().manual_seed(1 + RANKS * seed + rank),
            )
            for seed in self.seeds
        ]
        return iter(torch.stack(drawn, dim=1))

    def gradient(self, weights: torch.Tensor, batch: object) -> torch.Tensor:
        assert isinstance(batch, torch.Tensor)
        inputs, probabilities = self._forward(weights, self.images[batch])
        probabilities.scatter_add_(
            2, self.labels[batch][..., None], torch.full((*batch.shape, 1), -1.0)
        )
        delta = probabilities / batch.shape[1]
        gradient = torch.empty_like(weights)
        models = zip(self.views(weights), self.views(gradient), inputs, strict=True)
        for (matrix, _), (d_matrix, d_bias), x in reversed(list(models)):
            d_matrix.copy_(x.mT @ delta)
            d_bias.copy_(delta.sum(1, keepdim=True))
            delta = (delta @ matrix.mT) * (x > 0)
        return gradient

    def losses(self, weights: torch.Tensor) -> list[float]:
        """Mean training loss of each seed's model."""
        _, probabilities = self._forward(weights, self.images.expand(len(self.seeds), -1, -1))
        right = probabilities[:, torch.arange(len(self.labels)), self.labels]
        return [float(loss) for loss in -right.clamp_min(1e-30).log().mean(1)]

    def _forward(
        self, weights: torch.Tensor, x: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The input of each layer, and the softmax of the last."""
        inputs = []
        for matrix, bias in self.views(weights):
            x = x.relu() if inputs else x
            inputs.append(x)
            x = torch.baddbmm(bias, x, matrix)
        return inputs, x.softmax(2)

    def views(self, weights: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(matrix, bias) of each layer, one model per row."""
        rows, place, views = weights.view(-1, self.numel), 0, []
        for fan_in, fan_out in self.layers:
            matrix = rows[:, place : place + fan_in * fan_out].unflatten(1, (fan_in, fan_out))
            place += fan_in * fan_out
            views.append((matrix, rows[:, None, place : place + fan_out]))
            place += fan_out
        return views


class LeastSquares:
    """y = x.w + 0.1 noise, 10 000 Gaussian samples; one model per dimension and seed."""

    shapes = None
    rate = 0.02
    batch = 64
    samples = 10_000

    def __init__(self, dims: Sequence[int], seeds: Sequence[int]) -> None:
        self.keys = tuple(f"d{d}/seed{seed}" for d in dims for seed in seeds)
        self.sizes = tuple(d for d in dims for _ in seeds)
        self.seeds = tuple(seeds)
        self.data, best = [], []
        for d in dims:
            for seed in seeds:
                generator = torch.Generator().manual_seed(1000 * d + seed)
                x = torch.randn(self.samples, d, generator=generator)
                w = torch.randn(d, generator=generator)
                y = x @ w + 0.1 * torch.randn(self.samples, generator=generator)
                self.data.append((x, y))
                wide = x.double()
                best.append(torch.linalg.solve(wide.T @ wide, wide.T @ y.double()))
        self.best = torch.cat(best)

    def start(self) -> torch.Tensor:
        return torch.zeros(sum(self.sizes))

    def batches(self, rank: int, steps: int) -> Iterator[list[torch.Tensor]]:
        generator = torch.Generator().manual_seed(1 + rank)
        for _ in range(steps):
            yield list(
                torch.randint(self.samples, (len(self.sizes), self.batch), generator=generator)
            )

    def gradient(self, weights: torch.Tensor, batch: object) -> torch.Tensor:
        assert isinstance(batch, list)
        parts = []
        for (x, y), w, rows in zip(self.data, weights.split(self.sizes), batch, strict=True):
            part = x[rows]
            parts.append((part @ w - y[rows]) @ part / self.batch)
        return torch.cat(parts)

    def distances(self, weights: torch.Tensor) -> dict[int, float]:
        """Squared distance to the least-squares solution by dimension, the mean over seeds."""
        errors = (weights.double() - self.best).square().split(self.sizes)
        return {
            d: math.fsum(float(e.sum()) for e in errors if len(e) == d) / len(self.seeds)
            for d in self.sizes
        }
