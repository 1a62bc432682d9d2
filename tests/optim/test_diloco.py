"""DiLoCo: ranks that train by themselves and meet seldom; what they share is the same bits."""

from __future__ import annotations

import copy
import math
import threading
from typing import Any

import pytest
import torch
from torch import nn

from commlib import Communicator
from commlib.optim import DiLoCo, LocalSGD, Sync
from tests.communicators import on_ranks, only
from tests.optim.diloco import STREAMING, WAYS, adam, outer, shared, train
from tests.optim.models import same
from tests.optim.replicas import backward, drawn, model, weights
from tests.processes import Pool

NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize(("scheme", "how"), WAYS)
def test_what_ranks_share_is_the_same_bits(scheme: str, how: dict[str, Any]) -> None:
    """At every step, and after `finish` the parameters too; in between these differ."""

    def body(c: Communicator) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]:
        module = model()
        one = outer(module, c, **how)
        thetas, own = [], []
        for _ in range(13):
            train(module, one, 1, c.rank)
            thetas.append(shared(one))
            own.append(weights(module))
        one.finish()
        thetas.append(weights(module))
        assert same(thetas[-1], list(one.theta.values())) or how.get("fragments", 1) > 1
        return thetas, own

    (first, mine), *others = on_ranks(3, only(scheme), body)
    assert not same(first[0], first[-1])
    for thetas, own in others:
        assert all(same(a, b) for a, b in zip(first[:-1], thetas[:-1], strict=True))
        by_size = [sorted(x, key=lambda t: (t.numel(), t.ndim)) for x in (first[-1], thetas[-1])]
        assert same(*by_size)
        assert not same(mine[0], own[0])


def test_one_period_is_the_published_one() -> None:
    """The mean of W - theta, and torch's SGD with Nesterov's momentum on it."""

    def body(c: Communicator) -> list[list[torch.Tensor]]:
        module = model()
        one, seen = outer(module, c, period=3), []
        for step in range(9):
            backward(module, c.rank, step)
            if one.steps % 3 == 2:  # the inner step alone first, to see W
                alone = [p.detach().clone() for p in module.parameters()]
                state = copy.deepcopy(one.inner.state_dict())  # type: ignore[union-attr]
                one.inner.step()  # type: ignore[union-attr]
                seen.append(weights(module))
                with torch.no_grad():
                    for p, value in zip(module.parameters(), alone, strict=True):
                        p.copy_(value)
                one.inner.load_state_dict(state)  # type: ignore[union-attr]
            one.step()
            if one.steps % 3 == 0:
                assert same(weights(module), shared(one))
                seen.append(weights(module))
        return seen

    found = on_ranks(2, "fp32", body)
    theta = [nn.Parameter(p.detach().clone()) for p in model().parameters()]
    sgd = torch.optim.SGD(theta, 0.7, momentum=0.9, nesterov=True)
    for period in range(3):
        ranks = [seen[2 * period] for seen in found]
        for place, p in enumerate(theta):
            p.grad = p.detach() - torch.stack([own[place] for own in ranks]).mean(0)
        sgd.step()
        for p, value in zip(theta, found[0][2 * period + 1], strict=True):
            torch.testing.assert_close(value, p.detach(), rtol=1e-5, atol=1e-6)


def test_with_a_period_of_one_and_inner_sgd_averaging_is_data_parallel() -> None:
    def body(c: Communicator) -> list[torch.Tensor]:
        module = model()
        inner = torch.optim.SGD(module.parameters(), 0.1)
        one = LocalSGD(module.named_parameters(), inner, c, period=1)
        train(module, one, 5, c.rank)
        return weights(module)

    found = on_ranks(2, "fp32", body)[0]
    module = model()
    sgd = torch.optim.SGD(module.parameters(), 0.1)
    for step in range(5):
        gradients = []
        for rank in range(2):
            backward(module, rank, step)
            gradients.append([p.grad.clone() for p in module.parameters()])  # type: ignore[union-attr]
        for p, a, b in zip(module.parameters(), *gradients, strict=True):
            p.grad = (a + b) / 2
        sgd.step()
    for value, want in zip(found, weights(module), strict=True):
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-6)


