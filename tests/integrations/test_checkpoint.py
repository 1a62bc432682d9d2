"""Checkpoints with torch.distributed.checkpoint and torch.save, and resuming on other ranks."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

import commlib
import commlib.checkpoint
from tests.integrations import fsdp_cases
from tests.integrations.checkpoint_cases import (
    KINDS,
    POLICY,
    ddp,
    debts,
    descend,
    gradients,
    messages,
    plain,
)
from tests.integrations.ddp_cases import (
    DDP,
    WIDTH,
    assert_same_on_all_ranks,
    mlp,
    raises,
    ranked,
    residuals,
    train,
    unranked,
    weights,
)
from tests.processes import Pool

pytestmark = pytest.mark.processes
PATIENT = {"timeout": 240.0, "group_timeout": 240.0}  # seconds: files, on a busy machine


def parts(model: Any) -> dict[str, Any]:
    """What a user hands to DCP."""
    return {"model": model.module, "commlib": commlib.of(model)}


class FullDisk(dcp.FileSystemWriter):
    """Of rank 1's file only a part gets written."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        if dist.get_rank() == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write_data(plan, planner)


def save(folder: str) -> tuple[torch.Tensor, float]:
    """Three steps, saved in every way; the weights after three steps more, and a loss."""
    model = ddp()
    train(model, 3)
    dcp.save(parts(model), checkpoint_id=f"{folder}/saved")
    group = dist.new_group(backend="gloo")
    saving = dcp.async_save(parts(model), checkpoint_id=f"{folder}/async", process_group=group)
    torch.save(commlib.of(model).state_dict(), f"{folder}/{dist.get_rank()}.pt")
    commlib.checkpoint.save(model, f"{folder}/alone")
    end = train(model, 3, start=3)
    saving.result()

    raises(RuntimeError, "alone failed", "already exists", "of its own")(
        lambda: commlib.checkpoint.save(model, f"{folder}/alone")
    )
    with pytest.raises(CheckpointException, match="No space left"):
        dcp.save(parts(model), storage_writer=FullDisk(f"{folder}/full"))
    raises(OSError, "metadata")(lambda: commlib.checkpoint.load(model, f"{folder}/full"))

    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]  # two models, each over two ranks
    mine = dist.get_rank() % 2
    model = ddp(seed=mine, process_group=pairs[mine])
    train(model, 2)
    commlib.checkpoint.save(model, f"{folder}/pairs")
    before = residuals(model)
    commlib.of(model).reset()
    commlib.checkpoint.load(model, f"{folder}/pairs")
    assert all(torch.equal(x, before[path]) for path, x in residuals(model).items())
    torch.save(before, f"{folder}/pairs-{dist.get_rank()}.pt")

    model = ddp()
    descend(model, range(4))
    dcp.save(parts(model), checkpoint_id=f"{folder}/descent")
    return end, descend(model, range(4, 12))


def load_the_same(folder: str) -> list[torch.Tensor]:
    """By DCP, by DCP of what was saved asynchronously, and apart from the model: the same run."""
    load, ends = commlib.checkpoint.load, []
    for entries in ("saved", "async", "alone"):
        model = ddp(seed=5)
        given = parts(model) if entries == "saved" else {"model": model.module}
        dcp.load(given, checkpoint_id=f"{folder}/saved")
        if entries != "saved":
            load(model, f"{folder}/{entries}")
        ends.append(train(model, 3, start=3))
    return ends


def test_as_many_ranks_go_on_bitwise_and_others_close(pool: Pool, tmp_path: Path) -> None:
    saved = pool.run(save, str(tmp_path), ranks=4, **PATIENT)
    resumed = pool.run(load_the_same, str(tmp_path), ranks=4, **PATIENT)
    for ends, (expected, _) in zip(resumed, saved, strict=True):
        assert all(torch.equal(end, expected) for end in ends)
    for ranks in (2, 3):
        for loss, exact in pool.run(load_elsewhere, str(tmp_path), ranks=ranks, **PATIENT):
            assert loss == pytest.approx(exact, rel=0.01)
            assert saved[0][1] == pytest.approx(exact, rel=0.01)
    pool.run(refusals, str(tmp_path), ranks=2, **PATIENT)


