"""The interface gloo takes, how fast it is, and from which size on compression pays on it."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import interfaces
from .finding import Finding, fault, ok, warn

if TYPE_CHECKING:
    import torch

    from ..communicator import Communicator

PROBE_BYTES = 16 << 20  # one exchange: enough that latency is nothing of it
PROBE_ROUNDS = 5
PROBE_SECONDS = 120.0
JOB = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torch takes a job's group from


@dataclass(frozen=True)
class Probe:
    """A measured link: bits per second one rank sends (slowest rank), and the break-even tables."""

    ranks: int
    bits_per_second: float
    breakeven: str
    choices: str


def interface() -> Iterator[Finding]:
    """Which interface gloo takes, with its address and speed."""
    name, reason = interfaces.gloo()
    what = "gloo interface"
    choose = "export GLOO_SOCKET_IFNAME=INTERFACE with one of: " + ", ".join(
        f"{other} ({address})" for other, address in interfaces.addresses().items()
    )
    if name is None:
        yield fault(what, reason, choose)
        return
    address = interfaces.addresses().get(name, "no IPv4 address")
    speed = interfaces.speed(name)
    found = f"{name} ({address}, {_rate(speed)}), as {reason}"
    if name == "lo":
        yield warn(what, found, f"ranks on other hosts cannot reach it; {choose}")
    else:
        yield ok(what, found)


def emulated_hosts() -> Iterator[Finding]:
    """Whether `--rate` can work here."""
    from ..emulation import available

    reason = available()
    if reason is None:
        yield ok("emulated hosts", "can be built here")
    else:
        todo = "run as root, or permit user namespaces; `bench` and `demo` use loopback until then"
        yield warn("emulated hosts", reason, todo)


def judge(probe: Probe, speed: float | None, *, same_host: bool) -> Iterator[Finding]:
    """The measured rate against the interface's own speed (bits per second; None: not known)."""
    where = "between two ranks of this host" if same_host else f"{probe.ranks} ranks on this link"
    what = "gloo rate"
    found = f"{_rate(probe.bits_per_second)} {where}, interface {_rate(speed)}"
    if speed is None:
        yield ok(what, found)
    elif same_host and probe.bits_per_second < speed:
        yield warn(what, found, "the processor, not the network, will be the bottleneck")
    elif not same_host and probe.bits_per_second < 0.5 * speed:
        yield warn(what, found, "less than half of the line: another interface, or a busy network?")
    else:
        yield ok(what, found)


def obstacle(variables: Mapping[str, str]) -> Finding | None:
    """Why the job that these variables are of cannot be measured; None: it can, or there is none.

    RANK says that there is a job.
    """
    if "RANK" not in variables:
        return None
    what, alone = "gloo rate", "or unset RANK to measure two ranks of this host"
    missing = [name for name in JOB if not variables.get(name)]
    if missing:
        found = f"RANK={variables['RANK']} is a job's, which also needs {', '.join(missing)}"
        return fault(what, found, f"set {', '.join(JOB)} (torchrun does), {alone}")
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not variables[name].isdecimal():
            found = f"{name}={variables[name]} is not a whole number of at least 0"
            return fault(what, found, f"set it as torchrun does, {alone}")
    rank, size = int(variables["RANK"]), int(variables["WORLD_SIZE"])
    if rank >= size:
        found = f"RANK={rank} is not below WORLD_SIZE={size}"
        return fault(what, found, f"number the ranks from 0, {alone}")
    if size == 1:
        found = "WORLD_SIZE=1: one rank sends nothing, so there is nothing to measure"
        return warn(what, found, f"start it on every rank of the job, {alone}")
    return None


def probe() -> Probe:
    """Measure: this job's link where RANK is set, else two ranks on this host's gloo interface."""
    if "RANK" in os.environ:
        return measure()
    from .. import emulation

    name = interfaces.gloo()[0] or "lo"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "probe.json"
        code = emulation.spawn(
            [sys.executable, "-m", __package__, str(file)],
            2,
            env={"GLOO_SOCKET_IFNAME": name},
            timeout=PROBE_SECONDS,
        )
        if code:
            raise RuntimeError(f"two ranks over {name} ended with exit code {code}")
        return Probe(**json.loads(file.read_text()))


def measure() -> Probe:
    """On every rank of the default group, made here from RANK, WORLD_SIZE and MASTER_*."""
    import torch
    import torch.distributed as dist

    from ..benchmark.collectives import process_group
    from ..communicator import Communicator
    from ..planner import CANDIDATES, breakeven_table, choices_table
    from ..planner import measure as measure_profile
    from ..policy import Policy, Rule, Scheme
    from ..transport import TorchTransport

    with process_group(PROBE_SECONDS):
        size = dist.get_world_size()
        stride = PROBE_BYTES // size
        inp, out = (torch.zeros(stride * size, dtype=torch.uint8) for _ in range(2))
        seconds = []
        for _ in range(1 + PROBE_ROUNDS):
            dist.barrier()
            start = time.perf_counter()
            dist.all_to_all_single(out, inp)
            seconds.append(time.perf_counter() - start)
        slowest = torch.tensor(seconds[1:], dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        transport = TorchTransport()
        ways = {
            text: Communicator(transport, Policy((Rule(Scheme.parse(text)),)))
            for text in CANDIDATES
        }
        try:
            profile = measure_profile(lambda text, x: _finish(ways[text], x), transport)
        finally:
            for communicator in ways.values():
                communicator.close()
    return Probe(
        ranks=size,
        bits_per_second=stride * (size - 1) * 8 / float(slowest.median()),
        breakeven=breakeven_table(profile),
        choices=choices_table(profile),
    )


def _finish(communicator: Communicator, x: torch.Tensor) -> None:
    communicator.all_reduce(x).wait()


def _rate(bits_per_second: float | None) -> str:
    from ..benchmark.units import format_rate

    return "of unknown speed" if bits_per_second is None else format_rate(bits_per_second)
