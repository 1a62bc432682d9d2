"""What ranks of a pipeline say of mistakes and of the dead: all of them, and none hangs.

Before a step nothing has been sent, and all ranks hear at once. In a step a rank waits inside gloo,
which tells it when a connection closes or the group's timeout is over.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import commlib
from commlib.boundary import Boundary
from tests.integrations.pipeline_cases import (
    BATCH,
    CPU,
    LENGTH,
    MICRO,
    SAMPLES,
    WIDTH,
    batch,
    block,
    build,
    call,
    error_of,
    has,
    stages_of,
    train,
)
from tests.processes import Pool

pytestmark = pytest.mark.processes

GROUP_TIMEOUT = 6.0
DELTA: dict[str, Any] = {"sample_ids": list(range(BATCH))}


def wraps_that_differ() -> None:
    """Every difference is named on every rank, nothing is wrapped, and the group stays usable."""
    rank = dist.get_rank()
    given: list[tuple[list[str], Any]] = [
        (["num_stages", "2", "3"], lambda: commlib.wrap(stage_of(2 + rank), "int8")),
        (["policy", "int8", "int4"], lambda: commlib.wrap(build(), ("int8", "int4")[rank])),
        (
            ["policy", "int8", "int4"],
            lambda: commlib.wrap(build(), "int8", backward=("int8", "int4")[rank]),
        ),
        (["microbatches", "8", "4"], lambda: commlib.wrap(build(micro=8 - 4 * rank), "int8")),
        (["seed", "0", "1"], lambda: commlib.wrap(build(), "int8", seed=rank)),
        (
            ["ScheduleGPipe", "Schedule1F1B"],
            lambda: commlib.wrap(build(("GPipe", "1F1B")[rank]), "int8"),
        ),
    ]
    for words, wrap in given:
        has(error_of(wrap, RuntimeError), ["disagree", "rank", *words])
    train(commlib.wrap(build(), "int8"), 1)


def stage_of(count: int) -> PipelineStage:
    rank = dist.get_rank()
    return PipelineStage(block(rank), rank, count, CPU)


def shapes_that_differ() -> None:
    """STATIC: what one end sends and the other expects, on both ranks and before it is sent."""
    rank = dist.get_rank()
    sizes = (SAMPLES, LENGTH, WIDTH), (SAMPLES, LENGTH, 2 * WIDTH)
    mine = torch.empty(sizes[0], requires_grad=True), torch.empty(sizes[1], requires_grad=True)
    stage = PipelineStage(
        block(rank), rank, 2, CPU, input_args=(mine[rank],), output_args=(mine[0],)
    )
    schedule = commlib.wrap(Schedule1F1B(stage, MICRO, loss_fn=nn.MSELoss()), "int8", timeout=20.0)
    start = time.monotonic()
    text = error_of(lambda: call(schedule), RuntimeError)
    assert time.monotonic() - start < 10
    has(text, ["stage0.forward.to1", "[4, 32, 64]", "[4, 32, 128]", "same shapes"])
    assert error_of(lambda: call(schedule), RuntimeError) == text  # nothing was sent: nothing broke
    commlib.of(schedule).state_dict()


def a_batch_of_another_size() -> None:
    """Torch would fill a part of the next stage's buffers and say nothing."""
    schedule = commlib.wrap(build(loss_fn=None), "int8")
    call(schedule)
    args = (batch()[: 3 * MICRO],) if dist.get_rank() == 0 else ()
    text = error_of(lambda: schedule.step(*args), RuntimeError)
    has(text, ["stage0.forward.to1", "[3, 32, 64]", "[4, 32, 64]"] if args else ["rank 0"])


