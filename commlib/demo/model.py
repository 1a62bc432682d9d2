"""A small byte-level GPT (Radford et al. 2019): pre-norm blocks, GELU, no dropout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BYTES = 256


@dataclass(frozen=True)
class Shape:
    """What decides the size of a `GPT`; about 12 x layers x width^2 parameters."""

    layers: int
    width: int
    heads: int
    context: int


SHAPES = {
    "10M": Shape(layers=6, width=384, heads=6, context=128),
    "small": Shape(layers=4, width=128, heads=4, context=128),
}


class Block(nn.Module):
    """Attention and an MLP, each added to its own input."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        down: Tensor = self.down(F.gelu(self.up(self.norm2(x))))
        return x + down


class GPT(nn.Module):
    """Predicts the next byte. `forward(x, y)` gives the mean cross-entropy in nats per byte.

    x and y are integer tensors of shape (batch, length), length at most `shape.context`. The
    weights depend on `seed` alone, so ranks and methods start equal.
    """

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTES, shape.width)
        self.places = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, BYTES, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue  # norms and biases: PyTorch's ones and zeros, see below
            # Branches that end on the residual stream start smaller, so that it does not grow.
            ends = name.endswith(("out.weight", "down.weight"))
            std = 0.02 / (2 * shape.layers) ** 0.5 if ends else 0.02
            nn.init.normal_(parameter, std=std, generator=generator)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        hidden = self.bytes(x) + self.places(places)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.norm(hidden))
        return F.cross_entropy(logits.view(-1, BYTES), y.reshape(-1))


def optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """One of OPTIMIZERS, with the settings that both demos use."""
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer {name!r} is unknown; allowed: {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name](model.parameters())


# Of the learning rates 3e-4, 1e-3 and 0.03, 0.1, 0.3 the best after 300 steps of the small model.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    "sgd": partial(torch.optim.SGD, lr=0.03, momentum=0.9),
}
WARMUP_STEPS = 10


def warm_up(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the learning rate of `step` (from 0): linear over the first steps, constant then.

    It does not depend on how long the run is: the first 60 steps of 300 are a run of 60.
    """
    for group in optimizer.param_groups:
        full = group.setdefault("full_lr", group["lr"])
        group["lr"] = full * min(1.0, (step + 1) / WARMUP_STEPS)
