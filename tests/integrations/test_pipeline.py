"""Pipelines through commlib: every schedule, both frontends, whatever travels between stages.

The oracle is the same pipeline unwrapped, and bytes are counted where torch sends them.
"""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, SplitPoint, pipeline
from torch.distributed.pipelining._utils import InferenceMode
from torch.distributed.pipelining.schedules import _ScheduleForwardOnly

import commlib
from tests.integrations.pipeline_cases import (
    BATCH,
    CPU,
    LENGTH,
    MICRO,
    SAMPLES,
    SCHEDULES,
    WIDTH,
    Result,
    batch,
    block,
    build,
    call,
    counting,
    error_of,
    everywhere,
    has,
    loss,
    parameters,
    rows,
    same,
    stages_of,
    train,
)
from tests.processes import Pool

pytestmark = pytest.mark.processes


def schedule_story(name: str) -> None:
    plain = build(name)
    reference = train(plain, 2)
    with counting() as raw:
        call(plain, 2)
    wire = {}
    for policy in ("fp32", "int8", "int4"):
        schedule = commlib.wrap(build(name), policy)
        result = train(schedule, 2)
        before = commlib.of(schedule).transport.bytes_sent
        metered = sum(row["wire_bytes"] for row in rows(schedule).values())
        assert before == metered
        with counting() as count:
            call(schedule, 2)
        wire[policy] = count.bytes
        ranks = stages_of(schedule)[0].stage_index_to_group_rank
        for key in rows(schedule):  # neighbours on one rank hand over without a message
            source, _, target = key.removeprefix("stage").split(".")
            assert ranks[int(source)] != ranks[int(target.removeprefix("to"))]
        assert commlib.of(schedule).transport.bytes_sent - before == count.bytes
        if policy == "fp32":
            assert result.equals(reference)
        if policy == "int8":
            assert 1e-4 < result.error(reference) < 0.02, result.error(reference)
        if policy == "int4":
            assert result.error(reference) < 0.4
    assert wire["fp32"] == raw.bytes
    assert raw.bytes > 0
    assert raw.bytes >= 3.8 * wire["int8"], wire
    assert raw.bytes >= 7.5 * wire["int4"], wire


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(pool: Pool, name: str, ranks: int) -> None:
    pool.run(schedule_story, name, ranks=ranks)


def traced() -> Any:
    model = nn.Sequential(block(0), block(1))
    pipe = pipeline(model, mb_args=(batch()[:SAMPLES],), split_spec={"1": SplitPoint.BEGINNING})
    return ScheduleGPipe(pipe.build_stage(dist.get_rank(), CPU), MICRO, loss_fn=loss)


def static(name: str = "GPipe") -> Any:
    example = torch.empty(SAMPLES, LENGTH, WIDTH)
    args = () if dist.get_rank() else (example,)
    grad = example.clone().requires_grad_()
    return build(name, input_args=args or (grad,), output_args=(grad,))


def train_and_eval(make: Any) -> None:
    """Both, in either order; what is sent is compressed in both."""
    for order in ("ete", "tet"):
        results = {}
        for policy in (None, "fp32", "int8"):
            schedule = make()
            if policy is not None:
                commlib.wrap(schedule, policy)
            result, sent = Result(), []
            for number, letter in enumerate(order):
                call(schedule, number, evaluate=letter == "e")  # learns the shapes (again)
                for p in parameters(schedule):
                    p.grad = None
                with counting() as count:
                    result.outputs.append(call(schedule, number + 9, evaluate=letter == "e"))
                sent.append(count.bytes)
                result.gradients += [p.grad for p in parameters(schedule) if p.grad is not None]
            results[policy] = result, sent
        (plain, raw), (exact, same_bytes), (coded, wire) = results.values()
        assert exact.equals(plain)
        assert raw == same_bytes
        for few, many in zip(wire, raw, strict=True):
            assert many >= 3.8 * few
        assert 0 < coded.error(plain) < 0.02
        for a, b in zip(coded.outputs, plain.outputs, strict=True):
            assert a is None or 0 < (a - b).norm() / b.norm() < 0.02


def frontends() -> None:
    train_and_eval(build)
    train_and_eval(static)
    train_and_eval(traced)
    train_and_eval(lambda: build("InterleavedZeroBubble"))  # torch's V schedules have no eval
    schedule = commlib.wrap(static(), "int8")
    call(schedule)
    assert schedule._stage._inference_mode == InferenceMode.STATIC