def load_elsewhere(folder: str) -> tuple[float, float]:
    """On other ranks: the loss after resuming, and that of a run without compression."""
    model = ddp()
    rank, size = dist.get_rank(), dist.get_world_size()
    with pytest.raises(CheckpointException, match=f"commlib.rank {rank} of {size}"):
        dcp.load(parts(model), checkpoint_id=f"{folder}/saved")
    commlib.checkpoint.load(model, f"{folder}/saved")
    found = residuals(model)
    files = [torch.load(f"{folder}/{r}.pt", weights_only=True) for r in range(4)]
    commlib.of(model).reset()
    commlib.of(model).load_states(iter(files))
    assert all(torch.equal(x, found[path]) for path, x in residuals(model).items())
    made = commlib.checkpoint.redistribute(files, size)
    commlib.of(model).load_state_dict(made[rank])
    assert all(torch.equal(x, found[path]) for path, x in residuals(model).items())
    for name, debt in debts(files).items():
        assert torch.allclose(debts(made)[name], debt, rtol=0, atol=1e-7)

    model, exact = ddp(), plain("ddp")
    dcp.load({"model": model.module}, checkpoint_id=f"{folder}/descent")
    commlib.checkpoint.load(model, f"{folder}/descent")
    loss = descend(model, range(4, 12))
    assert_same_on_all_ranks(weights(model))
    return loss, descend(exact, range(12))


