"""Which calls of a group of the backend "commlib" are compressed; remembered, as all calls ask.

Decided from the policy, dtype and numbers of elements, which all ranks share.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d

from commlib.communicator import Communicator
from commlib.integrations import groups, routes
from commlib.integrations.backend import NAME
from commlib.plans import is_exact, why_raw
from commlib.policy import EXACT_BELOW_NUMEL, Policy, Role, Rule, TensorInfo
from commlib.scheme import DTYPES
from commlib.transport import backends

c10d: Any = distributed_c10d  # its table of groups is missing from the stubs

# What a call carries; numbers, as the hash of a `Role` takes too long for every call.
GRADIENT, ACTIVATION, PARAMETER, MESSAGE = range(4)
ROLES = (Role.GRADIENT, Role.ACTIVATION, Role.PARAMETER)
CODED = frozenset(DTYPES)
PLAIN = (torch.Tensor, nn.Parameter)  # others only look like tensors, while a program is traced
MAX_CHOICES = 4096
ANY = sys.maxsize  # elements, where each rank knows for itself alone how many


class Choices:
    """The choices of one group, until its policy changes (`renew`).

    lossless: nothing is ever compressed. parameters: some rule of the policy names them. least:
    elements below which nothing is compressed. held: nothing is, for now. used: something was.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = weakref.ref(group)  # which keeps this
        self._size = group.size()
        self._devices = frozenset(backends(group))
        self._made: dict[Any, bool] = {}
        self.held = self.used = False
        self.renew()

    def renew(self) -> None:
        """Look at the group's policy again."""
        group = self._group()
        assert group is not None
        policy = groups.policy(group)
        rules: tuple[Rule, ...] = ()  # of "auto", which names no role
        self.lossless = self._size == 1
        if isinstance(policy, Policy):
            rules = policy.rules
            self.lossless |= policy.lossless
        self.parameters = not self.lossless and any(r.role is Role.PARAMETER for r in rules)
        lossy = [rule.min_numel for rule in rules if not rule.scheme.lossless]
        self.least = min(lossy, default=EXACT_BELOW_NUMEL)  # "auto" measures from there on
        self._made.clear()

    def take(self, what: int, numel: int, x: torch.Tensor, *others: torch.Tensor) -> bool:
        """Whether a call on `numel` elements like those of `x` is compressed; ANY: on how many."""
        if self.lossless or numel < self.least or x.dtype not in CODED:
            return False
        key = (what, numel, x.dtype, x.ndim, x.is_cuda)
        taken = self._made.get(key)
        if taken is None:
            if is_exact() or self.held:
                return False
            if len(self._made) >= MAX_CHOICES:
                self._made.clear()
            taken = self._made[key] = self._choose(what, numel, x)
        now = taken and not is_exact() and not self.held
        return now and all(self._dense(t, x) for t in (x, *others))

    def take_parts(
        self, what: int, numel: int, x: torch.Tensor, parts: Sequence[torch.Tensor]
    ) -> bool:
        """As `take`, where a list has a part like `x` for every rank."""
        return (
            not self.lossless
            and len(parts) == self._size
            and all(part.numel() == x.numel() for part in parts)
            and self.take(what, numel, x, *parts)
        )

    def scatters(self, output: torch.Tensor, input: torch.Tensor) -> bool:
        """As `take`, of a flat reduce_scatter."""
        numel = input.numel()
        if self.lossless or numel < self.least:
            return False
        return numel == self._size * output.numel() and self.take(GRADIENT, numel, input, output)

    def gathers(self, output: torch.Tensor, input: torch.Tensor) -> bool:
        """As `take`, of a flat all_gather."""
        if not self.parameters:
            return False
        numel = input.numel()
        return output.numel() == self._size * numel and self.take(PARAMETER, numel, input, output)

    def route(self, x: torch.Tensor) -> Communicator:
        """What carries tensors like `x`, of which nothing is remembered: said once."""
        group = self._group()
        assert group is not None
        found = groups.communicator(group, x.device)
        groups.tell_anonymous(group, found.policy)
        self.used = True
        return found

    def _choose(self, what: int, numel: int, x: torch.Tensor) -> bool:
        group = self._group()
        assert group is not None
        self._devices -= _of_others(group)
        if x.device.type not in self._devices:
            return False
        if what == MESSAGE:
            return routes.is_compressed(group, x)
        policy, role = groups.policy(group), ROLES[what]
        if isinstance(policy, str):  # "auto": what measuring finds, and it finds no role
            policy = self.route(x).policy
        if numel == ANY:
            lossy = [rule for rule in policy.rules if not rule.scheme.lossless]
            return any(rule.role in (None, role) for rule in lossy)
        ndim = x.ndim if x.ndim > 1 else None  # one dimension may be a flat buffer of anything
        infos = [
            TensorInfo(None, numel, x.dtype, role, ndim, step)
            for step in {0, *(rule.from_step for rule in policy.rules)}
        ]
        if what == PARAMETER:
            infos = [info for info in infos if getattr(policy.rule(info), "role", None) is role]
        if any(not policy.choose(info).lossless for info in infos):
            return True
        reason = next((why for info in infos if (why := why_raw(policy, info))), None)
        if reason is not None:
            groups.meter(group, x.device).not_compressed(None, reason)
        return False

    def _dense(self, x: torch.Tensor, like: torch.Tensor) -> bool:
        return (
            x.__class__ in PLAIN
            and x.layout is torch.strided
            and x.dtype is like.dtype
            and x.device == like.device
            and x.device.type in self._devices
        )


def _of_others(group: dist.ProcessGroup) -> set[str]:
    """The types of devices that the user gave to another backend: the CPU of
    "cpu:gloo,cuda:commlib". torch leaves their calls to this group as well, and only writes down
    what was asked for, once the group is made.
    """
    pairs = (pair.split(":") for pair in c10d._world.pg_backend_config.get(group, "").split(","))
    return {pair[0] for pair in pairs if pair[-1] != NAME}
