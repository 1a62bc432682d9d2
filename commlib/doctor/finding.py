"""What a check finds: a status, what was looked at, what to do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How bad it is."""

    OK = "OK"
    WARN = "WARN"
    FAULT = "FAULT"


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found and, unless all is well, what to do."""

    status: Status
    what: str
    found: str
    todo: str = ""

    def __str__(self) -> str:
        line = f"{self.status:<5}  {self.what}: {self.found}"
        return f"{line}\n       -> {self.todo}" if self.todo else line


def ok(what: str, found: str) -> Finding:
    return Finding(Status.OK, what, found)


def warn(what: str, found: str, todo: str) -> Finding:
    return Finding(Status.WARN, what, found, todo)


def fault(what: str, found: str, todo: str) -> Finding:
    return Finding(Status.FAULT, what, found, todo)
