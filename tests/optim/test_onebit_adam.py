"""1-bit Adam: its equations, the mask, what is refused, resuming."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from commlib import Communicator
from commlib.collectives import two_phase
from commlib.optim import OneBitAdam
from commlib.scheme import Scheme
from commlib.topology import Link, Topology
from commlib_kernels.layout import Layout
from tests.communicators import on_ranks, only
from tests.optim.models import same
from tests.optim.replicas import Make, alike, backward, drawn, model, resumed, train, weights

LR, WARM = 0.01, 3


def made(**how: Any) -> Make:
    options = {"lr": LR, "warmup": WARM, **how}

    def make(params: Iterable[Any], communicator: Communicator) -> OneBitAdam:
        return OneBitAdam(params, communicator, **options)

    return make


def mean_gradients(module: nn.Module, size: int, step: int) -> list[torch.Tensor]:
    """The mean over ranks, in rank order, as the transport of threads makes it."""
    total: list[torch.Tensor] = []
    for rank in range(size):
        backward(module, rank, step)
        found = [p.grad for p in module.parameters() if p.grad is not None]
        total = [a + b for a, b in zip(total, found, strict=True)] if total else found
    return [one * (1 / size) for one in total]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"betas": (0.8, 0.95), "eps": 1e-3},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"weight_decay": 0.1},
    ],
)
def test_warm_up_is_torchs_adam(size: int, how: dict[str, Any]) -> None:
    found = alike(size, only("sign+ef"), made(warmup=5, **how), 5)
    module = model()
    adam = torch.optim.Adam(module.parameters(), LR, **how, foreach=False)
    for step in range(5):
        gradients = mean_gradients(module, size, step)
        for parameter, gradient in zip(module.parameters(), gradients, strict=True):
            parameter.grad = gradient
        adam.step()
    if "weight_decay" in how and "decoupled_weight_decay" not in how and size > 1:
        # every rank adds the decay to its own gradient, so sums round elsewhere: 5 steps of lr
        # times a few units of the last place
        for one, other in zip(found, weights(module), strict=True):
            assert torch.allclose(one, other, rtol=0, atol=5 * LR * 1e-5)
    else:
        assert same(found, weights(module))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_uncompressed_it_is_its_equations(size: int) -> None:
    """With nothing lost, against a loop in which no rank and no message occurs."""
    b1, b2, eps, steps = 0.9, 0.95, 1e-8, 8
    found = alike(size, "fp32", made(betas=(b1, b2)), steps)
    module = model().double()
    m = [torch.zeros_like(p) for p in module.parameters()]
    v = [torch.zeros_like(p) for p in module.parameters()]
    reference = model()
    for step in range(steps):
        with torch.no_grad():
            for p, q in zip(reference.parameters(), module.parameters(), strict=True):
                p.copy_(q)
        gradients = [g.double() for g in mean_gradients(reference, size, step)]
        for i, (x, g) in enumerate(zip(module.parameters(), gradients, strict=True)):
            m[i] = b1 * m[i] + (1 - b1) * g
            if step < WARM:
                v[i] = b2 * v[i] + (1 - b2) * g**2
            elif step == WARM:
                v[i] = v[i] * (v[i] > 1e-4 * v[i].mean())
            m[i] = m[i] if step < WARM else m[i] * (v[i] > 0)
            root = (v[i] / (1 - b2 ** min(step + 1, WARM))).sqrt()
            with torch.no_grad():
                x -= LR / (1 - b1 ** (step + 1)) * m[i] / (root + eps)
    # steps of about LR, each off by a few hundred units of fp32's last place (v is a square)
    for one, other in zip(found, weights(module), strict=True):
        assert torch.allclose(one.double(), other, rtol=0, atol=steps * LR * 1e-3)


@pytest.mark.parametrize("scheme", ["sign+ef", "int2+ef"])
def test_compressed_momentum_owes_what_is_missing(scheme: str) -> None:
    """sum_t (m_t - b1 m_(t-1) - (1 - b1) mean g_t) = - (mean h_i + c): nothing else is lost.

    h_i are the ranks' residuals, c the owners', chunk after chunk.
    """
    numel, steps, b1 = 1000, 12, 0.9

    def body(c: Communicator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = nn.Parameter(torch.zeros(numel))
        optimizer = OneBitAdam([("x", x)], c, LR, warmup=WARM, threshold=None)
        total, before = torch.zeros(numel, dtype=torch.float64), torch.zeros(numel)
        for step in range(steps):
            gradient = x.grad = drawn(c.rank, step, numel)
            optimizer.step()
            m = optimizer.state[x]["exp_avg"].clone()
            if step >= WARM:
                # the mean over ranks of this sum has the mean of their gradients
                total += m.double() - b1 * before.double() - (1 - b1) * gradient.double()
            before = m
        compressors = optimizer.state_dict()["communicator"]["compressors"].values()
        (held,) = [one["residuals"] for one in compressors if one["residuals"]]
        return total, held["x"], held["x|reduced"]

    ranks = on_ranks(3, only(scheme), body)
    lost = torch.stack([total for total, _, _ in ranks]).mean(0)
    owed = torch.stack([own for _, own, _ in ranks]).double().mean(0)
    owed += torch.cat([chunk for _, _, chunk in ranks]).double()
    assert owed.abs().max() > 0.01
    assert torch.allclose(lost, -owed, rtol=0, atol=steps * 2.0**-22)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "policy", ["sign+ef", only("sign:block=tensor+ef"), only("int8:round=stochastic"), "fp32"]
)
def test_ranks_end_with_the_same_bits(size: int, policy: Any) -> None:
    found = alike(size, policy, made(), 8)
    assert not same(found, weights(model()))
    assert all(one.isfinite().all() for one in found)


def test_all_parameters_travel_in_one_message() -> None:
    def body(c: Communicator) -> list[int]:
        module, sent = model(), [0]
        optimizer = OneBitAdam(module.named_parameters(), c, LR, warmup=WARM)
        for step in range(6):
            backward(module, c.rank, step)
            optimizer.step()
            sent.append(c.transport.bytes_sent)
        return [b - a for a, b in itertools.pairwise(sent)]

    sizes = tuple(parameter.numel() for parameter in model().parameters())
    topology = Topology(4, Link(0.0, 1.0))
    # five values in blocks would not be smaller than raw
    layout = Layout(sizes, exact=tuple(size == 5 for size in sizes))
    message = two_phase.wire_bytes(layout, Scheme.parse("sign+ef"), topology)
    for sent in on_ranks(4, only("sign+ef"), body):
        assert sent[1] == 6 * sum(sizes)  # a ring: 2 (W-1)/W of four bytes
        assert sent[4:] == [message] * 2


def quiet(c: Communicator, steps: int, late: bool, **how: Any) -> tuple[nn.Parameter, OneBitAdam]:
    """Half of the coordinates have no gradient during warm-up, and, if `late`, one after it."""
    x = nn.Parameter(torch.zeros(256))
    optimizer = OneBitAdam([("x", x)], c, LR, warmup=WARM, **how)
    for step in range(steps):
        gradient = drawn(c.rank, step, 256)
        if step < WARM or not late:
            gradient[128:] = 0
        x.grad = gradient
        optimizer.step()
    return x, optimizer


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("scheme", ["sign:block=tensor+ef", "fp32"])
def test_masked_coordinates_stay(scheme: str, late: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", "commlib")  # a bench run before may have made it quiet

    def body(c: Communicator) -> tuple[torch.Tensor, torch.Tensor]:
        x, optimizer = quiet(c, 8, late)
        return x.detach(), optimizer.state[x]["exp_avg"]

    for x, m in on_ranks(2, only(scheme), body):
        assert (x[128:] == 0).all()
        assert (m[128:] == 0).all()
        assert (x[:128] != 0).all()
        assert (m[:128] != 0).all()
    told = [r.getMessage() for r in caplog.records if "1-bit Adam" in r.getMessage()]
    assert len(told) == 1
    assert "frozen after 3 steps; 128 of 256 coordinates" in told[0]


@pytest.mark.parametrize(("scheme", "late"), [("sign:block=tensor+ef", False), ("fp32", True)])
def test_unmasked_a_step_that_v_does_not_measure_raises_on_all_ranks(
    scheme: str, late: bool
) -> None:
    """What the codec makes of zeros, or a gradient that comes late, over eps."""

    def body(c: Communicator) -> str:
        x, optimizer = quiet(c, WARM, late, threshold=None)
        before, moments = x.detach().clone(), dict(optimizer.state[x])
        moments = {name: tensor.clone() for name, tensor in moments.items()}
        x.grad = drawn(c.rank, WARM, 256)
        if not late:
            x.grad[128:] = 0
        with pytest.raises(RuntimeError) as told:
            optimizer.step()
        assert torch.equal(x, before)
        assert all(torch.equal(optimizer.state[x][n], t) for n, t in moments.items())
        assert optimizer.steps == WARM
        return str(told.value)

    one, other = on_ranks(2, only(scheme), body)
    assert one == other
    assert "OneBitAdam: step 4 would move 128 of 256 coordinates of 'x'" in one
    assert "set threshold (1e-4; it is None)" in one


def test_masked_coordinates_have_no_part_in_the_scales_of_others() -> None:
    """However large the gradients that they get later."""
    scheme = only("sign:block=tensor+ef")
    still = on_ranks(2, scheme, lambda c: quiet(c, 8, False)[0].detach()[:128])
    late = on_ranks(2, scheme, lambda c: quiet(c, 8, True)[0].detach()[:128])
    assert same(still, late)


def test_unmasked_a_large_eps_does() -> None:
    def body(c: Communicator) -> torch.Tensor:
        return quiet(c, 20, False, threshold=None, eps=1e-2)[0].detach()

    for x in on_ranks(2, only("sign:block=tensor+ef"), body):
        assert x.abs().max() < 20 * LR * 100  # momenta of about 1 over eps


@pytest.mark.parametrize("scheme", ["sign+ef", "int4+ef"])
def test_the_scale_of_the_loss_does_not_matter(scheme: str) -> None:
    """Powers of two leave every bit as it is: of the codec's scales, and of the mask."""

    def body(c: Communicator) -> list[torch.Tensor]:
        ends = []
        for number, scale in enumerate((1.0, 2.0**-20)):
            x = nn.Parameter(torch.zeros(512))
            optimizer = OneBitAdam([(f"x{number}", x)], c, LR, eps=1e-30, warmup=WARM)
            for step in range(8):
                # magnitudes over six decades: the mask has work
                x.grad = scale * drawn(c.rank, step, 512) * torch.logspace(-6, 0, 512)
                optimizer.step()
            masked = int((optimizer.state[x]["exp_avg_sq"] == 0).sum())
            assert 100 < masked < 400
            ends.append(x.detach().clone())
        return ends

    for one, other in on_ranks(2, only(scheme), body):
        assert torch.equal(one, other)


