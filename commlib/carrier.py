"""Carrier: how planned messages get through, and what happens when they do not.

Calls are started in call order, by a `Runner`. On CPU that is the calling thread if nothing else is
under way, else one worker thread; on CUDA the calling thread always, which queues them on a stream.

After a failure (a rank died, or did not come within the timeout) the carrier is aborted: it asks
the other ranks what they saw, and later calls raise and say so. Plans that ranks disagree about
touch neither network nor residuals, and leave it usable.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch

from .agreement import Agreement, Disagreement, shorten
from .capture import ONCE, Captures
from .checked import Checked
from .collectives import Steps
from .collectives.base import span
from .lane import COMMUNICATORS, Lane
from .plans import PARTS, Message, Plan
from .runner import Runner, Task
from .sampling import sample_errors
from .stamp import checking
from .streams import SideStream
from .telemetry import Meter
from .traffic import Transport
from .work import Work, writing
from .worker import Worker


class Carrier:
    """The traffic of one communicator.

    timeout: seconds an exchange or an agreement may take. lost: names whose residuals belong to
    messages that never arrived.
    """

    def __init__(self, transport: Transport, timeout: float, meter: Meter) -> None:
        self.transport = transport
        self.timeout = timeout
        self.meter = meter
        self.lost: list[str] = []
        self.aborted: RuntimeError | None = None
        self.checking = checking()
        self.captures = Captures()
        self._number = 0  # of the message
        self._agreement = Agreement(transport, timeout)
        self._place = self._agreement.number % COMMUNICATORS
        if transport.tagged and not transport.order.enter(self._place, self):
            raise RuntimeError(
                f"communicator {self._agreement.number} of this group would have the tags of "
                f"another that is still in use; a group has room for {COMMUNICATORS}: close() "
                "those that are done"
            )
        self._lock = threading.RLock()
        self._failing = threading.Lock()
        me = weakref.ref(self)  # the thread must not keep its communicator alive

        def fail(error: BaseException, tasks: list[Task]) -> BaseException:
            carrier = me()
            return error if carrier is None else carrier.fail(error, tasks)

        def look() -> None:
            carrier = me()
            if carrier is not None:
                carrier.look()

        def aborted() -> bool:
            carrier = me()
            return carrier is None or carrier.aborted is not None

        self._runner: Runner
        if transport.device.type == "cuda":
            how = (fail, aborted, meter.defer)
            self._runner = SideStream(transport.device, *how, timeout=timeout)
        else:
            self._runner = Worker(timeout, fail, look, transport.order)
        weakref.finalize(self, self._runner.stop)

    def agree(self, text: Mapping[str, Any]) -> None:
        """Return when all ranks have come with the same plan; RuntimeError names who did not."""
        with self._agreeing(text):
            self._agreement.agree(text)

    def tell(self, text: Mapping[str, Any], mine: str) -> list[str]:
        """Like `agree`, and what each rank says with it, by rank."""
        with self._agreeing(text):
            return self._agreement.tell(text, mine)

    @contextmanager
    def _agreeing(self, text: Mapping[str, Any]) -> Iterator[None]:
        with self._lock:
            self.refuse()
            try:
                yield
            except Disagreement:
                raise
            except (RuntimeError, OSError) as error:  # a timeout, another rank's failure, no store
                what = f"the agreement on {text['op']} of key {text['key']!r}"
                raise self.fail(error, [], what) from error

    def divide(self, groups: Sequence[Sequence[int]]) -> None:
        """Connect those `groups` of ranks that this one is in, which messages will ask for.

        That waits for their ranks: within a message it would keep others from moving. Where there
        are tags there is nothing to connect, a lane has its parts.
        """
        if self.transport.tagged:
            return
        with self.still():
            try:
                for ranks in groups:
                    if self.transport.rank in ranks:
                        self.transport.sub(ranks)
            except (RuntimeError, OSError) as error:
                raise self.fail(error, [], "connecting groups of ranks") from error

    def in_turn(self, what: str) -> AbstractContextManager[None]:
        """A block for exchanges straight on the transport: all earlier messages are posted."""
        return self._runner.in_turn(what)

    def flush(self) -> None:
        """Wait until nothing is under way."""
        self._runner.flush()

    @contextmanager
    def still(self) -> Iterator[None]:
        """A block for the memory of messages: none is under way, later ones find it done."""
        self.flush()
        with self._lock, torch.no_grad(), self._runner.fork():
            yield
        self.flush()

    def capturing(self) -> bool:
        """Whether what is called now goes into a CUDA graph."""
        return self._runner.capturing()

    def close(self) -> None:
        """Finish what is under way, then refuse everything."""
        self._runner.flush()
        self._runner.stop()
        self.transport.order.leave(self._place, self)
        self.aborted = self.aborted or RuntimeError("It is closed.")

    def _via(self, plan: Plan, message: Message) -> Transport:
        """The transport of the message about to start; the same kind on all ranks."""
        transport, by_hosts = self.transport, message.hierarchical
        if transport.tagged and (by_hosts or message.laned(plan.op)):
            mark = 0 if self.checking else message.mark  # stamps tell who is where, and at once
            transport = Lane(transport, self._agreement.number, self._number, mark)
        if self.checking:
            what = f"{plan.op} of key {plan.label!r} under scheme {message.name}"
            return Checked(transport, what, message.mark, self._number, self._runner.watch)
        return transport

    def start(
        self,
        plan: Plan,
        result: torch.Tensor,
        x: torch.Tensor,
        steps: Callable[[Message, Transport], Steps],
        async_op: bool,
    ) -> Work:
        """Carry out `plan` on flat `x`; inline if nothing else is under way."""
        if result.numel() == 0 and plan.op != PARTS:
            return Work(result, 0)
        with self._lock, torch.no_grad():
            capturing = self._admit(plan)
            work = self._runner.work(result, len(plan.messages), self.give_up)
            inline = self._runner.idle and not async_op
            sampled = not plan.lossless and not capturing and self.meter.due(plan.label)
            if sampled:  # before any message is counted: it may fail
                with self._runner.fork():
                    self._sample(plan, x)
            for message in plan.messages:
                self._number += 1
                what = f"{plan.op} of key {plan.label!r} (message {self._number})"
                via = self._via(plan, message)
                metered = self._metered(steps(message, via), plan, message, x.nbytes)
                task = Task(
                    metered, work, what, message.names, isinstance(via, Lane), tensors=(result, x)
                )
                (self._runner.run if inline else self._runner.submit)(task)
        if not async_op:
            work.wait()
        return work

    def native(self, plan: Plan, x: torch.Tensor, factor: float) -> Work | None:
        """The library's own all_reduce without detours, if nothing else is under way."""
        with self._lock:
            if not self._runner.idle or self.checking or x.numel() == 0:
                return None
            self._admit(plan)
            self._number += 1
            what = f"{plan.op} of key {plan.label!r} (message {self._number})"
            start, before = self._runner.now(), self.transport.bytes_sent
            try:
                with self._runner.in_turn(what), span("exchange"):
                    self._runner.attend(self.transport.all_reduce(x))
            except BaseException as error:
                broken = self.fail(error, [], what)
                if not isinstance(error, Exception):  # Ctrl-C stays what it is
                    raise
                raise broken from error
            if factor != 1.0:
                with writing(x):
                    x.mul_(factor)
            sent = self.transport.bytes_sent - before
            row = (plan.op, plan.label, "fp32", x.nbytes, sent)
            self._runner.since(start, partial(self.meter.record, *row))
            return self._runner.work(x, 0)

    def _admit(self, plan: Plan) -> bool:
        """Refuse what cannot be carried out now; whether it goes into a CUDA graph."""
        self.refuse()
        capturing = self.capturing()
        self.captures.admit(plan, capturing=capturing, checked=self.checking)
        return capturing

    def _sample(self, plan: Plan, x: torch.Tensor) -> None:
        for place, message in enumerate(plan.messages):
            # Of differences to what all ranks hold, the error of x itself would say nothing.
            if not (message.scheme.lossless or message.differences):
                step = self._number + 1 + place
                sample_errors(self.meter, message, x, step, self._runner.read)

    def _metered(self, steps: Steps, plan: Plan, message: Message, nbytes: int) -> Steps:
        """`steps`, recorded at their end with the bytes they sent. nbytes: of the call's tensor."""
        start, sent, answer = self._runner.now(), 0, None
        transport = self.transport
        while True:
            before = transport.bytes_sent
            try:
                step = steps.send(answer)  # type: ignore[arg-type]  # None starts it
            except StopIteration:
                break
            sent += transport.bytes_sent - before
            answer = yield step
        layout = message.layout
        raw_bytes = nbytes if plan.op == PARTS else layout.numel * layout.dtype.itemsize
        row = (plan.op, plan.label, message.name, raw_bytes, sent)
        self._runner.since(start, partial(self.meter.record, *row))

    def refuse(self, new: Plan | None = None) -> None:
        """Raise where no calls are taken, or not this one, of which nothing is known yet."""
        if self.aborted is not None:
            raise RuntimeError(f"this communicator takes no more calls. {self.aborted}")
        if new is not None and self.capturing():
            raise RuntimeError(ONCE.format(what=f"{new.op} of key {new.label!r}"))

    def look(self) -> None:
        if self.aborted is not None:
            raise self.aborted
        self._agreement.look()

    def give_up(self, timeout: float) -> BaseException:
        """What Work.wait raises after its own timeout: the communicator is aborted."""
        return self.fail(TimeoutError(f"not done after {timeout:g} s"), self._runner.tasks())

    def fail(self, error: BaseException, tasks: list[Task], what: str = "a call") -> BaseException:
        """Abort: ask the other ranks, remember what was lost; the error for everybody."""
        with self._failing:
            self.lost += sorted({n for t in tasks if t.step is not None for n in t.names if n})
            if self.aborted is None:
                what = tasks[0].what if tasks else what
                others = self._agreement.roll_call(what, error)
                said = f" {others}." if others else ""
                self.aborted = RuntimeError(
                    f"{what} failed on rank {self.transport.rank} of {self.transport.size}: "
                    f"{shorten(error)}.{said} The communicator is aborted; go on from a "
                    "checkpoint with a new one, on a new process group if a rank is gone."
                )
                self.aborted.__cause__ = error  # keeps buffers alive that may still be written to
            return self.aborted