def samples_that_are_wrong() -> None:
    """Every rank raises, and says whose samples are wrong; then the pipeline goes on."""
    schedule = commlib.wrap(build("1F1B"), "int4+delta")
    rank, good = dist.get_rank(), list(range(BATCH))
    given: list[tuple[list[str], list[Any]]] = [  # by rank
        (["needs sample_ids="], [None, None]),
        (["needs sample_ids="], [good, None]),
        (["sample id 0 stands twice"], [[0] * 2 + good[2:]] * 2),
        (["stands twice"], [[0] * 2 + good[2:], good]),
        (["31 sample_ids", "8 equal"], [good[:-1]] * 2),
        (["whole numbers"], [[0.5, *good[1:]]] * 2),
        (["whole numbers", "got 5"], [5, good]),
        (["whole numbers", "tensor(5)"], [torch.tensor(5), good]),
        (["whole numbers", "True"], [[True, *good[1:]]] * 2),
        (["whole numbers"], [torch.arange(BATCH).view(1, -1), good]),
        (["whole numbers"], [[1 << 63, *good[1:]]] * 2),
        (["disagree", "history"], [good, good[::-1]]),
    ]
    for first in (True, False):
        for words, samples in given:
            text = error_of(lambda ids=samples[rank]: call(schedule, sample_ids=ids))  # type: ignore[misc]
            has(text, words)
        if first:
            call(schedule, **DELTA)
            given.append((["4 samples"], [list(range(2 * BATCH))] * 2))
    call(schedule, **DELTA)
    commlib.of(schedule).verify()
    call(schedule, sample_ids=torch.arange(BATCH))
    call(schedule, sample_ids=list(np.arange(BATCH)))


def a_cap_too_small() -> None:
    row = LENGTH * WIDTH * 4
    for cap, words in (
        (row - 1, ["has no room for one sample", "raise the cap"]),
        (row * 5, ["a step of 32 samples", "room for 5"]),
    ):
        schedule = commlib.wrap(build("1F1B"), f"int4+delta:cap={cap}", timeout=20.0)
        has(error_of(lambda s=schedule: call(s, **DELTA)), ["stage0.forward.to1", *words])  # type: ignore[misc]


@pytest.mark.parametrize(
    "case",
    [
        wraps_that_differ,
        shapes_that_differ,
        a_batch_of_another_size,
        samples_that_are_wrong,
        a_cap_too_small,
    ],
    ids=lambda value: value.__name__,
)
def test_mistakes(pool: Pool, case: Any) -> None:
    pool.run(case, ranks=2)


class Trouble(nn.Module):
    """A block that does something else at its n-th call."""

    def __init__(self, index: int, at: tuple[int, int], what: str) -> None:
        super().__init__()
        self.body, self.index, self.at, self.what = block(index), index, at, what
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if (self.index, self.calls) == self.at:
            if self.what == "raise":
                raise KeyError("no such token")
            if self.what == "raise RuntimeError":
                raise RuntimeError("shapes do not multiply")
            os.kill(os.getpid(), signal.SIGKILL)
        return self.body(x)


def trouble(name: str, what: str, stage: int, calls: int) -> tuple[str, str, float, str]:
    """Kind, text, seconds and cause of the error, after a step that went well."""
    schedule = build(name, lambda index: Trouble(index, (stage, calls), what))
    commlib.wrap(schedule, "int8", timeout=4.0)
    start = time.monotonic()
    try:
        for step in range(3):
            start = time.monotonic()
            call(schedule, step)
    except Exception as error:
        text = "\n".join([str(error), *getattr(error, "__notes__", [])])
        seconds, cause = time.monotonic() - start, type(error.__cause__).__name__
        has(error_of(lambda: call(schedule), RuntimeError), ["takes no more steps"])
        return type(error).__name__, text, seconds, cause
    return "", "", 0.0, ""


# One call per micro-batch and one for the shapes: this is in the middle of the second step.
SECOND_STEP = 1 + MICRO + 3


def test_a_killed_rank(pool: Pool) -> None:
    name, victim = "ZBVZeroBubble", 1
    how = {"group_timeout": GROUP_TIMEOUT, "may_die": True}
    results = pool.run(trouble, name, "kill", victim, SECOND_STEP, ranks=3, **how)  # type: ignore[arg-type]
    assert results[victim] is None
    for rank, result in enumerate(results):
        if rank != victim:
            kind, text, seconds, _ = result
            assert kind == "RuntimeError"
            has(text, ["step 2 of the pipeline failed", f"no answer from rank {victim} (process "])
            has(text, ["which has ended", "go on from a checkpoint"])
            assert seconds < GROUP_TIMEOUT + 6


