"""Which uses of DDP leave no room for a communication hook, and what to do instead."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

PYTHON_REDUCER = (
    "torch._dynamo.config.optimize_ddp = 'python_reducer' gives hooks single gradients instead of "
    "buckets; use torch.compile with the default 'ddp_optimizer'"
)
SPARSE = "sparse gradients are not supported; build the embedding with sparse=False"


def as_ddp(model: nn.Module) -> DistributedDataParallel:
    inner = getattr(model, "_orig_mod", model)  # torch.compile(ddp)
    if not isinstance(inner, DistributedDataParallel):
        kind = f"{type(inner).__module__}.{type(inner).__qualname__}"
        if isinstance(inner, FullyShardedDataParallel):
            raise ValueError(
                f"commlib.wrap takes FSDP2 (torch.distributed.fsdp.fully_shard), got FSDP1's "
                f"{kind}, whose hooks see gradients without their names; use fully_shard"
            )
        raise ValueError(
            f"commlib.wrap takes a torch.nn.parallel.DistributedDataParallel, a model sharded by "
            "torch.distributed.fsdp.fully_shard, or a schedule or stage of "
            f"torch.distributed.pipelining, got {kind}; make it one of them first"
        )
    return inner


def device_of(ddp: DistributedDataParallel) -> torch.device:
    """The device of the gradients; ValueError where there is more than one."""
    parameters = ddp.module.named_parameters()
    found: set[torch.device] = {
        p.device for n, p in parameters if p.requires_grad and n not in ddp.parameters_to_ignore
    }
    if len(found) > 1:
        raise ValueError(
            f"the model's parameters lie on {', '.join(sorted(map(str, found)))}, and commlib "
            "serves one device per DDP model; give each rank one device"
        )
    return found.pop()


def check(ddp: DistributedDataParallel, hook: Callable[..., object]) -> None:
    """Refuse what leaves no room for a hook, before DDP does it with less to say."""
    if ddp.mixed_precision is not None:
        raise ValueError(
            "DDP(mixed_precision=...) takes the only communication hook for itself, so gradients "
            "cannot be compressed; use torch.autocast, or cast the model before DDP"
        )
    if any(hasattr(p, "_in_backward_optimizers") for p in ddp.module.parameters()):
        raise ValueError(
            "the model's optimizer runs inside backward (_apply_optimizer_in_backward), which "
            "takes the only communication hook of DDP; step the optimizer after backward"
        )
    if ddp._delay_all_reduce_params:
        raise ValueError(
            "DDP(delay_all_reduce_named_params=...) reduces those parameters past every "
            "communication hook; remove the option"
        )
    if ddp._use_python_reducer:
        raise ValueError(PYTHON_REDUCER)
    sparse = [
        name
        for name, module in ddp.module.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
    ]
    if sparse:
        raise ValueError(f"{SPARSE}; got it from {', '.join(sparse)}")
    foreign = [function for function, _ in ddp._comm_hooks if function is not hook]
    if foreign:
        raise ValueError(
            f"this DDP model already has the communication hook {foreign[0].__qualname__}, and DDP "
            "takes one; build the DDP model without it"
        )
