"""HSDP and replicate(): only the all-reduce between replicas is compressed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.fsdp import MixedPrecisionPolicy

import commlib
from commlib.integrations.ranked import unranked
from tests.integrations.fsdp_cases import (
    PATIENCE,
    Net,
    equal,
    gradients,
    loss,
    mesh,
    modules,
    relative,
    sharded,
    train,
)
from tests.processes import Pool

pytestmark = pytest.mark.processes


def replicated() -> Any:
    model = Net()
    for block in model.blocks:
        replicate(block)
    return replicate(model)


def hybrid(*shape: int, **how: Any) -> Any:
    return sharded(mesh=mesh(*shape), **how)


MODES: dict[str, Callable[[], Any]] = {
    "2 nodes of 2": lambda: hybrid(2, 2),
    "4 nodes of 1": lambda: hybrid(4, 1),
    "1 node of 4": lambda: hybrid(1, 4),
    "replicate": replicated,
    "bf16, summed in fp32": lambda: hybrid(
        2, 2, mp_policy=MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    ),
    "resharded to pairs": lambda: hybrid(1, 4, reshard_after_forward=2),
}


def every_mode() -> None:
    for name, make in MODES.items():
        plain = train(make(), 2, accumulate=2)
        assert equal(train(commlib.wrap(make(), "fp32"), 2, accumulate=2), plain), name
        error = relative(train(commlib.wrap(make(), "int8+ef"), 2, accumulate=2), plain)
        assert 0 < error < 0.01, (name, error)


def only_the_replicas_are_compressed() -> None:
    model = commlib.wrap(hybrid(2, 2), "int4+ef")
    state = commlib.of(model)
    assert list(state.communicators) == ["replicas"]
    train(model, 2)
    shard = sum(p.to_local().numel() for p in model.parameters())
    sent = state.communicators["replicas"].transport.bytes_sent
    # Per step half of it twice, in 4 bits, and scales and vectors; raw it would be 4 bytes each.
    assert 2 * 0.5 * shard < sent < 2 * 0.7 * shard
    replicas = unranked(state.state_dict())["memory"]["replicas"]
    memory = replicas["compressors"]["int4:round=nearest+ef"]
    for name, p in model.named_parameters():
        rows = -(-p.shape[0] // 2)
        assert memory["residuals"][name].numel() == rows * (p.numel() // p.shape[0])
    # Replicas end with the same bits.
    for name, p in model.named_parameters():
        mine = p.to_local().detach().contiguous()
        everywhere = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(everywhere, mine, group=p.device_mesh.get_group("replicate"))
        assert torch.equal(*everywhere), name


def partial_sums_wait_for_the_last_microbatch() -> None:
    """set_requires_all_reduce(False): reduce-scattered now, averaged between nodes at the end."""

    def gradient(model: Any) -> dict[str, torch.Tensor]:
        for step in range(3):
            for module in modules(model):
                module.set_requires_all_reduce(step == 2)
            loss(model, step).backward()
        return gradients(model)

    plain = gradient(hybrid(2, 2))
    assert equal(gradient(commlib.wrap(hybrid(2, 2), "fp32")), plain)
    model = commlib.wrap(hybrid(2, 2), "int8+ef")
    assert 0 < relative(gradient(model), plain) < 0.01
    rows = [line.split() for line in commlib.of(model).stats().splitlines()]
    assert [row[-5] for row in rows if row[:1] == ["all_reduce"]] == ["1"] * len(modules(model))


def the_mesh_stays_the_users() -> None:
    """The copy of a mesh's facts equals it; what is no all-reduce goes to the group it stands for,
    and unwrapped models on the same mesh know nothing of it."""
    shared = mesh(2, 2)
    plain, wrapped = sharded(mesh=shared), sharded(mesh=shared)
    commlib.wrap(commlib.wrap(wrapped, "int8+ef"), "int4+ef")
    theirs = plain._get_fsdp_state()._fsdp_param_group.mesh_info
    ours = wrapped._get_fsdp_state()._fsdp_param_group.mesh_info
    assert ours == theirs
    assert theirs.replicate_process_group is shared.get_group("replicate")
    stand_in = ours.replicate_process_group
    assert stand_in.inner is theirs.replicate_process_group
    x = torch.full((3,), float(dist.get_rank()))
    dist.broadcast(x, group_src=0, group=stand_in)
    assert x[0] == dist.get_rank() % 2
    everywhere = [torch.empty(3) for _ in range(2)]
    dist.all_gather(everywhere, x, group=stand_in)
    dist.barrier(group=stand_in)


def one_after_the_other(*parts: Callable[[], None]) -> None:
    for part in parts:
        part()


def test_replicas(pool: Pool) -> None:
    pool.run(
        one_after_the_other,
        every_mode,
        only_the_replicas_are_compressed,
        partial_sums_wait_for_the_last_microbatch,
        the_mesh_stays_the_users,
        timeout=PATIENCE,
    )
