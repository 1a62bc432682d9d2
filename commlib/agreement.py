"""Agreement: all ranks mean the same message, or all raise, before a payload byte moves.

The first use of a plan is a round through the group's store: the n-th plan of a communicator is the
same on all ranks if they call alike, so every rank posts its text under n and compares everybody's.
Afterwards the plan is known and nothing is posted.

Before the first round ranks meet. A store may outlive them: torchrun keeps it when it starts them
anew, with all that those before them wrote. So every rank draws a number, and all keys stand under
a name made of everybody's: what was left there before is never looked at.

When an exchange fails or times out, ranks hold a roll call through the store: each says what it was
doing and why it stopped, and whoever does not answer within a short time is named.
"""

from __future__ import annotations

import hashlib
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
# Seconds between looks for the ranks that have yet to come, the first and the last.
MEET_FIRST, MEET_LAST = 1e-3, 5e-2
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
        me = {"host": socket.gethostname(), "pid": os.getpid(), "drawn": os.urandom(8).hex()}
        self._who = {transport.rank: me}  # the ranks, as far as they have come
        self._others = [r for r in range(transport.size) if r != transport.rank]
        self._name = self._place(self._who)
        self._met = False

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

    def meet(self, what: str) -> str:
        """A name that is the same on all ranks, and was never used before; all ranks call it alike.

        Raises: TimeoutError naming the ranks that did not come.
        """
        self._check(self._meet() if self._others and not self._met else [], what)
        return self._name.rstrip("/")

    def _round(self, mine: str) -> tuple[dict[int, str], list[int]]:
        """Post `mine`; what the others posted in the same round, and who posted nothing in time."""
        number, self.agreed = self.agreed, self.agreed + 1
        if not self._others:
            return {}, []
        if not self._met and (missing := self._meet()):
            return {}, missing
        self.transport.post(f"{self._name}plan/{number}/{self.transport.rank}", mine)
        texts: dict[int, str] = {}
        missing = self._collect(f"plan/{number}", self.timeout, texts)
        if not missing and number:  # all came to this round: they have read the one before
            self.transport.forget(f"{self._name}plan/{number - 1}/{self.transport.rank}")
        return texts, missing

    def _meet(self) -> list[int]:
        """Learn who the other ranks are; those that did not come in time."""
        rank, pause = self.transport.rank, MEET_FIRST
        self.transport.post(f"{self.number}/who/{rank}", json.dumps(self._who[rank]))
        end, looked = time.monotonic() + self.timeout, -LOOK
        while True:
            self._greet()
            missing = [r for r in self._others if self._find(f"{self._name}here/{r}") is None]
            self._met = not missing
            if self._met or time.monotonic() > end:
                return missing
            if time.monotonic() > looked + LOOK:
                looked = time.monotonic()
                self.look()
                # what those before this rank say, had they given up on it
                self.look(self._place({r: who for r, who in self._who.items() if r != rank}))
            time.sleep(pause)
            pause = min(2 * pause, MEET_LAST)

    def _greet(self) -> None:
        """See who has come, and say so; who saw a rank of an earlier life will see another."""
        for other in self._others:
            text = self._find(f"{self.number}/who/{other}")
            if text is not None:
                self._who[other] = json.loads(text)
        name = self._place(self._who)
        if name != self._name:
            self._name = name
            self.transport.post(f"{name}here/{self.transport.rank}", "")

    def _place(self, who: Mapping[int, Mapping[str, Any]]) -> str:
        """Where ranks that see one another have their keys."""
        text = "".join(f"{rank} {who[rank]['drawn']} " for rank in sorted(who))
        return f"{self.number}/{hashlib.sha256(text.encode()).hexdigest()[:16]}/"

    def _find(self, key: str) -> str | None:
        """What was posted under `key` by now."""
        try:
            return self.transport.read(key, 0.0)
        except TimeoutError:
            return None

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

    def look(self, place: str | None = None) -> None:
        """Raise if another rank has reported a failure."""
        text = self._find(f"{place or self._name}failed")
        if text is None:
            return
        first = json.loads(text)
        if first["rank"] != self.transport.rank:
            raise RuntimeError(f"rank {first['rank']} has failed in {first['doing']}")

    def roll_call(self, doing: str, error: BaseException) -> str:
        """Report this rank's failure and say what the others report; never raises.

        Runs beside a clock: the store may be gone with the host that kept it. What was heard before
        counts: the rank that keeps the store fails too, and may be the first to leave.
        """
        heard: dict[int, str] = {}
        answer: list[str] = []

        def call() -> None:
            try:
                silent = self._exchange_reports(doing, error, heard)
                answer.append(f"no answer from {self._identify(silent)}" if silent else "")
            except Exception as lost:
                answer.append(self._unheard(heard, lost))

        thread = threading.Thread(target=call, name="commlib roll call", daemon=True)
        thread.start()
        thread.join(ROLL_CALL + 1.0)
        said = answer[0] if answer else self._unheard(heard)
        lines = [said] if said else []
        for other, text in sorted(heard.copy().items()):
            row = json.loads(text)
            lines.append(f"rank {other} was in {row['doing']}: {row['error']}")
        return "; ".join(lines)

    def _exchange_reports(
        self, doing: str, error: BaseException, heard: dict[int, str]
    ) -> list[int]:
        """Post this rank's failure, fill `heard` with the others'; the ranks that post none."""
        rank = self.transport.rank
        report = json.dumps({"rank": rank, "doing": doing, "error": shorten(error)})
        self.transport.post(f"{self._name}report/{rank}", report)
        self.transport.post(f"{self._name}failed", report)
        return self._collect("report", ROLL_CALL, heard, look=False)

    def _unheard(self, heard: dict[int, str], lost: Exception | None = None) -> str:
        """Whom nothing is known of, because the store could not be asked."""
        ranks = self._identify([r for r in self._others if r not in heard])
        why = f" ({type(lost).__name__}: {shorten(lost)})" if lost else ""
        return (
            f"nothing heard from {ranks}: the group's store does not answer, so the process that "
            f"keeps it, as a rule global rank 0, may be gone or cut off from here{why}"
        )

    def _collect(
        self, folder: str, timeout: float, texts: dict[int, str], *, look: bool = True
    ) -> list[int]:
        """Fill `texts` with what the other ranks posted in `folder`; who posted nothing in time."""
        end = time.monotonic() + timeout
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
        return [r for r in self._others if r not in texts]

    def _identify(self, ranks: list[int]) -> str:
        """The ranks by group rank, global rank, host and process, as far as known."""
        names = []
        for rank in ranks:
            facts = []
            if self.transport.ranks[rank] != rank:
                facts.append(f"global rank {self.transport.ranks[rank]}")
            who = self._who.get(rank)
            if who is None:
                facts.append("it never used this communicator")
            else:
                facts.append(f"process {who['pid']} on {who['host']}{_fate(who)}")
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
