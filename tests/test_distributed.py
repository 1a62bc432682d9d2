"""commlib.distributed: torch.distributed's names, with the group's policy on the wire."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist

import commlib.distributed as dist
from tests.integrations.ddp_cases import assert_same_on_all_ranks, raises, relative
from tests.processes import Pool

N = 4096
COMPRESSED = (
    "all_reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_gather",
    "all_gather_into_tensor",
    "all_to_all_single",
    "broadcast",
)


@pytest.mark.parametrize("name", COMPRESSED)
def test_signatures_are_torchs(name: str) -> None:
    ours = list(inspect.signature(getattr(dist, name)).parameters.values())
    theirs = list(inspect.signature(getattr(torch_dist, name)).parameters.values())
    positional = [p for p in ours if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in theirs]


def test_other_names_are_torchs() -> None:
    assert dist.ReduceOp is torch_dist.ReduceOp
    assert dist.init_process_group is torch_dist.init_process_group
    assert dist.group is torch_dist.group
    assert set(dir(torch_dist)) <= set(dir(dist))
    with pytest.raises(AttributeError, match="all_reduces"):
        _ = dist.all_reduces


def values(rank: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rank))


def mine(*shape: int) -> torch.Tensor:
    return values(dist.get_rank(), *shape)


def total(*shape: int) -> torch.Tensor:
    return sum(values(rank, *shape) for rank in range(dist.get_world_size()))  # type: ignore


def sums_keep_their_factor() -> None:
    dist.set_policy("int8")
    size = dist.get_world_size()
    operations: list[tuple[Any, float]] = [
        (dist.ReduceOp.SUM, 1.0),
        (dist.ReduceOp.AVG, 1 / size),
        (dist.ReduceOp(dist.ReduceOp.SUM), 1.0),
        (dist.ReduceOp.PREMUL_SUM(0.25), 0.25),
    ]
    for operation, factor in operations:
        x = mine(64, 64)
        assert dist.all_reduce(x, operation) is None
        assert 0 < relative(x, factor * total(64, 64)) < 0.02
        assert_same_on_all_ranks(x)

        part = torch.empty(64 // size, 64)
        dist.reduce_scatter_tensor(part, mine(64, 64), operation)
        expected = factor * total(64, 64).chunk(size)[dist.get_rank()]
        assert 0 < relative(part, expected) < 0.02
    x = mine(N).bfloat16()
    dist.all_reduce(x, async_op=False)
    assert relative(x.float(), total(N)) < 0.02
    part = torch.empty(32, 32)
    dist.reduce_scatter(part, list(mine(size * 32, 32).chunk(size)))
    assert 0 < relative(part, total(size * 32, 32).chunk(size)[dist.get_rank()]) < 0.02


def what_cannot_be_compressed_is_torchs() -> None:
    dist.set_policy("int4")
    size, rank = dist.get_world_size(), dist.get_rank()
    x = torch.arange(N) + rank
    dist.all_reduce(x)
    assert torch.equal(x, size * torch.arange(N) + sum(range(size)))
    x = mine(N).double()
    dist.all_reduce(x, dist.ReduceOp.SUM)
    assert relative(x, total(N).double()) < 1e-6
    x = mine(N)
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    assert torch.equal(x, torch.stack([values(r, N) for r in range(size)]).amax(0))
    flags = torch.tensor([rank == 0, False])
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    assert flags.tolist() == [True, False]
    got: list[Any] = [None] * size
    dist.all_gather_object(got, {"rank": rank})
    assert got == [{"rank": r} for r in range(size)]
    dist.set_policy("fp32")
    x, y = mine(N), mine(N)
    dist.all_reduce(x)
    torch_dist.all_reduce(y)
    assert torch.equal(x, y)


def gathers_and_exchanges() -> None:
    dist.set_policy("int8")
    size, rank = dist.get_world_size(), dist.get_rank()
    rows = torch.stack([values(r, 48, 48) for r in range(size)])

    out = torch.empty(size, 48, 48)
    dist.all_gather_into_tensor(out, mine(48, 48))
    assert 0 < relative(out, rows) < 0.02
    assert_same_on_all_ranks(out)
    out = torch.empty(size * 48, 48)
    inside = out[48 * rank : 48 * (rank + 1)]  # FSDP gathers from inside the output
    inside.copy_(mine(48, 48))
    dist.all_gather_into_tensor(out, inside)
    assert 0 < relative(out, rows.view(-1, 48)) < 0.02
    parts = [torch.empty(48, 48) for _ in range(size)]
    dist.all_gather(parts, mine(48, 48))
    assert 0 < relative(torch.stack(parts), rows) < 0.02

    out = torch.empty(size * 24, 48)
    dist.all_to_all_single(out, mine(size * 24, 48))
    expected = torch.cat([values(r, size * 24, 48).chunk(size)[rank] for r in range(size)])
    assert 0 < relative(out, expected) < 0.02
    # rank s sends (32 + 8 s + 4 r) rows to rank r, and none to itself where s + r == 1
    counts = [[0 if s + r == 1 else 32 + 8 * s + 4 * r for r in range(size)] for s in range(size)]
    sends, receives = counts[rank], [counts[s][rank] for s in range(size)]
    out = torch.empty(sum(receives), 48)
    dist.all_to_all_single(out, mine(sum(sends), 48), receives, sends)
    expected = torch.cat(
        [values(s, sum(counts[s]), 48).split(counts[s])[rank] for s in range(size)]
    )
    assert 0 < relative(out, expected) < 0.02

    x = mine(48, 48)
    dist.broadcast(x, src=1)
    assert 0 < relative(x, values(1, 48, 48)) < 0.02
    assert_same_on_all_ranks(x)


def asynchronous() -> None:
    dist.set_policy("int8")
    xs = [mine(N) * k for k in range(1, 6)]
    works = [dist.all_reduce(x, async_op=True) for x in xs]
    parts = [torch.empty(N) for _ in range(dist.get_world_size())]
    gathering = dist.all_gather(parts, mine(N), async_op=True)
    dist.barrier()  # torch's own collectives may run in between
    for k, (work, x) in enumerate(zip(works, xs, strict=True), 1):
        assert work.wait()
        assert work.is_completed()
        assert work.get_future().value()[0] is x
        assert relative(x, k * total(N)) < 0.02
    assert gathering.get_future().then(lambda f: len(f.value())).wait() == len(parts)
    assert relative(parts[1], values(1, N)) < 0.02


def explicit_schemes() -> None:
    dist.set_policy("fp32")
    x = mine(N)
    dist.all_reduce(x, scheme="int4")
    assert 0.001 < relative(x, total(N)) < 0.3
    counts = torch.ones(N, dtype=torch.int32)
    raises(ValueError, "int8", "int32")(lambda: dist.all_reduce(counts, scheme="int8"))
    raises(ValueError, "float64")(lambda: dist.broadcast(mine(N).double(), 0, scheme="int8"))
    raises(ValueError, "a key", "int8+ef")(lambda: dist.all_reduce(mine(N), scheme="int8+ef"))
    raises(ValueError, "MAX", "SUM")(
        lambda: dist.all_reduce(mine(N), dist.ReduceOp.MAX, scheme="int8")
    )
    raises(ValueError, "int9")(lambda: dist.all_reduce(mine(N), scheme="int9"))
    raises(ValueError, "int9")(lambda: dist.set_policy("int9"))
    assert (counts == 1).all()


class Told(logging.Handler):
    """The warnings of commlib.distributed."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def memory_needs_a_key() -> None:
    dist.set_policy("int4:round=nearest+ef")
    told = Told()
    logging.getLogger("commlib").addHandler(told)
    try:
        for _ in range(3):
            dist.all_reduce(mine(64, 64))
    finally:
        logging.getLogger("commlib").removeHandler(told)
    assert len([text for text in told.texts if "without error feedback" in text]) == 1
    assert dist.communicator().memory_bytes() == 0
    errors = {}
    for key in (None, "x"):
        summed = torch.zeros(64, 64)
        for _ in range(20):
            x = mine(64, 64)
            dist.all_reduce(x, key=key)
            summed += x
        errors[key] = relative(summed / 20, total(64, 64))
    assert errors["x"] < errors[None] / 4
    assert dist.communicator().memory_bytes() > 0