def test_fragments_take_turns() -> None:
    syncs: list[Sync] = []

    def body(c: Communicator) -> None:
        module = model()
        one = outer(module, c, period=8, fragments=4, on_sync=syncs.append if c.rank == 0 else None)
        train(module, one, 17, c.rank)

    on_ranks(2, only("fp32"), body)
    assert [(s.step, s.fragment) for s in syncs] == [
        *((2, 1), (4, 2), (6, 3), (8, 0), (10, 1), (12, 2), (14, 3), (16, 0))
    ]
    sizes = [p.numel() for p in model().parameters()]
    assert [s.numel for s in syncs[:4]] == sizes[1:] + sizes[:1]
    # two ranks, fp32: a ring sends 2 (W-1)/W of the values; the first step also compares
    assert [s.bytes_sent for s in syncs[1:]] == [4 * s.numel for s in syncs[1:]]
    assert all(0 < s.waited <= s.seconds for s in syncs)
    assert all(s.norm > 0 for s in syncs)


def test_fragments_may_be_named() -> None:
    def body(c: Communicator) -> None:
        module = model()
        one = outer(module, c, fragments=[NAMES[2:], NAMES[:2]])
        assert [list(f.names) for f in one.fragments] == [NAMES[2:], NAMES[:2]]
        before = weights(module)
        train(module, one, 2, c.rank)  # at 4 / 2 the second has its turn
        assert same(list(one.theta.values())[:2], before[2:])
        assert not same(list(one.theta.values())[2:], before[:2])

    on_ranks(1, "fp32", body)


def test_an_overlapped_result_is_mixed_in_after_its_delay() -> None:
    def body(c: Communicator) -> None:
        module = model()
        one = outer(module, c, period=4, overlap=2, mix=0.25)
        train(module, one, 5, c.rank)
        begun = shared(one)
        backward(module, c.rank, 5)
        twin = model()
        with torch.no_grad():  # the sixth inner step alone, on a twin
            for p, q in zip(twin.parameters(), module.parameters(), strict=True):
                p.copy_(q)
                p.grad = q.grad.clone()  # type: ignore[union-attr]
        inner = adam(twin)
        inner.load_state_dict(copy.deepcopy(one.inner.state_dict()))  # type: ignore[union-attr]
        inner.step()
        one.step()
        assert same(begun, weights(model()))  # nothing was applied at step 4 or 5
        assert not same(begun, shared(one))
        for value, own, theta in zip(weights(module), weights(twin), shared(one), strict=True):
            torch.testing.assert_close(value, 0.25 * own + 0.75 * theta, rtol=1e-6, atol=1e-7)

    on_ranks(2, only("e3m0"), body)


def test_training_does_not_wait_for_an_overlapped_exchange() -> None:
    """The other rank comes to its sync only once this one has gone on beyond its own."""
    beyond = threading.Event()

    def body(c: Communicator) -> None:
        module = model()
        one = outer(module, c, period=2, overlap=1)
        train(module, one, 3, c.rank)  # in the first exchange ranks agree on what they send
        if c.rank == 1:
            assert beyond.wait(20)
        train(module, one, 1, c.rank)  # begins the second
        beyond.set()
        train(module, one, 1, c.rank)
        assert one.last is not None
        assert one.last.step == 4

    on_ranks(2, only("int8"), body)


def test_ranks_that_begin_with_other_parameters_are_named() -> None:
    def body(c: Communicator) -> None:
        module = model()
        if c.rank == 2:
            with torch.no_grad():
                module[0].bias[3] += 1e-6  # type: ignore[operator, index]
        one = outer(module, c)
        backward(module, c.rank, 0)
        before = weights(module)
        with pytest.raises(RuntimeError, match=r"ranks \[2\] have other shared parameters"):
            one.step()
        assert same(before, weights(module))
        assert one.steps == 0

    on_ranks(3, "fp32", body)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("scheme", ["fp32", "sigma8", "e3m0"])