def refusals(folder: str) -> None:
    """Everything that would lose residuals without a word."""
    model = ddp()
    state = commlib.of(model)
    files = [torch.load(f"{folder}/{r}.pt", weights_only=True) for r in range(4)]
    halves = commlib.checkpoint.redistribute(files, 2)
    for states, *words in (
        ([], "no states"),
        (files[:3], "ranks 3 to 3 of 4 are missing"),
        (files[1:], "rank 0 is next", "rank 1 of 4"),
        ([files[0], files[2]], "rank 1 of 4 is next", "rank 2 of 4"),
        ([{"rank 0 of 4": 7}], "rank 0 of 4", "memory"),
        ([{"model": 7}], "got model"),
        (halves[1:], "rank 0 of 2 is next"),
        (halves[: dist.get_rank()], "missing" if dist.get_rank() else "no states"),
    ):
        raises(ValueError, *words)(lambda states=states: state.load_states(states))
    raises(ValueError, "rank 0 of 4")(lambda: state.load_state_dict(files[0]))

    dcp.save({"model": model.module}, checkpoint_id=f"{folder}/bare")
    raises(ValueError, "bare", "has none", "commlib.of(model)")(
        lambda: commlib.checkpoint.load(model, f"{folder}/bare")
    )
    dcp.save({"a": state, "b": state}, checkpoint_id=f"{folder}/two")
    raises(ValueError, "has a, b", "entry=")(
        lambda: commlib.checkpoint.load(model, f"{folder}/two")
    )
    commlib.checkpoint.load(model, f"{folder}/two", entry="b")
    raises(ValueError, "ranks [0, 1]", "[0, 7]")(
        lambda: commlib.checkpoint.load(model, f"{folder}/two", entry="b", ranks=[0, 7])
    )

    load = commlib.checkpoint.load
    other = ddp("sign+ef")
    raises(ValueError, "int4:round=nearest+ef", "sign+ef", "policy")(
        lambda: load(other, f"{folder}/saved")
    )
    rules = {"rules": [{"scheme": "int8+ef", "key": "2.*"}, {"scheme": "int4+ef", "min_ndim": 2}]}
    raises(ValueError, "'2.weight'", "int8:round=nearest+ef")(
        lambda: load(commlib.wrap(DDP(mlp()), rules), f"{folder}/saved")
    )
    renamed = commlib.wrap(DDP(nn.ModuleDict({"net": mlp()})), "int4+ef")
    raises(ValueError, "unknown parameter '", "net.0.weight")(
        lambda: load(renamed, f"{folder}/saved")
    )
    narrow = nn.Sequential(nn.Linear(WIDTH, WIDTH // 2), nn.ReLU(), nn.Linear(WIDTH // 2, WIDTH))
    raises(ValueError, "'0.weight' has 2304 elements", "1152")(
        lambda: load(commlib.wrap(DDP(narrow), "int4+ef"), f"{folder}/saved")
    )
    assert not residuals(other)

    raises(ValueError, "4 ranks", "a group of 2", "ranks=")(lambda: load(model, f"{folder}/pairs"))
    load(model, f"{folder}/pairs", ranks=[1, 3])
    theirs = torch.load(f"{folder}/pairs-{1 + 2 * dist.get_rank()}.pt")
    assert all(torch.equal(x, theirs[path]) for path, x in residuals(model).items())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_owed_reaches_other_ranks(pool: Pool, tmp_path: Path, kind: str) -> None:
    """All that came before and after, and what is owed still: the exact gradients of all steps."""
    path = str(tmp_path / "saved")
    came, want, states = zip(
        *pool.run(messages, kind, None, path, range(2), ranks=4, **PATIENT), strict=True
    )
    for ranks in (3, 2):
        more, wanted, ends = zip(
            *pool.run(messages, kind, path, None, range(2, 4), ranks=ranks, **PATIENT), strict=True
        )
        owed, start = debts(list(ends)), debts(list(states))
        assert any(x.abs().max() > 0.02 * want[0][n].abs().max() for n, x in start.items())
        for name, exact in want[0].items():
            exact = exact.flatten() + wanted[0][name].flatten()
            found = came[0][name].flatten() + more[0][name].flatten()
            found += owed.get(name, torch.zeros(1))[: exact.numel()]
            assert (found - exact).abs().max() < 2e-6 * max(1.0, exact.abs().max()), name


def groups_among_the_ranks(folder: str) -> None:
    """HSDP's replicas: which ranks had which shard is not carried over, and that is told."""
    model = commlib.wrap(fsdp_cases.sharded(mesh=fsdp_cases.mesh(2, 2)), POLICY)
    gradients(model, 0)
    torch.save(commlib.of(model).state_dict(), f"{folder}/{dist.get_rank()}.pt")
    dist.barrier()
    files = [torch.load(f"{folder}/{r}.pt", weights_only=True) for r in range(4)]
    held = sum(
        saved.nbytes
        for state in files
        for memory in unranked(state)["memory"]["replicas"]["compressors"].values()
        for saved in memory["residuals"].values()
    )
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("commlib").addHandler(handler)
    made = commlib.checkpoint.redistribute(files, 3)
    logging.getLogger("commlib").removeHandler(handler)
    assert told == [
        f"the residuals of communicator 'replicas' ({held} bytes) are of groups among the ranks: "
        "dropped, and starting from zero"
    ]
    assert held > 0
    assert unranked(made[2])["memory"] == {}


def test_what_is_dropped_is_told(pool: Pool, tmp_path: Path) -> None:
    pool.run(groups_among_the_ranks, str(tmp_path), ranks=4, **PATIENT)


def test_ranked() -> None:
    state = {"rank": 0, "world_size": 2, "history": 0}
    assert unranked(ranked(state, 3, 4), "history") is state
    for wrong in (state, {}, None, ranked({}, 3, 4), ranked({"history": 0}, 3, 4)):
        raises(ValueError, "such as 'rank 0 of 4'", "history")(
            lambda wrong=wrong: unranked(wrong, "history")
        )
