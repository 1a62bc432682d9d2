"""SideStream: what a CUDA device is told, and in which order, on a device that is not there."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from commlib import Communicator, Policy, Scheme
from commlib.policy import Rule
from commlib.telemetry import Meter
from commlib.traffic import Pending
from tests.communicators import data, everything, on_ranks, only
from tests.fake_cuda import DEVICE, FakeCuda, side_streams

LOSSY = ("int4+ef", "int8:round=stochastic", "int8+ef@ring", "bf16@native", "fp32@two_phase")


@pytest.fixture(autouse=True)
def lent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """The tensors whose memory a stream was told of: (address, stream)."""
    told: list[tuple[int, str]] = []

    def record_stream(x: torch.Tensor, stream: Any) -> None:
        told.append((x.data_ptr(), stream.name))

    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream, raising=False)
    return told


@pytest.mark.parametrize("scheme", ["fp32", *LOSSY])
def test_results_are_those_of_the_worker(scheme: str) -> None:
    expected = on_ranks(3, only(scheme), everything)
    results = side_streams(3, only(scheme), lambda c, cuda: everything(c))
    for got, want in zip(results, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("async_op", [False, True])
def test_one_fork_and_one_join(async_op: bool, lent: list[tuple[int, str]]) -> None:
    """The side stream waits for the caller, then works; the caller waits for its last event."""

    def body(c: Communicator, cuda: FakeCuda) -> None:
        c.all_reduce(data(c.rank, 3000), "w")
        cuda.log.clear()
        x = data(c.rank, 3000, 1)
        work = c.all_reduce(x, "w", async_op=async_op)
        queued = ["caller: record", "side: wait for caller", "side: record"]
        joined = ["caller: wait for side"]
        assert cuda.log == (queued if async_op else queued + joined)
        work.wait()
        assert cuda.log == queued + joined * (1 if async_op else 2)
        mine = [stream for address, stream in lent if address == x.data_ptr()]
        assert mine == (["side", "side"] if async_op else [])  # as the result, and as the input

    side_streams(2, only("int4+ef"), body)


def test_the_lossless_collective_stays_on_the_callers_stream() -> None:
    def body(c: Communicator, cuda: FakeCuda) -> None:
        c.all_reduce(data(c.rank, 3000), "w", factor=0.5).wait()
        assert cuda.log == ["caller: record", "caller: wait for caller"]

    side_streams(2, "fp32", body)


@pytest.mark.parametrize("scheme", LOSSY)
def test_the_host_waits_for_nothing(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No exchange is waited for with a timeout, polled or watched, and no thread is started."""
    waited: list[float | None] = []

    class Spy:
        def __init__(self, pending: Pending) -> None:
            self._pending = pending

        def wait(self, timeout: float | None = None) -> None:
            waited.append(timeout)
            self._pending.wait()

    def body(c: Communicator, cuda: FakeCuda) -> None:
        for verb in ("all_to_all", "all_gather", "all_reduce", "send", "recv"):
            call = getattr(c.transport, verb)
            monkeypatch.setattr(
                c.transport, verb, lambda *a, call=call, **k: Spy(call(*a, **k)), raising=True
            )
        for step in range(3):
            c.all_reduce(data(c.rank, 300_000, step), "w", async_op=True).wait()
        assert "host: synchronize" not in cuda.log

    before = {thread.name for thread in threading.enumerate()}
    side_streams(2, only(scheme), body)
    assert set(waited) == {None}
    started = {thread.name for thread in threading.enumerate()} - before
    assert not any(name.startswith("commlib") for name in started)


def test_a_work_asks_the_device() -> None:
    def body(c: Communicator, cuda: FakeCuda) -> None:
        x = data(c.rank, 3000)
        work = c.all_reduce(x, "w", async_op=True)
        cuda.device_is_done = False
        assert not work.is_completed()
        assert work.wait()  # streams wait, the host does not
        assert not work.is_completed()
        cuda.device_is_done = True
        assert work.is_completed()
        assert work.wait(1.0)
        assert work.result() is x
        assert work.exception() is None

    side_streams(2, only("int4+ef"), body)


