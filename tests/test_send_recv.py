"""commlib.distributed's point-to-point verbs between real processes on gloo."""

from __future__ import annotations

import datetime
import gc
import inspect
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist

import commlib
import commlib.distributed as dist
from commlib.collectives.p2p import wire_bytes
from commlib.integrations import routes
from commlib.lane import Together
from commlib.policy import Scheme
from tests.integrations.ddp_cases import raises, relative
from tests.processes import Pool

N = 4096
LARGE = 17 << 20  # 68 MiB: NCCL and gloo both buffer less


@pytest.mark.parametrize("name", ["send", "recv", "isend", "irecv", "batch_isend_irecv"])
def test_signatures_are_torchs(name: str) -> None:
    check_signature(getattr(dist, name), getattr(torch_dist, name))


def test_p2pop_has_torchs_signature() -> None:
    check_signature(dist.P2POp.__init__, torch_dist.P2POp.__init__)
    check_signature(dist.P2POp.__new__, torch_dist.P2POp.__new__)


def check_signature(ours: Any, theirs: Any) -> None:
    parameters = inspect.signature(ours).parameters.values()
    positional = [p for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    expected = inspect.signature(theirs).parameters.values()
    assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in expected]
    assert ours.__name__ == "batch_isend_irecv" or "scheme" in inspect.signature(ours).parameters


