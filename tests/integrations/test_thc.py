"""THC under DDP on gloo: many buckets, resume, NaN on all ranks, and a model that learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.integrations.ddp_cases import (
    DDP,
    assert_same_on_all_ranks,
    batch,
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

SCHEME = "fp32+ef@thc"


def it_trains_whatever_the_buckets() -> None:
    reference = train(commlib.wrap(DDP(mlp()), SCHEME), 8)
    assert_same_on_all_ranks(reference)
    for mode in ({"bucket_cap_mb": 0.004}, {"gradient_as_bucket_view": True}):
        assert torch.equal(train(commlib.wrap(DDP(mlp(), **mode), SCHEME), 8), reference), mode
    start = weights(mlp())
    moved = train(DDP(mlp()), 8) - start
    assert 0 < relative(reference - start, moved) < 0.2


def resume_is_bitwise(folder: str) -> None:
    for scheme in (SCHEME, "fp32@thc:bits=8"):
        uninterrupted = train(commlib.wrap(DDP(mlp(), bucket_cap_mb=0.004), scheme), 6)
        model = commlib.wrap(DDP(mlp(), bucket_cap_mb=0.004), scheme)
        train(model, 3)
        path = Path(folder) / f"{dist.get_rank()}.pt"
        state = {"model": model.module.state_dict(), "commlib": commlib.of(model).state_dict()}
        torch.save(state, path)
        saved = torch.load(path, weights_only=True)
        again = commlib.wrap(DDP(mlp()), scheme)
        again.module.load_state_dict(saved["model"])
        commlib.of(again).load_state_dict(saved["commlib"])
        assert torch.equal(train(again, 3, start=3), uninterrupted), scheme


def nan_is_seen_by_all_and_leaves_residuals() -> None:
    model = commlib.wrap(DDP(mlp()), SCHEME)
    train(model, 2)
    before = residuals(model)
    model.zero_grad()
    x = batch(7)
    if dist.get_rank() == 0:
        x[:] = float("nan")
    model(x).square().mean().backward()
    assert not gradients(model).isfinite().any()
    assert_same_on_all_ranks(gradients(model))
    after = residuals(model)
    kept = [path for path in before if "/residuals/" in path]
    assert len(kept) == 2
    assert all(torch.equal(after[path], before[path]) for path in kept)


def test_it_trains(pool: Pool) -> None:
    pool.run(it_trains_whatever_the_buckets, ranks=3)


def test_resume(pool: Pool, tmp_path: Path) -> None:
    pool.run(resume_is_bitwise, str(tmp_path), ranks=2)


def test_nan(pool: Pool) -> None:
    pool.run(nan_is_seen_by_all_and_leaves_residuals, ranks=2)
