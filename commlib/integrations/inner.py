"""The backends under a group of the backend "commlib": what torch would make of their names.

torch makes backends inside `_new_process_group_helper`, together with a group of its own around
them; this is that function's part for one device.
"""

from __future__ import annotations

import datetime
import importlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from commlib.integrations.backend import DEVICES, NAME
from commlib.transport import GLOO

c10d: Any = distributed_c10d  # much of it is missing from the stubs
Type: Any = dist.ProcessGroup.BackendType
FAKE = "torch.testing._internal.distributed.fake_pg"


def parse(inner: str) -> dict[str, str]:
    """The backend of each type of device: {"cpu": "gloo", "cuda": "nccl"}.

    Raises: ValueError: it names what torch does not know, or commlib itself.
    """
    if inner == "auto":
        both = dist.is_nccl_available() and torch.cuda.is_available()
        inner = "cpu:gloo,cuda:nccl" if both else GLOO
    if "fake" in inner:
        importlib.import_module(FAKE)  # registers it
    known = sorted({*dist.Backend.backend_list} - {NAME, "undefined"})
    names = {pair.rpartition(":")[2] for pair in inner.split(",")}
    if not names <= {*known}:
        raise ValueError(
            f"inner is {inner!r}; allowed: 'auto', {', '.join(map(repr, known))}, or one for each "
            "device, as 'cpu:gloo,cuda:nccl'"
        )
    served = c10d.BackendConfig(dist.Backend(inner)).get_device_backend_map()
    return {kind: str(name) for kind, name in served.items() if kind in DEVICES}


def make(served: Mapping[str, str], facts: Any, timeout: datetime.timedelta) -> dict[str, Any]:
    """The c10d backend of each type of device; one and the same where they have one name.

    facts: of the group, torch's `_DistributedBackendOptions`.
    """
    made: dict[str, Any] = {}
    for kind, name in served.items():
        if name not in made:
            store = c10d.PrefixStore(f"{kind}/", facts.store)
            made[name] = _debugged(_make(name, store, facts, timeout), name, store, facts, timeout)
    return {kind: made[name] for kind, name in served.items()}


def backend_type(name: str) -> Any:
    """The type under which c10d keeps a backend."""
    return dist.Backend.backend_type_map.get(name, Type.CUSTOM)


def _make(name: str, store: Any, facts: Any, timeout: datetime.timedelta) -> Any:
    rank, size = facts.group_rank, facts.group_size
    if name == GLOO:
        gloo = c10d.ProcessGroupGloo(store, rank, size, timeout=timeout)
        _describe(gloo.options, facts)
        gloo._set_sequence_number_for_group()
        return gloo
    if name == "nccl":
        options = c10d.ProcessGroupNCCL.Options()
        options.is_high_priority_stream = False
        options._timeout = timeout
        _describe(options, facts)
        nccl = c10d.ProcessGroupNCCL(store, rank, size, options)
        nccl._set_sequence_number_for_group()
        return nccl
    plugin = dist.Backend._plugins.get(name.upper())
    if plugin is None:
        raise ValueError(
            f"inner backend {name!r}: this torch cannot make it outside its own groups"
        )
    if not plugin.extended_api:
        return plugin.creator_fn(store, rank, size, timeout)
    return plugin.creator_fn(facts, None)


def _describe(options: Any, facts: Any) -> None:
    options.global_ranks_in_group = facts.global_ranks_in_group
    options.group_name = facts.group_id


def _debugged(backend: Any, name: str, store: Any, facts: Any, timeout: datetime.timedelta) -> Any:
    """Under TORCH_DISTRIBUTED_DEBUG=DETAIL with torch's own checks around it, like any other."""
    if isinstance(backend, dist.ProcessGroup):
        raise ValueError(f"inner backend {name!r} is itself a process group written in Python")
    if c10d.get_debug_level() != c10d.DebugLevel.DETAIL or not dist.is_gloo_available():
        return backend
    return c10d._create_process_group_wrapper(
        wrapped_pg=backend,
        store_prefix=facts.group_id,
        store=store,
        rank=facts.group_rank,
        world_size=facts.group_size,
        timeout=timeout,
    )
