"""What stands for torch.cuda where there is none: streams and events that write down what they do.

Tensors stay on the CPU, so whatever is queued is done at once; the log says in which order a device
would have been told. `side_streams` puts communicators of threads on such a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from commlib import Communicator
from commlib.streams import SideStream
from commlib.transport import ThreadTransport, run_ranks

DEVICE = torch.device("cuda", 0)


class Event:
    def __init__(self, cuda: FakeCuda, timing: bool) -> None:
        self.cuda, self.timing = cuda, timing
        self.on: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.on = stream
        if not self.timing:
            self.cuda.log.append(f"{stream.name}: record")

    def query(self) -> bool:
        assert not self.cuda.capturing, "an event must not be asked during a capture"
        return self.cuda.device_is_done

    def elapsed_time(self, end: Event) -> float:
        assert self.timing
        assert end.timing
        return 2.0  # milliseconds


class Stream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def record_event(self) -> Event:
        event = Event(self.cuda, False)
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        assert event.on is not None, "waits for an event that was not recorded"
        self.cuda.log.append(f"{self.name}: wait for {event.on.name}")

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


class FakeCuda:
    """The functions of torch.cuda that commlib uses, for one thread.

    capturing: whether a graph is. device_is_done: what events say.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.capturing = False
        self.device_is_done = True
        self._current = [Stream(self, "caller")]
        self._devices = [0]

    def Stream(self, device: torch.device, priority: int = 0) -> Stream:
        assert device == DEVICE
        return Stream(self, "side")

    def Event(self, enable_timing: bool = False) -> Event:
        return Event(self, enable_timing)

    def current_stream(self, device: torch.device) -> Stream:
        assert device == DEVICE
        return self._current[-1]

    def current_device(self) -> int:
        return self._devices[-1]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._current.append(stream)
        self._devices.append(0)
        yield
        self._current.pop()
        self._devices.pop()

    @contextmanager
    def device(self, device: torch.device | int) -> Iterator[None]:
        self._devices.append(torch.device("cuda", device).index if isinstance(device, int) else 0)
        yield
        self._devices.pop()

    def is_current_stream_capturing(self) -> bool:
        assert self.current_device() == 0, "asked of another device"
        return self.capturing

    def synchronize(self, device: torch.device) -> None:
        self.log.append("host: synchronize")


def to_side_stream(communicator: Communicator) -> FakeCuda:
    """Have `communicator` carry its messages out as on CUDA."""
    cuda, carrier = FakeCuda(), communicator._carrier
    carrier._runner.stop()

    def fail(error: BaseException, tasks: list[Any]) -> BaseException:
        return carrier.fail(error, tasks)

    carrier._runner = SideStream(
        DEVICE, fail, lambda: carrier.aborted is not None, communicator.meter.defer, cuda
    )
    return cuda


def side_streams(
    size: int, policy: Any, body: Callable[[Communicator, FakeCuda], Any], **how: Any
) -> list[Any]:
    """`body(communicator, cuda)` on `size` ranks that are threads."""

    def rank(transport: ThreadTransport) -> Any:
        communicator = Communicator(transport, policy, **how)
        cuda = to_side_stream(communicator)
        try:
            return body(communicator, cuda)
        finally:
            communicator.close()

    return run_ranks(size, rank)
