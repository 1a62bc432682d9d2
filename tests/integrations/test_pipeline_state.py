"""What a pipeline remembers, across a restart: the same run goes on, or all ranks hear why not."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import commlib
import commlib.checkpoint
from commlib.integrations.ranked import unranked
from tests.integrations.pipeline_cases import (
    BATCH,
    WIDTH,
    build,
    error_of,
    has,
    ids,
    loss,
    rows,
    same,
    small_step,
)
from tests.processes import Pool

pytestmark = pytest.mark.processes


def saved(schedule: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(commlib.of(schedule).state_dict(), file)
    return file


def load(schedule: Any, file: io.BytesIO) -> None:
    file.seek(0)
    commlib.of(schedule).load_state_dict(torch.load(file, weights_only=True))


def a_thousand_messages() -> None:
    """In both directions, with evictions; a restart in between changes no bit."""
    policy = f"int4:round=stochastic+delta:cap={48 * 4 * WIDTH * 4}"
    runs: dict[bool, list[Any]] = {}
    for restart in (False, True):
        schedule = commlib.wrap(build("1F1B"), policy, backward="int4+lep", seed=3)
        runs[restart] = []
        for step in range(63):
            if restart and step == 31:
                file, old = saved(schedule), schedule
                schedule = commlib.wrap(build("1F1B"), policy, backward="int4+lep", seed=3)
                for a, b in zip(
                    schedule._stage.submod.parameters(),
                    old._stage.submod.parameters(),
                    strict=True,
                ):
                    a.grad = b.grad
                load(schedule, file)
            out = small_step(schedule, step, sample_ids=ids(step))
            runs[restart].append(None if out is None else out.detach().clone())
        runs[restart] += [p.grad.clone() for p in schedule._stage.submod.parameters()]
        commlib.of(schedule).verify()
        if dist.get_rank() == 0:
            assert rows(schedule)["stage0.forward.to1"]["calls"] >= 250
    for a, b in zip(runs[False], runs[True], strict=True):
        assert (a is None and b is None) or same(a, b)


def the_loss_scale_changes() -> None:
    """rescale() by the ratio of two loss scales: the run goes on as if it had been the second.

    Powers of two scale codes, scales and residuals exactly. Also of residuals that were loaded and
    wait for their boundary.
    """
    for kind in ("fp32", "bf16", "int8"):
        wrap = partial(commlib.wrap, policy="int4", backward=f"int4+lep:dtype={kind}")
        plain, changed, loaded = wrap(scaled(4)), wrap(scaled(1)), wrap(scaled(4))
        for step in range(2):
            small_step(plain, step)
            small_step(changed, step)
        load(loaded, saved(changed))
        for schedule in (changed, loaded):
            commlib.of(schedule).rescale(4.0)
            schedule._loss_fn = scaled_loss(4)
        states = [commlib.of(s).state_dict() for s in (plain, changed, loaded)]
        residuals = [memories(state) for state in states]
        assert bool(residuals[0]) == (dist.get_rank() == 1)
        for other in residuals[1:]:
            assert other.keys() == residuals[0].keys()
            assert all(same(x, other[name]) for name, x in residuals[0].items())
        for schedule in (plain, changed, loaded):
            for p in schedule._stage.submod.parameters():
                p.grad = None
            small_step(schedule, 2)
        grads = [[p.grad for p in s._stage.submod.parameters()] for s in (plain, changed, loaded)]
        for other in grads[1:]:
            assert all(map(same, grads[0], other))
    has(error_of(lambda: commlib.of(plain).rescale(float("inf")), ValueError), ["finite"])


def scaled_loss(scale: float) -> Any:
    return lambda out, target: scale * loss(out, target)


def scaled(scale: float) -> Any:
    return build("1F1B", loss_fn=scaled_loss(scale))


def memories(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Residuals and their scales, by name."""
    inner = unranked(state, "boundaries", "policy", "history")
    found = {}
    for boundary in inner["boundaries"].values():
        for part in ("residuals", "scales"):
            found |= {f"{part} {n}": x for n, x in boundary["compressor"][part].items()}
    return found


