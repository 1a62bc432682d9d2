"""Counters: how many messages each name has had, which is its place in its random streams.

On CPU they are numbers. On CUDA those of codecs that round at random lie on the device: a captured
CUDA graph then counts on with every replay, and the host never has to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

Names = tuple[str, ...]
Step = int | torch.Tensor
"""A count; on a device an int64 scalar that is overwritten by the next one."""


class Counters(Protocol):
    """Messages by name. Names that travel together count on from the furthest of them."""

    def advance(self, names: Names) -> None:
        """Begin the next message of `names`."""

    def of(self, names: Names) -> Step:
        """The number of their message; 0 before the first."""

    def state(self) -> dict[str, int]:
        """All counts; of a device that has done what was queued."""

    def load(self, state: dict[str, int]) -> None:
        """Take up what `state` gave."""


class HostCounters:
    """Numbers on the host."""

    def __init__(self) -> None:
        self._steps: dict[str, int] = {}

    def advance(self, names: Names) -> None:
        step = 1 + max(self._steps.get(name, 0) for name in names)
        for name in names:
            self._steps[name] = step

    def of(self, names: Names) -> int:
        return self._steps.get(names[0], 0)

    def state(self) -> dict[str, int]:
        return dict(self._steps)

    def load(self, state: dict[str, int]) -> None:
        self._steps = dict(state)


class DeviceCounters:
    """One scalar on the device per group of names, as long as they travel together."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._steps: dict[str, Step] = {}  # scalars of groups, and numbers that were loaded
        self._groups: dict[Names, torch.Tensor] = {}

    def advance(self, names: Names) -> None:
        group = self._groups.get(names)
        if group is None:
            group = self._regroup(names)
        group.add_(1)

    def of(self, names: Names) -> Step:
        return self._steps.get(names[0], 0)

    def state(self) -> dict[str, int]:
        if not self._steps:
            return {}
        steps = [torch.as_tensor(step, device=self._device) for step in self._steps.values()]
        return dict(zip(self._steps, map(int, torch.stack(steps).tolist()), strict=True))

    def load(self, state: dict[str, int]) -> None:
        self._steps = dict(state)
        self._groups.clear()

    def _regroup(self, names: Names) -> torch.Tensor:
        """A scalar for `names`, at the furthest of them; groups that held one of them are gone."""
        steps = [self._steps.get(name, 0) for name in names]
        furthest = max((step for step in steps if isinstance(step, int)), default=0)
        with torch.inference_mode(False):  # training goes on with what evaluation began
            group = torch.full((), furthest, dtype=torch.int64, device=self._device)
        for old in _different(steps):
            torch.maximum(group, old, out=group)
        for other in [other for other in self._groups if not set(names).isdisjoint(other)]:
            del self._groups[other]
        self._steps.update(dict.fromkeys(names, group))
        self._groups[names] = group
        return group


def counters(device: torch.device, *, stochastic: bool) -> Counters:
    """The counters of a codec on `device`. stochastic: whether its bytes depend on them."""
    on_device = stochastic and device.type == "cuda"
    return DeviceCounters(device) if on_device else HostCounters()


def _different(steps: Sequence[Step]) -> list[torch.Tensor]:
    return list({id(step): step for step in steps if isinstance(step, torch.Tensor)}.values())
