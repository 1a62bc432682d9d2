"""What is known about a network, as plain numbers.

    seconds of one message = latency + bytes / bandwidth

Nothing here measures anything: `planner.measure` fills these in, cost formulas read them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


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
    """`size` ranks joined by equal links; `hosts` names the host of each rank where it is known."""

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
