"""Emulated hosts for benchmarks and demos: a slow network on one machine, without a cluster.

`spawn(argv, 4, rate="200mbit")` runs a command on 4 hosts with a line of 200 Mbit/s each, and
`spawn(argv, 4, hosts=2, rate="200mbit")` runs its 4 ranks on 2 such hosts;
`Network` keeps such hosts up for several runs. Works as root, and for other users inside a user
namespace where the system permits one; `available()` says why not. No packet leaves the machine.
"""

from commlib.emulation.network import (
    Network,
    available,
    burst_bytes,
    parse_rate,
    rate_here,
    sent_bytes,
)
from commlib.emulation.ranks import spawn

__all__ = ["Network", "available", "burst_bytes", "parse_rate", "rate_here", "sent_bytes", "spawn"]
