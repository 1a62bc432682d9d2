"""DDP through commlib: every mode of DDP gives the gradients that one mode gives, bit for bit.

A residual belongs to a parameter, so neither the grouping into buckets nor their order can show in
the result; a residual lost or misplaced at a regrouping would.
"""

from __future__ import annotations

import gc
import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.integrations.ddp_cases import (
    DDP,
    WIDTH,
    Branches,
    assert_same_on_all_ranks,
    backward,
    batch,
    calls_of,
    commlib,
    gradients,
    mlp,
    relative,
    residuals,
    train,
    weights,
)
from tests.processes import Pool

pytestmark = pytest.mark.processes

MODES: list[dict[str, Any]] = [
    {},  # regroups its buckets after the first iteration
    {"bucket_cap_mb": 0.004},  # one bucket per layer
    {"gradient_as_bucket_view": True},
    {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.004},
    {"static_graph": True, "bucket_cap_mb": 0.004},  # regroups after the second
    {"find_unused_parameters": True, "bucket_cap_mb": 0.004},  # never
]


def uncompressed_is_plain_ddp() -> None:
    for policy in ("fp32", "int8+ef"):
        wrapped = commlib.wrap(DDP(mlp()), policy)
        plain = DDP(mlp())
        backward(wrapped, 0)
        backward(plain, 0)
        error = relative(gradients(wrapped), gradients(plain))
        if policy == "fp32":
            assert error < 1e-6
        else:
            assert 1e-5 < error < 0.02  # it was compressed, and is a mean, not a sum


def all_modes_agree() -> None:
    reference = train(commlib.wrap(DDP(mlp()), "int4+ef"), 6)
    assert_same_on_all_ranks(reference)
    plain = train(DDP(mlp()), 6)
    assert 0 < relative(reference, plain) < 0.1
    for mode in MODES:
        model = commlib.wrap(DDP(mlp(), **mode), "int4+ef")
        assert torch.equal(train(model, 6), reference), mode


def buckets_are_regrouped() -> None:
    """The layouts that the modes above are there for do occur."""
    for mode, changes_at in ((MODES[1], 1), (MODES[4], 2), (MODES[5], None)):
        model = commlib.wrap(DDP(mlp(), **mode), "int8+ef")
        seen = calls_of(model)
        layouts = []
        for step in range(4):
            train(model, 1, start=step)
            layouts.append(tuple(seen))
            seen.clear()
        assert len(layouts[-1]) > 1
        changes = [step for step in range(1, 4) if layouts[step] != layouts[step - 1]]
        assert changes == ([changes_at] if changes_at else []), (mode, layouts)


def feedback_makes_the_mean_exact() -> None:
    """With a constant gradient the mean over T steps tends to it as 1/T, past every regrouping."""
    errors = {}
    for policy in ("int4:round=nearest", "int4+ef"):
        model = commlib.wrap(DDP(mlp(), bucket_cap_mb=0.004), policy)
        plain = DDP(mlp())
        backward(plain, 0)
        total = torch.zeros_like(gradients(plain))
        for _ in range(30):
            backward(model, 0)
            total += gradients(model)
        errors[policy] = relative(total / 30, gradients(plain))
    assert errors["int4+ef"] < errors["int4:round=nearest"] / 5, errors
    assert errors["int4+ef"] < 0.02, errors


def accumulation() -> None:
    """Under no_sync nothing is sent; the next message is the sum of all."""
    model = commlib.wrap(DDP(mlp()), "int8+ef")
    seen = calls_of(model)
    with model.no_sync():
        backward(model, 0)
    assert seen == []
    assert residuals(model) == {}
    reference = train(commlib.wrap(DDP(mlp()), "int8+ef"), 3, accumulate=4)
    model = commlib.wrap(DDP(mlp(), gradient_as_bucket_view=True), "int8+ef")
    assert torch.equal(train(model, 3, accumulate=4), reference)
    assert_same_on_all_ranks(reference)
    assert relative(reference, train(DDP(mlp()), 3, accumulate=4)) < 0.01


