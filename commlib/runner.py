"""Runner: what carries messages out. Two kinds, chosen by the device of the tensors:

    CPU    `Worker`       a thread codes and waits, several messages at a time
    CUDA   `SideStream`   the calling thread queues everything on a stream beside its own

Whoever hands messages over need not know which.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .collectives.base import Step, Steps
from .order import Ticket
from .traffic import Pending
from .work import GiveUp, Work, writing


@dataclass
class Task:
    """A message to carry out.

    names: states that it reads and writes; a message that shares one must wait for its end.
    lane: whether its exchanges may overtake those of others. tensors: the caller's own.
    """

    steps: Steps
    work: Work
    what: str
    names: frozenset[str] = frozenset()
    lane: bool = False
    tensors: tuple[torch.Tensor, ...] = ()
    step: Step | Pending | None = None  # what it asked for last
    ticket: Ticket | None = None  # of what is matched by order, until all is issued
    waiting: Future[None] | None = None  # for what it asked for, once watched
    writing: AbstractContextManager[object] = field(init=False)  # where its steps run

    def __post_init__(self) -> None:
        self.writing = writing(*self.tensors)

    def advance(self, answer: bool | None) -> bool:
        """Run to the next request; False at the end."""
        try:
            with self.writing:
                self.step = self.steps.send(answer)  # type: ignore[arg-type]  # None starts it
        except StopIteration:
            return False
        return True


Fail = Callable[[BaseException, list[Task]], BaseException]
"""(error, the tasks in flight, the one that failed first): the error that all of them get."""


class Runner(Protocol):
    """Carries messages out in the order in which they come."""

    @property
    def idle(self) -> bool:
        """Whether a message that comes now could start on the calling thread."""

    def capturing(self) -> bool:
        """Whether what the caller queues now goes into a CUDA graph instead of to the device."""

    def work(self, result: Any, parts: int, give_up: GiveUp | None = None) -> Work:
        """What the caller of `parts` tasks gets; of none: done by what is queued so far."""

    def run(self, task: Task) -> None:
        """Carry a task out on the calling thread; only while idle."""

    def submit(self, task: Task) -> None:
        """Carry a task out without keeping the caller."""

    def in_turn(self, what: str) -> AbstractContextManager[None]:
        """A block in which the caller may post `what` by order: all earlier messages have."""

    def attend(self, pending: Pending) -> None:
        """See to it that an exchange is done before what the caller does next."""

    def watch(self, pending: Pending) -> None:
        """Like `attend`, for exchanges of any kind, with an eye on what other ranks say."""

    def fork(self) -> AbstractContextManager[None]:
        """A block in the order of messages: after what was queued so far, before what follows."""

    def now(self) -> Any:
        """A moment, for `since`."""

    def since(self, start: Any, record: Callable[[float], None]) -> None:
        """Call `record` with the seconds from `start` to here, as soon as they are known."""

    def read(self, numbers: torch.Tensor, then: Callable[[list[Any]], None]) -> None:
        """Call `then` with `numbers`, as soon as they are known."""

    def tasks(self) -> list[Task]:
        """What is in flight or queued."""

    def flush(self) -> None:
        """Wait until nothing is under way."""

    def stop(self) -> None:
        """Take no more tasks."""