def test_a_wait_with_a_timeout_blocks_and_aborts() -> None:
    def body(c: Communicator, cuda: FakeCuda) -> None:
        work = c.all_reduce(data(c.rank, 3000), "w", async_op=True)
        cuda.device_is_done = False
        with pytest.raises(RuntimeError, match=r"not done after 0\.01 s"):
            work.wait(0.01)
        with pytest.raises(RuntimeError, match="takes no more calls"):
            c.all_reduce(data(c.rank, 3000), "w")
        cuda.log.clear()
        c.close()  # what hangs is not waited for
        assert cuda.log == []

    side_streams(2, only("int4+ef"), body)


def test_a_future_is_completed_under_the_side_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[str] = []

    def body(c: Communicator, cuda: FakeCuda) -> None:
        class Future(torch.futures.Future):  # type: ignore[type-arg]
            def set_result(self, result: Any) -> None:
                streams.append(cuda.current_stream(DEVICE).name)
                super().set_result(result)

        monkeypatch.setattr(torch.futures, "Future", Future)
        x = data(c.rank, 3000)
        future = c.all_reduce(x, "w", async_op=True).get_future()
        assert future.done()
        assert future.value() is x
        assert cuda.current_stream(DEVICE).name == "caller"

    side_streams(1, only("int4+ef"), body)
    assert streams == ["side"]


