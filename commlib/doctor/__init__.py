"""`commlib doctor`: is this machine ready, and from which size on does compression pay here?

A check is a function that yields findings; `CHECKS` is the table. OK needs nothing, WARN costs
speed or will bite later, FAULT breaks something and makes the exit code 1. The probe measures two
ranks of this host over the interface gloo takes, an upper bound for every link that leaves the
host; started by torchrun it measures that job's link instead.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict

from . import interfaces, network, software
from .finding import Finding, Status, fault
from .network import Probe

CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    software.python_and_packages,
    software.cuda,
    software.backends,
    software.kernel_cache,
    software.environment,
    network.interface,
    network.emulated_hosts,
)


def examine() -> Iterator[Finding]:
    """The findings of all checks. A check that breaks is itself a fault, and the others go on."""
    for check in CHECKS:
        try:
            yield from check()
        except Exception as error:  # a broken installation may fail in any way
            name = check.__name__.replace("_", " ")
            yield fault(name, f"{type(error).__name__}: {error}", "commlib cannot work like this")


def run(*, probe: bool = True, as_json: bool = False) -> int:
    """Print the report; 1 if anything is a FAULT, else 0. Rank 0 alone prints what is well.

    As JSON it is rank 0's; what is not well on others goes to stderr.
    """
    rank = os.environ.get("RANK")
    first = rank is None or not rank.isdecimal() or int(rank) == 0  # no number: nobody else tells
    findings: list[Finding] = []

    def tell(finding: Finding) -> None:
        findings.append(finding)
        if first and not as_json:
            print(finding, flush=True)
        elif not first and finding.status is not Status.OK:
            out = sys.stderr if as_json else sys.stdout
            print(f"rank {rank}: {finding}", file=out, flush=True)

    for finding in examine():
        tell(finding)
    measured = _measured(tell) if probe else None
    broken = any(finding.status is Status.FAULT for finding in findings)
    if as_json and first:
        report = {
            "findings": [asdict(finding) for finding in findings],
            "probe": asdict(measured) if measured else None,
            "fault": broken,
        }
        print(json.dumps(report, indent=2))
    elif measured is not None and first:
        print(f"\nWhere compression pays ({measured.ranks} ranks):\n{measured.breakeven}")
        print(f"\nMeasured here, and what policy='auto' takes:\n{measured.choices}")
    return int(broken)


def _measured(tell: Callable[[Finding], None]) -> Probe | None:
    obstacle = network.obstacle(os.environ)
    if obstacle is not None:
        tell(obstacle)
        return None
    try:
        measured = network.probe()
    except (ImportError, OSError, RuntimeError, ValueError) as error:  # ValueError: torch's own
        tell(
            fault(
                "gloo rate",
                str(error),
                "the ranks' own errors are on stderr; if they could not connect, see the interface",
            )
        )
        return None
    name = interfaces.gloo()[0]
    speed = interfaces.speed(name) if name else None
    for finding in network.judge(measured, speed, same_host="RANK" not in os.environ):
        tell(finding)
    return measured