@pytest.mark.parametrize("threshold", [0.0, 1e-4, 1e-2])
def test_the_mask_is_where_v_is_below_its_share_of_the_mean(threshold: float) -> None:
    def body(c: Communicator) -> tuple[torch.Tensor, torch.Tensor]:
        sizes = torch.logspace(-6, 0, 512)
        sizes[::8] = 0
        x = nn.Parameter(torch.zeros(512))
        optimizer = OneBitAdam([("x", x)], c, LR, warmup=WARM, threshold=threshold)
        for step in range(WARM):
            x.grad = sizes * drawn(c.rank, step, 512)
            optimizer.step()
        before = optimizer.state[x]["exp_avg_sq"].clone()
        x.grad = sizes * drawn(c.rank, WARM, 512)
        optimizer.step()
        return before, optimizer.state[x]["exp_avg_sq"]

    for before, after in on_ranks(2, only("sign+ef"), body):
        kept = before > threshold * before.mean()
        assert 50 < kept.sum() <= 512 - 64
        assert torch.equal(after, before * kept)


@pytest.mark.parametrize("before", [1, WARM, WARM + 1, WARM + 4])
@pytest.mark.parametrize("scheme", ["sign+ef", "int8:round=stochastic"])
def test_a_resumed_run_is_the_uninterrupted_one(scheme: str, before: int) -> None:
    resumed(3, only(scheme), made(), before, 4)