def test_a_rank_that_went_astray_raises_on_all_and_the_shared_model_stays(
    bad: float, scheme: str
) -> None:
    def body(c: Communicator) -> None:
        module = model()
        one = outer(module, c)
        train(module, one, 3, c.rank)
        theta = shared(one)
        backward(module, c.rank, 3)
        if c.rank == 1:
            with torch.no_grad():
                module[2].weight[1, 2] = bad  # type: ignore[index, operator]
        with pytest.raises(RuntimeError, match=r"step 4: the mean pseudo-gradient of 2\.weight"):
            one.step()
        assert same(theta, shared(one))

    on_ranks(2, only(scheme), body)


@pytest.mark.parametrize(
    "other", [{"lr": 0.5}, {"momentum": 0.5}, {"nesterov": False}, {"period": 8}, {"overlap": 1}]
)
def test_ranks_with_other_options_are_named(other: dict[str, Any]) -> None:
    """They would share other models from the first exchange on, or wait for one that never is."""

    def body(c: Communicator) -> None:
        module = model()
        one = outer(module, c, **(other if c.rank == 1 else {}))
        backward(module, c.rank, 0)
        with pytest.raises(RuntimeError, match=r"ranks \[1\] have other .* or options than rank 0"):
            one.step()
        assert one.steps == 0

    on_ranks(3, "fp32", body)


def test_momentum_that_was_not_kept_cannot_be_switched_on() -> None:
    def body(c: Communicator) -> None:
        module = model()
        one = outer(module, c, momentum=0.0)
        train(module, one, 1, c.rank)
        one.momentum = 0.9
        with pytest.raises(RuntimeError, match=r"momentum is 0\.9, and began as 0"):
            train(module, one, 1, c.rank)
        assert one.steps == 1
        one.momentum = 0.0
        train(module, one, 4, c.rank)
        assert one.last is not None

    on_ranks(1, "fp32", body)


def test_a_group_that_the_inner_optimizer_gets_later_is_refused() -> None:
    """As layers that are thawed on the way: nobody would exchange them."""

    def body(c: Communicator) -> None:
        module, more = model(), nn.Parameter(torch.zeros(3))
        one = outer(module, c)
        train(module, one, 5, c.rank)
        before = weights(module)
        assert one.inner is not None
        one.inner.add_param_group({"params": [more]})
        for call in (one.step, one.tick):
            with pytest.raises(RuntimeError, match="trains 5 parameters, and trained 4 when this"):
                call()
        assert one.steps == 5
        assert same(before, weights(module))

    on_ranks(2, "fp32", body)


def test_parameters_that_are_cast_later_are_refused() -> None:
    """What they round of theta would be exchanged as a pseudo-gradient."""

    def body(c: Communicator) -> None:
        module = model()
        one = outer(module, c)
        train(module, one, 1, c.rank)
        module.bfloat16()
        for call in (one.step, one.tick):
            with pytest.raises(RuntimeError, match=r"'0\.weight' has become torch.bfloat16"):
                call()
        module.float()
        train(module, one, 4, c.rank)
        assert one.steps == 5

    on_ranks(2, "fp32", body)


def test_without_an_inner_optimizer_steps_are_counted() -> None:
    """Whoever needs the inner step for himself, as for a GradScaler, calls `tick` after it."""

    def body(c: Communicator) -> None:
        module, twin = model(), model()
        inner = adam(module)
        one, other = DiLoCo(module.named_parameters(), None, c, period=2), outer(twin, c, period=2)
        for step in range(4):
            backward(module, c.rank, step)
            inner.step()
            one.tick()
        train(twin, other, 4, c.rank)
        assert same(weights(module), weights(twin))
        with pytest.raises(RuntimeError, match="there is no inner optimizer; call tick"):
            one.step()

    on_ranks(2, "fp32", body)


def test_a_closure_is_called_by_the_inner_optimizer() -> None:
    def body(c: Communicator) -> float | None:
        x = nn.Parameter(torch.ones(8))
        one = DiLoCo([("x", x)], torch.optim.SGD([x], 0.1), c, period=2)

        def closure() -> float:
            x.grad = None
            loss = x.square().sum()
            loss.backward()
            return float(loss.detach())

        return one.step(closure)

    assert on_ranks(2, "fp32", body) == [8.0, 8.0]