def inference_before_training() -> None:
    """Buffers made in inference mode cannot be written to outside of it."""
    schedule = commlib.wrap(build(), "int8:round=stochastic")
    with torch.inference_mode():
        call(schedule, evaluate=True)
    trained = train(schedule, 2)
    fresh = commlib.wrap(build(), "int8:round=stochastic")
    assert not trained.equals(train(fresh, 2))  # no number is drawn twice


def wrapped_again() -> None:
    """Aborted or in disagreement, a pipeline is not handed back as it was."""
    rank, schedule = dist.get_rank(), commlib.wrap(build(), "int8")
    train(schedule, 1)
    text = error_of(lambda: commlib.wrap(schedule, ("int8", "int4")[rank]), RuntimeError)
    has(text, ["disagree", "int8", "int4"])
    train(schedule, 1)
    first = commlib.of(schedule)
    assert commlib.of(commlib.wrap(schedule, "int8")) is first
    first.aborted = "for this test"
    second = commlib.of(commlib.wrap(schedule, "int8"))
    assert second is not first
    assert not second.aborted
    train(schedule, 1)


def without_loss() -> None:
    """A schedule that only runs forward, and torch's own class for that."""
    for make in (
        lambda: build("GPipe", loss_fn=None),
        lambda: build("Interleaved1F1B", loss_fn=None),
        lambda: _ScheduleForwardOnly(stages_of(build())[0], MICRO),
    ):
        plain, schedule = call(make()), commlib.wrap(make(), "int8+delta")
        assert commlib.of(schedule).needs_ids
        exact = call(schedule, sample_ids=None)  # no backward: nothing to remember, so raw
        assert plain is None or same(plain, exact)
        coded = call(commlib.wrap(make(), "int8"))
        assert plain is None or 0 < (coded - plain).norm() / plain.norm() < 0.02


def wrapping_stages() -> None:
    """A stage, or all of a rank's, without their schedule; no buffer stays behind."""
    reference = train(commlib.wrap(build("1F1B"), "int8"), 3)
    schedule = build("1F1B")
    stage = commlib.wrap(schedule._stage, "int8")
    assert stage is schedule._stage
    assert isinstance(stage, PipelineStage)
    assert train(schedule, 3).equals(reference)
    assert commlib.of(stage) is commlib.of(schedule)
    reference = train(commlib.wrap(build("LoopedBFS"), "int8"), 2)
    schedule = build("LoopedBFS")
    commlib.wrap(stages_of(schedule), "int8")
    assert train(schedule, 2).equals(reference)


def a_refusal_leaves_it_wrapped() -> None:
    """What a schedule has, its stages alone do not get: they keep what they had."""
    told = {"sample_ids": list(range(BATCH))}
    schedule = commlib.wrap(build("1F1B"), "int4+delta", timeout=20.0)
    pipe = commlib.of(schedule)
    train(schedule, 1, **told)
    for policy in (None, "int2+delta"):
        text = error_of(
            lambda p=policy: commlib.wrap(schedule._stage, p, timeout=9.0),  # type: ignore[misc]
            ValueError,
        )
        has(text, ["wrap the schedule"])
        assert commlib.of(schedule) is pipe
        assert pipe.transport.timeout == 20.0
    with counting() as count:
        train(schedule, 1, **told)
    assert not dist.get_rank() or {dtype for dtype, _ in count.messages} == {torch.uint8}
    plain = build("1F1B")
    has(error_of(lambda: commlib.wrap(plain._stage, "int4+delta"), ValueError), ["the schedule"])
    has(error_of(lambda: commlib.of(plain), ValueError), ["not wrapped"])


def two_pipelines_in_one_group() -> None:
    """Alternately, with schemes and memories of their own."""
    told = {"sample_ids": lambda step: list(range(BATCH))}
    alone = train(commlib.wrap(build("1F1B"), "int4+delta"), 3, **told)
    first, second = commlib.wrap(build("1F1B"), "int4+delta"), commlib.wrap(build(), "int8")
    assert commlib.of(first) is not commlib.of(second)
    for step in range(3):
        mixed = train(first, 1, start=step, **told)
        train(second, 1, start=step)
    assert same(mixed.weights[0], alone.weights[0])
    assert all("int8" in row["scheme"] for row in rows(second).values())
    commlib.of(first).verify()


