"""Point to point over NCCL: bytes, streams, batches; two ranks on one GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as torch_dist

import commlib.distributed as dist
from commlib.codecs import codec
from commlib.collectives import Mail
from commlib.feedback import Compressor
from commlib.integrations import routes
from commlib.transport import ThreadTransport, run_ranks
from tests.communicators import data
from tests.gpu.nccl import DEVICE, Ranks, busy, gpu, needs_gpu, same

pytestmark = [pytest.mark.gpu, needs_gpu]

SCHEMES = ("bf16", "int8", "int4:block=64", "sign")
NUMEL = 3_000_001  # as int8: two slices


def on_cpu(scheme: str) -> torch.Tensor:
    def rank(t: ThreadTransport) -> torch.Tensor:
        c, x = Compressor(codec(scheme).rounded("nearest")), data(0, NUMEL)
        (Mail(t).irecv(x.zero_(), 0, c) if t.rank else Mail(t).isend(x, 1, c)).wait(60)
        return x

    arrived: torch.Tensor = run_ranks(2, rank)[1]
    return arrived


def one_way(scheme: str) -> Any:
    if torch_dist.get_rank() == 0:
        x = gpu(0, NUMEL)
        dist.send(x, 1, scheme=scheme)
        return None
    x = torch.zeros(NUMEL, device=DEVICE)
    assert dist.recv(x, 0, scheme=scheme) == 0
    return x.cpu()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_arrives_is_what_arrives_on_cpu(ranks: Ranks, scheme: str) -> None:
    assert same(ranks.run(one_way, scheme)[1], on_cpu(scheme))


def while_busy() -> list[bool]:
    """Nothing here waits for the device, and what comes later on the stream finds the result."""
    rank = torch_dist.get_rank()
    x = gpu(0, NUMEL) if rank == 0 else torch.zeros(NUMEL, device=DEVICE)
    for _ in range(2):  # connections and kernels are made
        dist.send(x, 1, scheme="int8") if rank == 0 else dist.recv(x, 0, scheme="int8")
    x.zero_()
    wanted = gpu(1, NUMEL)
    torch.cuda.synchronize()
    torch_dist.barrier()
    event = busy()
    x.copy_(wanted) if rank == 0 else None
    work = dist.isend(x, 1, scheme="int8") if rank == 0 else dist.irecv(x, 0, scheme="int8")
    work.wait()
    still_busy = not event.query()
    if rank == 0:
        x.zero_()  # coded already, in the order of the stream
    y = x.clone()
    error = float((y.cpu() - data(1, NUMEL)).norm() / data(1, NUMEL).norm())
    return [still_busy, rank == 0 or 0 < error < 0.02]


def test_the_host_does_not_wait(ranks: Ranks) -> None:
    assert ranks.run(while_busy) == [[True, True], [True, True]]


def both_ways() -> tuple[bool, int, int]:
    rank = torch_dist.get_rank()
    peer, n = 1 - rank, 17 << 20  # 68 MiB: more than NCCL buffers
    out, counts = torch.zeros(n, device=DEVICE), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, gpu(rank, n), peer, scheme="int8"),
            dist.P2POp(dist.isend, torch.full_like(counts, rank), peer),
            dist.P2POp(dist.irecv, out, peer, scheme="int8"),
            dist.P2POp(dist.irecv, counts, peer),
        ]
    )
    for work in works:
        work.wait()
    right = torch.equal(counts.cpu(), torch.full((4,), peer))
    error = float((out.cpu() - data(peer, n)).norm() / data(peer, n).norm())
    (office,) = routes._offices[torch_dist.group.WORLD].values()
    return right and 0 < error < 0.02, len(works), office.mail.outstanding


def test_batches_both_ways(ranks: Ranks) -> None:
    assert ranks.run(both_ways) == [(True, 1, 0)] * 2  # NCCL groups them: one work


def checked() -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMMLIB_CHECK", "1")
        text = ""
        x = gpu(0)
        try:
            if torch_dist.get_rank() == 0:
                dist.send(x, 1, scheme="fp16")
            else:
                dist.recv(x, 0, scheme="bf16")
        except RuntimeError as error:
            text = str(error)
        torch_dist.barrier()
        return text


def test_stamps_are_compared_where_asked(ranks: Ranks) -> None:
    sender, receiver = ranks.run(checked)
    assert sender == ""
    assert "its scheme digest is" in receiver


def refused() -> None:
    x = gpu(0)
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match=r"isend: a CUDA graph cannot repeat"),
        torch.cuda.graph(graph),
    ):
        dist.isend(x, 1 - torch_dist.get_rank(), scheme="int8")
    with pytest.raises(ValueError, match="NCCL does not receive from any source"):
        dist.irecv(x, scheme="int8")


def test_what_nccl_cannot_do(ranks: Ranks) -> None:
    ranks.run(refused)
