"""What the ranks of the backend's tests run, in the words of torch.distributed alone."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

import commlib
from commlib.integrations import groups
from tests.integrations.ddp_cases import assert_same_on_all_ranks, raises, relative

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
    store = dist.PrefixStore("next", store)  # which is inside the old one's
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
                xs = [
                    (values(r, n) * (10 if dtype is torch.int64 else 1)).to(dtype)
                    for r in range(size)
                ]
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


# What else moves tensors, under int8.


def parameters_travel_raw() -> None:
    """A bare scheme leaves weights alone: what DDP broadcasts and FSDP gathers."""
    size = dist.get_world_size()
    rows = torch.cat([values(r, 64, 64) for r in range(size)])
    out = torch.empty(size * 64, 64)
    dist.all_gather_single(out, mine(64, 64))
    assert torch.equal(out, rows)
    parts = list(torch.empty(size * 64, 64).chunk(size))
    dist.all_gather(parts, mine(64, 64))
    assert torch.equal(torch.cat(parts), rows)
    x = mine(64, 64)
    dist.broadcast(x, size - 1)
    assert torch.equal(x, values(size - 1, 64, 64))
    assert sent() == (0, 0)


PARAMETERS = {"rules": [{"scheme": "int8", "role": "parameter", "min_numel": 1024}]}


def named_parameters_are_compressed() -> None:
    """Under PARAMETERS, which names no other role."""
    size, rank = dist.get_world_size(), dist.get_rank()
    rows = torch.cat([values(r, 64, 64) for r in range(size)])
    out = torch.empty(size * 64, 64)
    dist.all_gather_single(out, mine(64, 64))
    near(out, rows)
    with commlib.exact():  # the check itself gathers
        assert_same_on_all_ranks(out)
    out = torch.empty(size * 64, 64)
    inside = out[64 * rank : 64 * (rank + 1)]  # as FSDP gathers
    inside.copy_(mine(64, 64))
    dist.all_gather_single(out, inside)
    near(out, rows)
    parts = list(torch.empty(size * 64, 64).chunk(size))
    work = dist.all_gather(parts, mine(64, 64), async_op=True)
    assert work is not None
    assert all(a is b for a, b in zip(work.get_future().wait(), parts, strict=True))
    near(torch.cat(parts), rows)
    outs = [torch.empty(size * 64, 64), torch.empty(size * 3)]
    with dist._coalescing_manager():
        dist.all_gather_single(outs[0], mine(64, 64))
        dist.all_gather_single(outs[1], torch.full((3,), float(rank)))
    near(outs[0], rows)
    assert torch.equal(outs[1], torch.arange(float(size)).repeat_interleave(3))
    x = mine(64, 64)
    dist.broadcast(x, size - 1)
    near(x, values(size - 1, 64, 64))
    with commlib.exact():
        assert_same_on_all_ranks(x)
    x = mine(64, 64)
    dist.all_reduce(x)
    near(x, total(64, 64), lossy=False)


def activations_are_compressed() -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    out = torch.empty(size * 32, 48)
    dist.all_to_all_single(out, mine(size * 32, 48))
    near(out, torch.cat([values(r, size * 32, 48).chunk(size)[rank] for r in range(size)]))

    following, before = (rank + 1) % size, (rank - 1) % size
    x, y = mine(64, 64), torch.empty(64, 64)
    ops = [dist.P2POp(dist.isend, x, following), dist.P2POp(dist.irecv, y, before)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    near(y, values(before, 64, 64))
    small, into = torch.full((5,), float(rank)), torch.empty(5)
    ops = [dist.P2POp(dist.irecv, into, before), dist.P2POp(dist.isend, small, following)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    assert into.tolist() == [before] * 5
    if rank == 0:
        dist.send(x, 1, tag=7)
        sending = dist.isend(x, 1)
        assert sending is not None
        assert sending.wait()
    elif rank == 1:
        got = torch.empty(N)
        assert dist.recv(got, 0, tag=7) == 0
        near(got.view(64, 64), values(0, 64, 64))
        assert dist.recv(got) == 0  # from any
        near(got.view(64, 64), values(0, 64, 64))
    raw, wire = sent()
    assert raw > 3.8 * wire > 0
    # rank s sends (32 + 8 s + 4 r) rows to rank r, and none to itself where s + r == 1
    counts = [[0 if s + r == 1 else 32 + 8 * s + 4 * r for r in range(size)] for s in range(size)]
    sends, receives = counts[rank], [counts[s][rank] for s in range(size)]
    out = torch.empty(sum(receives), 48)
    dist.all_to_all_single(out, mine(sum(sends), 48), receives, sends)
    near(
        out, torch.cat([values(s, sum(counts[s]), 48).split(counts[s])[rank] for s in range(size)])
    )


def what_is_not_compressed_is_passed_on() -> None:
    """Small, integer, sparse and exact tensors, control traffic: bitwise torch's, nothing coded."""
    size, rank = dist.get_world_size(), dist.get_rank()
    before = sent()
    x = mine(100)
    dist.all_reduce(x)
    near(x, total(100), lossy=False)
    with commlib.exact():
        x = mine(N)
        dist.all_reduce(x)
        near(x, total(N), lossy=False)
    flag = torch.tensor([rank == 0])
    dist.all_reduce(flag, OPS.MAX)
    assert flag.item()
    sparse = torch.eye(64).to_sparse()
    dist.all_reduce(sparse)
    assert torch.equal(sparse.to_dense(), size * torch.eye(64))
    z = torch.complex(mine(N), mine(N))
    dist.all_reduce(z)  # as real numbers: of them a complex one is two
    assert relative(z.real, total(N)) < INT8
    before = sent()
    objects: list[Any] = [None] * size
    dist.all_gather_object(objects, {"rank": rank, "text": "x" * 5000})
    assert [found["rank"] for found in objects] == list(range(size))
    said = [["from 0"] if rank == 0 else None]
    dist.broadcast_object_list(said, src=0)
    assert said == [["from 0"]]
    scattered: list[Any] = [None]
    dist.scatter_object_list(scattered, [{"for": r} for r in range(size)], src=0)
    assert scattered == [{"for": rank}]
    rows = [torch.empty(N) for _ in range(size)] if rank == 0 else None
    dist.gather(mine(N), rows, dst=0)
    assert rows is None or torch.equal(rows[-1], values(size - 1, N))
    got = torch.empty(N)
    dist.scatter(got, [values(r, N) for r in range(size)] if rank == 0 else None, src=0)
    assert torch.equal(got, mine(N))
    empty = torch.empty(0)
    dist.all_reduce(empty)
    dist.all_gather_single(torch.empty(0), empty)
    dist.reduce_scatter_single(torch.empty(0), empty)
    dist.barrier()
    assert sent() == before


