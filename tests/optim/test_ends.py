"""What methods over a centre ask of it, before they send anything."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from commlib import Communicator
from commlib.optim import (
    EASGD,
    Add,
    Averaged,
    Center,
    Downpour,
    Gathered,
    Momentum,
    Node,
    Sharded,
    local,
)
from commlib.optim.link import End, Link
from commlib.optim.rules import Rule
from tests.communicators import on_ranks
from tests.optim.replicas import model


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
