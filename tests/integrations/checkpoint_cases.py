"""What the ranks of the checkpoint tests run: models of DDP and FSDP2, and the sums they owe."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import commlib
import commlib.checkpoint
from commlib.integrations.ranked import unranked
from tests.integrations import fsdp_cases
from tests.integrations.ddp_cases import DDP, batch, mlp

Named = dict[str, torch.Tensor]
KINDS = ("ddp", "fsdp")
POLICY = "int4+ef"


def ddp(policy: str = POLICY, seed: int = 0, **how: Any) -> Any:
    return commlib.wrap(DDP(mlp(seed), bucket_cap_mb=0.004, **how), policy)


def plain(kind: str) -> Any:
    return DDP(mlp()) if kind == "ddp" else fsdp_cases.sharded()


def gradients(model: Any, step: int) -> Named:
    """The mean gradients of one backward, whole, in fp64."""
    model.zero_grad()
    model(batch(step)).square().mean().backward()
    found = {}
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        found[name.removeprefix("module.")] = grad.double().clone()
    return found


def messages(kind: str, load: str | None, save: str | None, steps: range) -> tuple[Any, ...]:
    """Backwards with constant weights: what arrived, what should have, and the state after."""
    model, exact = commlib.wrap(plain(kind), POLICY), plain(kind)
    if load is not None:
        commlib.checkpoint.load(model, load)
    came, want = ([gradients(m, step) for step in steps] for m in (model, exact))
    if save is not None:
        commlib.checkpoint.save(model, save)
    return total(came), total(want), commlib.of(model).state_dict()


def total(parts: list[Named]) -> Named:
    return {name: sum(part[name] for part in parts) for name in parts[0]}  # type: ignore[misc]


def debts(states: list[Any]) -> Named:
    """What the next results are owed, by name, flat, in fp64; from all ranks' states."""
    sums: Named = {}
    chunks: dict[str, list[torch.Tensor]] = {}
    for state in states:
        for memory in unranked(state)["memory"]["gradients"]["compressors"].values():
            for name, h in memory["residuals"].items():
                parameter, _, owner = name.partition("|")
                if owner:
                    chunks.setdefault(parameter, []).append(h.double())
                else:
                    sums[name] = sums.get(name, 0) + h.double().flatten() / len(states)
    whole = {n: x + (torch.cat(chunks[n]) if n in chunks else 0) for n, x in sums.items()}
    return {n: x for n, x in whole.items() if x.any()}


def shared_batch(step: int) -> torch.Tensor:
    """This rank's part of a batch that is the same whatever the ranks: 24 = 2 * 12 = 4 * 6."""
    whole = torch.cat([batch(step, rank) for rank in range(3)])
    return whole[dist.get_rank() :: dist.get_world_size()]


def descend(model: Any, steps: range) -> float:
    """SGD on the shared batches; the loss after it on one more, the same on all ranks."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in steps:
        optimizer.zero_grad()
        model(shared_batch(step)).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        return float(model(torch.cat([batch(99, rank) for rank in range(3)])).square().mean())
