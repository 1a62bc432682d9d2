"""DiLoCo among workers that come and go: who is there is agreed on at each exchange (`members`)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from commlib.eager import eager
from commlib.optim.members import LeftOut, Members
from commlib.optim.outer import OPTIONS, Outer, Sync
from commlib.optim.ticks import check_count

logger = logging.getLogger("commlib")


class ElasticDiLoCo(Outer):
    """`DiLoCo` with any non-empty set of workers, which may die, stall, leave and join.

    ::

        outer = ElasticDiLoCo(model.named_parameters(), inner, Members(store), period=100)
        outer.join(at_least=4)                # the run's model and step, if others are at it
        while outer.steps < steps:
            ...
            outer.step()
        outer.leave()

    The mean is over the workers that arrive at an exchange. One that died is not waited for longer
    than the members' `timeout`, once; an exchange that it breaks is repeated without it. One that
    stalled longer is left out: its next `step` waits until it has been let in again, with the model
    and the step of the others, and what it had learned since its last exchange is dropped. A new
    worker waits for the others' next exchange, gets theta, momentum, step and options, and begins
    with an inner optimizer that has seen nothing.

    A worker whose parameters are not finite leaves and raises; the others go on.

    Args: as of `DiLoCo`, with `members` for its communicator. Parameters are on the CPU. There is
        no overlap: a result that waits would be one more thing to hand over.

    Raises: ValueError: what cannot be.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, torch.nn.Parameter]],
        inner: torch.optim.Optimizer | None,
        members: Members,
        *,
        period: int,
        lr: float = 0.7,
        momentum: float = 0.9,
        nesterov: bool = True,
        fragments: int | Sequence[Sequence[str]] = 1,
        on_sync: Callable[[Sync], None] | None = None,
    ) -> None:
        self.members = members
        super().__init__(
            params,
            inner,
            torch.device("cpu"),
            period=period,
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            fragments=fragments,
            on_sync=on_sync,
        )
        self._joined = False

    def join(self, at_least: int = 1, patience: float = 600.0) -> None:
        """Become a member; W, theta, momentum, steps and options are then the run's.

        The first worker of a run is asked for its own: it may have loaded a state before.

        Args:
            at_least: workers, this one included, that the first waits for.
            patience: seconds to wait: the first for these, others for being let in.

        Raises: ValueError: the run has another period, policy or other parameters. RuntimeError:
            nobody let this worker in, or the store does not answer.
        """
        check_count("ElasticDiLoCo: at_least", at_least)
        if self._joined:
            raise RuntimeError("ElasticDiLoCo: this worker has joined already")
        if self.members.enter(self._settings(), at_least, patience):
            self._hand_over()
        else:
            self._take_over(patience)
        self._joined = True
        self.finish()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As `Outer.load_state_dict`, before `join`, where it counts for a run's first worker.

        Raises: RuntimeError: this worker is a member, whose model is that of the others.
        """
        if self._joined:
            raise RuntimeError(
                "ElasticDiLoCo: this worker is a member of a run, whose model is that of all: load "
                "a state before join(), or after leave()"
            )
        super().load_state_dict(state_dict)

    def leave(self) -> None:
        """Take no more part; the others do not wait for this worker. W <- theta."""
        self.members.leave()
        self._joined = False
        self.finish()

    @eager
    @torch.no_grad()
    def tick(self) -> None:
        """As `Outer.tick`; a worker that was left out is let in again before it returns.

        Raises: RuntimeError: not joined; its parameters are not finite; nobody lets it in again.
        """
        before = self.last
        try:
            super().tick()
        except LeftOut:
            logger.warning("ElasticDiLoCo: the others went on without this worker; it joins again")
            self._take_over(PATIENCE)
            self.finish()
            return
        if self.last is not before:
            self._hand_over()

    def _exchange(self, k: int, difference: torch.Tensor) -> None:
        fragment = self.fragments[k]
        bad = fragment.not_finite(difference)
        if bad:
            self.members.leave()
            self._joined = False
            raise RuntimeError(
                f"ElasticDiLoCo: step {self.steps}: {', '.join(bad)} of this worker is not finite; "
                "it has left, and the others go on. join() takes their model"
            )
        self.members.mean(difference, fragment.names, fragment.sizes, fragment.ndims)

    def _hand_over(self) -> None:
        """To those who join."""
        text = {"steps": self.steps, **{name: getattr(self, name) for name in OPTIONS}}
        self.members.welcome([*self._theta, *self._buffers], json.dumps(text))

    def _take_over(self, patience: float) -> None:
        mine = [*self._theta, *self._buffers]
        received = [torch.empty_like(one) for one in mine]  # one that breaks leaves no trace
        text = json.loads(self.members.receive(received, patience))
        for one, new in zip(mine, received, strict=True):
            one.copy_(new)
        self.steps = text.pop("steps")
        for name, value in text.items():
            setattr(self, name, value)
        self._counted = self._sent()

    def _settings(self) -> str:
        return json.dumps(
            {
                "period": self.period,
                "policy": self.members.policy.digest(),
                "momentum": bool(self._buffers),
                "fragments": [list(zip(f.names, f.sizes, strict=True)) for f in self.fragments],
            }
        )

    def _ready(self) -> None:
        if not self._joined:
            raise RuntimeError("ElasticDiLoCo: this worker is no member: call join() first")

    def _sent(self) -> int:
        return self.members.bytes_sent


PATIENCE = 600.0
"""Seconds that a worker which was left out waits to be let in."""
