"""torch.distributed's calls as the communicator's: operations, lists, rows, strides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from commlib.communicator import Communicator, Work
from commlib.integrations.works import AsyncWork, Together
from commlib.scheme import Role
from commlib.work import writing

ReduceOp = dist.ReduceOp
After = Callable[[], None]


def is_sum(op: Any) -> bool:
    """Whether it is a sum times a factor: SUM, AVG, PREMUL_SUM."""
    return (
        op == ReduceOp.SUM
        or op == ReduceOp.AVG
        or (op == ReduceOp.PREMUL_SUM and hasattr(op, "factor"))
    )


def factor(op: Any, size: int) -> float:
    """What the sum over `size` ranks is multiplied by."""
    if op == ReduceOp.PREMUL_SUM:
        return float(op.factor)
    return 1.0 / size if op == ReduceOp.AVG else 1.0


def elements(
    x: torch.Tensor, mine: Sequence[int] | None, other: Sequence[int] | None, size: int
) -> list[int] | None:
    """Split sizes in elements; torch counts rows, and either side may be left out."""
    if not mine and not other:
        return None
    row = math.prod(x.shape[1:])
    return [rows * row for rows in mine] if mine else [x.numel() // size] * size


def gather_parts(
    route: Communicator, parts: Sequence[torch.Tensor], x: torch.Tensor, **how: Any
) -> tuple[Work, After]:
    """Gather every rank's `x`, all of one size; what puts them into `parts` once it is done."""
    flat = x.new_empty(route.size * x.numel())
    work = route.all_gather(flat, x.contiguous().view(-1), role=Role.PARAMETER, **how)

    def spread() -> None:
        for part, row in zip(parts, flat.view(route.size, -1), strict=True):
            part.copy_(row.view_as(part))

    return work, spread


def scatter_parts(
    route: Communicator, out: torch.Tensor, parts: Sequence[torch.Tensor], **how: Any
) -> Work:
    """`out` becomes the sum of what every rank has in its place in `parts`, all of one size."""
    flat = torch.cat([part.reshape(-1) for part in parts])
    return route.reduce_scatter(out.view(-1), flat, **how)


# torch's calls: whatever strides it would take, and always a work. `how`: scheme, and key.


def all_reduce(
    route: Communicator, x: torch.Tensor, op: Any, async_op: bool, **how: Any
) -> AsyncWork:
    flat, after = _written(x)
    work = route.all_reduce(flat, factor=factor(op, route.size), async_op=async_op, **how)
    return _work(work, async_op, [x], after)


def reduce_scatter(
    route: Communicator,
    out: torch.Tensor,
    x: torch.Tensor | Sequence[torch.Tensor],
    op: Any,
    async_op: bool,
    **how: Any,
) -> AsyncWork:
    flat, after = _written(out)
    how |= {"factor": factor(op, route.size), "async_op": async_op}
    if isinstance(x, torch.Tensor):
        work = route.reduce_scatter(flat, x.contiguous(), **how)
    else:
        work = scatter_parts(route, flat, x, **how)
    return _work(work, async_op, [out], after)


def all_gather(
    route: Communicator,
    out: torch.Tensor | Sequence[torch.Tensor],
    x: torch.Tensor,
    async_op: bool,
    **how: Any,
) -> AsyncWork:
    after: After | None
    if isinstance(out, torch.Tensor):
        flat, after = _written(out)
        work = route.all_gather(flat, x.contiguous(), role=Role.PARAMETER, async_op=async_op, **how)
        return _work(work, async_op, [out], after)
    work, after = gather_parts(route, out, x, async_op=async_op, **how)
    return _work(work, async_op, out, after)


def all_to_all(
    route: Communicator,
    out: torch.Tensor,
    x: torch.Tensor,
    out_rows: Sequence[int] | None,
    in_rows: Sequence[int] | None,
    async_op: bool,
    **how: Any,
) -> AsyncWork:
    flat, after = _written(out)
    work = route.all_to_all(
        flat,
        x.contiguous(),
        out_splits=elements(out, out_rows, in_rows, route.size),
        in_splits=elements(x, in_rows, out_rows, route.size),
        role=Role.ACTIVATION,
        async_op=async_op,
        **how,
    )
    return _work(work, async_op, [out], after)


def broadcast(
    route: Communicator, x: torch.Tensor, src: int, async_op: bool, **how: Any
) -> AsyncWork:
    flat, after = _written(x)
    work = route.broadcast(flat, src, role=Role.PARAMETER, async_op=async_op, **how)
    return _work(work, async_op, [x], after)


def _written(x: torch.Tensor) -> tuple[torch.Tensor, After | None]:
    """`x` without gaps, to be written to; what then brings the result back to where it belongs."""
    if x.is_contiguous():
        return x, None
    flat = x.detach().contiguous()

    def back() -> None:
        x.detach().copy_(flat)

    return flat, back


def _work(
    work: Work, async_op: bool, outputs: Sequence[torch.Tensor], after: After | None = None
) -> AsyncWork:
    if after is not None and not async_op:
        with writing(*outputs):
            after()
        after = None
    return AsyncWork(work, outputs, after)


# How c10d spells them.


def spelled(kind: Any, given: Any, timeout: Any = None) -> Any:
    """c10d's options of a call that may name its operation alone, or nothing."""
    if isinstance(given, kind):
        return given
    options = kind()
    if given is not None:
        options.reduceOp = given
    if timeout is not None:
        options.timeout = timeout
    return options


def summing(options: Any) -> Any:
    """The options of a reduction, with SUM."""
    made = type(options)()
    for name in ("timeout", "asyncOp", "rootRank", "rootTensor"):
        if hasattr(options, name):
            setattr(made, name, getattr(options, name))
    made.reduceOp = ReduceOp.SUM
    return made


def coalesced(
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    takes: Callable[[torch.Tensor, torch.Tensor], bool],
    ours: Callable[[torch.Tensor, torch.Tensor], AsyncWork],
    theirs: Callable[[list[torch.Tensor], list[torch.Tensor]], Any],
) -> Any:
    """One call on many tensors: each that is taken by itself, the rest in one call of torch's."""
    if len(outputs) != len(inputs):
        return theirs(list(outputs), list(inputs))
    works, rest = [], []
    for out, x in zip(outputs, inputs, strict=True):
        if takes(out, x):
            works.append(ours(out, x))
        else:
            rest.append((out, x))
    if rest or not works:
        works.append(theirs([out for out, _ in rest], [x for _, x in rest]))
    return works[0] if len(works) == 1 else Together(works, outputs)
