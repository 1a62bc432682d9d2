"""FSDP2: stretches without compression, gathers on a 2-D mesh, a rank dying while it gathers."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
import torch.distributed as dist

import commlib
from tests.integrations.ddp_cases import batch
from tests.integrations.fsdp_cases import (
    PATIENCE,
    Net,
    equal,
    gradients,
    loss,
    mesh,
    modules,
    sharded,
    train,
)
from tests.processes import Pool

pytestmark = pytest.mark.processes


def gathered(model: Any) -> dict[str, torch.Tensor]:
    """The whole parameters as forward would see them, the same on all ranks or an error."""
    for module in modules(model):
        module.unshard()
    whole = {n: p.detach().clone() for n, p in model.named_parameters()}
    for module in modules(model):
        module.reshard()
    for name, p in whole.items():
        everywhere = [torch.empty_like(p) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, p.contiguous())
        assert all(torch.equal(p, other) for other in everywhere), name
    return whole


def stretches() -> None:
    """In `exact()` gradients and gathers are the unwrapped model's; afterwards it goes on coding
    where it was: with differences to what all ranks hold."""
    for parameters in ("int8", "int4+delta"):
        model = commlib.wrap(sharded(), "int4+ef", parameters=parameters)
        plain = sharded()
        train(model, 2)
        plain.load_state_dict(model.state_dict())
        true = gathered(plain)
        assert not equal(gathered(model), true)
        with commlib.exact():
            assert equal(gathered(model), true)
            for each in (model, plain):
                each.zero_grad()
                loss(each, 5).backward()
            assert equal(gradients(model), gradients(plain))
            model.zero_grad()
        train(model, 2, start=6)
        plain.load_state_dict(model.state_dict())
        true, seen = gathered(plain), gathered(model)
        for name, p in true.items():
            if p.dim() > 1:
                assert 0 < (seen[name] - p).norm() < 0.02 * p.norm(), (parameters, name)
            else:
                assert torch.equal(seen[name], p)


def gathers_within_a_node() -> None:
    """HSDP with `parameters=`: the gathers of a node's shards are compressed as well."""
    plain = train(sharded(mesh=mesh(2, 2)), 2)
    for gradient_scheme, parameters in (("fp32", "int8"), ("int8+ef", "int4+delta")):
        model = commlib.wrap(sharded(mesh=mesh(2, 2)), gradient_scheme, parameters=parameters)
        mine = train(model, 2)
        state = commlib.of(model)
        assert set(state.communicators) == {"parameters", "replicas"}
        sent = state.communicators["parameters"].transport.bytes_sent
        numel = sum(p.numel() for p in Net().parameters())
        # Two forwards and backwards gather half of it each, which raw is 2 bytes per element.
        assert 0 < sent < 0.6 * 4 * 2 * numel, (parameters, sent)
        for name, p in mine.items():
            assert (p - plain[name]).norm() < 0.02 * plain[name].norm(), (parameters, name)
        gathered(model)


def dies_while_gathering(victim: int) -> str:
    """What a living rank says when `victim` is killed in forward, before it has gathered all."""
    model = commlib.wrap(sharded(), "int8+ef", parameters="int8")
    train(model, 1)
    if dist.get_rank() == victim:
        model.blocks[1].register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    try:
        with torch.no_grad():
            for step in range(3):
                model(batch(step))
    except RuntimeError as error:
        return str(error)
    return ""


def test_stretches_without_compression(pool: Pool) -> None:
    pool.run(stretches, ranks=3, timeout=PATIENCE)


def test_gathers_of_hybrid_shards(pool: Pool) -> None:
    pool.run(gathers_within_a_node, ranks=4, timeout=PATIENCE)


def test_a_rank_that_dies_while_it_gathers(pool: Pool) -> None:
    how = {"group_timeout": 20.0, "may_die": True, "timeout": PATIENCE}
    texts = pool.run(dies_while_gathering, 1, ranks=3, **how)
    assert texts[1] is None
    for rank in (0, 2):
        assert f"rank {rank} of 3" in texts[rank], texts[rank]
        assert "all_gather" in texts[rank]
