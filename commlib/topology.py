"""What is known about a network, as plain numbers.

    seconds of one message = latency + bytes / bandwidth

Nothing here measures anything: `planner.measure` fills these in, cost formulas read them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Link:
    """A link as two numbers: `latency` in seconds per message, `bandwidth` in bytes per second."""

    latency: float
    bandwidth: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.latency) and self.latency >= 0):
            raise ValueError(f"latency is {self.latency}, it must be finite seconds >= 0")
        if not self.bandwidth > 0:  # also refuses NaN; infinity is a fair model of "no limit"
            raise ValueError(f"bandwidth is {self.bandwidth}, it must be bytes per second > 0")

    def seconds(self, nbytes: float, messages: int = 1) -> float:
        """Seconds for `nbytes` bytes in `messages` messages, one after the other."""
        return messages * self.latency + nbytes / self.bandwidth


@dataclass(frozen=True)
class Topology:
    """`size` ranks joined by equal links; `hosts` names the host of each rank where it is known.

    Ranks of one host share its link.
    """

    size: int
    link: Link
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}, a topology has at least one rank")
        if self.hosts and len(self.hosts) != self.size:
            raise ValueError(
                f"hosts names {len(self.hosts)} ranks, size is {self.size}: "
                "give one host per rank, or none"
            )

    @property
    def nodes(self) -> tuple[Ranks, ...]:
        """The ranks of each host; a host for each rank where hosts are not known."""
        return nodes_of(self.hosts) if self.hosts else tuple((r,) for r in range(self.size))


def nodes_of(hosts: Sequence[str]) -> tuple[Ranks, ...]:
    """The ranks of each host, ascending, hosts in the order of their first rank.

    hosts: of rank 0, 1, ...: any texts, equal where ranks are on one host.
    """
    found: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        found.setdefault(host, []).append(rank)
    return tuple(tuple(ranks) for ranks in found.values())


@lru_cache(maxsize=256)
def columns_of(nodes: tuple[Ranks, ...]) -> tuple[Ranks, ...]:
    """Groups with one rank of every node, ascending: as many as the smallest node has ranks.

    A larger node's are spread over it, so that they have its cores and NICs between them.
    """
    width = min(len(node) for node in nodes)
    return tuple(
        tuple(sorted(node[column * len(node) // width] for node in nodes))
        for column in range(width)
    )
