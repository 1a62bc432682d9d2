"""The error that coding makes, measured now and then on real tensors.

Codes the tensor once more, without its residual and without touching any state, and compares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from commlib_kernels.layout import Layout
from commlib_kernels.tag import Tag

from .algorithms import PowerSGD, Thc
from .collectives import thc
from .collectives.base import message
from .collectives.low_rank import approximated
from .feedback import names_of
from .plans import Message
from .telemetry import Meter

Read = Callable[[torch.Tensor, Callable[[list[Any]], None]], None]


def sample_errors(
    meter: Meter, plan_message: Message, x: torch.Tensor, step: int, read: Read
) -> None:
    """Record |Q(x) - x| / |x| of every compressed segment; a zero segment has none.

    read(numbers, then): calls `then` with the numbers, once they are known.
    """
    scheme = str(plan_message.scheme)
    layout = message(plan_message.layout, plan_message.scheme.codec, 1)
    coded = _coded(plan_message, layout, x, step)
    names: tuple[str | None, ...] = names_of(plan_message.key) or (None,) * len(layout.sizes)
    sampled, norms = [], []
    for segment, (name, start, size) in enumerate(
        zip(names, layout.starts, layout.sizes, strict=True)
    ):
        if not layout.is_exact(segment):
            part = x[start : start + size].float()
            sampled.append(name)
            norms += [(coded[start : start + size].float() - part).norm(), part.norm()]

    def record(pairs: list[Any]) -> None:
        for name, (error, norm) in zip(sampled, pairs, strict=True):
            if norm > 0:
                meter.record_error(name, scheme, error / norm)

    if norms:
        read(torch.stack(norms).view(-1, 2), record)


def _coded(plan_message: Message, layout: Layout, x: torch.Tensor, step: int) -> torch.Tensor:
    """`x` after coding, where `layout` has it compressed."""
    codec, config = plan_message.scheme.codec, plan_message.scheme.algorithm
    coded = torch.empty_like(x)
    if isinstance(config, Thc):
        for start, size in zip(layout.starts, layout.sizes, strict=True):
            part = slice(start, start + size)
            coded[part] = thc.approximated(x[part].float(), config.bits)
        return coded
    if not isinstance(config, PowerSGD):
        wire = torch.empty(codec.nbytes(layout), dtype=torch.uint8, device=x.device)
        codec.encode(x, wire, layout, Tag(step=step))
        codec.decode(wire, coded, layout, Tag(step=step))
        return coded
    places = zip(plan_message.shapes, layout.starts, layout.sizes, strict=True)
    for shape, start, size in places:
        if shape:
            matrix = x[start : start + size].view(shape).float()
            coded[start : start + size].view(shape).copy_(approximated(matrix, config.rank))
    return coded
