"""Communicator on a real device: bytes and streams.

What ranks on CPU get is what is expected everywhere: bit for bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from commlib import Communicator
from commlib.telemetry import Meter
from tests.communicators import data, everything, only
from tests.gpu.nccl import (
    DEVICE,
    NUMEL,
    Ranks,
    busy,
    cpu_ranks,
    gpu,
    needs_gpu,
    on_gpu,
    remembered,
    same,
)

pytestmark = [pytest.mark.gpu, needs_gpu]

SCHEMES = (
    "fp32",
    "bf16@native",
    "int4+ef",
    "int8:round=stochastic",
    "int8+ef:dtype=int8@two_phase:back=int4:slices=2",
    "int4+ef@ring",
    "ternary",
)
BLOCKING = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"}


# Results.


def all_of(scheme: str) -> list[torch.Tensor]:
    c = on_gpu(scheme)
    assert c.transport.device.type == DEVICE
    outs = everything(c)
    c.close()
    return outs


@pytest.mark.parametrize("scheme", SCHEMES)
def test_results_are_those_of_cpu_ranks(ranks: Ranks, scheme: str) -> None:
    expected = cpu_ranks(scheme, everything)
    assert same(ranks.run(all_of, scheme), expected)


def steps_of(c: Communicator, steps: int) -> list[torch.Tensor]:
    """Many messages in flight, of tensors that are let go of at once; the last of them."""
    outs, works = [], []
    for step in range(steps):
        x = data(c.rank, 20_000 + 1000 * (step % 5), step).to(c.transport.device)
        key = None if step % 3 == 0 else f"k{step % 5}"
        work = c.all_reduce(x, key, factor="avg", async_op=step % 4 != 0)
        if step >= steps - 15:
            outs.append(x)
            works.append(work)
        del x, work  # of the others nobody waits for the end
    for work in works:
        work.wait()
    return [out.cpu() for out in outs]


def many_steps(c: Communicator) -> tuple[list[torch.Tensor], dict[str, Any]]:
    return steps_of(c, 60), remembered(c)


def many_steps_on_gpu(scheme: str) -> tuple[list[torch.Tensor], dict[str, Any]]:
    return many_steps(on_gpu(scheme))


@pytest.mark.parametrize("scheme", ["int4+ef", "int8:round=stochastic", "int4:round=stochastic+ef"])
def test_many_messages_in_flight_come_out_right(ranks: Ranks, scheme: str) -> None:
    """And what is remembered: step counters are read off the device, residuals are the CPU's."""
    assert same(ranks.run(many_steps_on_gpu, scheme), cpu_ranks(scheme, many_steps))


def resumed(scheme: str) -> bool:
    first = on_gpu(scheme)
    for step in range(3):
        first.all_reduce(gpu(first.rank, step=step), "w")
    state = first.state_dict()
    second = on_gpu(scheme)
    second.load_state_dict(state)
    for step in range(3, 6):
        x, y = gpu(first.rank, step=step), gpu(first.rank, step=step)
        first.all_reduce(x, "w")
        second.all_reduce(y, "w")
        if not torch.equal(x, y):
            return False
    return first.state_dict()["steps"] == second.state_dict()["steps"]


@pytest.mark.parametrize("scheme", ["int4+ef", "int8:round=stochastic"])
def test_resuming_is_bitwise_going_on(ranks: Ranks, scheme: str) -> None:
    assert all(ranks.run(resumed, scheme))


def two_devices_and_two_communicators() -> list[torch.Tensor]:
    one = on_gpu("int8+ef")
    two = on_gpu("int4+ef")
    host = Communicator(policy=only("int4+ef"), device="cpu")
    default = Communicator(policy=only("int4+ef"))
    assert default.transport.device.type == "cuda"
    x, y, z = gpu(one.rank), gpu(one.rank), data(one.rank, NUMEL)
    works = [c.all_reduce(t, "w", async_op=True) for c, t in ((one, x), (two, y), (host, z))]
    for work in works:
        work.wait()
    for c, wrong in ((one, z), (host, x)):
        with pytest.raises(ValueError, match="make a communicator with device="):
            c.all_reduce(wrong, "w")
    outs = [x.cpu(), y.cpu(), z]
    for c in (one, two, host, default):
        c.close()
    return outs


def test_communicators_of_one_group_do_not_mix(ranks: Ranks) -> None:
    for x, y, z in (first := ranks.run(two_devices_and_two_communicators)):
        assert not torch.equal(x, y)
        assert torch.equal(y, z)  # the same scheme on either device
        assert torch.equal(x, first[0][0])


def of_gloo() -> str:
    group = dist.new_group(backend="gloo")
    try:
        Communicator(group, "int8", device="cuda")
    except ValueError as error:
        return str(error)
    return ""


def test_gloo_is_refused_cuda_tensors(ranks: Ranks) -> None:
    assert all('backend="cpu:gloo,cuda:nccl"' in text for text in ranks.run(of_gloo))


def alone() -> torch.Tensor:
    c = on_gpu("int4+ef")
    x = gpu(0)
    c.all_reduce(x, "w", factor=0.5, async_op=True).wait()
    c.all_gather(y := torch.empty_like(x), x).wait()
    return y.cpu()


def test_a_group_of_one(ranks: Ranks) -> None:
    (got,) = ranks.run(alone, ranks=1)
    assert torch.equal(got, data(0, NUMEL) * 0.5)


