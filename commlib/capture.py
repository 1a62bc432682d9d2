"""Captures: what a CUDA graph may capture, and what stays where it is for its sake.

    communicator.all_reduce(x, "w")          # once as usual
    with torch.cuda.graph(graph):
        communicator.all_reduce(x, "w")      # not done now, but with every replay
    graph.replay()                           # residuals and random streams go on

A graph repeats kernels on the addresses they had when it was captured. So whatever a message needs
beyond its buffers has to be there before: residuals, step counters, tables on the device, compiled
kernels, NCCL's connections, the agreement of all ranks. Carrying the same message out once makes
all of these. Afterwards they must not move: DDP's regrouping of buckets, say, lays residuals
elsewhere, and a graph would go on with the old ones. The communicator has to live as long as its
graphs, and NCCL wants them gone before its group.
"""

from __future__ import annotations

from .algorithms import Thc
from .plans import PARTS, Message, Plan

ONCE = (
    "{what} is called for the first time while a CUDA graph is being captured: ranks could not "
    "agree on it, and its memory would belong to the graph. Make the same call once before "
    "capturing"
)


class Captures:
    """The messages of a communicator, as far as CUDA graphs mind."""

    def __init__(self) -> None:
        self._ready: dict[int, Message] = {}  # carried out, and nothing of theirs has moved since
        self._fixed: dict[int, Message] = {}  # of those, the ones in a graph

    @property
    def any(self) -> bool:
        """Whether a graph holds a message."""
        return bool(self._fixed)

    def admit(self, plan: Plan, *, capturing: bool, checked: bool) -> None:
        """Note a call that is about to be carried out or captured.

        Raises: RuntimeError where it cannot be captured, or would move what a graph works on.
        """
        if capturing:
            self._capture(plan, checked)
            return
        for message in plan.messages:
            if id(message) not in self._ready:
                self._settle(plan, message)

    def forget(self) -> None:
        """Residuals are gone: messages have to be carried out again before a capture."""
        self._ready.clear()

    def drop(self, plan: Plan | None) -> None:
        """A plan is no longer kept; its messages in a graph are."""
        for message in () if plan is None else plan.messages:
            if id(message) not in self._fixed:
                self._ready.pop(id(message), None)

    def _capture(self, plan: Plan, checked: bool) -> None:
        what = f"{plan.op} of key {plan.label!r}"
        if checked:
            raise RuntimeError(
                f"{what}: COMMLIB_CHECK=1 compares numbers on the host in every message, which a "
                "CUDA graph cannot repeat; capture without it"
            )
        if plan.op == PARTS:
            raise RuntimeError(
                f"{what} has sizes of its own in every call, which a CUDA graph cannot repeat; "
                "capture all_to_all of equal parts"
            )
        for message in plan.messages:
            if isinstance(message.scheme.algorithm, Thc):
                raise RuntimeError(
                    f"{what}: {message.name} draws its random numbers on the host in every "
                    "message, which a CUDA graph cannot repeat; capture under int4+ef"
                )
            if id(message) not in self._ready:
                raise RuntimeError(ONCE.format(what=what))
        self._fixed |= {id(message): message for message in plan.messages}

    def _settle(self, plan: Plan, message: Message) -> None:
        """`message` comes for the first time: those it shares memory with have to come again."""
        mine = message.names - {""}  # what has no name has no memory that could move
        rivals = [id_ for id_, other in self._ready.items() if mine & other.names]
        for id_ in rivals:
            if id_ in self._fixed:
                shared = ", ".join(sorted(mine & self._fixed[id_].names))
                raise RuntimeError(
                    f"{plan.op} of key {plan.label!r} would move the memory of {shared}, which a "
                    "captured CUDA graph works on; keep to the grouping that was captured, or use "
                    "other keys"
                )
        for id_ in rivals:
            del self._ready[id_]
        self._ready[id(message)] = message
