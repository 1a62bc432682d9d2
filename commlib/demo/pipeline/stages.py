"""A GPT cut into pipeline stages, and stages whose boundaries are cut to one element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model import BYTES, GPT, Shape

SHAPES = {
    "3M": Shape(layers=4, width=256, heads=4, context=128),
    "small": Shape(layers=4, width=64, heads=2, context=64),
}


def parameters(shape: Shape) -> int:
    """Number of parameters of a whole model."""
    return sum(parameter.numel() for parameter in GPT(shape).parameters())


class Stage(nn.Module):
    """Stage `index` of `stages`: its share of the blocks; the first embeds, the last predicts.

    Takes bytes (batch, length) or the hidden states of the stage before, gives hidden states or
    logits. The weights are those of `GPT(shape, seed)`.

    Raises ValueError where there are fewer blocks than stages.
    """

    def __init__(self, shape: Shape, index: int, stages: int, seed: int = 0) -> None:
        super().__init__()
        if not 0 <= index < stages <= shape.layers:
            raise ValueError(f"stage {index} of {stages}: a model of {shape.layers} blocks")
        whole = GPT(shape, seed)
        first, end = (shape.layers * number // stages for number in (index, index + 1))
        self.blocks = nn.ModuleList(list(whole.blocks)[first:end])
        self.bytes: nn.Embedding | None = None
        self.places: nn.Embedding | None = None
        self.norm: nn.LayerNorm | None = None
        self.head: nn.Linear | None = None
        if index == 0:
            self.bytes, self.places = whole.bytes, whole.places
        if index == stages - 1:
            self.norm, self.head = whole.norm, whole.head

    def forward(self, x: Tensor) -> Tensor:
        if self.bytes is not None and self.places is not None:
            x = self.bytes(x) + self.places(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            x = block(x)
        if self.norm is not None and self.head is not None:
            x = self.head(self.norm(x))
        return x


def loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte."""
    return F.cross_entropy(logits.view(-1, BYTES), target.reshape(-1))


class Alone(nn.Module):
    """A stage that computes as always and sends one element: what a step costs without a network.

    What arrives is made anew, activations and gradients, as random numbers of an ordinary size.
    So its weights learn nothing.
    """

    filler: Tensor

    def __init__(self, stage: Stage, index: int, stages: int, size: tuple[int, ...]) -> None:
        super().__init__()
        self.stage, self.first, self.last = stage, index == 0, index == stages - 1
        noise = torch.randn(size, generator=torch.Generator().manual_seed(index))
        self.register_buffer("filler", noise)

    def forward(self, x: Tensor) -> Tensor:
        if not self.first:
            x = _Grow.apply(x, self.filler)  # type: ignore[no-untyped-call]
        x = self.stage(x)
        if not self.last:
            x = _Shrink.apply(x, self.filler)  # type: ignore[no-untyped-call]
        return x


class _Grow(torch.autograd.Function):
    """One element becomes a tensor; its gradient becomes one element."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, filler: Tensor) -> Tensor:
        return filler.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].reshape(-1)[:1].clone(), None


class _Shrink(torch.autograd.Function):
    """A tensor becomes one element; its gradient becomes a tensor."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, filler: Tensor) -> Tensor:
        ctx.save_for_backward(filler)
        return whole.reshape(-1)[:1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (filler,) = ctx.saved_tensors
        return 1e-4 * filler, None
