"""Plans under "auto": within the error of auto, the same on all ranks, and none where it is raw."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from commlib import engine
from commlib.integrations import autoplan
from commlib.integrations.replanning import Replanner, Settings
from commlib.planner import Curve, Errors, Profile, Speed
from commlib.planner.messages import CANDIDATES, OWN
from commlib.policy import Policy, TensorInfo
from commlib.topology import Link
from tests.integrations.ddp_cases import (
    DDP,
    assert_same_on_all_ranks,
    batch,
    commlib,
    raises,
    relative,
    residuals,
    train,
    weights,
)
from tests.integrations.test_replanning import SMALL, Deep
from tests.processes import Pool

KIB = 1024
GRID = tuple(4 * KIB << k for k in range(4))
SLOW, FAST = 1e5, 1e12  # bytes per second


def profile(rate: float, size: int) -> Profile:
    """A line of that rate and codecs of 1 GB/s, with hardly any latency."""
    ratios = {"bf16": 0.5, "int8": 0.2539}
    curves = [Curve("fp32", GRID, tuple(n / rate for n in GRID))]
    curves += [
        Curve(s, GRID, tuple(n * (r / rate + 3e-9) for n in GRID)) for s, r in ratios.items()
    ]
    speeds = tuple(Speed(s, 1e9, 1e9, 1e9, r) for s, r in ratios.items())
    return Profile(size, tuple(curves), speeds, Link(1e-6, rate), Link(1e-6, rate), 1e-6)


@contextmanager
def on_a_line(rate: float, coding: float = 1e9, every: int = 2) -> Iterator[list[str]]:
    """What is measured, and how often plans are made; yields what was asked the speed of."""
    asked: list[str] = []

    def speed(transport: Any, text: str) -> Speed:
        asked.append(text)
        rate = 1e9 if text == OWN else coding
        return Speed(text, rate, rate, rate, 0.25)

    with (
        mock.patch.object(engine, "measure", lambda run, t: profile(rate, t.size)),
        mock.patch.object(engine, "speed", speed),
        mock.patch.object(autoplan, "SETTINGS", Settings(every, CANDIDATES, "int8+ef")),
    ):
        yield asked


def auto(**mode: Any) -> DDP:
    return commlib.wrap(DDP(Deep(), **{**SMALL, **mode}), "auto")


def schemes(model: DDP) -> dict[str, str]:
    """Of the parameters that travel compressed, by the policy in force."""
    policy = commlib.of(model).communicator.policy
    found = {}
    for n, p in model.module.named_parameters():
        rule = policy.rule(TensorInfo(n, 10**6, p.dtype, ndim=p.dim()))
        if rule is not None and not rule.scheme.lossless:
            found[n] = str(rule.scheme)
    return found


def it_plans_within_the_error_of_auto() -> None:
    with on_a_line(SLOW) as asked:
        model = auto()
        assert asked == [OWN, *CANDIDATES]
        train(model, 2)
        assert set(schemes(model).values()) == {OWN}
        before = weights(model)
        train(model, 1, start=2)
    state = commlib.of(model)
    assert state.policy == "auto"
    taken = schemes(model)
    assert set(taken) == {f"layers.{n}.weight" for n in range(4)}  # vectors and the head are exact
    assert set(taken.values()) <= set(CANDIDATES)
    assert len(set(taken.values())) > 1
    assert_same_on_all_ranks(weights(model))
    assert any(name.endswith("layers.0.weight") for name in residuals(model))
    assert before.numel() == weights(model).numel()

    # by what all ranks coded in step 1, on weights that a run without plans has there
    with on_a_line(SLOW):
        same, alone = auto(), DDP(Deep())
        commlib.of(same).replan(None)
        train(same, 1)
        alone.load_state_dict(same.state_dict())
    table = Errors(state._tensors()["gradients"], (OWN, *CANDIDATES))
    for rank in range(dist.get_world_size()):
        alone.module.zero_grad()
        alone.module(batch(1, rank)).square().mean().backward()
        for name, parameter in alone.module.named_parameters():
            table.add(name, parameter.grad)
    layers = {layer.name: layer for layer in table.layers("int8+ef")}
    rows = [layers[name] for name in taken]
    budget = sum(row.errors[row.place(OWN)] for row in rows)
    error = sum(row.errors[row.place(taken[row.name])] for row in rows)
    assert 0.3 * budget < error <= budget


def buckets_and_resuming_change_no_bit() -> None:
    """The state has what was measured: what is measured at resuming does not count."""
    with on_a_line(SLOW):
        whole = auto()
        reference = train(whole, 6)
        assert_same_on_all_ranks(reference)
        assert set(schemes(whole).values()) <= set(CANDIDATES)
        for cut in (1, 2, 3, 4):
            model = auto()
            train(model, cut)
            file = io.BytesIO()
            saved = {"model": model.module.state_dict(), "commlib": commlib.of(model).state_dict()}
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            for rate in (SLOW, SLOW * 7, FAST):
                with on_a_line(rate, coding=1e8):
                    again = auto(gradient_as_bucket_view=True)
                again.module.load_state_dict(saved["model"])
                commlib.of(again).load_state_dict(saved["commlib"])
                assert torch.equal(train(again, 6 - cut, start=cut), reference), (cut, rate)
                assert schemes(again) == schemes(whole)
            commlib.wrap(
                model, *(["auto"] if cut % 2 else []), timeout=30.0
            )  # which changes nothing
            assert torch.equal(train(model, 6 - cut, start=cut), reference), cut
    plain = train(DDP(Deep()), 6)
    assert 0 < relative(reference, plain) < 0.01


def where_it_is_not_worth_it_auto_is_as_it_was() -> None:
    with on_a_line(FAST) as asked:
        model = auto()
        assert commlib.of(model)._replanner is None
        assert not asked  # nothing is measured
        assert torch.equal(train(model, 4), train(DDP(Deep()), 4))
    with on_a_line(SLOW):
        model = auto()
        commlib.of(model).replan(None)
        plain = train(model, 5)
        assert set(schemes(model).values()) == {OWN}
        commlib.wrap(model, timeout=30.0)  # which does not begin them again
        train(model, 2, start=5)
        assert set(schemes(model).values()) == {OWN}
        again = auto()  # nor does a state of it
        again.module.load_state_dict(model.module.state_dict())
        commlib.of(again).load_state_dict(commlib.of(model).state_dict())
        assert torch.equal(train(again, 3, start=7), train(model, 3, start=7))
    with on_a_line(SLOW, coding=1e4):  # candidates that code too slowly
        model = auto()
        assert torch.equal(train(model, 5), plain)
        assert set(schemes(model).values()) == {OWN}
        assert residuals(model).keys() == {k for k in residuals(model) if "residuals" not in k}


def other_policies_end_it_and_take_over() -> None:
    with on_a_line(SLOW):
        model = auto()
        train(model, 3)
        state = commlib.of(model).state_dict()
        commlib.of(model).replan(1)  # by int4+ef, as asked
        assert type(commlib.of(model)._replanner) is Replanner
        train(model, 2)
        assert isinstance(commlib.of(model).policy, Policy)
        commlib.wrap(model, "int8+ef")
        train(model, 3)
        assert commlib.of(model)._replanner is None
        assert set(schemes(model).values()) == {"int8+ef"}
        # residuals of a plan do not fit a policy that the user names
        refused = raises(ValueError, "this policy sends it as int8:round=nearest+ef")
        refused(lambda: commlib.of(model).load_state_dict(state))
        commlib.wrap(model, "auto")
        assert type(commlib.of(model)._replanner) is autoplan.AutoPlanner
        commlib.of(model).load_state_dict(state)
        assert set(schemes(model).values()) <= set(CANDIDATES)


def a_state_before_the_first_plan_of_replan_goes_on_as_auto() -> None:
    """What was measured is of messages; also where the run that loads it has planned already."""

    def asked() -> DDP:
        model = auto()
        commlib.of(model).replan(4, schemes=("int8", "int6"), default="int8")
        return model

    with on_a_line(SLOW):
        model = asked()
        train(model, 2)
        sent = {n: p.clone() for n, p in model.module.state_dict().items()}
        saved = commlib.of(model).state_dict()
        reference = train(model, 4, start=2)
        assert isinstance(commlib.of(model).policy, Policy)
        for again in (asked(), model):
            again.module.load_state_dict(sent)
            commlib.of(again).load_state_dict(saved)
            assert commlib.of(again).policy == "auto"
            assert torch.equal(train(again, 4, start=2), reference)


def other_numbers_of_ranks_keep_what_is_measured_here() -> None:
    with on_a_line(SLOW):
        model = auto()
        train(model, 3)
        mine = commlib.of(model)._replanner.state_dict()
        there = {**mine["auto"]["prices"], "size": 8, "message": 7.0}
        for prices, kept in ((there, False), (mine["auto"]["prices"], True)):
            saved = {**mine, "auto": {**mine["auto"], "prices": prices, "own": '{"rules": []}'}}
            again = auto()
            measured = commlib.of(again)._replanner.own
            if kept:
                saved["auto"]["own"] = measured.to_json()
            commlib.of(again)._replanner.load_state_dict(saved, torch.device("cpu"))
            assert commlib.of(again)._replanner.own == measured
            assert commlib.of(again)._replanner.prices.message != 7.0
            assert commlib.of(again)._replanner._planned


def a_step_that_is_not_finite_changes_nothing() -> None:
    with on_a_line(SLOW):
        model = auto()
        train(model, 1)
        inputs = batch(1)
        if dist.get_rank() == 0:
            inputs[0, 0] = torch.nan
        model.zero_grad()
        model(inputs).square().mean().backward()
        train(model, 1, start=2)
        assert set(schemes(model).values()) == {OWN}
        train(model, 2, start=3)
        assert set(schemes(model).values()) <= set(CANDIDATES)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        (it_plans_within_the_error_of_auto, 3),
        (buckets_and_resuming_change_no_bit, 2),
        (where_it_is_not_worth_it_auto_is_as_it_was, 2),
        (other_policies_end_it_and_take_over, 2),
        (a_state_before_the_first_plan_of_replan_goes_on_as_auto, 2),
        (other_numbers_of_ranks_keep_what_is_measured_here, 2),
        (a_step_that_is_not_finite_changes_nothing, 2),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_plans_under_auto(pool: Pool, case: Callable[[], None], ranks: int) -> None:
    pool.run(case, ranks=ranks)
