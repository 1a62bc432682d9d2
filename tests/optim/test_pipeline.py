"""Pipelines: the schedule, the ticks that are counted, gradients, one stage per rank."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from commlib.optim import PPRS, Pipeline, Schedule
from commlib.optim.hops import CLOCK, HEADER, Local
from commlib.optim.pipeline import Stage
from commlib.optim.ticks import Operation, span
from commlib.transport import TorchTransport, Transport, run_ranks
from tests.optim.models import WIDTH, data, error, gradients, here, modules, parameters, same
from tests.processes import Pool

counts = st.integers(1, 40)


@given(counts, counts)
def test_the_schedule_is_one_that_stages_can_keep(stages: int, passes: int) -> None:
    schedule = Schedule(stages, passes)
    logs = [schedule.operations(stage) for stage in range(stages)]
    at = [{(kind, number): tick for tick, kind, number in log} for log in logs]
    for log in logs:
        assert len({(kind, number) for _, kind, number in log}) == len(log) == 2 * passes
        assert all(before.tick < after.tick for before, after in pairwise(log))
    for left, right in pairwise(at):
        assert all(left["forward", j] < right["forward", j] for j in range(passes))
        assert all(right["backward", j] < left["backward", j] for j in range(passes))
    assert all(at[-1]["forward", j] < at[-1]["backward", j] for j in range(passes))
    assert span(logs) == schedule.ticks == 2 * (passes + stages - 1)
    idle = 1 - 2 * passes / schedule.ticks
    assert schedule.bubble_fraction == pytest.approx(idle, abs=1e-12)
    later = schedule.operations(0, start=7)
    assert later == tuple(Operation(tick + 7, kind, j) for tick, kind, j in logs[0])


@pytest.mark.parametrize("depth", [1, 2, 5, 30])
@pytest.mark.parametrize(("samples", "copies"), [(1, 1), (1, 8), (3, 1), (3, 4)])
def test_stages_log_what_the_schedule_says(samples: int, copies: int, depth: int) -> None:
    optimizer = PPRS(here(depth), copies, 0.01, 1e-3)
    pipeline, schedule = optimizer.pipeline, Schedule(depth, samples * copies)
    for step in range(3):
        optimizer.step(*data(samples))
        assert pipeline.ticks == 2 * (samples * copies + depth - 1)
        start = step * schedule.ticks  # one step begins when the one before ends
        for stage in pipeline.stages:
            assert stage.log == list(schedule.operations(stage.number, start))
    assert pipeline.schedule(samples * copies) == schedule


def test_ticks_are_counted_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hop that takes a unit of time, a stage that works twice as long: both show."""
    take = Local.take

    def slow(self: Local, fresh: bool) -> tuple[torch.Tensor, int]:
        x, ready = take(self, fresh)
        return x, ready + 1

    pipeline = here()
    with monkeypatch.context() as patch:
        patch.setattr(Local, "take", slow)
        pipeline.run(*data())
    assert pipeline.ticks == Schedule(4, 2).ticks + 2 * 3

    pipeline, work = here(), Stage._work

    def twice(self: Stage, kind: Any, number: int, ready: int) -> None:
        work(self, kind, number, ready)
        self.clock += self.number == 1

    monkeypatch.setattr(Stage, "_work", twice)
    pipeline.run(*data())
    assert pipeline.ticks > Schedule(4, 2).ticks


@pytest.mark.parametrize("depth", [1, 2, 4, 7])
def test_the_gradient_is_plain_autograds(depth: int) -> None:
    pipeline, (samples, targets) = here(depth), data(3)
    loss = pipeline.run(samples, targets)
    model = nn.Sequential(*modules(depth))
    losses = []
    for x, y in zip(samples, targets, strict=True):
        losses.append(error(model(x), y))
        losses[-1].backward()
    expected = [p.grad / 3 for p in model.parameters() if p.grad is not None]
    assert same(gradients(pipeline), expected)
    assert loss == pytest.approx(sum(one.item() for one in losses) / 3, rel=1e-6)


SCHEMES = [(None, None), ("int8", None), ("int4+reuse", "int8")]


def one_rank(
    transport: Transport, activations: str | None, gradients: str | None
) -> tuple[Any, ...]:
    """Three steps of this rank's stage: what the ranks' tests compare."""
    depth, how = transport.size, {"activations": activations, "gradients": gradients}
    mine = [modules(depth)[transport.rank]]
    optimizer = PPRS(Pipeline(mine, loss=error, transport=transport, **how), 3, 0.1, 1e-2, seed=2)
    losses = [optimizer.step(*data()) for _ in range(3)]
    pipeline = optimizer.pipeline
    nbytes = (pipeline.activation_bytes, pipeline.gradient_bytes, transport.bytes_sent)
    return losses, parameters(pipeline), list(pipeline.stages[0].log), nbytes


