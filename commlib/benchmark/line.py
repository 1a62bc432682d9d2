"""What a job's ranks know of the line between their hosts."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch.distributed as dist

from ..doctor import interfaces
from ..emulation import sent_bytes
from ..hosts import identity


class Line(NamedTuple):
    """Between the hosts of a job; `of_job` asks all ranks."""

    hosts: int
    shared: bool = False  # by several hosts, and a host sends more than one of its ranks does
    interface: str | None = None  # of this rank, that all bytes between shared hosts pass

    def sent(self) -> int:
        """Bytes that this host has sent to others, ever; 0 where that is not known."""
        return 0 if self.interface is None else sent_bytes(self.interface)


def of_job(device: str) -> Line:
    """The line of the default group's ranks, which all call it; `device` of what they send."""
    name = interface(device)
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, (identity(), name is not None))
    hosts = len({host for host, _ in said})
    shared = 1 < hosts < len(said)
    return Line(hosts, shared, name if shared and all(known for _, known in said) else None)


def interface(device: str) -> str | None:
    """The interface that all bytes to other hosts pass; None where it is not known.

    Gloo moves what lies on the CPU, through one interface or, where GLOO_SOCKET_IFNAME names
    several, in turns. NCCL chooses its own.
    """
    if device != "cpu" or "," in os.environ.get("GLOO_SOCKET_IFNAME", ""):
        return None
    name = interfaces.gloo()[0]
    return None if name == "lo" else name
