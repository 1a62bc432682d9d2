"""What is remembered of an FSDP2 model: by name, through checkpoints, through wrapping again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import commlib
from commlib.integrations.ranked import unranked
from tests.integrations.ddp_cases import raises
from tests.integrations.fsdp_cases import PATIENCE, equal, loss, mesh, relative, sharded, shards
from tests.processes import Pool

pytestmark = pytest.mark.processes

Make = Callable[[], Any]


def steps(model: Any, which: range) -> dict[str, torch.Tensor]:
    """SGD without a state of its own."""
    for step in which:
        loss(model, step).backward()
        with torch.no_grad():
            for p in (p for p in model.parameters() if p.requires_grad):
                p -= 0.1 * p.grad
                p.grad = None
    return shards(model)


def resuming_is_bitwise() -> None:
    """Residuals and the references of differences; also where rounding is random."""
    cases: list[tuple[str, str | None, Make]] = [
        ("int4:round=stochastic:block=64+ef:omega=0.5", None, sharded),
        ("int4+ef:dtype=int8", "int4+delta", sharded),
        ("int4+ef", "int8", lambda: sharded(mesh=mesh(dist.get_world_size(), 1))),
    ]
    for policy, parameters, make in cases:
        whole = steps(commlib.wrap(make(), policy, parameters=parameters), range(4))
        first = commlib.wrap(make(), policy, parameters=parameters)
        steps(first, range(2))
        weights, memory = first.state_dict(), commlib.of(first).state_dict()
        for order in (1, -1):  # either may be loaded first
            second = commlib.wrap(make(), policy, parameters=parameters)
            loads = [lambda: second.load_state_dict(weights),  # noqa: B023
                     lambda: commlib.of(second).load_state_dict(memory)][::order]  # noqa: B023  # fmt: skip
            for load in loads:
                load()
            assert equal(steps(second, range(2, 4)), whole), (policy, parameters, order)
        forgetful = commlib.wrap(make(), policy, parameters=parameters)
        forgetful.load_state_dict(weights)
        assert 0 < relative(steps(forgetful, range(2, 4)), whole) < 0.01


def wrapping_again() -> None:
    model = commlib.wrap(sharded(), "int4+ef")
    state = commlib.of(model)
    steps(model, range(2))
    held = state.memory_bytes()
    assert held > 0

    def residual() -> torch.Tensor:
        compressors = unranked(state.state_dict())["memory"]["gradients"]["compressors"]
        return compressors["int4:round=nearest+ef"]["residuals"]["head.weight"]

    before = residual()
    commlib.wrap(model, seed=3)  # the policy stays, and residuals with it
    assert commlib.of(model) is state
    assert state.seed == 3
    assert torch.equal(residual(), before)
    commlib.wrap(model, parameters="int8")  # gathers join, residuals stay
    assert list(state.communicators) == ["gradients", "parameters"]
    assert torch.equal(residual(), before)
    steps(model, range(2, 3))
    assert not torch.equal(residual(), before)
    commlib.wrap(model, "int8+ef")
    assert state.memory_bytes() == 0
    assert str(state.parameters) == "int8"
    steps(model, range(3, 4))

    state.rescale(2.0)
    state.reset()
    assert state.memory_bytes() == 0
    state.close()  # the next step opens others
    steps(model, range(4, 5))
    assert state.memory_bytes() > 0
    assert "reduce_scatter" in state.stats()
    assert "all_gather" in state.stats()


def rules_may_name_the_role() -> None:
    """A policy's rules for parameters are those of the gathers; without such FSDP2's own stay."""
    rules = [{"scheme": "int8", "role": "parameter", "min_ndim": 2}, {"scheme": "int4+ef"}]
    state = commlib.of(commlib.wrap(sharded(), {"rules": rules}))
    assert list(state.communicators) == ["gradients", "parameters"]
    assert [str(rule.scheme) for rule in state.parameters.rules] == ["int8"]
    assert list(commlib.of(commlib.wrap(sharded(), "int4+ef")).communicators) == ["gradients"]
    with mock.patch.dict(os.environ, {"COMMLIB_POLICY": json.dumps({"rules": rules})}):
        state = commlib.of(commlib.wrap(sharded()))
    assert list(state.communicators) == ["gradients", "parameters"]


class Codes(nn.Module):
    """Frozen weights of 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        codes = torch.arange(48 * 48).remainder(251).to(torch.uint8).view(48, 48)
        self.codes = nn.Parameter(codes, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float() @ (self.codes.float() / 255)


def frozen_integers_are_no_gradients() -> None:
    """The gradients' dtype is that of the parameters that have some. Gathered together with
    integers they go as bytes, uncompressed, and that is told."""
    model = sharded(nn.Sequential(Codes(), nn.Linear(48, 30)))
    commlib.wrap(model, "int4+ef", parameters="int8")
    state = commlib.of(model)
    steps(model, range(2))
    assert unranked(state.state_dict())["memory"]["gradients"]["compressors"]
    state.load_state_dict(state.state_dict())
    assert "0.codes +2" in state.stats()
    assert "gathers bytes" in state.stats()


def padding_remembers_nothing() -> None:
    """30 rows over 4 ranks are 8 each: the last two rows of the last rank's are nobody's."""
    model = commlib.wrap(sharded(), "int4+ef")
    steps(model, range(3))
    state = unranked(commlib.of(model).state_dict())
    memory = state["memory"]["gradients"]["compressors"]
    rows = memory["int4:round=nearest+ef"]["residuals"]["head.weight"]
    assert rows.shape == (4, 8 * 48)
    assert rows[3, 6 * 48 :].eq(0).all()
    assert rows[3, : 6 * 48].ne(0).any()


def another_ranks_state_is_refused() -> None:
    model = commlib.wrap(sharded(), "int4+ef")
    state = commlib.of(model).state_dict()
    unranked(state)["rank"] += 1
    raises(ValueError, "rank")(lambda: commlib.of(model).load_state_dict(state))


def one_after_the_other(*parts: Callable[[], None]) -> None:
    for part in parts:
        part()


def test_state(pool: Pool) -> None:
    pool.run(
        one_after_the_other,
        resuming_is_bitwise,
        wrapping_again,
        rules_may_name_the_role,
        frozen_integers_are_no_gradients,
        another_ranks_state_is_refused,
        ranks=3,
        timeout=PATIENCE,
    )


def test_padding(pool: Pool) -> None:
    pool.run(padding_remembers_nothing)
