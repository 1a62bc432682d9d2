"""Hierarchical schemes between real processes: groups inside a group, deaths, DDP, emulated hosts.

Ranks of one machine say by NCCL_HOSTID that they are on several; on emulated hosts nobody has to.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from commlib import Communicator, emulation
from commlib.collectives import hierarchical
from commlib.scheme import Scheme
from commlib.topology import Link, Topology
from commlib.transport import TorchTransport
from commlib_kernels.layout import Layout
from tests.communicators import data, only
from tests.integrations.ddp_cases import (
    DDP,
    assert_same_on_all_ranks,
    commlib,
    mlp,
    relative,
    residuals,
    train,
)
from tests.processes import Pool

pytestmark = pytest.mark.processes

SCHEME = "int4+ef@hierarchical"
TIMEOUT = 10.0
NUMELS = (1, 100, 5000, 1_000_000, 70_000, 4097)


@contextmanager
def host(letters: str) -> Iterator[None]:
    """This rank is on host `letters[rank]`."""
    os.environ["NCCL_HOSTID"] = letters[dist.get_rank()]
    try:
        yield
    finally:
        del os.environ["NCCL_HOSTID"]


def groups() -> int:
    return len(distributed_c10d._world.pg_map)


def stream(letters: str, tagged: bool) -> list[torch.Tensor]:
    """Messages of many sizes under way at once; without tags by process groups, as on NCCL."""
    before = groups()
    c = Communicator(policy=only(SCHEME), timeout=30.0)
    c.transport.tagged = tagged
    outs, works = [], []
    with host(letters):
        for i, numel in enumerate(NUMELS):
            outs.append(data(c.rank, numel, i))
            works.append(c.all_reduce(outs[-1], f"k{i}", factor="avg", async_op=i != 2))
        for work in works:
            work.wait()
    owner = c.rank in (0, 1)
    assert groups() - before == (0 if tagged else 1 + owner)  # its node's and its column's
    sent, metered = c.transport.bytes_sent, sum(row["wire_bytes"] for row in c.meter.rows())
    assert sent == metered > 0
    c.close()
    assert groups() == before
    return [out[::97].clone() for out in outs]


def test_a_stream_of_messages_by_tags_and_by_groups(pool: Pool) -> None:
    by_tags = pool.run(stream, "abbb", True)
    by_groups = pool.run(stream, "abbb", False)
    for i, numel in enumerate(NUMELS):
        mean = torch.stack([data(r, numel, i) for r in range(4)]).mean(0)[::97]
        assert all(torch.equal(result[i], by_tags[0][i]) for result in (*by_tags, *by_groups))
        assert (by_tags[0][i] - mean).norm() < 0.3 * mean.norm()


def sub_groups_after_others() -> list[float]:
    """Ranks have seen different numbers of groups: `new_group` would wait for ever here."""
    if dist.get_rank() == 0:
        for _ in range(3):
            dist.new_group([0], use_local_synchronization=True)
    t = TorchTransport(timeout=20.0)
    found = []
    for ranks in ([0, 2], [1, 2], [0, 1, 2], [2]):
        if t.rank in ranks:
            x = torch.tensor([float(t.rank)])
            sub = t.sub(ranks)
            assert sub is t.sub(list(reversed(ranks)))
            sub.all_reduce(x).wait()
            found.append(x.item())
    sent = t.bytes_sent
    again = TorchTransport(timeout=20.0)  # ranks have made different numbers of these, too
    again.sub([0, 1, 2]).barrier()
    assert again.bytes_sent == 0 < sent
    before = groups()
    t.close()
    again.close()
    assert before - groups() == len(found) + 1
    t.barrier()
    return found


def test_sub_groups_need_no_equal_past(pool: Pool) -> None:
    assert pool.run(sub_groups_after_others, ranks=3) == [
        [2.0, 3.0],
        [3.0, 3.0],
        [2.0, 3.0, 3.0, 2.0],
    ]


def messages_until_it_fails(victim: int, tagged: bool) -> tuple[str, float, str, str]:
    """The error, the seconds it took, what a later call says, and what state_dict says."""
    c = Communicator(policy=only(SCHEME), timeout=TIMEOUT)
    c.transport.tagged = tagged
    c.warmup(SCHEME)
    dist.barrier()
    with host("aabb"):
        c.all_reduce(data(c.rank, 1_000_000), "w")
    work = c.all_reduce(data(c.rank, 1_000_000, 1), "w", async_op=True)
    if c.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    text = later = state = ""
    try:
        work.wait()
        for step in range(100):
            c.all_reduce(data(c.rank, 1_000_000, step), "w")
    except RuntimeError as error:
        text, seconds = str(error), time.monotonic() - start
    try:
        c.all_reduce(torch.ones(10))
    except RuntimeError as error:
        later = str(error)
    try:
        c.state_dict()
    except RuntimeError as error:
        state = str(error)
    c.close()
    return text, seconds, later, state


@pytest.mark.parametrize("tagged", [True, False], ids=["tags", "groups"])
def test_a_killed_rank_is_named(pool: Pool, tagged: bool) -> None:
    """Also by the rank that exchanges nothing with it: of another host, and of another column."""
    victim = 3
    results = pool.run(messages_until_it_fails, victim, tagged, may_die=True)
    assert results[victim] is None
    for text, seconds, later, state in results[:victim]:
        assert "all_reduce of key 'w'" in text
        assert f"no answer from rank {victim} (process " in text
        assert "which has ended" in text, text
        assert seconds < TIMEOUT + 5.0
        assert "takes no more calls" in later
        assert "residuals of w" in state


def train_and_resume(folder: str, letters: str) -> None:
    """Interrupted after 3 steps and resumed with other buckets: the bits of 6 steps in one go."""
    with host(letters):
        uninterrupted = train(commlib.wrap(DDP(mlp(), bucket_cap_mb=0.004), SCHEME), 6)
        plain = train(DDP(mlp()), 6)
        assert 0 < relative(uninterrupted, plain) < 0.02
        assert_same_on_all_ranks(uninterrupted)
        model = commlib.wrap(DDP(mlp(), bucket_cap_mb=0.004), SCHEME)
        train(model, 3)
        path = Path(folder) / f"{dist.get_rank()}.pt"
        torch.save(
            {"model": model.module.state_dict(), "commlib": commlib.of(model).state_dict()}, path
        )
        saved = torch.load(path, weights_only=True)
        again = commlib.wrap(DDP(mlp(seed=5)), SCHEME)
        again.module.load_state_dict(saved["model"])
        commlib.of(again).load_state_dict(saved["commlib"])
        assert torch.equal(train(again, 3, start=3), uninterrupted)
        owns = dist.get_rank() != 1  # the hosts have one column: ranks 0 and 2
        remembered = [path for path, x in residuals(again).items() if x.is_floating_point()]
        assert bool(remembered) == owns


def test_ddp_resumes_bitwise(pool: Pool, tmp_path: Path) -> None:
    pool.run(train_and_resume, str(tmp_path), "aab", ranks=3)


# Bytes that leave this rank's host in messages of one scheme, as its interface counts them.
COUNT = """
import json, os, pathlib, sys
import torch
import torch.distributed as dist
from commlib import Communicator
from commlib.emulation import sent_bytes
from commlib.policy import Policy, Rule, Scheme