def unused_parameters() -> None:
    """Nobody used `right`: DDP drops what is sent for it, so its residual has to stay (T7)."""
    model = commlib.wrap(DDP(Branches(), find_unused_parameters=True), "int4+ef")
    backward(model, 0, False)
    before = {path: x for path, x in residuals(model).items() if "right" in path}
    assert any(x.is_floating_point() and x.any() for x in before.values())
    for step in (1, 2):
        backward(model, step, True)
        assert model.module.right.weight.grad is None
    after = residuals(model)
    for path, x in before.items():
        if x.is_floating_point():
            assert torch.equal(after[path], x), path
    # Used on rank 0 alone (T8): every rank gets the same mean.
    plain = DDP(Branches(), find_unused_parameters=True)
    plain.load_state_dict(model.state_dict())
    for ddp in (model, plain):
        backward(ddp, 3, dist.get_rank() != 0)
    assert_same_on_all_ranks(gradients(model))
    assert relative(gradients(model), gradients(plain)) < 0.3


def frozen_parameters() -> None:
    model = commlib.wrap(DDP(mlp(), find_unused_parameters=True), "int8+ef")
    train(model, 2)
    model.module[2].requires_grad_(False)
    kept = model.module[2].weight.clone()
    train(model, 2, start=2)
    assert torch.equal(model.module[2].weight, kept)
    assert_same_on_all_ranks(weights(model))
    # A new DDP over what is left takes over the residuals by name.
    state = commlib.of(model).state_dict()
    del model
    smaller = mlp()
    smaller[2].requires_grad_(False)
    again = commlib.wrap(DDP(smaller), "int8+ef")
    commlib.of(again).load_state_dict(state)
    train(again, 2)
    assert_same_on_all_ranks(weights(again))


def uneven_inputs() -> None:
    """Ranks that ran out keep taking part, with zeros (T9); the divisor stays the world size."""
    model = commlib.wrap(DDP(mlp(), bucket_cap_mb=0.004), "int8+ef")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = calls_of(model)
    with model.join():
        for step in range(2 + 2 * dist.get_rank()):
            optimizer.zero_grad()
            model(batch(step)).square().mean().backward()
            optimizer.step()
    steps = 2 + 2 * (dist.get_world_size() - 1)
    assert len(seen) >= steps
    assert weights(model).isfinite().all()
    assert_same_on_all_ranks(weights(model))


