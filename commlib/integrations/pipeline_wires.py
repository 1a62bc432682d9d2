"""What a pipeline exchanges for the tensors in its stages' messages."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from commlib.boundary import Boundary
from commlib.modes import Delta, Reuse
from commlib.plans import single
from commlib.sampling import sample_errors
from commlib.telemetry import Meter


class Due(NamedTuple):
    """A message that was posted."""

    boundary: Boundary | None  # None: raw
    wire: torch.Tensor  # what it is received into
    x: torch.Tensor  # the stage's own buffer
    work: Any  # None: the schedule waits for it


def sample(meter: Meter, boundary: Boundary, x: torch.Tensor) -> None:
    """Measure what coding does to `x` by itself.

    Not where its difference is coded, nor on a device, which the host would wait for.
    """
    if not x.is_cuda and not isinstance(boundary.scheme.feedback, Delta | Reuse):
        plan = single("send", boundary.scheme, boundary.key, x.numel(), x.dtype)
        flat = x.detach().contiguous().view(-1)
        sample_errors(meter, plan.messages[0], flat, 0, lambda t, then: then(t.tolist()))


def decode(boundary: Boundary, wire: torch.Tensor, x: torch.Tensor, microbatch: int) -> None:
    """Decode into a stage's own buffer."""
    if x.is_contiguous():
        boundary.decode(wire, x, microbatch)
        return
    # as the tensor was at its sender, where that has a layout of its own
    plain = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    boundary.decode(wire, plain, microbatch)
    x.copy_(plain)


def with_wire(op: Any, wire: torch.Tensor) -> Any:
    """The same P2POp with another tensor."""
    return type(op)(op.op, wire, group=op.group, tag=op.tag, group_peer=op.group_peer)
