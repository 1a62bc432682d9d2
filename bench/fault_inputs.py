"""Bad input, case by case: what is passed, on which ranks, and what the error must say.

A case runs on every rank. `odd` is the rank that differs where ranks must differ. Cases whose error
comes before anything is sent use the trial's own communicator; those that set ranks against one
another make their own on the same group, so that the trial's must survive them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from commlib import Communicator, Policy, Scheme
from commlib.policy import Rule

KNOWN = "small.weight"  # a key that the trial's program uses, of 3000 elements


class Call(NamedTuple):
    """What a case gets."""

    communicator: Communicator
    scheme: str
    odd: int
    fresh: Callable[[str], Communicator]  # another communicator on the same group

    @property
    def is_odd(self) -> bool:
        return self.communicator.rank == self.odd


@dataclass(frozen=True)
class Case:
    """run(call) must raise an `error`, whose text must match every pattern of `says`.

    In patterns, {odd} is the odd rank.
    """

    name: str
    run: Callable[[Call], object]
    error: type[Exception]
    says: tuple[str, ...]


@dataclass
class CaseReport:
    """How a case ended on one rank."""

    name: str
    raised: str = ""
    text: str = ""
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    untouched: bool = False
    state: dict[str, Any] = field(default_factory=dict)


def run_case(case: Case, communicator: Communicator, scheme: str, odd: int) -> CaseReport:
    """Run one case; its report says what was raised and what that lacks."""
    made: list[Communicator] = []

    def fresh(text: str) -> Communicator:
        policy = Policy((Rule(Scheme.parse(text)),))
        made.append(Communicator(policy=policy, timeout=communicator.timeout))
        return made[-1]

    report = CaseReport(case.name)
    began = time.monotonic()
    try:
        case.run(Call(communicator, scheme, odd, fresh))
        report.problems.append(f"raised nothing, not {case.error.__name__}")
    except Exception as error:
        report.raised, report.text = type(error).__name__, str(error)
        if not isinstance(error, case.error):
            report.problems.append(f"raised {report.raised}, not {case.error.__name__}")
    report.seconds = time.monotonic() - began
    for other in made:
        other.close()
    for pattern in case.says:
        if not re.search(pattern.format(odd=odd), report.text):
            report.problems.append(f"does not say {pattern.format(odd=odd)!r}")
    return report


def strided(call: Call) -> object:
    return call.communicator.all_reduce(torch.ones(60, 50).t(), KNOWN).wait()


def elsewhere(call: Call) -> object:
    return call.communicator.all_reduce(torch.ones(3000, device="meta"), KNOWN).wait()


def regrown(call: Call) -> object:
    return call.communicator.all_reduce(torch.ones(3001), KNOWN).wait()


def integers(call: Call) -> object:
    return call.communicator.all_reduce(torch.arange(4096), KNOWN, scheme="int8")


def sizes(call: Call) -> object:
    x = torch.ones(4096 + 128 * call.is_odd)
    return call.fresh(call.scheme).all_reduce(x, "sizes.weight").wait()


def dtypes(call: Call) -> object:
    x = torch.ones(4096, dtype=torch.bfloat16 if call.is_odd else torch.float32)
    return call.fresh(call.scheme).all_reduce(x, "dtypes.weight").wait()


def schemes(call: Call) -> object:
    communicator = call.fresh("int7:block=64+ef" if call.is_odd else call.scheme)
    return communicator.all_reduce(torch.ones(4096), "schemes.weight").wait()


def operations(call: Call) -> object:
    communicator, x = call.fresh(call.scheme), torch.ones(4096)
    if call.is_odd:
        out = torch.empty(4096 * communicator.size)
        return communicator.all_gather(out, x, "operations.weight").wait()
    return communicator.all_reduce(x, "operations.weight").wait()


def named(text: str, *says: str) -> Case:
    """A policy text that must be refused, by the communicator's constructor."""
    return Case(f"policy {text!r}", lambda call: call.fresh(text), ValueError, says)


RANKS = r"ranks? "
CASES = (
    named("int44+ef", "int44", "int4"),
    named("int4+eff", "eff", "allowed: ef"),
    named("int4:blok=64", "blok", "block"),
    named("int8@two_fase", "two_fase", "two_phase"),
    named("ternary+ef", "gamma = ", "must be below 1"),
    named("int2:round=stochastic+ef", "gamma = ", "must be below 1"),
    Case("strided tensor", strided, ValueError, ("contiguous", r"\(50, 60\)")),
    Case("other device", elsewhere, ValueError, ("meta", "cpu")),
    Case("known key, other size", regrown, ValueError, (KNOWN, "3000", "3001")),
    Case("integers, lossy scheme", integers, ValueError, ("int64", "int8", "float32")),
    Case("sizes differ", sizes, RuntimeError, ("sizes.weight", RANKS, "{odd}", "4096", "4224")),
    Case("dtypes differ", dtypes, RuntimeError, ("dtypes.weight", RANKS, "{odd}", "bfloat16")),
    Case("schemes differ", schemes, RuntimeError, (RANKS, "{odd}", "int7:block=64")),
    Case("operations differ", operations, RuntimeError, (RANKS, "all_gather", "all_reduce")),
)