def check_ranks(
    results: list[tuple[Any, ...]], activations: str | None, gradients: str | None
) -> None:
    """The ranks' results are the single process's, bitwise."""
    size, passes = len(results), 2 * 3
    single = PPRS(here(size, activations=activations, gradients=gradients), 3, 0.1, 1e-2, seed=2)
    losses = [single.step(*data()) for _ in range(3)]
    assert results[-1][0] == losses
    assert all(result[0] == [None] * 3 for result in results[:-1])
    found = [parameter for result in results for parameter in result[1]]
    assert same(found, parameters(single.pipeline))
    start = 2 * single.pipeline.schedule(passes).ticks
    for stage, result in enumerate(results):
        assert result[2] == list(Schedule(size, passes).operations(stage, start))
    assert span(result[2] for result in results) == 2 * (passes + size - 1)
    there, back = (sum(result[3][way] for result in results) for way in (0, 1))
    assert (there, back) == (single.pipeline.activation_bytes, single.pipeline.gradient_bytes)
    ways = 2 * (size - 1)
    extra = ways * (HEADER * 8 + 3 * passes * CLOCK)
    assert sum(result[3][2] for result in results) == there + back + extra


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("activations", "gradients"), SCHEMES)
def test_a_stage_per_rank_is_one_process_bitwise(
    size: int, activations: str | None, gradients: str | None
) -> None:
    results = run_ranks(size, lambda t: one_rank(t, activations, gradients))
    check_ranks(results, activations, gradients)


def gloo_rank(activations: str | None, gradients: str | None) -> tuple[Any, ...]:
    return one_rank(TorchTransport(), activations, gradients)


@pytest.mark.processes
def test_real_processes_too(pool: Pool) -> None:
    """Four processes over gloo: the iterates, the ticks and the bytes of one process."""
    for how in (SCHEMES[0], SCHEMES[2]):
        check_ranks(pool.run(gloo_rank, *how), *how)


def test_ranks_with_different_schemes_are_told() -> None:
    def rank(transport: Transport) -> None:
        scheme = "int8" if transport.rank else "int4"
        mine = [modules(2)[transport.rank]]
        Pipeline(mine, loss=error, transport=transport, activations=scheme).run(*data())

    with pytest.raises(RuntimeError, match="rank 0 sends under another scheme than 'int8:"):
        run_ranks(2, rank, timeout=10)


def test_later_passes_travel_as_differences() -> None:
    """One raw pass per sample, then int4; the gradient is near that of raw passes."""
    raw, coded = here(), here(activations="int4+reuse")
    for pipeline in (raw, coded):
        PPRS(pipeline, 8, 1e-3, 1e-2).step(*data())
    # 3 boundaries, 2 samples; a raw tensor and its stamp, 12 bytes of codes in 16, scales in 16
    assert raw.activation_bytes == 3 * 2 * 8 * (2 * WIDTH * 4 + 16)
    assert coded.activation_bytes == 3 * 2 * (2 * WIDTH * 4 + 16 + 7 * (16 + 16 + 16))
    assert coded.gradient_bytes == raw.gradient_bytes
    pairs = zip(raw.stages, coded.stages, strict=True)
    for one, other in (
        (a, b) for x, y in pairs for a, b in zip(x.parameters, y.parameters, strict=True)
    ):
        assert one.grad is not None
        assert other.grad is not None
        assert 0 < (one.grad - other.grad).norm() < 1e-2 * one.grad.norm()


@pytest.mark.parametrize("activations", [None, "int4+reuse"])
def test_a_step_that_failed_leaves_the_next_one_as_it_was(activations: str | None) -> None:
    class Fails(nn.Module):
        broken = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.broken:
                raise OSError("out of order")
            return x * 1.0

    fails = Fails()
    pipeline = Pipeline([*modules(3), fails], loss=error, activations=activations)
    pipeline.run(*data())
    expected = gradients(pipeline)
    fails.broken = True
    with pytest.raises(OSError, match="out of order"):
        pipeline.run(*data())
    fails.broken = False
    pipeline.run(*data())
    assert same(gradients(pipeline), expected)


def test_frozen_and_unused_parameters() -> None:
    first, second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    first.weight.requires_grad_(False)
    second.register_parameter("unused", nn.Parameter(torch.ones(3)))
    before = first.weight.clone()
    optimizer = PPRS(Pipeline([first, second], loss=error), 2, 0.1, 1e-2)
    optimizer.step(*data())
    assert first.weight.grad is None
    assert torch.equal(first.weight, before)
    assert torch.equal(second.get_parameter("unused"), torch.ones(3))
    assert first.bias.grad is not None
    assert first.bias.grad.abs().sum() > 0


def test_the_last_stage_may_hand_on() -> None:
    """The loss is made by the stage before it."""
    summed = Pipeline([*modules(3), Summed(), nn.Identity()])
    whole = Pipeline(modules(3), loss=lambda x: x.square().sum())
    assert summed.run(data()[0]) == whole.run(data()[0])
    assert same(gradients(summed), gradients(whole))


class Summed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square().sum()


def test_a_rank_has_one_stage() -> None:
    def rank(transport: Transport) -> None:
        with pytest.raises(ValueError, match="got 4 stages, with a transport allowed"):
            Pipeline(modules(), transport=transport)

    run_ranks(1, rank)
