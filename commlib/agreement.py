"""Agreement: all ranks mean the same message, or all raise, before a payload byte moves.

The first use of a plan is a round through the group's store: the n-th plan of a communicator is the
same on all ranks if they call alike, so every rank posts its text under n and compares everybody's.
Afterwards the plan is known and nothing is posted.

When an exchange fails or times out, ranks hold a roll call through the store: each says what it was
doing and why it stopped, and whoever does not answer within a short time is named.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .traffic import Transport

# Seconds a failing rank waits for the others' answers.
ROLL_CALL = 2.0
# Seconds between looks for another rank's failure while waiting for its plan.
LOOK = 1.0
# Characters of a value shown in an error.
SHOWN = 120

# Where a plan has what a rank says beside it.
SAYS = "says"

Plan = Mapping[str, Any]


class Disagreement(RuntimeError):
    """Ranks came with different plans; nothing was sent."""


class Agreement:
    """One communicator's dealings with the store of its group."""

    def __init__(self, transport: Transport, timeout: float) -> None:
        self.transport = transport
        self.timeout = timeout
        self.agreed = 0
        self.number = transport.turn()  # of the communicator, the same on all ranks
        self._name = f"{self.number}/"
        self._others = [r for r in range(transport.size) if r != transport.rank]
        self._introduced = False

    def agree(self, plan: Plan) -> None:
        """Return when every rank has come with an equal `plan`.

        Raises: RuntimeError naming the ranks that differ, and in what, or those that did not come.
        """
        mine = json.dumps(plan)
        texts, missing = self._round(mine)
        different = {r: json.loads(t) for r, t in texts.items() if t != mine}
        if different:
            raise Disagreement(_difference(plan, self.transport.rank, different))
        self._complete(missing, _describe(plan))

    def tell(self, plan: Plan, mine: str) -> list[str]:
        """What each rank has to say beside a `plan` that is the same on all, by rank.

        Raises: as `agree`.
        """
        texts, missing = self._round(json.dumps({**plan, SAYS: mine}))
        plans = {r: json.loads(text) for r, text in texts.items()}
        said = {r: other.pop(SAYS, None) for r, other in plans.items()}
        text = json.dumps(plan)
        different = {
            r: other
            for r, other in plans.items()
            if json.dumps(other) != text or not isinstance(said[r], str)
        }
        if different:
            raise Disagreement(_difference(plan, self.transport.rank, different))
        self._complete(missing, _describe(plan))
        return [said.get(r, mine) for r in range(self.transport.size)]

    def gather(self, what: str, mine: Any) -> list[Any]:
        """What every rank says (JSON), by rank; all ranks call it alike.

        Raises: TimeoutError naming the ranks that did not come.
        """
        texts, missing = self._round(json.dumps(mine))
        self._check(missing, what)
        said = {r: json.loads(text) for r, text in texts.items()}
        return [said.get(r, mine) for r in range(self.transport.size)]

    def _round(self, mine: str) -> tuple[dict[int, str], list[int]]:
        """Post `mine`; what the others posted in the same round, and who posted nothing in time."""
        number, self.agreed = self.agreed, self.agreed + 1
        if not self._others:
            return {}, []
        if not self._introduced:
            self._introduced = True
            who = {"host": socket.gethostname(), "pid": os.getpid()}
            self.transport.post(f"{self._name}who/{self.transport.rank}", json.dumps(who))
        self.transport.post(f"{self._name}plan/{number}/{self.transport.rank}", mine)
        texts, missing = self._collect(f"plan/{number}", self.timeout)
        if not missing and number:  # all came to this round: they have read the one before
            self.transport.forget(f"{self._name}plan/{number - 1}/{self.transport.rank}")
        return texts, missing

    def _complete(self, missing: list[int], what: str) -> None:
        self._check(missing, what)
        if self._others:
            self.look()  # a rank that gave up waiting for this one has left

    def _check(self, missing: list[int], what: str) -> None:
        if missing:
            raise TimeoutError(
                f"{what}: no word from {self._identify(missing)} within {self.timeout:g} s; all "
                "ranks must call the same collectives in the same order"
            )

    def look(self) -> None:
        """Raise if another rank has reported a failure."""
        try:
            first = json.loads(self.transport.read(f"{self._name}failed", 0.0))
        except TimeoutError:
            return
        if first["rank"] != self.transport.rank:
            raise RuntimeError(f"rank {first['rank']} has failed in {first['doing']}")

    def roll_call(self, doing: str, error: BaseException) -> str:
        """Report this rank's failure and say what the others report; never raises.

        Runs beside a clock: the store may be gone with the host that kept it.
        """
        answer: list[str] = []

        def call() -> None:
            try:
                answer.append(self._roll_call(doing, error))
            except Exception as lost:
                answer.append(
                    "the group's store does not answer, so the process that keeps it, as a rule "
                    f"global rank 0, may be gone ({type(lost).__name__}: {shorten(lost)})"
                )

        thread = threading.Thread(target=call, name="commlib roll call", daemon=True)
        thread.start()
        thread.join(ROLL_CALL + 1.0)
        if not answer:
            return "the group's store does not answer; its process or its host may be gone"
        return answer[0]

    def _roll_call(self, doing: str, error: BaseException) -> str:
        rank = self.transport.rank
        report = {"rank": rank, "doing": doing, "error": shorten(error)}
        self.transport.post(f"{self._name}report/{rank}", json.dumps(report))
        self.transport.post(f"{self._name}failed", json.dumps(report))
        texts, missing = self._collect("report", ROLL_CALL, look=False)
        lines = []
        if missing:
            lines.append(f"no answer from {self._identify(missing)}")
        for other, text in sorted(texts.items()):
            row = json.loads(text)
            lines.append(f"rank {other} was in {row['doing']}: {row['error']}")
        return "; ".join(lines)

    def _collect(
        self, folder: str, timeout: float, *, look: bool = True
    ) -> tuple[dict[int, str], list[int]]:
        """What the other ranks posted in `folder`, and who posted nothing in time."""
        end = time.monotonic() + timeout
        texts: dict[int, str] = {}
        for rank in self._others:
            while rank not in texts:
                left = max(0.0, end - time.monotonic())
                try:
                    texts[rank] = self.transport.read(
                        f"{self._name}{folder}/{rank}", min(left, LOOK)
                    )
                except TimeoutError:
                    if left == 0.0:
                        break
                    if look:
                        self.look()
        return texts, [r for r in self._others if r not in texts]

    def _identify(self, ranks: list[int]) -> str:
        """The ranks by group rank, global rank, host and process, as far as known."""
        names = []
        for rank in ranks:
            facts = []
            if self.transport.ranks[rank] != rank:
                facts.append(f"global rank {self.transport.ranks[rank]}")
            try:
                who = json.loads(self.transport.read(f"{self._name}who/{rank}", 0.0))
                facts.append(f"process {who['pid']} on {who['host']}{_fate(who)}")
            except TimeoutError:
                facts.append("it never used this communicator")
            names.append(f"rank {rank} ({', '.join(facts)})")
        return ", ".join(names)


def _fate(who: Mapping[str, Any]) -> str:
    """Whether a process of this host still runs; nothing is known of other hosts'."""
    if who["host"] != socket.gethostname() or who["pid"] == os.getpid():
        return ""
    try:
        state = Path(f"/proc/{who['pid']}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ", which has ended"
    return {"Z": ", which has ended", "X": ", which has ended", "T": ", which is stopped"}.get(
        state, ""
    )


def _describe(plan: Plan) -> str:
    return f"{plan['op']} of key {_show(plan['key'])}"


def _difference(mine: Plan, rank: int, others: Mapping[int, Plan]) -> str:
    """Which ranks came with what instead."""
    lines = []
    for other, plan in sorted(others.items()):
        for name in {**mine, **plan}:
            got, expected = plan.get(name), mine.get(name)
            if got != expected:
                lines.append(
                    f"{name}: rank {other} has {_show(got)}, rank {rank} has {_show(expected)}"
                )
    return (
        f"ranks disagree about {_describe(mine)}: {'; '.join(lines)}. All ranks must call the "
        "same collectives in the same order, with the same sizes, dtypes, keys and policy"
    )


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 30]} ... ({len(text)} characters)"


def shorten(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