class Mixed(nn.Module):
    """Layers of three dtypes: two are compressed, fp64 gradients travel raw."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.single = nn.Linear(WIDTH, WIDTH)
        self.short = nn.Linear(WIDTH, WIDTH).bfloat16()
        self.wide = nn.Linear(WIDTH, WIDTH).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.single(x) + self.short(x.bfloat16()).float() + self.wide(x.double()).float()


def mixed_dtypes() -> None:
    model, plain = commlib.wrap(DDP(Mixed()), "int8+ef"), DDP(Mixed())
    for step in range(3):
        backward(model, step)
        backward(plain, step)
        assert_same_on_all_ranks(gradients(model))
        assert relative(gradients(model), gradients(plain)) < 0.03
        exact, grad = plain.module.wide.weight.grad, model.module.wide.weight.grad
        assert relative(grad, exact) < 1e-14


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.turn = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.complex64))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((x.to(torch.complex64) @ self.turn).abs())


def complex_parameters() -> None:
    """DDP carries them as pairs of real numbers."""
    for scheme, bound in (("fp32", 1e-6), ("int8+ef", 0.03), ("fp32+ef@power_sgd:rank=2", 2.0)):
        model, plain = commlib.wrap(DDP(Complex()), scheme), DDP(Complex())
        for step in range(3):
            backward(model, step)
            backward(plain, step)
            assert_same_on_all_ranks(model.module.turn.grad)
            assert relative(model.module.turn.grad, plain.module.turn.grad) < bound
        if "power_sgd" not in scheme:
            commlib.of(model).replan(every=1)
            backward(model, 3)
            backward(model, 4)
            assert_same_on_all_ranks(model.module.turn.grad)


def dropped_models_leave_nothing() -> None:
    """Neither connections nor threads, as without commlib."""

    def open_now() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    def use() -> None:
        model = commlib.wrap(DDP(mlp()), "int8+ef")
        for step in range(2):
            backward(model, step)

    use()
    dist.barrier()
    before = open_now()
    for _ in range(3):
        use()

    def more() -> bool:
        """Than after one model, whose other end may have been about to go; three would leave 24."""
        return any(now > then for now, then in zip(open_now(), before, strict=True))

    end = time.monotonic() + 10.0
    while more() and time.monotonic() < end:  # the other end may be later
        time.sleep(0.01)
    assert not more()
    dist.barrier()


def dropped_in_a_child() -> None:
    """A process that is forked and finds the model there ends as it likes."""
    model = commlib.wrap(DDP(mlp()), "int8+ef")
    backward(model, 0)
    child = os.fork()
    if not child:
        signal.alarm(20)
        del model
        gc.collect()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    backward(model, 1)
    dist.barrier()


def nan_passes_in_one_step() -> None:
    for mode in ({}, {"gradient_as_bucket_view": True}):
        model, plain = commlib.wrap(DDP(mlp(), **mode), "int8+ef"), DDP(mlp())
        backward(model, 0)
        model.zero_grad()
        x = batch(1)
        if dist.get_rank() == 0:
            x[0, 0] = float("nan")
        model(x).square().mean().backward()
        assert not gradients(model).isfinite().all()  # GradScaler sees it, on every rank
        assert_same_on_all_ranks(gradients(model))
        backward(model, 2)
        backward(plain, 2)
        assert gradients(model).isfinite().all()
        assert relative(gradients(model), gradients(plain)) < 0.03


def buffers_stay_exact() -> None:
    def build() -> nn.Module:
        return nn.Sequential(mlp()[0], nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH))

    torch.manual_seed(3)
    plain = DDP(build())
    torch.manual_seed(3)
    model = commlib.wrap(DDP(build()), "int4+ef")
    for step in range(2):  # equal weights, no optimizer: the statistics are DDP's own
        backward(plain, step)
        backward(model, step)
    for name, buffer in plain.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], buffer)


def sub_group() -> None:
    """A group of ranks that do not follow one another: {0, W-1}."""
    ranks = [0, dist.get_world_size() - 1]
    group = dist.new_group(ranks)
    if dist.get_rank() in ranks:
        model = commlib.wrap(DDP(mlp(), process_group=group), "int8+ef")
        plain = DDP(mlp(), process_group=group)
        assert commlib.of(model).communicator.size == 2
        assert relative(train(model, 4), train(plain, 4)) < 0.01
        assert_same_on_all_ranks(weights(model), group)
        del model, plain  # a reducer that outlives its gloo group may hang in its destructor
        dist.destroy_process_group(group)


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        (uncompressed_is_plain_ddp, 3),
        (all_modes_agree, 3),
        (buckets_are_regrouped, 2),
        (feedback_makes_the_mean_exact, 2),
        (accumulation, 2),
        (unused_parameters, 3),
        (frozen_parameters, 2),
        (uneven_inputs, 3),
        (mixed_dtypes, 2),
        (complex_parameters, 2),
        (dropped_models_leave_nothing, 2),
        (dropped_in_a_child, 2),
        (nan_passes_in_one_step, 2),
        (buffers_stay_exact, 2),
        (sub_group, 3),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_ddp(pool: Pool, case: Any, ranks: int) -> None:
    pool.run(case, ranks=ranks)