def test_groups_have_their_own_options_and_schedules() -> None:
    """What torch's Adam does with the same groups, in warm-up; and a rate of 0 later too."""

    def groups(module: nn.Module, named: bool) -> list[dict[str, Any]]:
        pairs = list(module.named_parameters())
        parts = [pairs[:2], pairs[2:]]
        chosen = [p if named else [one for _, one in p] for p in parts]
        return [{"params": chosen[0], "lr": 0.02, "betas": (0.5, 0.9)}, {"params": chosen[1]}]

    def body(c: Communicator) -> tuple[list[torch.Tensor], ...]:
        module = model()
        optimizer = OneBitAdam(groups(module, True), c, LR, warmup=WARM)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(WARM):
            backward(module, c.rank, step)
            optimizer.step()
            schedule.step()
        warm = weights(module)
        for group in optimizer.param_groups[:1]:
            group["lr"] = 0.0
        backward(module, c.rank, WARM)
        optimizer.step()
        return warm, weights(module)

    warm, end = on_ranks(1, only("sign+ef"), body)[0]
    module = model()
    adam = torch.optim.Adam(groups(module, False), LR, foreach=False)
    schedule = torch.optim.lr_scheduler.ExponentialLR(adam, 0.5)
    for step in range(WARM):
        backward(module, 0, step)
        adam.step()
        schedule.step()
    assert same(warm, weights(module))
    assert same(warm[:2], end[:2])
    assert not same(warm[2:], end[2:])


