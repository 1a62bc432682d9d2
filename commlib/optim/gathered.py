"""Gathered: the centre of synchronous methods, which every rank keeps, and all move together.

A push is an all-gather of the ranks' coded updates: every rank decodes all of them, its own too,
and adds them in rank order, so the centres stay alike bit for bit without being sent. A rank sends
W-1 payloads, and nothing is coded twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from commlib.communicator import Communicator
from commlib.optim.center import Shape, flat
from commlib.optim.link import references
from commlib.optim.replicas import strangers
from commlib.optim.rules import Takes
from commlib.scheme import Role


class Gathered:
    """See above; `pull` costs nothing.

    Args:
        params: named tensors. The ranks' must be alike at first: by one seed, or broadcast.
        communicator: of the ranks; its policy says how updates travel, without feedback, which a
            gather does not have.

    Raises: ValueError: parameters of several dtypes, a policy with feedback.
    """

    def __init__(
        self, params: Iterable[tuple[str, torch.Tensor]], communicator: Communicator
    ) -> None:
        named = list(params)
        for rule in communicator.policy.rules:
            if rule.role in (None, Role.OTHER) and rule.scheme != rule.scheme.stateless():
                raise ValueError(
                    f"Gathered: the policy has {str(rule.scheme)!r}, allowed: schemes without "
                    f"feedback; use {str(rule.scheme.stateless())!r}"
                )
        self.communicator = communicator
        self._alike = False
        self._shape = Shape.of(named)
        self.given = references(tensor for _, tensor in named)
        self._ndims = tuple(tensor.ndim for _, tensor in named)
        self.copy = flat(tensor for _, tensor in named)
        self.takes: Takes = "updates"
        self.additive = True

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each parameter."""
        return self._shape.sizes

    def pull(self) -> torch.Tensor:
        """The centre."""
        return self.copy

    def push(self, update: torch.Tensor) -> torch.Tensor:
        """Add the updates of all ranks; returns what was added of this one's.

        Raises: RuntimeError: ranks begin with other centres.
        """
        self._check_alike()
        rows = update.new_empty(self.communicator.size, update.numel())
        sizes = self._shape.sizes
        self.communicator.all_gather_segments(
            rows, update, self._shape.names, sizes, self._ndims, sizes, role=Role.OTHER
        ).wait()
        torch.nan_to_num_(rows, nan=0.0, posinf=0.0, neginf=0.0)
        for row in rows:
            self.copy += row
        return rows[self.communicator.rank]

    def state_dict(self) -> dict[str, Any]:
        """The centre; the communicator has a state of its own."""
        return {"copy": self.copy.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`. ValueError: of another number of values."""
        if state["copy"].shape != self.copy.shape:
            raise ValueError(
                f"Gathered: the state has {state['copy'].numel()} values, the parameters "
                f"{self.copy.numel()}"
            )
        self.copy.copy_(state["copy"])
        self._alike = False

    def _check_alike(self) -> None:
        """Once, and after loading: refuse to go on with centres that differ."""
        if self._alike:
            return
        others = strangers(self.communicator, 0, [self.copy.view(torch.uint8)])
        if others:
            raise RuntimeError(
                f"Gathered: ranks {others} have another centre than rank 0: begin with the same "
                "parameters on all, from one seed, by broadcast or from one checkpoint"
            )
        self._alike = True
