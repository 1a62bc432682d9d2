"""rescale() and reset(), where the units of gradients change (T17).

A residual is in the units of the gradient. Gradients here do not depend on the weights, so that
what compression still owes is all that separates weights from those of an exact run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from commlib import Communicator
from tests.communicators import data, on_ranks, only

N, STEPS = 3000, 6


def debt(c: Communicator) -> torch.Tensor:
    """What the next mean is owed: the senders' mean and the owners' chunks, summed over ranks."""
    total = torch.zeros(N, dtype=torch.float64)
    for memory in c.state_dict()["compressors"].values():
        total += memory["residuals"]["w"].double() / c.size
        chunk = memory["residuals"]["w|reduced"]
        start = N - chunk.numel() if c.rank else 0  # of two chunks
        total[start : start + chunk.numel()] += chunk
    c.transport.all_reduce(total).wait()
    return total


def run(
    c: Communicator, sent: Callable[[int], float], moved: Callable[[int], float], factor: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`moved(t)` times the mean of `sent(t)` times a gradient, summed; exactly; and the debt.

    Half way the residuals are multiplied by `factor`.
    """
    came, exact = torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    for step in range(STEPS):
        if step == STEPS // 2:
            c.rescale(factor)
        x = sent(step) * data(c.rank, N, step)
        c.all_reduce(x, "w", factor="avg")
        came += moved(step) * x.double()
        mean = sum(data(rank, N, step).double() for rank in range(c.size)) / c.size
        exact += moved(step) * sent(step) * mean
    return came, exact, debt(c)


@pytest.mark.parametrize("right", [True, False])
def test_the_learning_rate_jumps(right: bool) -> None:
    """w - lr h stays on the exact path if h goes by a / b, and leaves it if h stays."""
    a, b = 0.4, 0.05

    def rate(step: int) -> float:
        return a if step < STEPS // 2 else b

    ranks = on_ranks(
        2, only("int4+ef"), lambda c: run(c, lambda step: 1.0, rate, a / b if right else 1.0)
    )
    for came, exact, owed in ranks:
        error = (came + b * owed - exact).abs().max()
        assert (error < 1e-6) == right
        assert right or error > 0.02  # (a - b) h


@pytest.mark.parametrize("right", [True, False])
def test_the_loss_scale_changes(right: bool) -> None:
    """GradScaler's S: gradients are S g, the optimizer divides by S; h goes by S' / S."""
    before, after = 1024.0, 512.0

    def scale(step: int) -> float:
        return before if step < STEPS // 2 else after

    ranks = on_ranks(
        2,
        only("int4+ef"),
        lambda c: run(c, scale, lambda s: 1 / scale(s), after / before if right else 1.0),
    )
    for came, exact, owed in ranks:
        error = (came + owed / after - exact).abs().max()
        assert (error < 1e-6) == right


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_both_sides_change_and_are_forgotten(kind: str) -> None:
    """Owners' residuals alike; a factor of two is exact in every dtype, others in 2^-9 of int8."""

    def body(c: Communicator) -> None:
        c.all_reduce(data(c.rank, N), "w")
        before = dense(c)
        c.rescale(0.5)
        assert all(torch.equal(x, before[name] / 2) for name, x in dense(c).items())
        c.rescale(3.0)
        for name, x in dense(c).items():
            error = (x - 1.5 * before[name]).abs()
            assert (error <= 2.0**-8 * 1.5 * before[name].abs()).all()
            assert x.any()
        for bad in (float("nan"), float("inf")):
            with pytest.raises(ValueError, match="finite"):
                c.rescale(bad)
        c.reset()
        assert c.memory_bytes() == 0

    on_ranks(2, only(f"int4+ef:dtype={kind}"), body)


def dense(c: Communicator) -> dict[str, torch.Tensor]:
    found: dict[str, Any] = {}
    for memory in c.state_dict()["compressors"].values():
        for name, h in memory["residuals"].items():
            steps = memory["scales"].get(name, torch.tensor([0x3F80], dtype=torch.int16))
            steps = steps.view(torch.bfloat16).double()
            found[name] = (
                h.double() * steps.repeat_interleave(-(-h.numel() // steps.numel()))[: h.numel()]
            )
    return found