def parameter(**how: Any) -> nn.Parameter:
    return nn.Parameter(torch.zeros(3, **how))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"period": 0}, "DiLoCo: period is 0, allowed: a whole number of at least 1"),
    ({"lr": 0.0}, "lr is 0.0, allowed: a finite number above 0"),
    ({"momentum": 1.0}, "momentum is 1.0, allowed: 0 to below 1"),
    ({"overlap": 4}, "overlap is 4, allowed: 0 to 3 steps"),
    ({"overlap": -1}, "overlap is -1"),
    ({"mix": 1.0}, "mix is 1.0, allowed: 0 to below 1"),
    ({"fragments": 5}, "fragments is 5, allowed: 1 to 4, for 4 parameters and a period of 4"),
    ({"fragments": 0}, "fragments is 0"),
    ({"fragments": [NAMES, []]}, "none of them empty"),
    ({"fragments": [NAMES[:3]]}, r"each parameter once; 2\.bias is not"),
    ({"fragments": [NAMES, NAMES[:1]]}, r"each parameter once; 0\.weight is not"),
]


@pytest.mark.parametrize(("how", "message"), REFUSED)
def test_options_that_cannot_be_are_refused(how: dict[str, Any], message: str) -> None:
    def body(c: Communicator) -> None:
        with pytest.raises(ValueError, match=message):
            outer(model(), c, **how)
        assert c.transport.bytes_sent == 0

    on_ranks(1, "fp32", body)


def test_parameters_that_cannot_be_served_are_refused() -> None:
    x, y = parameter(), parameter()
    cases: list[tuple[Any, Any, str]] = [
        ([x], [x], "parameters without names"),
        ([], [x], "no parameters"),
        ([("x", x), ("x", y)], [x, y], "two parameters are named 'x'"),
        ([("x", x), ("y", x)], [x, y], "'y' is 'x' once more"),
        ([("x", parameter(dtype=torch.float64))], [x], "'x' is torch.float64, allowed"),
        ([("x", parameter(device="meta"))], [x], "'x' is on meta, the group on cpu"),
        ([("x", nn.Parameter(torch.zeros(3), requires_grad=False))], [x], "leave it out"),
        ([("x", x), ("y", y)], [x], "the inner optimizer does not train y"),
        ([("x", x)], [x, y], "trains 1 parameters that are not among those given"),
    ]

    def body(c: Communicator) -> None:
        frozen = nn.Parameter(torch.zeros(3), requires_grad=False)  # which it does not train
        DiLoCo([("x", x)], torch.optim.SGD([x, frozen], 0.1), c, period=2)
        for params, trained, message in cases:
            with pytest.raises(ValueError, match=message):
                DiLoCo(params, torch.optim.SGD(trained, 0.1), c, period=2)

    on_ranks(1, "fp32", body)


def with_given_gradients(c: Communicator, how: dict[str, Any]) -> list[torch.Tensor]:
    """9 steps whose gradients no machine computes in its own way."""
    module = model()
    one = outer(module, c, **how)
    for step in range(9):
        for place, p in enumerate(module.parameters()):
            p.grad = drawn(c.rank, 10 * step + place, *p.shape)
        one.step()
    one.finish()
    return [*weights(module), *shared(one)]


def over_gloo(how: dict[str, Any]) -> list[torch.Tensor]:
    communicator = Communicator(None, only("sigma8"))
    end = with_given_gradients(communicator, how)
    communicator.close()
    return end


@pytest.mark.parametrize("how", [{}, STREAMING])
def test_over_gloo_it_is_what_it_is_on_threads(pool: Pool, how: dict[str, Any]) -> None:
    threads = on_ranks(2, only("sigma8"), lambda c: with_given_gradients(c, how))
    for found, want in zip(pool.run(over_gloo, how, ranks=2), threads, strict=True):
        assert same(found, want)
