"""EF21 and EF21-SGDM: equations, bookkeeping, convergence, what is refused, resuming."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from commlib import Communicator, Scheme, codec
from commlib.codecs import Codec
from commlib.optim import EF21
from commlib.scheme import Role
from commlib_kernels.layout import Layout
from commlib_kernels.tag import Tag
from tests.communicators import on_ranks, only
from tests.optim.models import same
from tests.optim.replicas import Make, alike, backward, drawn, model, resumed, weights

LR = 0.1


def made(**how: Any) -> Make:
    options = {"lr": LR, **how}

    def make(params: Iterable[Any], communicator: Communicator) -> EF21:
        return EF21(params, communicator, **options)

    return make


def top10(flat: torch.Tensor) -> torch.Tensor:
    chosen = flat.abs().topk(10).indices
    return torch.zeros_like(flat).index_copy(0, chosen, flat[chosen])


def coded(chosen: Codec, x: torch.Tensor) -> torch.Tensor:
    """C(x) of one parameter, without a communicator."""
    layout, flat = Layout((x.numel(),), align=chosen.align), x.reshape(-1).contiguous()
    wire = torch.zeros(chosen.nbytes(layout), dtype=torch.uint8)
    out = torch.empty_like(flat)
    chosen.encode(flat, wire, layout, Tag())
    chosen.decode(wire, out, layout, Tag())
    return out.view(x.shape)


def reference(
    size: int, scheme: str, steps: int, *, eta: float = 1.0, raw: bool = True
) -> list[torch.Tensor]:
    """All ranks in one loop."""
    module = model()
    parameters = list(module.parameters())
    chosen = Scheme.parse(scheme).resolve(Role.OTHER).codec
    own = [[torch.zeros_like(p) for p in parameters] for _ in range(size)]
    momenta: list[list[torch.Tensor]] = [[] for _ in range(size)]
    mean = [torch.zeros_like(p) for p in parameters]
    for step in range(steps):
        sent = []
        for rank in range(size):
            backward(module, rank, step)
            found = [p.grad.clone() for p in parameters if p.grad is not None]
            if eta < 1:
                pairs = zip(momenta[rank] or found, found, strict=True)
                found = momenta[rank] = [v.lerp(g, eta) for v, g in pairs]
            differences = [v - g for v, g in zip(found, own[rank], strict=True)]
            if (step or not raw) and size > 1:
                # five values in blocks are not smaller than raw
                differences = [d if d.numel() == 5 else coded(chosen, d) for d in differences]
            sent.append(differences)
        with torch.no_grad():
            for i, x in enumerate(parameters):
                total = torch.zeros_like(x)
                for rank in range(size):
                    own[rank][i] += sent[rank][i]
                    total += sent[rank][i]
                mean[i] += total / size
                x.sub_(mean[i], alpha=LR)
    return weights(module)


def test_a_momentum_that_rests_at_eta_1_is_the_gradient_then() -> None:
    """eta may change on the way; an old momentum would come back."""

    def body(c: Communicator) -> list[float]:
        x, moved = nn.Parameter(torch.zeros(1)), []
        optimizer = EF21([("x", x)], c, 1.0, 0.5)
        for eta, gradient in [(0.5, 64.0), (1.0, 0.0), (0.5, 0.0), (0.5, 8.0)]:
            optimizer.param_groups[0]["eta"] = eta
            before, x.grad = x.item(), torch.full((1,), gradient)
            optimizer.step()
            moved.append(before - x.item())
        return moved

    assert on_ranks(1, "fp32", body) == [[64.0, 0.0, 0.0, 4.0]]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("scheme", ["sign", "int2", "fp32"])
def test_ef21_is_its_equations(size: int, scheme: str) -> None:
    found = alike(size, only(scheme), made(), 8)
    wanted = reference(size, "fp32" if size == 1 else scheme, 8)
    assert same(found, wanted)


@pytest.mark.parametrize("how", [{"eta": 0.3}, {"first": "coded"}, {"eta": 0.3, "first": "coded"}])
def test_momentum_and_a_coded_start(how: dict[str, Any]) -> None:
    found = alike(3, only("sign"), made(**how), 8)
    raw = how.get("first") != "coded"
    wanted = reference(3, "sign", 8, eta=how.get("eta", 1.0), raw=raw)
    assert same(found, wanted)
    assert not same(found, reference(3, "sign", 8))


@pytest.mark.parametrize("compress", [None, top10])
@pytest.mark.parametrize("scheme", ["sign", "int2", "natural", "bf16"])
def test_what_a_rank_keeps_is_what_the_others_added_for_it(scheme: str, compress: Any) -> None:
    steps = 20

    def body(c: Communicator) -> tuple[torch.Tensor, torch.Tensor]:
        x = nn.Parameter(torch.zeros(700))
        optimizer = EF21([("x", x)], c, LR, first="coded", compress=compress)
        for step in range(steps):
            x.grad = drawn(c.rank, step, 700)
            optimizer.step()
        return optimizer.state[x]["own"], optimizer.state[x]["mean"]

    ranks = on_ranks(3, only(scheme), body)
    own = torch.stack([one for one, _ in ranks]).double()
    assert all(torch.equal(mean, ranks[0][1]) for _, mean in ranks)
    # two sums of `steps` terms, each rounded to 2^-24 of values below 8
    bound = 2 * steps * 8 * 2.0**-24
    assert torch.allclose(own.mean(0), ranks[0][1].double(), rtol=0, atol=bound)
    assert not torch.equal(own[0], own[1])


def test_nothing_lost_is_descent() -> None:
    found = alike(2, "fp32", made(), 6)
    module = model()
    descent = torch.optim.SGD(module.parameters(), LR)
    for step in range(6):
        total: list[torch.Tensor] = []
        for rank in range(2):
            backward(module, rank, step)
            here = [p.grad.clone() for p in module.parameters() if p.grad is not None]
            total = [a + b for a, b in zip(total, here, strict=True)] if total else here
        for parameter, gradient in zip(module.parameters(), total, strict=True):
            parameter.grad = gradient / 2
        descent.step()
    for one, other in zip(found, weights(module), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-5)


def pulled(kind: str, steps: int) -> float:
    """|grad f|^2 of f = mean_i |x - b_i|^2 / 2, whose parts pull to different places.

    In float64, where only the top 10 of 200 coordinates travel.
    """

    def body(c: Communicator) -> float:
        x = nn.Parameter(torch.zeros(200, dtype=torch.float64))
        targets = [drawn(rank, 0, 200).double() for rank in range(c.size)]
        error = torch.zeros_like(x)
        optimizer = EF21([("x", x)], c, 0.05, first="coded", compress=top10)
        for _ in range(steps):
            gradient = x.detach() - targets[c.rank]
            if kind == "EF21":
                x.grad = gradient
                optimizer.step()
                continue
            wanted = gradient + error
            sent = top10(wanted)
            if kind == "error feedback":
                error = wanted - sent
            c.all_reduce(sent, factor="avg", scheme="fp32").wait()
            x.data.sub_(0.05 * sent)
        return float((x.detach() - torch.stack(targets).mean(0)).square().sum())

    return max(on_ranks(4, "fp32", body))


def test_it_converges_where_error_feedback_does_not() -> None:
    assert pulled("EF21", 800) < 1e-20
    assert pulled("error feedback", 800) > 1e-4
    assert pulled("none", 800) > 1e-4


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("policy", ["int2", only("sign:block=tensor"), only("natural"), "fp32"])
def test_ranks_end_with_the_same_bits(size: int, policy: Any) -> None:
    found = alike(size, policy, made(eta=0.5), 8)
    assert not same(found, weights(model()))


@pytest.mark.parametrize("before", [1, 5])
@pytest.mark.parametrize("how", [{}, {"eta": 0.2}])
@pytest.mark.parametrize("scheme", ["sign", "natural"])
def test_a_resumed_run_is_the_uninterrupted_one(
    scheme: str, how: dict[str, Any], before: int
) -> None:
    resumed(3, only(scheme), made(**how), before, 4)


def test_bytes() -> None:
    """W-1 payloads a step, after a first one that is raw."""

    def body(c: Communicator) -> list[int]:
        x, sent = nn.Parameter(torch.zeros(4096)), [0]
        optimizer = EF21([("x", x)], c, LR)
        for step in range(3):
            x.grad = drawn(c.rank, step, 4096)
            optimizer.step()
            sent.append(c.transport.bytes_sent)
        return [b - a for a, b in itertools.pairwise(sent)]

    payload = codec("sign").nbytes(Layout((4096,)))
    assert payload == 4096 // 8 + 2 * 32
    agreed = 3 * 8  # one comparison of the ranks' parameters
    for sent in on_ranks(4, only("sign"), body):
        assert sent == [3 * 4 * 4096 + agreed, 3 * payload, 3 * payload]


def test_a_gradient_that_is_not_finite_raises_on_all_ranks_and_leaves_no_trace() -> None:
    def body(c: Communicator) -> None:
        module = model()
        optimizer = EF21(module.named_parameters(), c, LR, 0.5)
        for step in range(6):
            backward(module, c.rank, step)
            if step == 3:
                if c.rank == 1:
                    module[0].bias.grad[0] = math.nan  # type: ignore[index, union-attr]
                before = weights(module)
                with pytest.raises(RuntimeError, match=r"mean difference of 0\.bias is not finite"):
                    optimizer.step()
                assert same(before, weights(module))
                continue
            optimizer.step()
        assert all(one.isfinite().all() for one in weights(module))

    on_ranks(2, only("sign"), body)


@pytest.mark.parametrize(
    ("policy", "how", "message"),
    [
        ("sign+ef", {}, "the policy has 'sign\\+ef', allowed: schemes without feedback.*'sign'"),
        ("int4+delta", {}, "the policy has 'int4\\+delta', allowed: schemes without"),
        (None, {}, "the policy has 'int8\\+ef'"),
        ("ternary", {}, "needs a codec that contracts"),
        ("int2:round=stochastic", {}, "gamma = .*, and|int2:round=stochastic has gamma"),
        ("qsgd:levels=4:block=tensor", {}, "has gamma ="),
        ("sign", {"eta": 0.0}, "EF21: eta is 0.0, allowed: a finite number above 0"),
        ("sign", {"eta": 1.5}, "EF21: eta is 1.5, allowed: above 0, at most 1"),
        ("sign", {"lr": math.inf}, "EF21: lr is inf"),
        ("sign", {"first": "none"}, "EF21: first is 'none', allowed: raw, coded"),
    ],
)
def test_refusals(
    policy: str | None, how: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COMMLIB_POLICY", raising=False)

    def body(c: Communicator) -> None:
        with pytest.raises(ValueError, match=message):
            made(**how)(model().named_parameters(), c)

    on_ranks(1, policy, body)


def test_a_function_that_makes_something_else_is_refused() -> None:
    def body(c: Communicator) -> None:
        module = model()
        optimizer = EF21(
            module.named_parameters(), c, LR, first="coded", compress=lambda flat: flat[:10]
        )
        backward(module, 0, 0)
        with pytest.raises(ValueError, match=r"compress made torch.float32 of shape \(10,\)"):
            optimizer.step()

    on_ranks(1, "fp32", body)


def test_a_state_of_another_rank_is_refused() -> None:
    def body(c: Communicator) -> dict[str, Any]:
        optimizer = EF21(model().named_parameters(), c, LR)
        return optimizer.state_dict()

    states = on_ranks(2, "fp32", body)

    def other(c: Communicator) -> None:
        optimizer = EF21(model().named_parameters(), c, LR)
        with pytest.raises(ValueError, match="of rank 1 of 2, allowed: rank 0 of 1; among other"):
            optimizer.load_state_dict(states[1])

    on_ranks(1, "fp32", other)
