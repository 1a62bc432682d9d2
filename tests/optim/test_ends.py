"""What methods over a centre ask of it and of their optimizer, before they send anything."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from commlib import Communicator
from commlib.optim import (
    DASGD,
    EASGD,
    Add,
    Averaged,
    Center,
    DiLoCo,
    Downpour,
    Gathered,
    LocalSGD,
    Momentum,
    Node,
    Sharded,
    local,
)
from commlib.optim.fragments import needs_closure
from commlib.optim.link import End, Link
from commlib.optim.rules import Rule
from tests.communicators import on_ranks
from tests.optim.models import same
from tests.optim.replicas import model, weights

Make = Callable[[torch.optim.Optimizer, Any], object]
METHODS = [partial(EASGD, moving_rate=0.2), Downpour]


def linked(module: nn.Module, rule: Rule | None = None) -> Link:
    return local(Center(module.named_parameters(), rule=rule), module.named_parameters(), "w")


def sgd(module: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), lr=0.1)


def ends(module: nn.Module, rule: Rule | None) -> list[End]:
    """A link, and one to shards, of which one has the rule."""
    named = list(module.named_parameters())
    centers = [Center(named[:2]), Center(named[2:], rule=rule)]
    parts = zip(centers, (named[:2], named[2:]), strict=True)
    return [linked(module, rule), Sharded([local(center, part, "w") for center, part in parts])]


@pytest.mark.parametrize("rule", [Momentum(0.0), Momentum(0.9), Averaged(Momentum(0.9))])
def test_elastic_averaging_needs_a_centre_that_adds(rule: Rule) -> None:
    """Else what leaves the workers is not what the centre gets."""
    module = model()
    for end in ends(module, rule):
        with pytest.raises(ValueError, match=r"EASGD: the rule of its centre does not add .* Add"):
            EASGD(sgd(module), end, moving_rate=0.2)
        with pytest.raises(ValueError, match="EASGD: the rule of its centre"):
            EASGD(sgd(module), end, moving_rate=0.2, unstable=True)
        with pytest.raises(ValueError, match="Node: the rule of its centre does not add"):
            Node(Center(module.named_parameters()), end, 0.5, 1)


@pytest.mark.parametrize("rule", [Momentum(0.9), Averaged(Momentum(0.9))])
def test_momentum_at_the_centre_is_of_single_steps(rule: Rule) -> None:
    module = model()
    for end in ends(module, rule):
        with pytest.raises(ValueError, match=r"Downpour: period is 4: the rule .* give period=1"):
            Downpour(sgd(module), end, period=4)
        Downpour(sgd(module), end, period=1)


@pytest.mark.parametrize("rule", [None, Add(), Averaged(Add())])
def test_centres_that_add_serve_all(rule: Rule | None) -> None:
    module = model()
    for end in ends(module, rule):
        EASGD(sgd(module), end, moving_rate=0.2)
        Downpour(sgd(module), end, period=4)
        Node(Center(module.named_parameters()), end, 0.5, 1)


def test_the_synchronous_centre_adds() -> None:
    def body(communicator: Communicator) -> None:
        module = model()
        center = Gathered(module.named_parameters(), communicator)
        EASGD(sgd(module), center, moving_rate=0.2)

    on_ranks(1, "fp32", body)


@pytest.mark.parametrize("make", METHODS)
def test_what_is_no_link_is_refused(make: Make) -> None:
    module = model()
    center = Center(module.named_parameters())
    for given in (center, None, "center"):
        told = f"got a {type(given).__name__} for a link .*local\\(center, .*connect\\("
        with pytest.raises(ValueError, match=told):
            make(sgd(module), given)
        with pytest.raises(ValueError, match=told):
            Node(center, given, 0.5, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"link is a Center, allowed: .* local\(.*connect\("):
        DASGD(module.parameters(), center)  # type: ignore[arg-type]


class Strict(torch.optim.SGD):
    """A step that cannot be made without its closure."""

    def step(self, *, closure: Callable[[], float]) -> float:  # type: ignore[override]
        return closure()


class Lax(torch.optim.SGD):
    """A step that takes anything, and needs nothing."""

    def step(self, *args: Any, **more: Any) -> None:
        super().step()


@pytest.mark.parametrize("make", METHODS)
@pytest.mark.parametrize("kind", [torch.optim.LBFGS, Strict])
def test_an_optimizer_that_needs_a_closure_is_refused(make: Make, kind: Any) -> None:
    """It would go over the model again after the exchange, and got no closure anyway."""
    module = model()
    link, before = linked(module), weights(module)
    with pytest.raises(ValueError, match=f"the step of {kind.__name__} needs a closure"):
        make(kind(module.parameters()), link)
    assert same(before, weights(module))
    assert link.bytes_sent == linked(model()).bytes_sent  # it has joined, and no more


def test_others_step_alone() -> None:
    x = [nn.Parameter(torch.zeros(2))]
    kinds = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Rprop, Lax)
    for kind in kinds:
        optimizer = kind(x, lr=0.1)
        assert not needs_closure(optimizer)
        torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps the step
        assert not needs_closure(optimizer)
    late = torch.optim.LBFGS(x)
    torch.optim.lr_scheduler.StepLR(late, 1)
    assert needs_closure(late)


@pytest.mark.parametrize("kind", [DiLoCo, LocalSGD])
def test_diloco_hands_its_closure_on(kind: type[DiLoCo]) -> None:
    """So LBFGS works there; without one it is refused before anything is sent."""

    def body(communicator: Communicator) -> list[torch.Tensor]:
        module = model()
        inner = torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=2)
        outer = kind(module.named_parameters(), inner, communicator, period=2)
        x = torch.randn(8, 7, generator=torch.Generator().manual_seed(communicator.rank))

        def closure() -> float:
            inner.zero_grad()
            loss = (module(x) - 1).square().mean()
            loss.backward()
            return float(loss.detach())

        with pytest.raises(ValueError, match=r"step of LBFGS needs a closure.*step\(closure\)"):
            outer.step()
        assert communicator.transport.bytes_sent == 0
        losses = [outer.step(closure) for _ in range(2)]
        assert losses[1] < losses[0]  # type: ignore[operator]
        return weights(module)

    one, other = on_ranks(2, "fp32", body)
    assert same(one, other)
    assert not same(one, weights(model()))
