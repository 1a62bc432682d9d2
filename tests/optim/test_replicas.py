"""What replicated optimizers share: parameters by name, equal replicas, gloo, DDP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from commlib import Communicator
from commlib.optim import EF21, DiLoCo, OneBitAdam
from commlib.transport import run_ranks
from tests.communicators import on_ranks, only
from tests.optim.models import same
from tests.optim.replicas import Make, backward, drawn, model, train, weights
from tests.processes import Pool

MAKERS: list[tuple[str, Make]] = [
    ("sign+ef", lambda params, c: OneBitAdam(params, c, 0.01, warmup=2)),
    ("sign", lambda params, c: EF21(params, c, 0.1, 0.5)),
]


def adam(params: Any, c: Communicator) -> OneBitAdam:
    return OneBitAdam(params, c, warmup=2)


def refuse(params: Any, message: str) -> None:
    def body(c: Communicator) -> None:
        for make in (adam, lambda params, c: EF21(params, c, 0.1)):
            with pytest.raises(ValueError, match=message):
                make(params(), c)

    on_ranks(1, "fp32", body)


def test_a_policy_is_no_communicator() -> None:
    def diloco(params: Any, c: Any) -> DiLoCo:
        return DiLoCo(params, torch.optim.SGD(model().parameters(), 0.1), c, period=2)

    for make in (adam, lambda params, c: EF21(params, c, 0.1), diloco):
        with pytest.raises(ValueError, match=r"communicator is 'sign', allowed: .*Communicator\("):
            make(model().named_parameters(), "sign")


def parameter(**how: Any) -> nn.Parameter:
    return nn.Parameter(torch.zeros(3, **how))


def test_parameters_have_names() -> None:
    refuse(lambda: model().parameters(), "parameters without names; give model.named_parameters")
    refuse(lambda: [("x", parameter()), ("x", parameter())], "two parameters are named 'x'")
    twice = [{"params": [("x", parameter())]}, {"params": [("x", parameter())]}]
    refuse(lambda: [dict(one) for one in twice], "two parameters are named 'x'")


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_under_two_names_is_refused() -> None:
    """Torch warns, and moves it twice a step."""
    tied = parameter()
    refuse(lambda: [("x", tied), ("y", tied)], "'y' is 'x' once more and would move twice")


def test_parameters_that_cannot_be_served_are_refused() -> None:
    refuse(lambda: [("x", parameter(dtype=torch.bfloat16))], "'x' is torch.bfloat16, allowed")
    frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
    refuse(lambda: [("x", frozen)], "'x' does not require a gradient: leave it out")
    refuse(lambda: [("x", parameter(device="meta"))], "'x' is on meta, the communicator on cpu")

    def body(c: Communicator) -> None:
        mixed = [("x", parameter()), ("y", parameter(dtype=torch.float64))]
        with pytest.raises(ValueError, match=r"torch.float32 and torch.float64, allowed: all of"):
            EF21(mixed, c, 0.1)

    on_ranks(1, "fp32", body)


def test_groups_may_be_added_before_the_first_step() -> None:
    def body(c: Communicator) -> None:
        module = model()
        named = list(module.named_parameters())
        optimizer = adam(named[:2], c)
        with pytest.raises(ValueError, match="lr is -1"):
            optimizer.add_param_group({"params": named[2:], "lr": -1.0})
        assert len(optimizer.param_groups) == 1
        optimizer.add_param_group({"params": named[2:]})
        before = weights(module)
        backward(module, c.rank, 0)
        optimizer.step()
        assert not any(same([a], [b]) for a, b in zip(before, weights(module), strict=True))
        with pytest.raises(RuntimeError, match="a group was added after step 1"):
            optimizer.add_param_group({"params": [("new", parameter())]})

    on_ranks(2, only("sign+ef"), body)


@pytest.mark.parametrize(("scheme", "make"), MAKERS)
def test_ranks_that_begin_with_other_parameters_are_named(scheme: str, make: Make) -> None:
    def body(c: Communicator) -> None:
        module = model()
        if c.rank == 1:
            with torch.no_grad():
                module[2].bias[3] += 1e-6  # type: ignore[operator, index]
        backward(module, c.rank, 0)
        before = weights(module)
        with pytest.raises(RuntimeError, match=r"ranks \[1\] have other parameters, steps, mom"):
            make(module.named_parameters(), c).step()
        assert same(before, weights(module))

    on_ranks(3, only(scheme), body)


@pytest.mark.parametrize(
    "make",
    [
        lambda params, c: OneBitAdam(params, c, 0.01 * (1 + c.rank), warmup=2),
        lambda params, c: OneBitAdam(params, c, betas=(0.9, 0.99 + 0.001 * c.rank), warmup=2),
        lambda params, c: OneBitAdam(params, c, warmup=2 + c.rank),
        lambda params, c: OneBitAdam(params, c, warmup=2, threshold=1e-4 * (1 + c.rank)),
        lambda params, c: EF21(params, c, 0.1 * (1 + c.rank)),
        lambda params, c: EF21(params, c, 0.1, eta=1 / (1 + c.rank)),
        lambda params, c: EF21(params, c, 0.1, first="coded" if c.rank else "raw"),
    ],
)
def test_ranks_with_other_options_are_named(make: Make) -> None:
    """They would drift apart without a word, or wait for a message that never comes."""

    def body(c: Communicator) -> None:
        module = model()
        backward(module, c.rank, 0)
        with pytest.raises(RuntimeError, match=r"ranks \[1\] have other .* or options than rank 0"):
            make(module.named_parameters(), c).step()
        assert same(weights(model()), weights(module))

    on_ranks(2, only("sign"), body)


@pytest.mark.parametrize(("scheme", "make"), MAKERS)
def test_a_parameter_without_a_gradient_counts_as_zero(scheme: str, make: Make) -> None:
    """Where a rank did not use it, the mean is over all ranks all the same."""

    def body(c: Communicator, none: bool) -> list[torch.Tensor]:
        used, sometimes = nn.Parameter(torch.zeros(200)), nn.Parameter(torch.zeros(300))
        optimizer = make([("used", used), ("sometimes", sometimes)], c)
        for step in range(5):
            used.grad = drawn(c.rank, step, 200)
            sometimes.grad = drawn(c.rank, step + 10, 300)
            if c.rank == 1:
                sometimes.grad = None if none else torch.zeros(300)
            optimizer.step()
        return [used.detach(), sometimes.detach()]

    missing = on_ranks(2, only(scheme), lambda c: body(c, True))
    zeros = on_ranks(2, only(scheme), lambda c: body(c, False))
    assert same(missing[0], missing[1])
    assert same(missing[0], zeros[0])


def test_sparse_gradients_are_refused() -> None:
    def body(c: Communicator) -> None:
        table = nn.Embedding(10, 4, sparse=True)
        optimizer = adam(table.named_parameters(), c)
        table(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(ValueError, match=r"the gradient of 'weight' is torch\.sparse_coo"):
            optimizer.step()

    on_ranks(1, "fp32", body)


@pytest.mark.parametrize(("scheme", "make"), MAKERS)
def test_a_closure_is_called_with_gradients(scheme: str, make: Make) -> None:
    def body(c: Communicator) -> float:
        x = nn.Parameter(torch.ones(200))
        optimizer = make([("x", x)], c)

        def closure() -> float:
            x.grad = None
            loss = x.square().sum()
            loss.backward()
            return float(loss.detach())

        return optimizer.step(closure)  # type: ignore[call-arg, return-value]

    assert on_ranks(2, only(scheme), body) == [200.0, 200.0]


@pytest.mark.parametrize(("scheme", "make"), MAKERS)
def test_a_grad_scaler_is_refused(scheme: str, make: Make) -> None:
    """A rank whose gradient is infinite would skip a step that the others make."""

    def body(c: Communicator) -> None:
        module = model()
        optimizer: Any = make(module.named_parameters(), c)
        scaler = torch.amp.GradScaler("cpu")
        backward(module, c.rank, 0)
        scaler.scale(torch.ones(()))
        with pytest.raises(RuntimeError, match="use bfloat16 autocast, which needs none"):
            scaler.step(optimizer)
        assert optimizer.steps == 0
        torch.amp.GradScaler("cpu", enabled=False).step(optimizer)
        assert optimizer.steps == 1

    on_ranks(2, only(scheme), body)


@pytest.mark.parametrize(("scheme", "make"), MAKERS)
def test_layouts_in_memory_do_not_matter(scheme: str, make: Make) -> None:
    def body(c: Communicator) -> list[torch.Tensor]:
        ends = []
        for form in (torch.contiguous_format, torch.channels_last):
            x = nn.Parameter(drawn(0, 7, 4, 6, 3, 3).to(memory_format=form))
            optimizer = make([(f"x{len(ends)}", x)], c)
            for step in range(5):
                x.grad = drawn(c.rank, step, 4, 6, 3, 3).to(memory_format=form)
                optimizer.step()
            ends.append(x.detach().contiguous())
        return ends

    for one, other in on_ranks(2, only(scheme), body):
        assert same([one], [other])


@pytest.mark.parametrize(("scheme", "make"), MAKERS)
def test_parameters_of_any_strides(scheme: str, make: Make) -> None:
    """Of one dimension, with gaps, too: `reshape` leaves these in place."""

    def body(c: Communicator) -> list[torch.Tensor]:
        ends = []
        for step in (1, 2):
            x = nn.Parameter(torch.ones(200 * step)[::step])
            optimizer = make([(f"x{step}", x), (f"y{step}", nn.Parameter(torch.ones(0, 3)))], c)
            for n in range(4):
                x.grad = drawn(c.rank, n, 200)
                optimizer.step()
            ends.append(x.detach().contiguous())
        return ends

    for one, other in on_ranks(2, only(scheme), body):
        assert same([one], [other])


@pytest.mark.parametrize(("scheme", "make"), MAKERS)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(scheme: str, make: Make) -> None:
    def body(c: Communicator) -> None:
        module = model()
        optimizer = make(module.named_parameters(), c)
        backward(module, c.rank, 0)
        optimizer.step()
        good = optimizer.state_dict()
        other = nn.Sequential(nn.Linear(7, 90), nn.Tanh(), nn.Linear(90, 4))
        wrong = make(other.named_parameters(), c)
        with pytest.raises(ValueError, match=r"of '2\.weight' has shape \(5, 90\), allowed: \(4,"):
            wrong.load_state_dict(good)
        renamed = make([(f"m.{name}", p) for name, p in module.named_parameters()], c)
        with pytest.raises(ValueError, match=r"the state is of parameters \[\['0\.weight'"):
            renamed.load_state_dict(good)
        assert renamed.steps == 0
        with pytest.raises(ValueError, match="it has no communicator"):
            optimizer.load_state_dict({k: v for k, v in good.items() if k != "communicator"})
        assert optimizer.steps == 1

    on_ranks(1, only(scheme), body)


def test_a_loaded_state_is_a_copy() -> None:
    def body(c: Communicator) -> None:
        x, y = nn.Parameter(torch.zeros(64)), nn.Parameter(torch.zeros(64))
        one, other = adam([("x", x)], c), adam([("x", y)], c)
        x.grad = drawn(0, 0, 64)
        one.step()
        y.data.copy_(x.data)
        other.load_state_dict(one.state_dict())
        before = one.state[x]["exp_avg"].clone()
        y.grad = drawn(0, 1, 64)
        other.step()
        assert torch.equal(one.state[x]["exp_avg"], before)

    on_ranks(1, "fp32", body)


def over_gloo(number: int, ddp: bool) -> list[torch.Tensor]:
    """Train on the default group, a plain module or one under DDP."""
    scheme, make = MAKERS[number]
    communicator = Communicator(None, only(scheme))
    module: nn.Module = model()
    if ddp:
        module = DistributedDataParallel(module)
    optimizer = make(module.named_parameters(), communicator)
    for step in range(8):
        if isinstance(module, DistributedDataParallel):
            with module.no_sync():
                backward(module, communicator.rank, step)
        else:
            backward(module, communicator.rank, step)
        optimizer.step()
    communicator.close()
    return weights(module)


@pytest.mark.parametrize("ddp", [False, True])
@pytest.mark.parametrize("number", range(len(MAKERS)))
def test_over_gloo(pool: Pool, number: int, ddp: bool) -> None:
    """The same bits as between threads; two ranks, whose exact sum has one order."""
    scheme, make = MAKERS[number]

    def body(c: Communicator) -> Any:
        torch.set_num_threads(1)  # of this thread, as in the pool: products are sums in one order
        return train(make, 8)(c)

    wanted = on_ranks(2, only(scheme), body)[0]
    for found in pool.run(over_gloo, number, ddp, ranks=2):
        assert same(found, wanted)


def one_is_not_finite(number: int) -> str:
    """All ranks raise, and none waits for another."""
    scheme, make = MAKERS[number]
    communicator = Communicator(None, only(scheme))
    module = model()
    optimizer = make(module.named_parameters(), communicator)
    text = ""
    for step in range(5):
        backward(module, communicator.rank, step)
        if step == 3 and communicator.rank == 2:
            module[0].weight.grad.fill_(float("inf"))  # type: ignore[union-attr, operator]
        try:
            optimizer.step()
        except RuntimeError as error:
            text = f"{step}: {error}"
    communicator.close()
    dist.barrier()
    return text


@pytest.mark.parametrize("number", range(len(MAKERS)))
def test_a_bad_gradient_over_gloo(pool: Pool, number: int) -> None:
    told = pool.run(one_is_not_finite, number, ranks=3)
    assert len(set(told)) == 1
    assert told[0].startswith("3: ")
    assert "of 0.weight is not finite" in told[0]


def test_ranks_of_different_steps_do_not_hang() -> None:
    """One rank in warm-up, the other beyond it: said before anything is sent."""

    def rank(transport: Any) -> None:
        communicator = Communicator(transport, only("sign+ef"))
        module = model()
        optimizer = adam(module.named_parameters(), communicator)
        optimizer.steps = 2 * transport.rank
        backward(module, transport.rank, 0)
        with pytest.raises(RuntimeError, match=r"ranks \[1\] have other parameters, steps"):
            optimizer.step()
        communicator.close()

    run_ranks(2, rank)
