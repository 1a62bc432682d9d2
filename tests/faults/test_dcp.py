"""torch.distributed.checkpoint runs out of disk: all ranks hear of it, and nothing is lost."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.integrations.ddp_cases import DDP, commlib, mlp, raises, residuals, train
from tests.processes import Pool

checkpoint = pytest.importorskip("commlib.checkpoint")
pytestmark = pytest.mark.processes


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """A disk that takes no more than `limit` bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_on_a_full_disk(folder: str) -> None:
    undisturbed = train(commlib.wrap(DDP(mlp()), "int4+ef"), 6)
    model = commlib.wrap(DDP(mlp()), "int4+ef")
    train(model, 3)
    whole, broken = Path(folder) / "whole", Path(folder) / "broken"
    checkpoint.save(model, whole)
    weights = {name: x.clone() for name, x in model.module.state_dict().items()}
    train(model, 1, start=3)

    before = residuals(model)
    with small_files(1000 if dist.get_rank() == 1 else resource.RLIM_INFINITY):
        raises(RuntimeError, "first on rank 1", "File too large")(
            lambda: checkpoint.save(model, broken)
        )
    dist.barrier()
    assert not (broken / ".metadata").exists()
    assert all(torch.equal(x, before[path]) for path, x in residuals(model).items())
    assert torch.equal(train(model, 2, start=4), undisturbed)  # it goes on as if nothing had been

    again = commlib.wrap(DDP(mlp(seed=5)), "int4+ef")
    raises(OSError, "metadata")(lambda: checkpoint.load(again, broken))
    again.module.load_state_dict(weights)
    checkpoint.load(again, whole)
    assert torch.equal(train(again, 3, start=3), undisturbed)


def test_a_save_on_a_full_disk(pool: Pool, tmp_path: Path) -> None:
    pool.run(save_on_a_full_disk, str(tmp_path), ranks=2)