def values(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def every_verb() -> None:
    dist.set_policy("int8")
    rank, x, y = dist.get_rank(), values(0, 64, 64), values(1, 64, 64)
    original = x.clone()
    if rank == 0:
        assert dist.send(x, 1) is None
        assert torch.equal(x, original)
        work = dist.isend(y, 1, tag=3)
        assert work.wait()
        assert work.is_completed()
        assert work.is_success()
        assert routes.bytes_sent() == 2 * wire_bytes(
            N, x.dtype, Scheme.parse("int8").resolve().codec
        )
    else:
        out = torch.empty(N)  # another shape: only the number of elements counts
        assert dist.recv(out, 0) == 0
        assert 0 < relative(out.view(64, 64), x) < 0.02
        out = torch.zeros(64, 64, requires_grad=True)  # as Megatron makes them
        work = dist.irecv(out, 0, tag=3)
        assert not work.is_completed()
        assert work.wait(datetime.timedelta(seconds=20))
        assert work.is_completed()
        assert work.exception() is None
        assert work.result()[0] is out
        assert work.source_rank() == work._source_rank() == 0
        assert 0 < relative(out.detach(), y) < 0.02
        assert routes.bytes_sent() == 0
    work = dist.isend(x, 1) if rank == 0 else dist.irecv(x, 0)
    x.zero_()  # coded before isend returned
    work.wait(20)
    assert rank == 0 or 0 < relative(x, original) < 0.02
    half = y.bfloat16()
    if rank == 0:
        dist.send(half, 1, scheme="int4")
    else:
        got = torch.empty_like(half)
        dist.recv(got, 0, scheme="int4")
        assert 0.01 < relative(got.float(), half.float()) < 0.2


def tags_out_of_order() -> None:
    dist.set_policy("int8")
    rank = dist.get_rank()
    tensors = [torch.full((size,), float(k + 1)) for k, size in enumerate((N, N, 3_000_000, N))]
    counts = torch.arange(5)
    if rank == 0:
        works = [dist.isend(x, 1, tag=k) for k, x in enumerate(tensors)]
        works.append(dist.isend(counts, 1, tag=0))  # raw, with the same tag as a compressed one
    else:
        outs = [torch.empty_like(x) for x in tensors]
        got = torch.empty_like(counts)
        works = [dist.irecv(got, 0, tag=0)]
        works += [dist.irecv(outs[k], 0, tag=k) for k in (3, 1, 2, 0)]
    for work in reversed(works):
        work.wait()
    if rank:
        assert torch.equal(got, counts)
        assert all(relative(o, x) < 0.02 for o, x in zip(outs, tensors, strict=True))


def from_any_source() -> None:
    dist.set_policy("int8")
    rank, size = dist.get_rank(), dist.get_world_size()
    for numel in (N, 3_000_000):  # one slice and two
        if rank:
            dist.send(torch.full((numel,), float(rank)), 0)
        else:
            out, found = torch.empty(numel), []
            for _ in range(size - 1):
                source = dist.recv(out)
                assert relative(out, torch.full((numel,), float(source))) < 0.02
                found.append(source)
            assert sorted(found) == list(range(1, size))
    if rank:
        dist.send(torch.arange(3), 0)
    else:
        ints = torch.empty(3, dtype=torch.int64)
        assert sorted(dist.recv(ints) for _ in range(size - 1)) == list(range(1, size))


def batches() -> None:
    dist.set_policy("int8")
    rank = dist.get_rank()
    peer = 1 - rank
    x, out = values(rank, LARGE), torch.empty(LARGE)
    small, got = torch.full((8,), rank), torch.empty(8, dtype=torch.int64)
    before = routes.bytes_sent()
    ops = [
        dist.P2POp(dist.isend, x, peer),
        dist.P2POp(torch_dist.isend, small, peer),  # raw
        torch_dist.P2POp(torch_dist.irecv, out, peer),
        dist.P2POp(dist.irecv, got, group_peer=peer),
    ]
    assert isinstance(ops[0], torch_dist.P2POp)
    works = dist.batch_isend_irecv(ops)
    assert len(works) == len(ops)
    for work in works:
        work.wait()
    assert all(work.is_success() for work in works if work is not works[1])
    assert 0 < relative(out, values(peer, LARGE)) < 0.02
    assert (got == peer).all()
    assert works[2].source_rank() == peer
    # one way or two, the other order
    assert routes.bytes_sent() - before < 0.27 * 4 * LARGE + small.nbytes
    y = torch.empty(N)
    ops = [dist.P2POp(dist.irecv, y, peer, tag=5), dist.P2POp(dist.isend, x[:N], peer, tag=5)]
    for work in dist.batch_isend_irecv(ops[::-1] if rank else ops):
        work.wait()
    assert 0 < relative(y, values(peer, LARGE)[:N]) < 0.02
    y = torch.empty(N)
    ops = [
        dist.P2POp(dist.irecv, y, peer, scheme="bf16"),
        dist.P2POp(dist.isend, x[:N], peer, scheme="bf16"),
    ]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    assert torch.equal(y, values(peer, LARGE)[:N].bfloat16().float())
    for work in dist.batch_isend_irecv(
        [dist.P2POp(dist.irecv, got, peer), dist.P2POp(dist.isend, small + 7, peer)]
    ):
        work.wait()  # torch's own works
    assert (got == peer + 7).all()
    raises(ValueError, "not empty")(lambda: dist.batch_isend_irecv([]))
    raises(ValueError, "list of P2POp")(lambda: dist.batch_isend_irecv(ops[0]))  # type: ignore
    raises(ValueError, "got Tensor")(lambda: dist.batch_isend_irecv([ops[0], x]))  # type: ignore
    raises(ValueError, "isend")(lambda: dist.P2POp(dist.all_reduce, x, peer))
    group = dist.new_group([0, 1])
    other = dist.P2POp(dist.isend, x, peer, group)
    raises(ValueError, "one group")(lambda: dist.batch_isend_irecv([ops[0], other]))


def a_refused_batch_leaves_no_trace() -> None:
    """A message that was numbered and not sent would be missed by the other end."""
    dist.set_policy("int8")
    rank = dist.get_rank()
    peer, x, small = 1 - rank, values(rank, N), torch.zeros(6, 6)
    good = dist.P2POp(dist.isend, x, peer)
    refused = [
        dist.P2POp(dist.isend, x.view(64, -1).t(), peer),
        dist.P2POp(dist.irecv, x.view(64, -1).t(), peer),
        dist.P2POp(dist.isend, small.t()[1:], peer),  # raw
        dist.P2POp(dist.isend, x, peer, scheme="int8|entropy"),  # of no fixed size
        dist.P2POp(dist.isend, x, peer, tag=-1),
    ]
    for bad in refused if rank == 0 else []:
        received = dist.P2POp(dist.irecv, torch.empty(N), peer)
        raises(ValueError)(lambda bad=bad, got=received: dist.batch_isend_irecv([got, good, bad]))
    y = torch.empty(N)
    for work in dist.batch_isend_irecv([good, dist.P2POp(dist.irecv, y, peer)]):
        work.wait()
    assert 0 < relative(y, values(peer, N)) < 0.02


def batches_that_the_library_groups() -> None:
    """As NCCL does: one work for all."""
    dist.set_policy("int8")
    rank = dist.get_rank()
    real = torch_dist.batch_isend_irecv
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch_dist, "batch_isend_irecv", lambda ops: [Together([*map(Waited, real(ops))])]
        )
        out, got = torch.empty(N), torch.empty(8, dtype=torch.int64)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, values(rank, N), 1 - rank),
                dist.P2POp(dist.irecv, out, 1 - rank),
                dist.P2POp(dist.irecv, got, 1 - rank),
                dist.P2POp(dist.isend, torch.full((8,), rank), 1 - rank),
            ]
        )
    assert len(works) == 1
    assert works[0].wait()
    assert works[0].is_completed()
    assert 0 < relative(out, values(1 - rank, N)) < 0.02
    assert (got == 1 - rank).all()
    assert routes._offices[torch_dist.group.WORLD][torch.device("cpu")].mail.outstanding == 0


