"""Point to point between real processes, when something is wrong: a clear error, and in time."""

from __future__ import annotations

import os
import time

import pytest
import torch

import commlib.distributed as dist
from commlib.collectives.p2p import FIRST_TAG
from commlib.integrations import routes
from tests.communicators import data
from tests.integrations.ddp_cases import raises
from tests.processes import Pool

N = 4096


def refused() -> None:
    dist.set_policy("int8")
    rank, x = dist.get_rank(), data(0, N)
    raises(ValueError, "rank 7 is not in this group of 2")(lambda: dist.isend(x, 7))
    raises(ValueError, "rank 7 is not in this group")(lambda: dist.isend(x[:4], group_dst=7))
    raises(ValueError, "rank -1 is not in this group")(lambda: dist.recv(x, -1))
    raises(ValueError, "this rank itself")(lambda: dist.send(x, rank))
    raises(ValueError, "this rank itself")(lambda: dist.irecv(x, rank))
    raises(ValueError, "name the other rank, dst or group_dst")(lambda: dist.send(x))
    raises(ValueError, "dst or group_dst, got 1 and 1")(lambda: dist.send(x, 1, group_dst=1))
    raises(ValueError, "not contiguous")(lambda: dist.recv(x.view(64, 64).t(), 1 - rank))
    raises(ValueError, f"allowed: 0 to {FIRST_TAG - 1}")(
        lambda: dist.isend(x, 1 - rank, tag=FIRST_TAG)
    )
    raises(ValueError, "int9")(lambda: dist.isend(x, 1 - rank, scheme="int9"))
    raises(TypeError, "torch.Tensor")(lambda: dist.isend([x], 1 - rank))  # type: ignore
    meta = torch.empty(N, device="meta")
    raises(ValueError, "does not move meta tensors")(lambda: dist.isend(meta, 1 - rank))
    assert routes.bytes_sent() == 0


def sizes_differ() -> str:
    """The receiver expects fewer: raw, gloo would end its process."""
    dist.set_policy("int8")
    start = time.monotonic()
    try:
        if dist.get_rank() == 0:
            dist.send(data(0, 8000), 1)
        else:
            dist.recv(torch.empty(4000), 0)
    except RuntimeError as error:
        assert time.monotonic() - start < 10
        return str(error)
    return "no error"


def schemes_differ(sender: str, receiver: str) -> str:
    try:
        if dist.get_rank() == 0:
            dist.send(data(0, N), 1, scheme=sender)
        else:
            dist.recv(torch.empty(N), 0, scheme=receiver)
    except RuntimeError as error:
        return str(error)
    return ""


def peer_dies() -> str:
    dist.set_policy("int8")
    if dist.get_rank() == 0:
        os._exit(1)
    try:
        dist.recv(torch.empty(N), 0, tag=4)
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.processes
def test_what_cannot_be_sent_is_refused_before_it_is(pool: Pool) -> None:
    pool.run(refused, ranks=2, group_timeout=20.0)


@pytest.mark.processes
def test_other_sizes_end_in_a_clear_error(pool: Pool) -> None:
    sender, receiver = pool.run(sizes_differ, ranks=2, group_timeout=2.0)
    assert "send to rank 1 of 8000 float32 values as int8" in sender
    assert "recv from rank 0 of 4000 float32 values as int8" in receiver
    assert "Timed out" in sender + receiver
    assert "same number of elements, dtype, scheme and tag" in receiver


@pytest.mark.processes
def test_other_schemes_end_in_a_clear_error(pool: Pool) -> None:
    _, text = pool.run(schemes_differ, "fp16", "bf16", ranks=2, group_timeout=20.0)
    assert "its scheme digest is" in text
    assert "4096 float32 values as bf16" in text
    sender, receiver = pool.run(schemes_differ, "int8", "int4", ranks=2, group_timeout=2.0)
    assert "as int8" in sender
    assert "as int4" in receiver


@pytest.mark.processes
def test_a_dead_peer_ends_in_a_clear_error(pool: Pool) -> None:
    text = pool.run(peer_dies, ranks=2, group_timeout=20.0, may_die=True)[1]
    assert "recv from rank 0 of 4096 float32 values as int8" in text
    assert "tag 4" in text