def states() -> None:
    """Checkpoints of every mode, moved to another store, and refused where they do not belong."""
    cases: list[tuple[str, str, Any]] = [
        ("int4+delta", "int4+lep:dtype=bf16", lambda step: {"sample_ids": ids(step)}),
        ("int4+reuse", "int4+reuse", lambda step: {"is_fresh": step % 2 == 0}),
        ("int4:round=stochastic", "int4+lep", lambda step: {}),
    ]
    for forward, backward, told in cases:
        first = commlib.wrap(build("1F1B"), forward, backward=backward)
        for step in range(3):
            small_step(first, step, **told(step))
        file = saved(first)
        other = forward.replace("+delta", "+delta:store=disk")
        second = commlib.wrap(build("1F1B"), other, backward=backward)
        if "lep" in backward:
            state = unranked(commlib.of(first).state_dict())
            assert state["boundaries"]["stage1.backward.to0"]["compressor"]
        load(second, file)
        assert commlib.of(second).state_dict().keys() == commlib.of(first).state_dict().keys()
        for p in second._stage.submod.parameters():
            p.grad = None
        for p in first._stage.submod.parameters():
            p.grad = None
        for step in range(3, 6):
            a, b = (small_step(s, step, **told(step)) for s in (first, second))
            assert a is None or same(a, b)
        for p, q in zip(
            first._stage.submod.parameters(), second._stage.submod.parameters(), strict=True
        ):
            assert same(p.grad, q.grad)  # type: ignore[arg-type]
    third = commlib.wrap(build("1F1B"), "int8")
    has(error_of(lambda: load(third, file), ValueError), ["int8", "int4", "load it where"])
    state = commlib.of(third).state_dict()
    unranked(state)["rank"] = 1 - dist.get_rank()
    has(error_of(lambda: commlib.of(third).load_state_dict(state), ValueError), ["rank"])


def loaded_on_one_rank(policy: str, told: dict[str, Any]) -> None:
    """All ranks hear of it, and may all forget and go on."""
    first = commlib.wrap(build("1F1B"), policy)
    for step in range(3):
        small_step(first, step, **told)
    file = saved(first)
    second = commlib.wrap(build("1F1B"), policy, timeout=20.0)
    if dist.get_rank() == 0:
        load(second, file)
    sent = commlib.of(second).transport.bytes_sent
    has(
        error_of(lambda: small_step(second, 3, **told), RuntimeError),
        ["disagree" if told else "memory"],
    )
    assert commlib.of(second).transport.bytes_sent == sent
    if told:
        commlib.of(second).reset()
        small_step(second, 3, **told)
        commlib.of(second).verify()


def one_rank_forgets() -> None:
    """reset() on one rank only is found before a message of another size is sent."""
    schedule = commlib.wrap(build("1F1B"), "int4+delta")
    told = {"sample_ids": list(range(BATCH))}
    small_step(schedule, 0, **told)
    if dist.get_rank() == 1:
        commlib.of(schedule).reset()
    has(error_of(lambda: small_step(schedule, 1, **told), RuntimeError), ["disagree", "history"])
    commlib.of(schedule).reset()
    small_step(schedule, 1, **told)
    commlib.of(schedule).verify()
    if dist.get_rank() == 1:
        commlib.of(schedule).reset()
    text = error_of(commlib.of(schedule).verify, RuntimeError)
    has(text, ["stage0.forward.to1", "ranks 0 and 1", "reset()"])


def tampered() -> None:
    """One changed value in one rank's file: an error on all ranks, naming the boundary."""
    told = {"sample_ids": list(range(BATCH))}
    first = commlib.wrap(build("1F1B"), "int4+delta")
    small_step(first, 0, **told)
    state = commlib.of(first).state_dict()
    if dist.get_rank() == 1:
        end = unranked(state)["boundaries"]["stage0.forward.to1"]
        end["references"]["rows"][3, 7] += 1.0
    second = commlib.wrap(build("1F1B"), "int4+delta", timeout=20.0)
    commlib.of(second).load_state_dict(state)
    text = error_of(lambda: small_step(second, 1, **told), RuntimeError)
    has(text, ["rank 1", "stage0.forward.to1", "checksum"])


def through_dcp(folder: str) -> None:
    """Each rank's own boundaries come back; on another number of ranks nobody gets any."""
    told = {"sample_ids": list(range(BATCH))}
    first, second, third = (commlib.wrap(build("1F1B"), "int4+delta") for _ in range(3))
    small_step(first, 0, **told)
    commlib.checkpoint.save(first, f"{folder}/alone")
    dcp.save({"commlib": commlib.of(first)}, checkpoint_id=f"{folder}/saved")
    dcp.load({"commlib": commlib.of(second)}, checkpoint_id=f"{folder}/saved")
    commlib.checkpoint.load(third, f"{folder}/alone")
    for other in (second, third):
        small_step(other, 1, **told)
        commlib.of(other).verify()
    load = commlib.checkpoint.load
    text = error_of(lambda: load(third, f"{folder}/alone", ranks=[0]), ValueError)
    has(text, ["a pipeline of 1 ranks", "this one has 2"])


def test_through_dcp(pool: Pool, tmp_path: Path) -> None:
    pool.run(through_dcp, str(tmp_path), ranks=2)


@pytest.mark.parametrize(
    "case",
    [a_thousand_messages, the_loss_scale_changes, states, one_rank_forgets, tampered],
    ids=lambda case: case.__name__,
)
def test_state(pool: Pool, case: Any) -> None:
    pool.run(case, ranks=2)


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        ("int4+delta", {"sample_ids": list(range(BATCH))}),
        ("int4+reuse", {"is_fresh": True}),
        ("int8", {}),
    ],
)
def test_loaded_on_one_rank(pool: Pool, policy: str, told: dict[str, Any]) -> None:
    pool.run(loaded_on_one_rank, policy, told, ranks=2)