def moments(optimizer: OneBitAdam) -> list[torch.Tensor]:
    held = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    return [one[name].clone() for one in held for name in sorted(one)]


def test_a_first_step_under_the_mask_that_is_too_far_leaves_v_as_it_was() -> None:
    """v is masked in some, and too small in others for the gradient that comes late."""

    def body(c: Communicator) -> None:
        x = nn.Parameter(torch.zeros(384))
        optimizer = OneBitAdam([("x", x)], c, LR, warmup=WARM, threshold=1e-14, eps=1e-9)
        scale = torch.tensor([1.0, 1e-6, 1e-8]).repeat_interleave(128)
        for step in range(WARM):
            x.grad = scale * drawn(0, step, 384).sign()
            optimizer.step()
        before = [x.detach().clone(), *moments(optimizer)]
        x.grad = drawn(c.rank, WARM, 384)
        with pytest.raises(RuntimeError, match="of 384 coordinates of 'x' by up to"):
            optimizer.step()
        assert same(before, [x.detach(), *moments(optimizer)])
        x.grad *= scale
        optimizer.step()
        assert int((optimizer.state[x]["exp_avg_sq"] == 0).sum()) == 128

    on_ranks(2, "fp32", body)


@pytest.mark.parametrize("step", [1, WARM, WARM + 1])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_raises_on_all_ranks_and_leaves_no_trace(
    step: int, bad: float
) -> None:
    def body(c: Communicator) -> None:
        module = model()
        optimizer = OneBitAdam(module.named_parameters(), c, LR, warmup=WARM)
        for now in range(step + 3):
            backward(module, c.rank, now)
            if now == step:
                if c.rank == 1:
                    module[2].weight.grad[1, 2] = bad  # type: ignore[index, union-attr]
                before = [*weights(module), *moments(optimizer)]
                with pytest.raises(RuntimeError, match=r"the mean .* of 2\.weight is not finite"):
                    optimizer.step()
                assert same(before, [*weights(module), *moments(optimizer)])
                assert optimizer.steps == step
                continue
            optimizer.step()
        assert all(one.isfinite().all() for one in weights(module))

    on_ranks(2, only("sign+ef"), body)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"warmup": 0}, "OneBitAdam: warmup is 0, allowed: a whole number of at least 1"),
        ({"threshold": 1.0}, "threshold is 1.0, allowed: 0 to below 1"),
        ({"threshold": -1e-4}, "threshold is -0.0001"),
        ({"lr": -1.0}, "OneBitAdam: lr is -1.0, allowed: a finite number of at least 0"),
        ({"eps": 0.0}, "OneBitAdam: eps is 0.0, allowed: a finite number above 0"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\), allowed: two numbers in \[0, 1\)"),
        ({"weight_decay": math.nan}, "OneBitAdam: weight_decay is nan"),
    ],
)
def test_refusals(how: dict[str, Any], message: str) -> None:
    def body(c: Communicator) -> None:
        with pytest.raises(ValueError, match=message):
            made(**how)(model().named_parameters(), c)

    on_ranks(1, "sign+ef", body)


