"""What DiLoCo remembers: a resumed run is bitwise the uninterrupted one, also amid an exchange."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from commlib import Communicator
from tests.communicators import on_ranks, only
from tests.optim.diloco import STREAMING, WAYS, outer, shared, train
from tests.optim.models import same
from tests.optim.replicas import model, weights


@pytest.mark.parametrize(("scheme", "how"), WAYS)
@pytest.mark.parametrize("before", [3, 7, 8])
def test_a_resumed_run_is_the_uninterrupted_one(
    scheme: str, how: dict[str, Any], before: int
) -> None:
    """From a file, in the middle of a period, of an overlap (7, 8), and right after a sync."""

    def saving(c: Communicator) -> tuple[bytes, list[torch.Tensor]]:
        module = model()
        one = outer(module, c, **how)
        train(module, one, before, c.rank)
        file = io.BytesIO()
        parts = {"model": module.state_dict(), "inner": one.inner.state_dict()}  # type: ignore[union-attr]
        torch.save({**parts, "outer": one.state_dict()}, file)
        train(module, one, 9, c.rank)
        return file.getvalue(), [*weights(module), *shared(one)]

    saved = on_ranks(2, only(scheme), saving)

    def resuming(c: Communicator) -> list[torch.Tensor]:
        state = torch.load(io.BytesIO(saved[c.rank][0]), weights_only=True)
        module = model()
        one = outer(module, c, **how)
        module.load_state_dict(state["model"])
        one.inner.load_state_dict(state["inner"])  # type: ignore[union-attr]
        one.load_state_dict(state["outer"])
        assert one.steps == before
        train(module, one, 9, c.rank)
        return [*weights(module), *shared(one)]

    for found, (_, whole) in zip(on_ranks(2, only(scheme), resuming), saved, strict=True):
        assert same(found, whole)


def test_a_state_holds_what_is_under_way() -> None:
    def body(c: Communicator) -> None:
        module = model()
        one = outer(module, c, **STREAMING)
        train(module, one, 4, c.rank)
        state = one.state_dict()
        assert [(f["fragment"], f["begun"], f["due"]) for f in state["flights"]] == [(0, 4, 5)]
        theta = shared(one)
        again = one.state_dict()  # saving has changed nothing, and may be done twice
        assert same([f["mean"] for f in state["flights"]], [f["mean"] for f in again["flights"]])
        assert same(theta, shared(one))
        one.finish()
        assert not one.state_dict()["flights"]
        assert not same(theta, shared(one))

    on_ranks(2, only("int8"), body)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    def body(c: Communicator) -> None:
        module = model()
        one = outer(module, c)
        train(module, one, 4, c.rank)
        good = one.state_dict()
        refused = [
            (outer(module, c, period=5), good, "the state has period 4, allowed: 5"),
            (outer(module, c, overlap=1), good, "the state has overlap 0, allowed: 1"),
            (outer(module, c, fragments=2), good, "the state has fragments"),
            (outer(module, c, momentum=0.0), good, r"momentum of the state has .* allowed: \{\}"),
            (outer(module, c), {**good, "options": {"lr": 0.7}}, "no mix, momentum, nesterov"),
            (outer(module, c), {"steps": 3}, "it has no communicator, flights, fragments"),
            (
                outer(module, c),
                {**good, "communicator": {**good["communicator"], "rank": 1}},
                "residuals belong to one rank",
            ),
        ]
        for other, state, message in refused:
            before = shared(other)
            with pytest.raises(ValueError, match=message):
                other.load_state_dict(state)
            assert same(before, shared(other))
            assert other.steps == 0

    on_ranks(1, "fp32", body)


def test_options_go_with_the_state() -> None:
    def body(c: Communicator) -> None:
        one = outer(model(), c)
        one.lr, one.mix, one.nesterov = 0.1, 0.3, False
        other = outer(model(), c)
        other.load_state_dict(one.state_dict())
        assert (other.lr, other.mix, other.momentum) == (0.1, 0.3, 0.9)
        assert not other.nesterov

    on_ranks(1, "fp32", body)
