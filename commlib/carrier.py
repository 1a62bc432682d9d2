"""Carrier: how planned messages get through, and what happens when they do not.

Calls are started in call order: on the calling thread if nothing else is under way, else by one
worker thread.

After a failure (a rank died, or did not come within the timeout) the carrier is aborted: it asks
the other ranks what they saw, and later calls raise and say so. Plans that ranks disagree about
touch neither network nor residuals, and leave it usable.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .agreement import Agreement, Disagreement, shorten
from .checked import Checked
from .collectives import Steps
from .collectives.base import span
from .lane import MIN_BYTES as LANE_MIN_BYTES
from .lane import Lane
from .plans import Message, Plan
from .sampling import sample_errors
from .telemetry import Meter
from .traffic import Transport
from .work import Work
from .worker import Task, Worker, attend


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
        self.checking = _flag("COMMLIB_CHECK")
        self._number = 0  # of the message
        self._agreement = Agreement(transport, timeout)
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

        self._worker = Worker(timeout, fail, look)
        weakref.finalize(self, self._worker.stop)

    def agree(self, text: Mapping[str, Any]) -> None:
        """Return when all ranks have come with the same plan; RuntimeError names who did not."""
        with self._lock:
            self.refuse()
            try:
                self._agreement.agree(text)
            except Disagreement:
                raise
            except (RuntimeError, OSError) as error:  # a timeout, another rank's failure, no store
                what = f"the agreement on {text['op']} of key {text['key']!r}"
                raise self.fail(error, [], what) from error

    def flush(self) -> None:
        """Wait until nothing is under way."""
        self._worker.flush()

    def close(self) -> None:
        """Finish what is under way, then refuse everything."""
        self._worker.flush()
        self._worker.stop()
        self.aborted = self.aborted or RuntimeError("It is closed.")

    def _via(self, plan: Plan, message: Message) -> Transport:
        """The transport of the message about to start; the same kind on all ranks."""
        transport = self.transport
        if self.checking:
            return Checked(transport, message.name, self._number, self.timeout)
        if transport.tagged and message.part_bytes(plan.op, transport.size) >= LANE_MIN_BYTES:
            return Lane(transport, self._agreement.number, self._number)
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
        if result.numel() == 0 and plan.op != "all_to_all of parts":
            return Work(result, 0)
        with self._lock, torch.no_grad():
            self.refuse()
            work = Work(result, len(plan.messages), self.give_up)
            inline = self._worker.idle and not async_op
            sampled = not plan.lossless and self.meter.due(plan.label)
            for place, message in enumerate(plan.messages):  # before any is counted: it may fail
                if sampled and not message.scheme.lossless:
                    sample_errors(self.meter, message, x, self._number + 1 + place)
            for message in plan.messages:
                self._number += 1
                what = f"{plan.op} of key {plan.label!r} (message {self._number})"
                via = self._via(plan, message)
                metered = self._metered(steps(message, via), plan, message)
                task = Task(metered, work, what, message.names, isinstance(via, Lane))
                (self._worker.run if inline else self._worker.submit)(task)
        if not async_op:
            work.wait()
        return work

    def native(self, plan: Plan, x: torch.Tensor, factor: float) -> Work | None:
        """The library's own all_reduce without detours, if nothing else is under way."""
        with self._lock:
            if not self._worker.idle or self.checking or x.numel() == 0:
                return None
            self.refuse()
            self._number += 1
            start, before = time.perf_counter(), self.transport.bytes_sent
            try:
                with span("exchange"):
                    attend(self.transport.all_reduce(x), self.timeout, self.look)
            except Exception as error:
                what = f"{plan.op} of key {plan.label!r} (message {self._number})"
                raise self.fail(error, [], what) from error
            if factor != 1.0:
                with torch.no_grad():
                    x.mul_(factor)
            sent = self.transport.bytes_sent - before
            seconds = time.perf_counter() - start
            self.meter.record(plan.op, plan.label, "fp32", x.nbytes, sent, seconds)
        return Work(x, 0)

    def _metered(self, steps: Steps, plan: Plan, message: Message) -> Steps:
        """`steps`, recorded at their end with the bytes they sent."""
        start, sent, answer = time.perf_counter(), 0, None
        transport = self.transport
        while True:
            before = transport.bytes_sent
            try:
                step = steps.send(answer)  # type: ignore[arg-type]  # None starts it
            except StopIteration:
                break
            sent += transport.bytes_sent - before
            answer = yield step
        seconds = time.perf_counter() - start
        raw_bytes = message.layout.numel * message.layout.dtype.itemsize
        self.meter.record(plan.op, plan.label, message.name, raw_bytes, sent, seconds)

    def refuse(self) -> None:
        if self.aborted is not None:
            raise RuntimeError(f"this communicator takes no more calls. {self.aborted}")

    def look(self) -> None:
        if self.aborted is not None:
            raise self.aborted
        self._agreement.look()

    def give_up(self, timeout: float) -> BaseException:
        """What Work.wait raises after its own timeout: the communicator is aborted."""
        return self.fail(TimeoutError(f"not done after {timeout:g} s"), self._worker.tasks())

    def fail(self, error: BaseException, tasks: list[Task], what: str = "a call") -> BaseException:
        """Abort: ask the other ranks, remember what was lost; the error for everybody."""
        with self._failing:
            self.lost += sorted({n for t in tasks if t.step is not None for n in t.names if n})
            if self.aborted is None:
                what = tasks[0].what if tasks else what
                others = self._agreement.roll_call(what, error)
                self.aborted = RuntimeError(
                    f"{what} failed on rank {self.transport.rank} of {self.transport.size}: "
                    f"{shorten(error)}. {others}. The communicator is aborted; go on from a "
                    "checkpoint with a new one, on a new process group if a rank is gone."
                )
                self.aborted.__cause__ = error  # keeps buffers alive that may still be written to
            return self.aborted


def _flag(name: str) -> bool:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{name}={value!r}; allowed: 0, 1")
    return value == "1"