def auto() -> tuple[str, torch.Tensor]:
    c = Communicator(policy="auto", device=DEVICE)
    x = gpu(c.rank)
    c.all_reduce(x, "w", factor="avg")
    return c.policy.digest(), x.cpu()


def test_auto_measures_the_device(ranks: Ranks) -> None:
    (one, x), (two, y) = ranks.run(auto)
    assert one == two
    assert torch.equal(x, y)


# Streams.


def while_busy(scheme: str) -> list[Any]:
    """Whether the host was back while the device was still at what came before; the results."""
    c = on_gpu(scheme)
    c.warmup()
    for step in range(3):  # compiles, agrees, connects, allocates
        c.all_reduce(gpu(c.rank, step=step), "w", async_op=True).wait()
        c.all_reduce(gpu(c.rank, step=step), "w")
    x, y = gpu(c.rank, step=7), gpu(c.rank, step=8)
    torch.cuda.synchronize()
    before = busy()
    work = c.all_reduce(x, "w", async_op=True)
    future = work.get_future()
    c.all_reduce(y, "w")
    work.wait()
    future.wait()
    back_early = not before.query()
    pending = not work.is_completed()
    assert work.wait(30.0)  # with a timeout the host blocks
    done = before.query() and work.is_completed()
    return [back_early, pending, done, x.cpu(), y.cpu()]


@pytest.mark.parametrize("scheme", ["fp32@two_phase", "int4+ef", "int8:round=stochastic"])
def test_the_host_goes_on(ranks: Ranks, scheme: str) -> None:
    def on_cpu(c: Communicator) -> list[torch.Tensor]:
        for step in (0, 0, 1, 1, 2, 2):
            c.all_reduce(data(c.rank, NUMEL, step), "w")
        outs = [data(c.rank, NUMEL, step) for step in (7, 8)]
        for out in outs:
            c.all_reduce(out, "w")
        return outs

    expected = cpu_ranks(scheme, on_cpu)
    for (early, pending, done, *outs), want in zip(
        ranks.run(while_busy, scheme), expected, strict=True
    ):
        assert (early, pending, done) == (True, True, True)
        assert same(outs, want)


def profiled(scheme: str) -> set[str]:
    """CUDA calls that block the host, made while collectives are called."""
    c = Communicator(policy=only(scheme), device=DEVICE, meter=Meter(sample_every=1))
    tensors = [gpu(c.rank, step=step) for step in range(5)]
    for x in tensors[:2]:
        c.all_reduce(x, "w")
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        c.all_reduce(tensors[2], "w")  # the profiler's own start lies here
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        with record_function("hot"):
            for x in tensors:
                c.all_reduce(x, "w", async_op=True).wait()
                c.all_reduce(x, "w")
        torch.cuda.set_sync_debug_mode("default")
    events = profiler.events()
    assert events is not None
    (hot,) = (e.time_range for e in events if e.name == "hot" and e.device_type.name == "CPU")
    inside = {e.name for e in events if hot.start <= e.time_range.start <= hot.end}
    assert any("LaunchKernel" in name for name in inside)
    return inside & BLOCKING


@pytest.mark.parametrize("scheme", ["fp32", "int4+ef", "int8:round=stochastic"])
def test_nothing_in_the_hot_path_blocks(ranks: Ranks, scheme: str) -> None:
    assert ranks.run(profiled, scheme) == [set(), set()]


def on_another_stream() -> torch.Tensor:
    """What the caller's stream does before and after is waited for, whichever that is."""
    c = on_gpu("int4+ef")
    c.all_reduce(gpu(c.rank), "w")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.empty(NUMEL, device="cuda")
        source = gpu(c.rank, step=1)
        busy()
        x.copy_(source)
        work = c.all_reduce(x, "w", async_op=True)
        work.wait()
        y = x.clone()
        stream.synchronize()
    return y.cpu()


def test_any_stream_may_call(ranks: Ranks) -> None:
    def on_cpu(c: Communicator) -> torch.Tensor:
        for step in range(2):
            c.all_reduce(x := data(c.rank, NUMEL, step), "w")
        return x

    expected = cpu_ranks("int4+ef", on_cpu)
    assert same(ranks.run(on_another_stream), expected)


def metered() -> list[dict[str, Any]]:
    c = on_gpu("int4+ef")
    for step in range(4):
        c.all_reduce(gpu(c.rank, step=step), "w", async_op=True).wait()
    torch.cuda.synchronize()
    return c.meter.rows()


def test_the_meter_knows_the_devices_seconds(ranks: Ranks) -> None:
    for (row,) in ranks.run(metered):
        assert row["calls"] == 4
        assert 0 < row["seconds"] < 60
        assert 0.05 < row["rel_err"] < 0.2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_process_may_use_several_devices() -> None:
    """The current device is another than the tensors'."""
    pool = Ranks()
    try:
        assert all(pool.run(on_the_second_device))
    finally:
        pool.close()


def on_the_second_device() -> bool:
    c = Communicator(policy=only("int4+ef"), device="cuda:1")
    host = Communicator(policy=only("int4+ef"), device="cpu")
    for step in range(3):
        x, y = data(c.rank, NUMEL, step).to("cuda:1"), data(c.rank, NUMEL, step)
        c.all_reduce(x, "w", async_op=True).wait()
        host.all_reduce(y, "w")
        if not torch.equal(x.cpu(), y):
            return False
    return torch.cuda.current_device() == 0
