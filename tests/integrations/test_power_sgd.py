"""PowerSGD under DDP on gloo: many buckets, every mode, NaN, resume, and a model that learns."""

from __future__ import annotations

import math
from pathlib import Path
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
from tests.integrations.test_ddp import MODES
from tests.processes import Pool

pytestmark = pytest.mark.processes

SCHEME = "fp32+ef@power_sgd:rank=2"


def deep() -> nn.Sequential:
    """Eight matrices of the same size, and nothing else."""
    torch.manual_seed(4)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(8)]
    return nn.Sequential(*(module for layer in layers for module in (layer, nn.Tanh())))


def any_number_of_buckets(steps: int) -> None:
    """1, 2 and 8 buckets: the order of exchanges is one, and so are the weights."""
    found = []
    for megabytes, buckets in ((25.0, 1), (0.04, 2), (0.004, 8)):
        model = commlib.wrap(DDP(deep(), bucket_cap_mb=megabytes), SCHEME)
        train(model, 2, lr=1.0)  # DDP regroups its buckets after the first
        seen = calls_of(model)
        found.append(train(model, steps - 2, start=2, lr=1.0))
        assert len(seen) == (steps - 2) * buckets
        assert_same_on_all_ranks(found[-1])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    start = weights(deep())
    moved = train(DDP(deep()), steps, lr=1.0) - start
    assert 1e-3 < relative(found[0] - start, moved) < 0.5, relative(found[0] - start, moved)


def all_modes_agree() -> None:
    for scheme in (SCHEME, "fp16+ef@power_sgd"):
        reference = train(commlib.wrap(DDP(mlp()), scheme), 5)
        assert_same_on_all_ranks(reference)
        for mode in MODES:
            model = commlib.wrap(DDP(mlp(), **mode), scheme)
            assert torch.equal(train(model, 5), reference), mode


def feedback_makes_the_mean_exact() -> None:
    """With a constant gradient the mean over T steps tends to it as 1/T, else it stays as it is."""
    errors: dict[str, list[float]] = {}
    plain = DDP(mlp())
    backward(plain, 0)
    for scheme in ("fp32@power_sgd", "fp32+ef@power_sgd"):
        model = commlib.wrap(DDP(mlp(), bucket_cap_mb=0.004), scheme)
        total, found = torch.zeros_like(gradients(plain)), errors.setdefault(scheme, [])
        for step in range(1, 61):
            backward(model, 0)
            total += gradients(model)
            found.append(relative(total / step, gradients(plain)))
    alone, fed_back = errors.values()
    assert alone[59] > 0.9 * alone[19], errors
    assert fed_back[59] < 0.5 * fed_back[19], errors
    assert fed_back[59] < 0.3 * alone[59], errors


def nan_passes_in_one_step() -> None:
    """GradScaler sees it on every rank, and the run goes on as if that step had not been."""
    plain = commlib.wrap(DDP(mlp()), SCHEME)
    for mode in MODES:
        model = commlib.wrap(DDP(mlp(), **mode), SCHEME)
        for step in range(3):
            backward(model, step)
            if mode is MODES[0]:
                backward(plain, step)
        before = residuals(model)
        model.zero_grad()
        x = batch(7)
        if dist.get_rank() == 0:
            x[0, 0] = float("nan")
        model(x).square().mean().backward()
        assert not gradients(model).isfinite().all()
        assert_same_on_all_ranks(gradients(model))
        after = residuals(model)
        assert any("Q" in path for path in before)
        assert all(torch.equal(after[path], x) for path, x in before.items())
        backward(model, 3)
        if mode is MODES[0]:
            backward(plain, 3)
        assert torch.equal(gradients(model), gradients(plain)), mode


