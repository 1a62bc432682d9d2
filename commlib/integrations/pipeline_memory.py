"""What a pipeline remembers on this rank, for whoever saves, compares, changes or forgets it."""

from __future__ import annotations

import math
from typing import Any

from commlib.agreement import Agreement
from commlib.boundary import Boundary, rescaled
from commlib.integrations.pipeline_checks import compare_sums
from commlib.integrations.pipeline_policy import told_policy
from commlib.integrations.ranked import in_world, ranked, unranked
from commlib.policy import Policy
from commlib.transport import TorchTransport


class Memory:
    """The part of a `Pipeline` that is about its memory."""

    policy: Policy
    transport: TorchTransport
    aborted: str
    _agreement: Agreement
    _boundaries: dict[str, Boundary]
    _saved: dict[str, Any]
    _loaded: bool
    _history: int

    def memory_bytes(self) -> int:
        """Bytes of references and residuals on this rank."""
        return sum(boundary.memory_bytes() for boundary in self._boundaries.values())

    def reset(self) -> None:
        """Forget references and residuals; on all ranks, between steps."""
        self._saved, self._history, self._loaded = {}, 0, False
        for boundary in self._boundaries.values():
            boundary.reset()

    def rescale(self, factor: float) -> None:
        """Multiply the residuals of `+lep` by `factor`, on all ranks, between steps.

        They are in the units of gradients: where a loss scale went from S to S', by S' / S; where
        the learning rate of SGD jumped from a to b, by a / b. ValueError where it is not finite.
        """
        if not math.isfinite(factor):
            raise ValueError(f"rescale: factor is {factor}, it must be finite; reset() forgets")
        for boundary in self._boundaries.values():
            boundary.rescale(factor)
        self._saved = {key: rescaled(saved, factor) for key, saved in self._saved.items()}

    def verify(self) -> None:
        """Compare the references at both ends of every boundary; all ranks call it.

        Raises: RuntimeError, on all ranks, naming the boundaries that differ.
        """
        mine = {key: boundary.checksum() for key, boundary in self._boundaries.items()}
        mine |= {key: saved["checksum"] for key, saved in self._saved.items()}
        compare_sums(self._agreement.gather("verify", mine))

    def state_dict(self) -> dict[str, Any]:
        """References, residuals and counters of this rank: tensors, numbers and strings.

        One file per rank, or this object itself for torch.distributed.checkpoint. A run resumed on
        all ranks is bitwise the uninterrupted one.
        """
        if self.aborted:
            raise RuntimeError(f"a message of this pipeline did not arrive. {self.aborted}")
        rank, size = self.transport.rank, self.transport.size
        state: dict[str, Any] = {"rank": rank, "world_size": size, "history": self._history}
        state["policy"] = str(told_policy(self.policy))
        state["boundaries"] = {key: b.state_dict() for key, b in self._boundaries.items()}
        state["boundaries"] |= self._saved
        return ranked(state, *in_world(rank, size))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()` of the same rank, on all ranks.

        Raises: ValueError: of another rank or policy. RuntimeError: it has changed since.
        """
        state = unranked(state, "boundaries", "policy", "history")
        here = (self.transport.rank, self.transport.size, str(told_policy(self.policy)))
        there = (state["rank"], state["world_size"], state["policy"])
        if here != there:
            raise ValueError(
                f"this is rank {here[0]} of {here[1]} under {here[2]!r}, the state is of rank "
                f"{there[0]} of {there[1]} under {there[2]!r}; load it where it was saved, or "
                "start without it on all ranks"
            )
        self._saved = dict(state["boundaries"])
        for key, boundary in self._boundaries.items():
            boundary.reset()
            if key in self._saved:
                boundary.load_state_dict(self._saved.pop(key))
        self._history, self._loaded = state["history"], True