def works_are_torchs() -> None:
    """What a caller may do with what an asynchronous call returns."""
    xs = [mine(64, 64) * k for k in range(1, 5)]
    works = [dist.all_reduce(x, async_op=True) for x in xs]
    dist.barrier()  # gloo's waits for all that was called before
    assert all(work.is_completed() for work in works)
    for k, (work, x) in enumerate(zip(works, xs, strict=True), 1):
        assert isinstance(work, dist.Work)
        assert work.wait(datetime.timedelta(seconds=20))
        assert work.is_success()
        assert work.exception() is None
        assert work.result()[0] is x
        assert work.get_future().then(lambda done: done.value()[0]).wait() is x
        near(x, k * total(64, 64))
    parameter = torch.nn.Parameter(mine(64, 64))
    dist.all_reduce(parameter)
    near(parameter.detach(), total(64, 64))
    turned = mine(64, 64).t()  # of what rank 0 has in a row, others may have a column
    work = dist.all_reduce(turned if dist.get_rank() else turned.contiguous(), async_op=True)
    assert work is not None
    work.wait()
    if dist.get_rank():
        near(turned, total(64, 64).t())
    group: Any = dist.group.WORLD
    x = mine(64, 64)
    group.allreduce(x).wait()
    near(x, total(64, 64))
    x = mine(64, 64)
    group.allreduce([x], OPS.AVG).wait()
    near(x, total(64, 64) / dist.get_world_size())
    x = mine(64, 64)
    group.allreduce([x], op=OPS.MAX).wait()
    xs = [mine(64, 64), mine(16), mine(64, 64) * 2]
    work = group.allreduce_coalesced(xs)
    assert work.get_future().wait()[2] is xs[2]
    assert work.is_completed()
    near(xs[0], total(64, 64))
    near(xs[1], total(16), lossy=False)
    near(xs[2], 2 * total(64, 64))


def failures() -> None:
    """torch's errors come out as they are; commlib's name ranks and leave other calls alone."""
    rank = dist.get_rank()
    x = mine(N)
    raises(RuntimeError, "Cannot use ReduceOp.BAND")(lambda: dist.all_reduce(x, OPS.BAND))
    raises(RuntimeError, "PREMUL_SUM")(
        lambda: dist.all_reduce(torch.arange(N), OPS.PREMUL_SUM(2.0))
    )
    raises(ValueError, "contiguous")(
        lambda: dist.all_to_all_single(torch.empty(64, 64), mine(64, 64).t())
    )
    options = commlib.Options("int8" if rank else "int4")
    group = dist.new_group(pg_options=options)
    raises(RuntimeError, "ranks disagree", "int4", "int8")(
        lambda: dist.all_reduce(mine(N), group=group)
    )
    dist.destroy_process_group(group)
    for met in (False, True):  # before that
        group = dist.new_group(pg_options=commlib.Options("int8", timeout=3.0))
        if met:
            dist.all_reduce(mine(N), group=group)
        if rank == 0:
            call = partial(dist.all_reduce, mine(2 * N), group=group)
            raises(RuntimeError, "no word from rank 1", "within 3 s")(call)
            if met:
                raises(RuntimeError, "takes no more calls")(call)
        dist.barrier()
        x = torch.ones(3)
        dist.all_reduce(x, group=group)  # not compressed
        assert x.tolist() == [2.0] * 3
        dist.destroy_process_group(group)
