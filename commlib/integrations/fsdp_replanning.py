"""Re-planning for FSDP2: a scheme per parameter by the gradients as they are (`replanning`).

What is planned is what a communicator carries: the rows of a reduce-scatter, or with replicas the
shard that is averaged between them. Each communicator has plans of its own, the same on its ranks,
which are those that exchange.

FSDP2 tells of no step. One begins with the first group that is reduced after a backward has ended
for it, or, where none does (pipelines reduce outside of autograd), with the first that comes again.
Autograd's own count of backwards is of no use: reentrant checkpointing runs others inside of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from commlib.communicator import Communicator
from commlib.integrations.fsdp_groups import Segments
from commlib.integrations.replanning import Replanner
from commlib.policy import Policy


class Watched:
    """The gradients of one communicator, whose steps are backwards."""

    def __init__(self, replanner: Replanner) -> None:
        self.replanner = replanner
        self._seen: set[tuple[str, ...]] = set()  # in the step that goes on
        self._ended: set[str] = set()  # names of groups whose backward has ended since it began

    def see(
        self, communicator: Communicator, segments: Segments, x: torch.Tensor, rows: int = 1
    ) -> Policy | None:
        """Gradients of a group about to be sent, `rows` times its segments; the new policy, if any.

        Before the first group of a step there may be one, in force then.
        """
        policy, again = None, not self._ended.isdisjoint(segments.keys)
        if not self._seen or again or segments.keys in self._seen:
            self.settle()
            policy = self.replanner.before_step(communicator)
        self._seen.add(segments.keys)
        parts = x.view(rows, sum(segments.sizes)).split(list(segments.sizes), dim=1)
        self.replanner.see(segments.keys, parts, last=False)
        return policy

    def ended(self, names: Sequence[str]) -> None:
        """A backward has ended for the group with these names; others may be reduced yet."""
        self._ended.update(names)

    def settle(self) -> None:
        """No more gradients come in this step."""
        if self._seen:
            self.replanner.see((), (), last=True)
        self._seen.clear()
        self._ended.clear()

    def state_dict(self) -> dict[str, Any]:
        """As of `Replanner`, between two steps."""
        self.settle()
        return self.replanner.state_dict()
