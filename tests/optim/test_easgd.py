"""EASGD: what theory says of its map, what is conserved, and that a run goes on as it was."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from bench import easgd_theory
from commlib import Communicator
from commlib.optim import (
    EASGD,
    Averaged,
    Center,
    Downpour,
    Gathered,
    Link,
    Node,
    Projected,
    local,
    schedules,
    stable,
)
from commlib.optim.center import flat
from tests.communicators import on_ranks
from tests.optim.replicas import backward, model


@pytest.mark.parametrize(
    ("eta", "alpha", "inside"),
    [
        (0, 0, True), (0, 1, True), (0, 1.01, False), (1, 2 / 3, True), (1, 0.67, False),
        (2, 0, True), (2, 0.01, False), (2.01, 0, False), (-0.1, 0.1, False), (0.1, -0.1, False),
    ],
)  # fmt: skip
def test_the_region(eta: float, alpha: float, inside: bool) -> None:
    assert stable(eta, alpha) is inside


@pytest.mark.parametrize("p", [1, 2, 4])
def test_nothing_inside_is_unstable(p: int) -> None:
    etas = torch.linspace(0, 2, 9, dtype=torch.float64)
    for alpha in (0.0, 0.3, 0.6, 0.9, 1.0):
        inside = [stable(float(eta), alpha) for eta in etas]
        radii = easgd_theory.radius(easgd_theory.maps(p, etas, alpha))
        assert all(r <= 1 + 1e-9 for r, yes in zip(radii, inside, strict=True) if yes)
        if p == 1:  # there the region is all there is
            assert all(r > 1 - 1e-9 for r, yes in zip(radii, inside, strict=True) if not yes)


def test_the_map_is_that_of_the_paper() -> None:
    """One worker: x <- (1 - eta - alpha) x + alpha xc, xc <- alpha x + (1 - alpha) xc."""
    found = easgd_theory.maps(1, torch.tensor([0.5], dtype=torch.float64), 0.25)[0]
    assert found == pytest.approx(torch.tensor([[0.25, 0.25], [0.25, 0.75]]).numpy())


def test_the_variance_of_the_centre_and_momentum() -> None:
    rows = [*easgd_theory.variance((2, 50)), *easgd_theory.momentum(50)]
    # the published figures are those of many steps
    assert all(row.ratio is None or row.ratio <= 1e-6 for row in rows)
    assert rows[-1].passed


def sgd(module: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), lr=lr)


def test_what_is_refused() -> None:
    center = Center(model().named_parameters())
    module = model()
    link = local(center, module.named_parameters(), "w")
    optimizer = sgd(module)
    with pytest.raises(ValueError, match="period is 0"):
        EASGD(optimizer, link, moving_rate=0.2, period=0)
    with pytest.raises(ValueError, match=r"a rate of 1\.5 .* unstable=True allows it"):
        EASGD(optimizer, link, moving_rate=1.5)
    with pytest.raises(ValueError, match="curvature = 1 is outside"):
        EASGD(optimizer, link, moving_rate=0.7, curvature=10.0)
    with pytest.raises(ValueError, match="center_rate is 0"):
        EASGD(optimizer, link, moving_rate=0.2, center_rate=0.0)
    EASGD(optimizer, link, moving_rate=1.5, unstable=True)
    EASGD(optimizer, link, moving_rate=0.6, curvature=10.0)


def workers(
    center: Center, count: int, lr: float, period: int = 3
) -> list[tuple[nn.Sequential, EASGD, Link]]:
    made = []
    for rank in range(count):
        module = model()
        link = local(center, module.named_parameters(), f"w{rank}")
        easgd = EASGD(sgd(module, lr), link, moving_rate=0.9 / count, period=period)
        made.append((module, easgd, link))
    return made


@pytest.mark.parametrize("push", ["fp32", "int4", "int2", "rotate|eden2"])
def test_the_sum_of_workers_and_centre_is_conserved(push: str) -> None:
    """By exchanges; what gradients add is known, as SGD adds -lr g."""
    center = Center(model().named_parameters(), push=push)
    made = workers(center, 3, 0.1, period=2)
    total = center.values.double() * 4
    for step in range(12):
        for rank, (module, easgd, _) in enumerate(made):
            backward(module, rank, step)
            total -= 0.1 * flat(p.grad for p in module.parameters() if p.grad is not None).double()
            easgd.step()
    now = center.values.double() + sum(flat(m.parameters()).double() for m, _, _ in made)
    # 36 steps, each rounds each value of size < 4 by at most 2^-22, the centre 18 times
    assert float((now - total).abs().max()) < (36 + 18) * 2**-22


def train(made: Sequence[tuple[nn.Sequential, Any, Link]], steps: range) -> None:
    for step in steps:
        for rank, (module, worker, _) in enumerate(made):
            backward(module, rank, step)
            worker.step()


def test_resume_is_bitwise() -> None:
    def momentum(center: Center, states: list[Any]) -> list[tuple[nn.Sequential, EASGD, Link]]:
        made = []
        for rank in range(2):
            module = model()
            state = states[rank]
            link = local(center, module.named_parameters(), f"w{rank}", state and state["link"])
            optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, nesterov=True)
            worker = EASGD(optimizer, link, moving_rate=0.4, period=3)
            if state:
                worker.load_state_dict(state["worker"])
            made.append((module, worker, link))
        return made

    def fresh() -> Center:
        return Center(model().named_parameters(), push="int2:round=stochastic", pull="int4")

    whole = fresh()
    train(momentum(whole, [None] * 2), range(11))
    half = fresh()
    made = momentum(half, [None] * 2)
    train(made, range(4))
    states = [{"link": link.state_dict(), "worker": w.state_dict()} for _, w, link in made]
    again = fresh()
    again.load_state_dict(half.state_dict())
    train(momentum(again, states), range(4, 11))
    assert torch.equal(again.values, whole.values)


def test_a_centre_that_takes_gradients_is_refused() -> None:
    center = Center(model().named_parameters(), rule=Averaged(Projected(schedules.Constant(0.1))))
    module = model()
    link = local(center, module.named_parameters(), "w")
    for make in (partial(EASGD, moving_rate=0.2), Downpour):
        with pytest.raises(ValueError, match=r"pushes updates, and the rule .* takes gradients"):
            make(sgd(module), link)


def test_a_state_of_other_parameters_is_refused() -> None:
    center = Center(model().named_parameters())
    ((module, worker, _),) = workers(center, 1, 0.1)
    del module
    with pytest.raises(ValueError, match="3 values"):
        worker.load_state_dict({**worker.state_dict(), "params": torch.zeros(3)})


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("policy", ["fp32", "int4", "sign"])
def test_synchronous_centres_are_alike(size: int, policy: str) -> None:
    def body(communicator: Communicator) -> tuple[torch.Tensor, torch.Tensor]:
        module = model()
        center = Gathered(module.named_parameters(), communicator)
        worker = EASGD(sgd(module), center, moving_rate=0.9 / size, period=2)
        for step in range(6):
            backward(module, communicator.rank, step)
            worker.step()
        return center.copy, flat(module.parameters())

    found = on_ranks(size, policy, body)
    for copy, _ in found:
        assert torch.equal(copy.view(torch.uint8), found[0][0].view(torch.uint8))
    assert size == 1 or not torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("period", [1, 4])
def test_one_worker_of_downpour_is_sgd(period: int) -> None:
    """Alone, an exchange changes nothing but where the centre is."""
    center = Center(model().named_parameters())
    module, plain = model(), model()
    link = local(center, module.named_parameters(), "w")
    worker, other = Downpour(sgd(module), link, period=period), sgd(plain)
    for step in range(8):
        backward(module, 0, step)
        backward(plain, 0, step)
        worker.step()
        other.step()
        assert center.version == step // period
    worker.exchange()
    assert center.version == 7 // period + 1
    # additions of updates to the centre round anew
    assert torch.allclose(center.values, flat(plain.parameters()), rtol=0, atol=1e-5)
    assert torch.equal(flat(module.parameters()), center.values)


def test_the_step_after_an_exchange_is_on_the_gradient_of_before() -> None:
    center = Center([("x", torch.zeros(1))])
    x = nn.Parameter(torch.zeros(1))
    link = local(center, [("x", x)], "w")
    worker = Downpour(torch.optim.SGD([x], lr=1.0), link, period=1)
    local(center, [("x", torch.zeros(1))], "other").push(torch.full((1,), 10.0))
    for gradient, arrived, now in ((1.0, 10.0, -1.0), (2.0, 9.0, 7.0)):
        x.grad = torch.full((1,), gradient)
        worker.step()
        assert (float(center.values), float(x.detach())) == (arrived, now)


def test_downpour_goes_on_bitwise_and_keeps_what_codecs_leave() -> None:
    def fresh() -> Center:
        return Center(model().named_parameters(), push="int2+ef", pull="int8")

    def made(center: Center, states: list[Any]) -> list[tuple[nn.Sequential, Downpour, Link]]:
        found = []
        for rank in range(2):
            module, state = model(), states[rank]
            link = local(center, module.named_parameters(), f"w{rank}", state and state[0])
            worker = Downpour(sgd(module), link, period=2)
            if state:
                worker.load_state_dict(state[1])
            found.append((module, worker, link))
        return found

    whole, half, again = fresh(), fresh(), fresh()
    train(made(whole, [None] * 2), range(9))
    first = made(half, [None] * 2)
    train(first, range(5))
    again.load_state_dict(half.state_dict())
    train(made(again, [(link.state_dict(), w.state_dict()) for _, w, link in first]), range(5, 9))
    assert torch.equal(again.values, whole.values)


def test_what_parameters_round_is_no_progress() -> None:
    """A centre in float32 keeps what bfloat16 has no room for."""
    center, x = Center([("x", torch.full((8,), 1.003))]), nn.Parameter(torch.zeros(8).bfloat16())
    link = local(center, [("x", x.float())], "w")
    worker = Downpour(torch.optim.SGD([x], 0.1), link)
    for _ in range(3):
        worker.step()
    assert torch.equal(center.values, torch.full((8,), 1.003))


def test_a_tree_conserves_and_mixes() -> None:
    """Without gradients the sum over leaves, nodes and root stays, and all come together."""
    named = [("x", torch.zeros(64))]
    root = Center(named)
    nodes = []
    for i in range(2):
        center = Center(named)
        nodes.append(Node(center, local(root, named, f"n{i}"), 0.3, period=2))
    leaves = []
    for i in range(4):
        x = nn.Parameter(torch.zeros(64))
        link = local(nodes[i // 2].center, [("x", x)], f"w{i}")
        leaf = EASGD(torch.optim.SGD([x], lr=0.0), link, moving_rate=0.3, period=1)
        x.grad = torch.zeros(64)
        with torch.no_grad():
            x.fill_(float(i))
        leaves.append((x, leaf))
    for _ in range(200):
        for _, leaf in leaves:
            leaf.step()
    everything = [x.detach() for x, _ in leaves] + [n.center.values for n in nodes]
    everything.append(root.values)
    assert float(sum(v[0] for v in everything)) == pytest.approx(6.0, abs=1e-4)
    assert all(float(v[0]) == pytest.approx(6 / 7, abs=1e-3) for v in everything)


def test_synchronous_centres_that_differ_or_would_forget_are_refused() -> None:
    def body(communicator: Communicator) -> None:
        module = model()
        if communicator.rank:
            with torch.no_grad():
                module[0].bias[3] += 1e-6  # type: ignore[operator, index]
        center = Gathered(module.named_parameters(), communicator)
        worker = EASGD(sgd(module), center, moving_rate=0.4)
        with pytest.raises(RuntimeError, match=r"Gathered: ranks \[1\] have another centre than"):
            worker.step()

    def forgets(communicator: Communicator) -> None:
        with pytest.raises(ValueError, match=r"policy has 'int4\+ef', allowed: .* use 'int4'"):
            Gathered(model().named_parameters(), communicator)

    on_ranks(2, "int4", body)
    on_ranks(1, "int4+ef", forgets)


def test_a_tree_of_threads_does_not_block() -> None:
    named = [("x", torch.zeros(16))]
    root = Center(named, push="int4")
    nodes = [
        Node(Center(named, push="int4"), local(root, named, f"n{i}"), 0.2, period=1)
        for i in range(3)
    ]

    def leaf(i: int) -> None:
        x = nn.Parameter(torch.zeros(16))
        link = local(nodes[i % 3].center, [("x", x)], f"w{i}")
        worker = EASGD(torch.optim.SGD([x], lr=0.1), link, moving_rate=0.2, period=1)
        for _ in range(50):
            x.grad = x.detach() - 1
            worker.step()

    threads = [threading.Thread(target=leaf, args=(i,), daemon=True) for i in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert root.version == 9 * 50
    assert float((root.values - 1).abs().max()) < 0.2


def test_a_node_refuses_rates_that_cannot_be() -> None:
    center = Center([("x", torch.zeros(1))])
    link = local(Center([("x", torch.zeros(1))]), [("x", torch.zeros(1))], "n")
    with pytest.raises(ValueError, match=r"rate is 1\.5"):
        Node(center, link, 1.5, 1)
    with pytest.raises(ValueError, match="period"):
        Node(center, link, 0.5, 0)
    named = list(model().named_parameters())
    with pytest.raises(ValueError, match=r"Node: got 4 parameters of 1175 .* in another order"):
        Node(Center(named), local(Center(named[::-1]), named[::-1], "n"), 0.5, 1)
    root = Center(named, rule=Projected(schedules.Constant(0.1)))
    with pytest.raises(ValueError, match=r"Node: pushes updates, and .* takes gradients"):
        Node(Center(named), local(root, named, "n"), 0.5, 1)


@pytest.mark.parametrize("kind", ["EASGD", "Downpour"])
def test_a_group_that_comes_later_is_refused(kind: str) -> None:
    """The centre has no place for it, so each worker would have its own for good."""
    center, module = Center(model().named_parameters()), model()
    link, optimizer = local(center, module.named_parameters(), "w"), sgd(module)
    worker = (
        Downpour(optimizer, link) if kind == "Downpour" else EASGD(optimizer, link, moving_rate=0.2)
    )
    worker.step()
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.raises(RuntimeError, match=f"{kind}: the inner optimizer trains 5 parameters"):
        worker.step()
    assert worker.steps == 1


@pytest.mark.parametrize("kind", ["EASGD", "Downpour"])
def test_parameters_in_another_order_or_number_are_refused(kind: str) -> None:
    """Their values would be written to others."""
    center = Center(model().named_parameters())

    def make(optimizer: torch.optim.Optimizer, link: Link) -> object:
        if kind == "EASGD":
            return EASGD(optimizer, link, moving_rate=0.2)
        return Downpour(optimizer, link)

    module = model()
    link = local(center, module.named_parameters(), "w")
    before = flat(module.parameters())
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    for optimizer in (torch.optim.SGD(groups, lr=0.1), torch.optim.SGD(matrices, lr=0.1)):
        with pytest.raises(ValueError, match="other order"):
            make(optimizer, link)
    assert torch.equal(flat(module.parameters()), before)
    alike = [nn.Parameter(torch.full((3,), float(n))) for n in range(3)]
    named = [(f"x{n}", p) for n, p in enumerate(alike)]
    with pytest.raises(ValueError, match="parameters are in another order than the link's"):
        make(torch.optim.SGD(alike[::-1], lr=0.1), local(Center(named), named, "w"))
    # in the order of the groups it works, and a frozen one stays where it is
    matrices[0].requires_grad_(False)
    ordered = [(f"p{n}", p) for n, p in enumerate([*matrices, *vectors])]
    center = Center(ordered)
    worker = make(torch.optim.SGD(groups, lr=0.1), local(center, ordered, "w"))
    frozen = matrices[0].detach().clone()
    for step in range(3):
        backward(module, 0, step)
        worker.step()  # type: ignore[attr-defined]
    assert torch.equal(matrices[0], frozen)
    assert not torch.equal(flat(module.parameters()), before)


def test_children_go_on_while_a_parent_stalls() -> None:
    """The node's values are free while its update is under way."""
    named = [("x", torch.zeros(4))]
    root, center = Center(named), Center(named)
    above = local(root, named, "n")
    push, pulled = above.push, []

    def slow(update: torch.Tensor) -> torch.Tensor:
        thread = threading.Thread(target=lambda: pulled.append(other.pull()), daemon=True)
        thread.start()
        thread.join(5)
        return push(update)

    above.push = slow  # type: ignore[assignment, method-assign]
    Node(center, above, 0.5, period=1)
    other = local(center, named, "other")
    local(center, named, "w").push(torch.ones(4))
    assert len(pulled) == 1
    assert torch.equal(root.values + center.values, torch.ones(4))


def test_a_synchronous_run_goes_on_bitwise() -> None:
    def body(communicator: Communicator) -> bool:
        def run(worker: EASGD, module: nn.Module, steps: range) -> None:
            for step in steps:
                backward(module, communicator.rank, step)
                worker.step()

        def fresh() -> tuple[nn.Module, Gathered, EASGD]:
            module = model()
            center = Gathered(module.named_parameters(), communicator)
            return module, center, EASGD(sgd(module), center, moving_rate=0.4, period=2)

        module, center, worker = fresh()
        run(worker, module, range(3))
        saved = center.state_dict(), worker.state_dict()
        run(worker, module, range(3, 6))
        again, other, resumed = fresh()
        other.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        run(resumed, again, range(3, 6))
        return torch.equal(other.copy, center.copy) and torch.equal(
            flat(again.parameters()), flat(module.parameters())
        )

    assert all(on_ranks(2, "fp32", body))