def groups_have_their_own_policy() -> None:
    ranks = [0, dist.get_world_size() - 1]
    dist.set_policy("fp32")
    group = dist.new_group(ranks)
    if dist.get_rank() in ranks:
        dist.set_policy("int8", group)
        x = mine(N)
        dist.all_reduce(x, group=group)
        expected = values(ranks[0], N) + values(ranks[1], N)
        assert 1e-4 < relative(x, expected) < 0.02
        x = mine(N)
        dist.broadcast(x, ranks[1], group)  # a rank of the world
        assert 1e-4 < relative(x, values(ranks[1], N)) < 0.02
        assert dist.communicator(group) is not dist.communicator()
    x = mine(N)
    dist.all_reduce(x)
    assert relative(x, total(N)) < 1e-6
    if dist.get_rank() in ranks:
        threads = threading.active_count()
        dist.destroy_process_group(group)
        assert threading.active_count() <= threads
    dist.barrier()


def default_policy(value: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMMLIB_POLICY", value)
        group = dist.new_group(list(range(dist.get_world_size())))
        assert str(dist.communicator(group).policy) == value
        dist.destroy_process_group(group)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        (sums_keep_their_factor, 4),
        (what_cannot_be_compressed_is_torchs, 3),
        (gathers_and_exchanges, 3),
        (asynchronous, 3),
        (explicit_schemes, 2),
        (memory_needs_a_key, 2),
        (groups_have_their_own_policy, 3),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_distributed(pool: Pool, case: Callable[[], None], ranks: int) -> None:
    pool.run(case, ranks=ranks)


@pytest.mark.processes
def test_policy_from_the_environment(pool: Pool) -> None:
    pool.run(default_policy, "int8", ranks=2)
