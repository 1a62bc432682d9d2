"""Edges: what travels between the stages of a pipeline, as its stages know it.

The names of torch.distributed.pipelining's private fields stand here and in `pipeline_hooks` only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from commlib.policy import Role

ROLES = {"forward": Role.ACTIVATION, "backward": Role.ACTIVATION_GRADIENT}


class Edge(NamedTuple):
    """One tensor's way between two stages; equal at both ends."""

    direction: str  # "forward" or "backward"
    source: int  # stage
    target: int
    slot: int  # place among the tensors of this way

    @property
    def key(self) -> str:
        """The name of what travels, in the rules of policies and in statistics."""
        tensor = f".{self.slot}" if self.slot else ""
        return f"stage{self.source}.{self.direction}.to{self.target}{tensor}"


class Shape(NamedTuple):
    """What travels on an edge per micro-batch."""

    sizes: tuple[int, ...]
    dtype: torch.dtype


def is_local(stage: Any, other: int) -> bool:
    """Whether stage number `other` lives on the rank of `stage`."""
    ranks = stage.stage_index_to_group_rank
    return bool(ranks[other] == ranks[stage.stage_index])


def outgoing(stage: Any, direction: str) -> list[tuple[Edge, Shape | None]]:
    """What `stage` sends per micro-batch, in the order of its send ops.

    A shape is None where the stage does not know it before it sends.
    """
    found: list[tuple[int, Shape | None]] = []
    if direction == "forward":
        shapes = _output_shapes(stage)
        for place, targets in sorted(stage.act_send_info.items()):
            shape = shapes[place] if place < len(shapes) else None
            found += [(target, shape) for target in targets if target is not None]
    elif stage.has_backward and not stage.is_first:
        grad_meta = getattr(stage, "_get_grad_send_meta", None)  # since torch 2.13
        for place, info in enumerate(stage.args_recv_info[0]):
            if info.is_root_arg if hasattr(info, "is_root_arg") else not hasattr(info, "buffer"):
                continue
            if grad_meta is None or grad_meta(place) is not None:
                found.append((info.source, _shape(info.buffer)))
    return _edges(
        stage, [(Edge(direction, stage.stage_index, to, 0), shape) for to, shape in found]
    )


def incoming(stage: Any, direction: str) -> list[tuple[Edge, Shape | None]]:
    """What `stage` receives per micro-batch, in the order of its receive ops."""
    if direction == "backward" and (not stage.has_backward or stage.is_last):
        return []
    infos = stage.args_recv_info if direction == "forward" else stage.grad_recv_info
    found: list[tuple[Edge, Shape | None]] = [
        (Edge(direction, info.source, stage.stage_index, 0), _shape(info.buffer))
        for info in infos.get(0, ())
        if getattr(info, "source", None) is not None and info.buffer is not None
    ]
    return _edges(stage, found)


def own_memory(stage: Any, direction: str, microbatch: int, x: torch.Tensor) -> torch.Tensor:
    """The buffer `x` of a stage, or one in its place where elements of `x` share their memory.

    A stage makes its buffers like the tensors they are for, and the gradient of a sum is one number
    seen many times.
    """
    if all(stride or size < 2 for stride, size in zip(x.stride(), x.shape, strict=True)):
        return x
    infos = stage.args_recv_info if direction == "forward" else stage.grad_recv_info
    for info in infos[microbatch]:
        if info.buffer is x:
            info.buffer = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            return info.buffer  # type: ignore[no-any-return]
    return x


def _edges(stage: Any, found: list[tuple[Edge, Shape | None]]) -> list[tuple[Edge, Shape | None]]:
    """The same with their slots counted."""
    seen: dict[Edge, int] = {}
    out = []
    for edge, shape in found:
        slot = seen[edge] = seen.get(edge, -1) + 1
        out.append((edge._replace(slot=slot), shape))
    return out


def _shape(tensor: torch.Tensor) -> Shape:
    return Shape(tuple(tensor.shape), tensor.dtype)


def _output_shapes(stage: Any) -> list[Shape | None]:
    """Shapes of a stage's outputs, by whatever name its version of torch has them."""
    metas = getattr(getattr(stage, "_stage_meta", None), "outputs", None)
    if metas is None and hasattr(stage, "get_outputs_meta"):
        metas = stage.get_outputs_meta()
    return [None if meta is None else Shape(tuple(meta.shape), meta.dtype) for meta in metas or ()]