def test_an_error_while_queueing_aborts(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(c: Communicator, cuda: FakeCuda) -> None:
        c.all_reduce(data(c.rank, 3000), "w")

        def broken(*args: Any) -> Pending:
            raise RuntimeError("NCCL is gone")

        monkeypatch.setattr(c.transport, "send", broken)
        with pytest.raises(RuntimeError, match=r"NCCL is gone.*aborted"):
            c.all_reduce(data(c.rank, 3000), "w", async_op=True)
        with pytest.raises(RuntimeError, match="takes no more calls"):
            c.all_reduce(data(c.rank, 3000), "w")
        with pytest.raises(RuntimeError, match="did not arrive"):
            c.state_dict()

    side_streams(2, only("int4+ef"), body)


def test_memory_is_touched_between_messages_only() -> None:
    """After all that was queued, on the side stream, and before all that follows."""

    def body(c: Communicator, cuda: FakeCuda) -> None:
        c.all_reduce(data(c.rank, 3000), "w")
        state = c.state_dict()
        fenced = ["host: synchronize", "caller: record", "side: wait for caller"]
        for call in (c.reset, lambda: c.rescale(0.5), lambda: c.load_state_dict(state)):
            cuda.log.clear()
            call()
            assert cuda.log == [*fenced, "host: synchronize"]

    side_streams(2, only("int4+ef"), body)


def test_seconds_and_errors_come_when_the_device_is_done() -> None:
    def body(c: Communicator, cuda: FakeCuda) -> None:
        cuda.device_is_done = False
        c.all_reduce(data(c.rank, 3000), "w", async_op=True)
        assert c.meter.rows() == []
        assert c.meter.errors() == {}
        cuda.device_is_done = True
        (row,) = c.meter.rows()
        assert (row["calls"], row["seconds"]) == (1, 2e-3)
        assert 0.05 < row["rel_err"] < 0.2

    side_streams(2, only("int4+ef"), body)


def test_what_is_not_known_when_a_meter_starts_anew_is_forgotten() -> None:
    meter, known = Meter(), threading.Event()
    meter.defer(known.is_set, lambda: meter.record("all_reduce", "w", "int8", 8, 4, 1.0))
    meter.reset()
    known.set()
    assert meter.rows() == []


# Capture.


def captured(c: Communicator, cuda: FakeCuda, call: Any) -> None:
    cuda.capturing = True
    try:
        call()
    finally:
        cuda.capturing = False


def test_a_capture_takes_no_buffer_that_others_have() -> None:
    def body(c: Communicator, cuda: FakeCuda) -> None:
        c.all_reduce(data(c.rank, 3000), "w")
        kept, rows = c._pool.nbytes(), c.meter.rows()
        assert kept > 0
        cuda.log.clear()
        x, y = data(c.rank, 3000, 1), data(c.rank, 3000, 1)
        captured(c, cuda, lambda: c.all_reduce(x, "w"))
        assert c._pool.nbytes() == kept  # nothing was taken from it and nothing came in
        assert cuda.log[:2] == ["caller: record", "side: wait for caller"]  # the side stream joins
        assert cuda.log[-1] == "caller: wait for side"  # and the caller's ends it
        assert c.meter.rows() == rows  # neither counted nor sampled
        c.all_reduce(y, "w")

    side_streams(2, only("int4+ef"), body)


@pytest.mark.parametrize(
    ("why", "match"),
    [
        ("new", "for the first time.*Make the same call once before"),
        ("reset", "for the first time.*Make the same call once before"),
        ("regrouped", "for the first time.*Make the same call once before"),
        ("checked", "COMMLIB_CHECK=1 compares numbers on the host"),
        ("parts", "sizes of its own in every call"),
    ],
)
def test_what_cannot_be_captured_is_refused_before_anything_is_queued(why: str, match: str) -> None:
    def body(c: Communicator, cuda: FakeCuda) -> None:
        x, out, splits = data(c.rank, 3000), torch.empty(3000), [1000, 2000]

        def call() -> None:
            if why == "parts":
                parts = torch.empty(2 * splits[c.rank])
                given = [splits[c.rank]] * 2
                c.all_to_all(parts, x, out_splits=given, in_splits=splits)
            else:
                c.all_reduce_segments(x, ("a", "b"), (1000, 2000), (2, 2))

        if why != "new":
            call()
        if why == "reset":
            c.reset()
        elif why == "regrouped":
            c.all_reduce(out.zero_()[:2000], "b")
        elif why == "checked":
            c._carrier.checking = True
        cuda.log.clear()
        sent = c.transport.bytes_sent
        with pytest.raises(RuntimeError, match=match):
            captured(c, cuda, call)
        assert cuda.log == []
        assert c.transport.bytes_sent == sent
        c._carrier.checking = False
        call()  # the communicator is none the worse

    side_streams(2, only("int4+ef"), body)


def test_a_policy_that_counts_calls_is_not_captured() -> None:
    policy = Policy((Rule(Scheme.parse("int4+ef"), from_step=2), Rule(Scheme.parse("fp32"))))

    def body(c: Communicator, cuda: FakeCuda) -> None:
        x = data(c.rank, 3000)
        c.all_reduce(x, "w")
        with pytest.raises(RuntimeError, match="from_step"):
            captured(c, cuda, lambda: c.all_reduce(x, "w"))

    side_streams(2, policy, body)


def test_what_a_graph_works_on_stays_where_it_is() -> None:
    def body(c: Communicator, cuda: FakeCuda) -> None:
        def call() -> None:
            c.all_reduce_segments(data(c.rank, 3000), ("a", "b"), (1000, 2000), (2, 2))

        call()
        captured(c, cuda, call)
        (compressor,) = c._compressors._made.values()
        residual = compressor._residuals["a"].residual
        assert residual.any()
        with pytest.raises(RuntimeError, match="would move the memory of b"):
            c.all_reduce(data(c.rank, 2000), "b")
        with pytest.raises(RuntimeError, match="before capturing"):
            c.load_state_dict(c.state_dict())
        c.reset()
        assert not residual.any()
        assert compressor._residuals["a"].residual is residual
        call()
        assert residual.any()
        captured(c, cuda, call)

    side_streams(2, only("int4+ef"), body)


def test_anonymous_messages_share_nothing_that_could_move() -> None:
    def body(c: Communicator, cuda: FakeCuda) -> None:
        x, y = data(c.rank, 3000), data(c.rank, 4000)
        for z in (x, y, x):
            c.all_reduce(z)
        captured(c, cuda, lambda: c.all_reduce(y))
        c.all_reduce(data(c.rank, 5000))
        c.all_reduce(x)

    side_streams(2, only("int4:round=stochastic"), body)