class Waited:
    """A work of torch's as a Pending that may be waited for again and again."""

    def __init__(self, work: Any) -> None:
        self.work, self.is_done = work, False

    def done(self) -> bool:
        return self.is_done

    def wait(self, timeout: float | None = None) -> None:
        if not self.is_done:
            self.work.wait()
        self.is_done = True

    def poll(self, seconds: float, timeout: float) -> bool:
        self.wait(timeout)
        return True


def what_is_not_compressed_is_torchs() -> None:
    rank = dist.get_rank()
    exact = values(3, N)

    def moved(x: torch.Tensor, **how: Any) -> torch.Tensor:
        before, out = routes.bytes_sent(), torch.zeros_like(x)
        if rank == 0:
            dist.send(x, 1, **how)
        else:
            # torch's own receive: so the sender used the user's tag, and no other bytes
            torch_dist.recv(out, 0, tag=how.get("tag", 0))
        assert routes.bytes_sent() == before
        return x if rank == 0 else out

    dist.set_policy("int4")
    for x in (
        torch.arange(N), exact.double(), torch.ones(N, dtype=torch.bool), exact[:8],
        torch.view_as_complex(exact.view(-1, 2).contiguous()), exact[:0], exact[0],
    ):  # fmt: skip
        assert torch.equal(moved(x, tag=9), x)
    with commlib.exact():
        assert torch.equal(moved(exact), exact)
    assert torch.equal(moved(exact, scheme="fp32"), exact)
    assert torch.equal(moved(exact, scheme="fp32@two_phase"), exact)
    dist.set_policy("fp32")
    assert torch.equal(moved(exact), exact)
    # a rule for activations decides
    rules = [{"scheme": "int8", "role": "activation"}, {"scheme": "fp32"}]
    dist.set_policy({"rules": rules})
    out = exact.clone()
    dist.send(out, 1) if rank == 0 else dist.recv(out, 0)
    assert rank == 0 or 0 < relative(out, exact) < 0.02
    # payload and stamp together must be smaller: of 12 values 32 + 16 bytes, of 48
    dist.set_policy({"rules": [{"scheme": "int8"}]})
    assert torch.equal(moved(exact[:12]), exact[:12])
    few = torch.zeros(13)
    dist.send(exact[:13], 1) if rank == 0 else dist.recv(few, 0)
    assert rank == 0 or 0 < relative(few, exact[:13]) < 0.02
    # a policy that keeps residuals works without
    dist.set_policy("int8+ef")
    dist.send(out, 1) if rank == 0 else dist.recv(out, 0)
    raises(ValueError, "no key, no memory", "next sample", "'int8'")(
        lambda: dist.isend(exact, 1 - rank, scheme="int8+ef")
    )
    raises(ValueError, "int64", "int8")(
        lambda: dist.isend(torch.arange(N), 1 - rank, scheme="int8")
    )


