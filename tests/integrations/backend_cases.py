"""What the ranks of the backend's tests run, in the words of torch.distributed alone."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

import commlib
from commlib.integrations import groups
from tests.integrations.ddp_cases import assert_same_on_all_ranks, relative

N = 4096
INT8 = 0.02  # relative error of a sum under int8, at most: (1 + W) / (2 * 127) of a block's maximum
OPS = dist.ReduceOp
c10d: Any = distributed_c10d


@contextmanager
def world(options: Any = None, backend: str = "commlib") -> Iterator[dist.ProcessGroup]:
    """The default group anew, of another backend; over the store of the old one."""
    rank, size, store = dist.get_rank(), dist.get_world_size(), c10d._get_default_store()
    timeout = datetime.timedelta(seconds=30)
    dist.destroy_process_group()
    world.count = getattr(world, "count", 0) + 1  # type: ignore[attr-defined]
    store = dist.PrefixStore(f"world{world.count}", store)  # type: ignore[attr-defined]
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=timeout, pg_options=options
    )
    assert dist.group.WORLD is not None
    yield dist.group.WORLD


def values(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mine(*shape: int, group: Any = None) -> torch.Tensor:
    return values(dist.get_rank(group), *shape)


def total(*shape: int, group: Any = None) -> torch.Tensor:
    return sum(values(r, *shape) for r in range(dist.get_world_size(group)))  # type: ignore


def near(found: torch.Tensor, expected: torch.Tensor, *, lossy: bool = True) -> None:
    error = relative(found.double(), expected.double())
    assert error < INT8, error
    assert (error > 1e-5) == lossy, error


def sent(group: Any = None) -> tuple[int, int]:
    """Raw bytes of what was compressed in `group`, and what of it went over the wire."""
    group = groups.member(group)
    rows = groups.meter(group, torch.device("cpu")).rows()
    return sum(row["raw_bytes"] for row in rows), sum(row["wire_bytes"] for row in rows)


# Every reduction, operation and dtype: (verb, tensors it is given) -> what it leaves.


def reductions() -> dict[str, Callable[[torch.Tensor, Any], torch.Tensor]]:
    size = dist.get_world_size()

    def all_reduce(x: torch.Tensor, op: Any) -> torch.Tensor:
        assert dist.all_reduce(x, op) is None
        return x

    def asynchronous(x: torch.Tensor, op: Any) -> torch.Tensor:
        work = dist.all_reduce(x, op, async_op=True)
        assert work.wait()
        assert work.is_completed()
        return x

    def coalesced(x: torch.Tensor, op: Any) -> torch.Tensor:
        halves = list(x.chunk(2))
        with dist._coalescing_manager():
            for half in halves:
                dist.all_reduce(half, op)
        return x

    def reduce_scatter(x: torch.Tensor, op: Any) -> torch.Tensor:
        out = x.new_empty(x.numel() // size)
        dist.reduce_scatter_single(out, x, op)
        return gathered(out)

    def old_name(x: torch.Tensor, op: Any) -> torch.Tensor:
        out, opts = x.new_empty(x.numel() // size), c10d.ReduceScatterOptions()
        opts.reduceOp = op
        dist.group.WORLD._reduce_scatter_base(out, x, opts).wait()  # type: ignore[union-attr]
        return gathered(out)

    def scatter_list(x: torch.Tensor, op: Any) -> torch.Tensor:
        out = x.new_empty(x.numel() // size)
        dist.reduce_scatter(out, list(x.chunk(size)), op)
        return gathered(out)

    def scatter_coalesced(x: torch.Tensor, op: Any) -> torch.Tensor:
        outs = [x.new_empty(x.numel() // size), x.new_empty(1)]
        with dist._coalescing_manager():
            dist.reduce_scatter_single(outs[0], x, op)
            dist.reduce_scatter_single(outs[1], x[:size].clone(), op)
        return gathered(outs[0])

    return {
        verb.__name__: verb
        for verb in (
            all_reduce, asynchronous, coalesced, reduce_scatter, old_name, scatter_list,
            scatter_coalesced,
        )
    }  # fmt: skip


def gathered(x: torch.Tensor) -> torch.Tensor:
    out = x.new_empty(x.numel() * dist.get_world_size())
    dist.all_gather_single(out, x)
    return out


def operations_and_dtypes() -> None:
    """The table: what is compressed, what is bitwise gloo's, and that all of it is right."""
    size, n = dist.get_world_size(), 24 * 1024
    for name, verb in reductions().items():
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64):
            for op in (OPS.SUM, OPS.AVG, OPS.PREMUL_SUM(0.25), OPS.MAX, OPS.MIN, OPS.PRODUCT):
                if dtype is torch.int64 and op in (OPS.AVG, OPS.PREMUL_SUM(0.25)):
                    continue  # gloo refuses them, and so do we
                xs = [(values(r, n) * (10 if dtype is torch.int64 else 1)).to(dtype) for r in range(size)]
                found = verb(xs[dist.get_rank()].clone(), op)
                expected = reference(torch.stack(xs), op)
                assert_same_on_all_ranks(found)
                sums = op not in (OPS.MAX, OPS.MIN, OPS.PRODUCT)
                coded = sums and size > 1 and dtype in (torch.float32, torch.bfloat16)
                error = relative(found.double(), expected)
                about = (name, dtype, op, error)
                if coded and "8" in str(groups.policy(groups.member(None))):
                    assert 1e-4 < error < INT8, about
                elif dtype is torch.bfloat16:
                    assert error < 2**-8 * size, about
                else:
                    assert error < 1e-6, about


def reference(xs: torch.Tensor, op: Any) -> torch.Tensor:
    """`xs`, one row a rank, reduced."""
    exact = xs.double() if xs.is_floating_point() else xs
    if op == OPS.MAX:
        return exact.amax(0).double()
    if op == OPS.MIN:
        return exact.amin(0).double()
    if op == OPS.PRODUCT:
        return exact.prod(0).double()
    factor = 1 / len(xs) if op == OPS.AVG else op.factor if op == OPS.PREMUL_SUM else 1.0
    return factor * exact.sum(0).double()