def resume_is_bitwise(folder: str) -> None:
    for scheme in (SCHEME, "fp16+ef@power_sgd:rank=4", "fp32@power_sgd"):
        uninterrupted = train(commlib.wrap(DDP(mlp(), bucket_cap_mb=0.004), scheme), 6)
        model = commlib.wrap(DDP(mlp(), bucket_cap_mb=0.004), scheme)
        train(model, 3)
        path = Path(folder) / f"{dist.get_rank()}.pt"
        torch.save(
            {"model": model.module.state_dict(), "commlib": commlib.of(model).state_dict()}, path
        )
        saved = torch.load(path, weights_only=True)
        again = commlib.wrap(DDP(mlp(seed=5)), scheme)  # other buckets
        again.module.load_state_dict(saved["model"])
        commlib.of(again).load_state_dict(saved["commlib"])
        assert torch.equal(train(again, 3, start=3), uninterrupted), scheme
        if "+ef" in scheme:
            other = commlib.wrap(DDP(mlp()), "fp32+ef@power_sgd:rank=3")
            with pytest.raises(ValueError, match="load it under the policy that saved it"):
                commlib.of(other).load_state_dict(saved["commlib"])


def unused_parameters() -> None:
    """What nobody used keeps its residual (T7); used on one rank, all get the same mean (T8)."""
    model = commlib.wrap(DDP(Branches(), find_unused_parameters=True), SCHEME)
    backward(model, 0, False)
    before = {path: x for path, x in residuals(model).items() if "right" in path}
    assert any("residuals" in path and x.any() for path, x in before.items())
    for step in (1, 2):
        backward(model, step, True)
        assert model.module.right.weight.grad is None
    after = residuals(model)
    assert all(torch.equal(after[path], x) for path, x in before.items())
    backward(model, 3, dist.get_rank() != 0)
    assert_same_on_all_ranks(gradients(model))


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """1400 images of scikit-learn's digits, 8 x 8, and what they show."""
    from bench.problems import Digits

    problem = Digits((0,))
    return problem.images, problem.labels


def a_model_learns(steps: int) -> dict[str, float]:
    """The MLP 64-64-64-10 of the digits benchmark, 16 images per rank and step: training loss."""
    images, labels = digits()
    losses = {}
    rules = {"rules": [{"scheme": SCHEME, "min_ndim": 2}]}
    for name, policy in (("plain", None), ("rank 2", rules)):
        torch.manual_seed(0)
        model = DDP(nn.Sequential(
            nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
        ))  # fmt: skip
        if policy is not None:
            commlib.wrap(model, policy)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        generator = torch.Generator().manual_seed(dist.get_rank())
        for _ in range(steps):
            chosen = torch.randint(len(labels), (16,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
        assert_same_on_all_ranks(weights(model))
        with torch.no_grad():
            losses[name] = float(nn.functional.cross_entropy(model.module(images), labels))
        if policy is not None:
            rows = commlib.of(model).communicator.meter.rows()
            raw, wire = (sum(row[f"{what}_bytes"] for row in rows) for what in ("raw", "wire"))
            ranks = dist.get_world_size()
            losses["ratio"] = raw * 2 * (ranks - 1) / ranks / wire
    return losses


@pytest.mark.parametrize(("ranks", "steps"), [(2, 12), (3, 50)])
def test_any_number_of_buckets(pool: Pool, ranks: int, steps: int) -> None:
    pool.run(any_number_of_buckets, steps, ranks=ranks, timeout=100)


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        (all_modes_agree, 3),
        (feedback_makes_the_mean_exact, 2),
        (nan_passes_in_one_step, 3),
        (unused_parameters, 3),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_ddp(pool: Pool, case: Any, ranks: int) -> None:
    pool.run(case, ranks=ranks)


def test_resume(pool: Pool, tmp_path: Path) -> None:
    pool.run(resume_is_bitwise, str(tmp_path), ranks=3)


@pytest.mark.bench
def test_a_model_learns(pool: Pool) -> None:
    """Within 10% of what it learns without; about 11 times fewer bytes (biases travel raw)."""
    pytest.importorskip("sklearn")
    losses = pool.run(a_model_learns, 300, ranks=4, timeout=100)
    first = losses[0]
    assert all(found == first for found in losses)
    assert math.isfinite(first["plain"])
    assert first["rank 2"] < 1.1 * first["plain"], first
    assert first["plain"] < 0.2
    # 798 values of 8970, and 16-byte parts of each of a dozen segments
    assert 9 < first["ratio"] < 11.3, first