class Told(logging.Handler):
    """What commlib said."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def auto_is_raw_and_says_so() -> None:
    told = Told()
    logging.getLogger("commlib").addHandler(told)
    x, rank = values(3, N), dist.get_rank()
    try:
        for _ in range(3):
            if rank == 0:
                dist.send(x, 1)
            else:
                out = torch.empty(N)
                torch_dist.recv(out, 0)
                assert torch.equal(out, x)
    finally:
        logging.getLogger("commlib").removeHandler(told)
    assert len([text for text in told.texts if "'auto'" in text]) == (rank == 0)
    if rank == 0:
        dist.send(x, 1, scheme="int8")
    else:
        dist.recv(out, 0, scheme="int8")
        assert 0 < relative(out, x) < 0.02


def ranks_of_a_group() -> None:
    ranks = [0, 2]
    group = dist.new_group(ranks)
    rank = dist.get_rank()
    x = values(0, N)
    if rank == 1:
        assert dist.isend(x, 0, group) is None  # as torch does
        assert dist.recv(x, 0, group) == -1
        return
    dist.set_policy("int8", group)
    if rank == 2:
        dist.send(x, 0, group)
        dist.send(x, group=group, group_dst=0)
        dist.send(x, 0, group)
    else:
        out = torch.empty(N)
        assert dist.recv(out, 2, group) == 2
        assert 0 < relative(out, x) < 0.02
        assert dist.recv(out, group=group, group_src=1) == 2
        assert dist.recv(out, group=group) == 2  # any source: a rank of the world
    raises(ValueError, "not part of group")(lambda: dist.isend(x, 1, group))
    if rank == 0:
        assert "send" not in dist.communicator(group).stats()
    else:
        assert "send" in dist.communicator(group).stats()
    dist.set_policy("int4", group)  # counts from nothing
    assert "send" not in dist.communicator(group).stats()
    dist.destroy_process_group(group)  # and its messages with it
    assert group not in routes._offices


def groups_that_torch_destroys() -> None:
    """A reference of ours to a group would end the process at its exit."""
    group, before = dist.new_group([0, 1]), len(routes._offices)
    dist.set_policy("int8", group)
    rank, x = dist.get_rank(), values(0, N)
    dist.irecv(torch.empty(N), 1 - rank, group, tag=9)  # nobody will send
    works = [dist.isend(x, 1 - rank, group), dist.irecv(torch.empty(N), 1 - rank, group)]
    for work in works:
        work.wait()
    assert len(routes._offices) == before + 1
    torch_dist.barrier()
    torch_dist.destroy_process_group(group)
    del group
    gc.collect()
    assert len(routes._offices) == before


def works_that_nobody_keeps() -> None:
    """Torch's own would be lost here, and the peer would wait for its timeout."""
    dist.set_policy("int8")
    if dist.get_rank() == 0:
        for k in range(3):
            dist.isend(torch.full((3_000_000,), k + 1.0), 1)
        torch_dist.barrier()
    else:
        for k in range(3):
            out = torch.empty(3_000_000)
            dist.recv(out, 0)
            assert relative(out, torch.full((3_000_000,), k + 1.0)) < 0.02
        torch_dist.barrier()


@pytest.mark.processes
@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        (every_verb, 2),
        (tags_out_of_order, 2),
        (from_any_source, 3),
        (batches, 2),
        (a_refused_batch_leaves_no_trace, 2),
        (batches_that_the_library_groups, 2),
        (what_is_not_compressed_is_torchs, 2),
        (auto_is_raw_and_says_so, 2),
        (ranks_of_a_group, 3),
        (groups_that_torch_destroys, 2),
        (works_that_nobody_keeps, 2),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_send_recv(pool: Pool, case: Callable[[], None], ranks: int) -> None:
    pool.run(case, ranks=ranks, group_timeout=20.0)