numel, messages = int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo")
found = {}
for text in sys.argv[4:]:
    c = Communicator(policy=Policy((Rule(Scheme.parse(text)),)))
    x = torch.randn(numel, generator=torch.Generator().manual_seed(dist.get_rank()))
    c.all_reduce(x, "w")
    dist.barrier()
    before = sent_bytes()
    dist.barrier()  # nobody begins before the other rank of its host has looked
    for _ in range(messages):
        c.all_reduce(x, "w", factor="avg")
    dist.barrier()
    found[text] = (sent_bytes() - before, str(c.nodes), float(x.double().sum()))
    dist.barrier()
    c.close()
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(json.dumps(found))
dist.destroy_process_group()
"""


def test_what_passes_between_emulated_hosts(tmp_path: Path) -> None:
    """Two hosts of two ranks, found by their network alone: their interfaces count the bytes."""
    reason = emulation.available()
    if reason is not None:
        pytest.skip(f"cannot emulate hosts: {reason}")
    numel, messages, flat = 1_000_000, 4, "int4+ef"
    argv = [sys.executable, "-c", COUNT, str(tmp_path), str(numel), str(messages), SCHEME, flat]
    env = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    assert emulation.spawn(argv, 4, hosts=2, env=env, timeout=100) == 0
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(4)]
    topology = Topology(4, Link(0.0, 1.0), tuple("aabb"))
    must = messages * hierarchical.host_bytes(Layout((numel,)), Scheme.parse(SCHEME), topology)
    for rank in range(4):
        (sent, nodes, total), (flat_sent, _, _) = found[rank][SCHEME], found[rank][flat]
        assert nodes == "((0, 1), (2, 3))"
        assert total == found[0][SCHEME][2]
        # 66 of 1514 bytes are headers, and the other side's bytes are acknowledged
        assert must <= sent <= 1.1 * must
        assert flat_sent >= 2 * must