def test_a_state_of_another_warm_up_is_refused() -> None:
    def body(c: Communicator) -> None:
        optimizer = OneBitAdam(model().named_parameters(), c, warmup=3)
        other = OneBitAdam(model().named_parameters(), c, warmup=4)
        with pytest.raises(ValueError, match="the state has warmup 3, allowed: 4"):
            other.load_state_dict(optimizer.state_dict())

    on_ranks(1, "sign+ef", body)


def test_training_goes_on_among_other_ranks_with_residuals_redistributed() -> None:
    from commlib.reshard import redistribute

    def before(c: Communicator) -> tuple[dict[str, Any], list[torch.Tensor]]:
        module = model()
        optimizer = OneBitAdam(module.named_parameters(), c, LR, warmup=WARM)
        for step in range(WARM + 3):
            backward(module, c.rank, step)
            optimizer.step()
        return optimizer.state_dict(), weights(module)

    saved = on_ranks(4, only("sign+ef"), before)
    memories = redistribute([state["communicator"] for state, _ in saved], 2)

    def after(c: Communicator) -> list[torch.Tensor]:
        module = model()
        with torch.no_grad():
            for parameter, value in zip(module.parameters(), saved[0][1], strict=True):
                parameter.copy_(value)
        optimizer = OneBitAdam(module.named_parameters(), c, LR, warmup=WARM)
        with pytest.raises(ValueError, match=r"reshard\.redistribute makes those of other ranks"):
            optimizer.load_state_dict(saved[c.rank][0])
        optimizer.load_state_dict({**saved[0][0], "communicator": memories[c.rank]})
        backward(module, c.rank, 9)
        optimizer.step()
        return weights(module)

    one, other = on_ranks(2, only("sign+ef"), after)
    assert same(one, other)
    assert not same(one, saved[0][1])


def test_the_policy_says_what_is_compressed() -> None:
    """A bare text leaves vectors and small matrices exact: they are not under the sign codec."""

    def body(c: Communicator) -> set[str]:
        train(made(), WARM + 2)(c)
        compressors = c.state_dict()["compressors"].values()
        return {name for made in compressors for name in made["residuals"]}

    for names in on_ranks(2, "sign+ef", body):
        assert names == set()
    for names in on_ranks(2, only("sign+ef"), body):
        assert {"0.weight", "0.bias", "2.weight"} <= names
