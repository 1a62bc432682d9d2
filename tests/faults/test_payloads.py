"""What arrives is not what was meant: cut short, changed, of another scheme, of another program.

Messages between two ranks are always checked, collectives under COMMLIB_CHECK=1. What no check can
help: gloo itself ends a process that is sent more bytes than it asked for.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as torch_dist

import commlib.distributed as dist
from commlib import Communicator
from commlib.agreement import Agreement
from commlib.lane import Lane
from commlib.stamp import FIELDS
from commlib.transport import TorchTransport
from tests.communicators import data, only
from tests.processes import Pool

pytestmark = pytest.mark.processes

N = 100_000
FAULTY = 1  # the rank that sends what it should not


def cut(wire: torch.Tensor) -> torch.Tensor:
    return wire[: wire.numel() - 100].clone()


def flipped(wire: torch.Tensor) -> torch.Tensor:
    changed = wire.clone()
    changed[wire.numel() // 2] ^= 1
    return changed


def foreign(wire: torch.Tensor) -> torch.Tensor:
    return torch.full_like(wire, ord("G"))


CHANGES = [cut, flipped, foreign]


# Messages from one rank to another.


def changed_message(change: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """What the receiver says of a message that `change` went over; the next one must arrive."""
    send = TorchTransport.send

    def other(self: TorchTransport, x: torch.Tensor, dst: int, tag: int = 0) -> Any:
        return send(self, change(x), dst, tag)

    x, out, text = data(0, N), torch.empty(N), ""
    if dist.get_rank() == FAULTY:
        with patch.object(TorchTransport, "send", other):
            dist.send(x, 0, scheme="int8")
        dist.send(x, 0, scheme="int8")
        return ""
    try:
        dist.recv(out, FAULTY, scheme="int8")
    except RuntimeError as error:
        text = str(error)
    dist.recv(out, FAULTY, scheme="int8")
    assert (out - x).norm() < 0.02 * x.norm()
    return text


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_message_that_changed_on_its_way(pool: Pool, change: Any) -> None:
    text = pool.run(changed_message, change, ranks=2)[0]
    assert f"recv from rank {FAULTY} of {N} float32 values as int8" in text
    # Cut, its stamp is read from what lay in the buffer before: any field may be wrong.
    assert re.search(rf"its ({'|'.join(FIELDS)}) is 0x\w+, expected 0x", text), text


# Collectives.


def raised(call: Callable[[], Any]) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


def changed_all_reduce(change: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """What every rank says when one rank's parts come otherwise than they were stamped."""
    with patch.dict(os.environ, COMMLIB_CHECK="1"):
        c = Communicator(policy=only("int4+ef"), timeout=10.0)
    c.all_reduce(data(c.rank, N), "w")
    all_to_all = Lane.all_to_all

    def other(self: Lane, out: Any, inp: Any, **splits: Any) -> Any:
        if inp.nbytes > 1000:  # not the stamps
            part = inp.numel() // self.size
            inp = torch.cat([inp[: 2 * part], change(inp[2 * part :])])  # to rank 2
            splits = {"in_splits": [part, part, inp.numel() - 2 * part], "out_splits": [part] * 3}
        return all_to_all(self, out, inp, **splits)

    with patch.object(Lane, "all_to_all", other if c.rank == FAULTY else all_to_all):
        return raised(lambda: c.all_reduce(data(c.rank, N), "w"))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_part_of_an_all_reduce_that_changed_on_its_way(pool: Pool, change: Any) -> None:
    texts = pool.run(changed_all_reduce, change, ranks=3)
    for rank, text in enumerate(texts):
        assert f"all_reduce of key 'w' (message 2) failed on rank {rank} of 3" in text
        assert "rank 2" in text
    assert f"payload of rank {FAULTY} arrived at rank 2 with crc32" in texts[2]


def scheme_of_its_own() -> str:
    """A rank codes by another scheme than it said."""
    mine = "int8" if torch_dist.get_rank() == FAULTY else "int4"
    with patch.dict(os.environ, COMMLIB_CHECK="1"):
        c = Communicator(policy=only(mine), timeout=10.0)
    with patch.object(Agreement, "agree", lambda self, plan: self.meet("lies")):
        return raised(lambda: c.all_reduce(data(c.rank, N), "w"))


def test_another_scheme(pool: Pool) -> None:
    for rank, text in enumerate(pool.run(scheme_of_its_own, ranks=3)):
        assert f"all_reduce of key 'w' (message 1) failed on rank {rank} of 3" in text
        assert "plan digest of rank" in text


# Other programs on this network.


def listening(pid: int) -> list[int]:
    """Ports on which a process waits for connections."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            sockets.add(descriptor.readlink().name)
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    rows += [line.split() for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]]
    return [
        int(row[1].rpartition(":")[2], 16)
        for row in rows
        if row[3] == "0A" and f"socket:[{row[9]}]" in sockets
    ]


@contextmanager
def scanned(ports: list[int]) -> Iterator[None]:
    """Connect to `ports`, say what strangers say, and hang up or not."""
    said = [b"", b"GET / HTTP/1.0\r\n\r\n", bytes(64), bytes(range(256)) * 8]
    lines = []
    for port in ports:
        for text in said:
            with suppress(OSError):  # refused, or hung up on: as it should be
                line = socket.create_connection(("127.0.0.1", port), timeout=1.0)
                lines.append(line)
                line.sendall(text)
    for line in lines[::2]:
        line.close()
    yield
    for line in lines:
        line.close()


def strangers_call(scan: bool, starter: int) -> list[torch.Tensor]:
    pids: list[Any] = [None] * 3
    torch_dist.all_gather_object(pids, os.getpid())
    ports = [port for pid in (*pids, starter) for port in listening(pid)]
    assert len(ports) >= 4  # of each rank's gloo, and of the store
    mine = ports if scan and torch_dist.get_rank() == 0 else []
    results = []
    with scanned(mine):
        c = Communicator(policy=only("int4+ef"), timeout=20.0)  # new connections, scanned as well
        for step in range(8):
            with scanned(mine if step == 4 else []):
                results.append(data(c.rank, N, step))
                c.all_reduce(results[-1], "w")
        c.close()
    return results


def test_strangers_that_knock_at_every_port(pool: Pool) -> None:
    undisturbed, scanned = (
        pool.run(strangers_call, scan, os.getpid(), ranks=3) for scan in (False, True)
    )
    for one, other in zip(undisturbed, scanned, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
