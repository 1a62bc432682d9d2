"""What commlib.wrap takes as an FSDP2 model, which uses leave no room, and what to do instead."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)
from torch.distributed.fsdp._fully_shard._fsdp_common import DDPMeshInfo

from commlib.algorithms import TwoPhase
from commlib.integrations.fsdp_comms import OURS
from commlib.modes import ErrorFeedback
from commlib.policy import Policy, check_mode
from commlib.scheme import Role


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that was given to `torch.compile`, or the module itself."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


def is_fsdp(model: nn.Module) -> bool:
    """Whether FSDP2 shards the module or something in it."""
    return any(isinstance(module, FSDPModule) for module in unwrapped(model).modules())


def groups_of(model: nn.Module) -> list[Any]:
    """Every parameter group of FSDP2 below `model`, in the order of its modules.

    Raises: ValueError: a module has parameters on several meshes.
    """
    found: dict[Any, None] = {}
    for name, module in unwrapped(model).named_modules():
        if not isinstance(module, FSDPModule):
            continue
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # before 2.13 a module had one at most
            groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
        if len(groups) > 1:
            raise ValueError(
                f"module {name!r} shards its parameters over several meshes (ShardPlacementResult "
                "of shard_placement_fn), and FSDP2 gives such modules no communication of their "
                "own; call fully_shard on a module per mesh"
            )
        found.update(dict.fromkeys(groups))
    return list(found)


def check(groups: list[Any], *, gathers: bool) -> None:
    """Refuse what leaves no room for commlib's collectives (ValueError)."""
    for group in groups:
        comms = [group._reduce_scatter_comm, *([group._all_gather_comm] if gathers else [])]
        for comm in comms:
            if type(comm) not in (DefaultReduceScatter, DefaultAllGather, *OURS):
                raise ValueError(
                    f"this FSDP2 model already has a communication of its own, a "
                    f"{type(comm).__qualname__} (set_custom_reduce_scatter, set_custom_all_gather, "
                    "set_symm_mem_for_comm, set_allocate_memory_from_process_group_for_comm), "
                    "where commlib's would stand; leave that call out"
                )
    devices = {group.device for group in groups}
    if len(devices) > 1:
        raise ValueError(
            f"the model's parameters lie on {', '.join(sorted(map(str, devices)))}, and commlib "
            "serves one device per model; give each rank one device"
        )


def check_gradients(policy: Policy | str, groups: list[Any]) -> None:
    """Refuse schemes that gradients of these groups cannot have (ValueError)."""
    if isinstance(policy, str):
        return
    scattered = any(not isinstance(group.mesh_info, DDPMeshInfo) for group in groups)
    for rule in policy.rules:
        scheme = rule.scheme
        if rule.role not in (None, Role.GRADIENT):
            continue
        check_mode(scheme, Role.GRADIENT)
        if scattered and not scheme.lossless and not isinstance(scheme.algorithm, TwoPhase):
            raise ValueError(
                f"scheme {str(scheme)!r}: gradients of sharded parameters are reduce-scattered, "
                "which goes one way: parts to their owners, who add them; leave @"
                f"{scheme.algorithm} out"
            )


def check_parameters(policy: Policy | str) -> None:
    """Refuse what parameters cannot have (ValueError)."""
    if isinstance(policy, str):
        raise ValueError(
            "parameters='auto' is not measured: parameters lose precision by every scheme but "
            "fp32; name one, such as int8"
        )
    for rule in policy.rules:
        scheme = rule.scheme
        if isinstance(scheme.feedback, ErrorFeedback):
            raise ValueError(
                f"parameters={str(scheme)!r}: a parameter is a value, not an increment, and "
                f"yesterday's residual has no place in it; use {str(scheme.stateless())!r}, or "
                f"{scheme.codec}+delta"
            )
        check_mode(scheme, Role.PARAMETER)