@pytest.mark.parametrize(
    ("what", "calls"), [("raise", 1), ("raise", SECOND_STEP), ("raise RuntimeError", SECOND_STEP)]
)
def test_an_exception_in_a_stage(pool: Pool, what: str, calls: int) -> None:
    results = pool.run(trouble, "1F1B", what, 1, calls, ranks=3, group_timeout=GROUP_TIMEOUT)
    words = {"raise": "no such token", "raise RuntimeError": "shapes do not multiply"}[what]
    kind, text, seconds, cause = results[1]
    has(text, [words, "at stage 1 (rank 1 of 3)", "The pipeline is aborted"])
    assert seconds < 5
    if what == "raise":
        assert "KeyError" in (kind, cause)
    else:
        assert kind == "RuntimeError"
    for rank in (0, 2):
        kind, text, seconds, _ = results[rank]
        assert kind == "RuntimeError"
        has(text, [f"rank {rank} of 3", "rank 1 was in step", words])
        assert ("KeyError" in text) == (what == "raise")
        assert seconds < GROUP_TIMEOUT + 6


def stays_away(where: str) -> tuple[str, float]:
    """Rank 1 does not come: to wrap, to a step that agrees, to one that does not."""
    rank = dist.get_rank()
    schedule = build("1F1B")
    start = time.monotonic()

    def run() -> None:
        if where == "wrap" and rank == 1:
            time.sleep(3.0)
            return
        commlib.wrap(schedule, "int4+delta" if where == "agree" else "int8", timeout=1.5)
        call(schedule, **(DELTA if where == "agree" else {}))
        if rank == 1:
            time.sleep(2.5 if where == "agree" else 5.0)
            return
        call(schedule, **(DELTA if where == "agree" else {}))

    try:
        run()
    except (RuntimeError, OSError) as error:
        return str(error), time.monotonic() - start
    return "", 0.0


@pytest.mark.parametrize("where", ["wrap", "agree", "step"])
def test_a_rank_that_never_comes(pool: Pool, where: str) -> None:
    results = pool.run(stays_away, where, ranks=2, group_timeout=2.0)
    text, seconds = results[0]
    has(text, ["no answer from rank 1" if where == "step" else "no word from rank 1"])
    assert seconds < GROUP_TIMEOUT + 6


def corrupt(key: str) -> str:
    """One bit of the third message of the second step flips on its way."""
    schedule = commlib.wrap(build("1F1B"), "int8", timeout=4.0)
    call(schedule)
    decode = Boundary.decode

    def flipped(self: Boundary, wire: torch.Tensor, out: torch.Tensor, microbatch: int = 0) -> None:
        if (self.key, microbatch) == (key, 2):
            wire[100] ^= 4
        decode(self, wire, out, microbatch)

    with mock.patch.object(Boundary, "decode", flipped):
        return error_of(lambda: call(schedule), RuntimeError)


@pytest.mark.parametrize("key", ["stage0.forward.to1", "stage2.backward.to1"])
def test_a_bit_that_flips(pool: Pool, key: str) -> None:
    for rank, text in enumerate(pool.run(corrupt, key, ranks=3, group_timeout=GROUP_TIMEOUT)):
        has(text, [f"message 11 of {key}", "its crc32 is", f"rank {rank} of 3"])


LARGE = 65 << 20


class Large(nn.Module):
    """Repeats one number until a message is as large as it should be."""

    def __init__(self, index: int, numel: int) -> None:
        super().__init__()
        self.index, self.numel = index, numel
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.index:
            return (x.view(len(x), -1, 1024) * self.scale).mean(1)
        return (x * self.scale).repeat(1, self.numel // 1024)


def large_messages(policy: str) -> tuple[float, int]:
    """1F1B's batches of a send and a receive, each beyond what sockets and gloo buffer."""
    numel = (LARGE // 4 if policy == "fp32" else LARGE) // 1024 * 1024
    schedule = build("1F1B", lambda index: Large(index, numel), micro=2, loss_fn=nn.MSELoss())
    commlib.wrap(schedule, policy)
    x = torch.full((2, 1024), 0.5)
    if dist.get_rank() == 0:
        schedule.step(x)
    else:
        schedule.step(target=torch.zeros(2, 1024))
    (row,) = commlib.of(schedule).meter.rows()
    (grad,) = (p.grad for stage in stages_of(schedule) for p in stage.submod.parameters())
    assert grad is not None
    return float(grad), row["wire_bytes"] // 2


@pytest.mark.parametrize("policy", ["fp32", "int8"])
def test_large_messages_do_not_deadlock(pool: Pool, policy: str) -> None:
    for grad, size in pool.run(large_messages, policy, ranks=2):
        assert size > 64 << 20
        assert abs(grad - 2 * 2.0 * 2.0**2 * 0.5**2 / 1) < 0.1  # d/ds of (s * t * x)^2