def tensors_alive() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def memory_stays() -> None:
    """Over many steps: neither wires nor tensors pile up, wrapped by schedule or by stage."""
    for whole in (True, False):
        schedule = build("1F1B", micro=2)
        commlib.wrap(schedule if whole else schedule._stage, "int8")
        pipe = commlib.of(schedule)
        seen = []
        for steps in (2, 8, 40):
            train(schedule, steps)
            seen.append((tensors_alive(), pipe._pool.nbytes()))
        assert len(set(seen[1:])) == 1, seen
        assert pipe._pool.nbytes() < 300_000  # a step's messages, not all
        if whole:  # what was sent, and what was received, is used again: 3 and 2 wires
            assert sum(everywhere(pipe._pool.nbytes())) > 5 * 33_000
        assert pipe.memory_bytes() == 0


def the_table() -> None:
    schedule = commlib.wrap(build("1F1B"), "int4", backward="int8")
    train(schedule, 2)
    (row,) = rows(schedule).values()
    key, scheme = (
        ("stage0.forward.to1", "int4") if not dist.get_rank() else ("stage1.backward.to0", "int8")
    )
    assert row["key"] == key
    assert row["scheme"].startswith(scheme)
    assert row["op"] == key.split(".")[1]
    assert row["calls"] == 2 * MICRO
    assert row["raw_bytes"] == 2 * BATCH * LENGTH * WIDTH * 4
    assert 0 < row["seconds"] < 60
    assert 0 < row["rel_err"] < (0.2 if scheme == "int4" else 0.01)
    text = commlib.of(schedule).stats()
    assert key in text
    assert scheme in text


def below_what_the_policy_codes() -> None:
    """All messages of a pipeline have one size: where that is too small, nothing is coded."""
    schedule = commlib.wrap(build("1F1B"), "int4", backward="int8")
    x = batch(0, BATCH, 2, WIDTH)
    if dist.get_rank():
        schedule.step(target=x)
    else:
        schedule.step(x)
    assert {row["scheme"] for row in rows(schedule).values()} == {"fp32"}
    scheme = "int8" if dist.get_rank() else "int4"
    told = f"it has {SAMPLES * 2 * WIDTH} values, and the rule for {scheme} begins at 1024"
    assert told in commlib.of(schedule).stats()


def broken(*_: Any, **__: Any) -> None:
    raise RuntimeError("no such batch")


def nothing_holds_the_group() -> None:
    """Without the schedule nothing is left of it, and no garbage collection is needed."""
    group = dist.new_group([0, 1])
    plain, schedule = build("1F1B", group=group), build("1F1B", group=group)
    commlib.wrap(schedule, "int4+delta")
    train(plain, 1)
    train(schedule, 2, sample_ids=list(range(BATCH)))
    gc.collect()
    gc.disable()
    try:
        alive = [weakref.ref(thing) for thing in (plain._stage, schedule._stage)]
        pipe = weakref.ref(commlib.of(schedule))
        del plain, schedule
        assert [ref() for ref in alive] == [None, None]
        assert pipe() is None
        schedule = commlib.wrap(build("1F1B", group=group), "int4+delta", timeout=20.0)
        alive = [weakref.ref(schedule._stage)]
        has(error_of(partial(call, schedule, sample_ids=[1, 1])), ["2 sample_ids"])
        failing = partial(call, schedule, sample_ids=list(range(BATCH)))
        with torch.no_grad():  # before the step
            has(error_of(failing, RuntimeError), ["step() requires gradients"])
        assert not commlib.of(schedule).aborted
        schedule._step_microbatches = broken  # in the step
        has(error_of(failing), ["no such batch", "is aborted"])
        del schedule, failing
        assert alive[0]() is None
    finally:
        gc.enable()
    dist.destroy_process_group(group)


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        (frontends, 2),
        (inference_before_training, 2),
        (wrapped_again, 2),
        (without_loss, 2),
        (wrapping_stages, 2),
        (a_refusal_leaves_it_wrapped, 2),
        (two_pipelines_in_one_group, 2),
        (memory_stays, 2),
        (the_table, 2),
        (below_what_the_policy_codes, 2),
        (nothing_holds_the_group, 2),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_pipeline(pool: Pool, case: Any, ranks: int) -> None:
    pool.run(case, ranks=ranks)
