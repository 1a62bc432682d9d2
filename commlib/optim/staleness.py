"""How old the values are that updates were made on, and the gradients that a residual holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

NONE = torch.iinfo(torch.int64).max


class Staleness(NamedTuple):
    """A summary of delays, in updates of the centre."""

    updates: int
    p50: int
    p99: int
    max: int


def staleness(delays: Mapping[int, int]) -> Staleness:
    """Of a histogram (delay -> how many updates) such as `Center.delays`; zeros where it is empty.

    p50 and p99 are the smallest delays that 50 and 99 of 100 updates do not exceed.
    """
    total, seen = sum(delays.values()), 0
    found = dict.fromkeys((50, 99, 100), 0)
    for delay in sorted(delays, reverse=True):
        # from the largest down: `delay` still covers what is not above it
        for percent in found:
            if (total - seen) * 100 >= percent * total:
                found[percent] = delay
        seen += delays[delay]
    return Staleness(total, *found.values())


class ResidualVersions:
    """On which version the oldest gradient in each element of a residual was made.

    Under error feedback a message carries more than its own gradient: what earlier ones left. An
    element of which nothing was sent (it arrives as 0) keeps its version, as what was held back is
    in it still; of one that was sent the oldest goes first, and what rounding leaves is of the
    gradient just made. An element without a residual has no version.

    Args:
        numel: elements of the residual. 8 bytes each.
    """

    def __init__(self, numel: int) -> None:
        self.versions = torch.full((numel,), NONE)

    def sent(self, residual: torch.Tensor, arrives: torch.Tensor, version: int) -> None:
        """Take in a message: of a gradient of `version`, which leaves `residual`."""
        self.versions.clamp_(max=version)
        self.versions[arrives != 0] = version
        self.versions[residual == 0] = NONE

    @property
    def oldest(self) -> int | None:
        """The oldest version in the residual; None: it is empty."""
        found = int(self.versions.min()) if self.versions.numel() else NONE
        return None if found == NONE else found

    def before(self, version: int) -> torch.Tensor:
        """Which elements hold something older than `version`."""
        return self.versions < version

    def drop(self, elements: torch.Tensor) -> None:
        """Forget these elements, whose residual was dropped."""
        self.versions[elements] = NONE
