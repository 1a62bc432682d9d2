"""What commlib knows about a wrapped model on this rank: its communicators and what they remember.

`commlib.of(model)` gives one: `DDPState`, `FSDPState`.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from commlib.communicator import Communicator
from commlib.integrations import channel
from commlib.policy import Policy, Scheme

log = logging.getLogger("commlib")

PolicyLike = str | Scheme | Policy | dict[str, Any]

DEFAULT = "int8+ef"


class State:
    """One or more communicators under names, and the verbs that concern their memory.

    The communicators are made on first use, so a state may be built before the process group.

    Args:
        policy: scheme text, `Policy`, table or path of a policy file; None: COMMLIB_POLICY, else
            "int8+ef".
        seed: of the random streams.
        timeout: seconds a collective may take; None: the group's.
    """

    def __init__(
        self, policy: PolicyLike | None = None, *, seed: int = 0, timeout: float | None = None
    ) -> None:
        self.policy: Policy | str = parsed(policy or os.environ.get("COMMLIB_POLICY") or DEFAULT)
        self.seed = seed
        self.timeout = timeout
        self._communicators: dict[str, Communicator] | None = None
        self._saved: dict[str, Any] | None = None  # loaded once there are communicators

    def _open(self) -> dict[str, Communicator]:
        """Make the communicators, on all ranks alike."""
        raise NotImplementedError

    def _place(self) -> tuple[int, int]:
        """This rank and how many there are, among those that hold the model."""
        raise NotImplementedError

    @property
    def communicators(self) -> dict[str, Communicator]:
        """By what they carry; the first access makes them, on all ranks alike."""
        if self._communicators is None:
            self._communicators = self._open()
            if self._saved is not None:
                saved, self._saved = self._saved, None
                self._restore(saved)
        return self._communicators

    def state_dict(self) -> dict[str, Any]:
        """Residuals and step counters by parameter name: tensors, numbers and strings only.

        They belong to this rank: save one file per rank. A resumed run is bitwise the uninterrupted
        one.
        """
        rank, size = self._place()
        memory = {name: c.state_dict() for name, c in self.communicators.items()}
        return {"rank": rank, "world_size": size, "memory": memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()` of the same rank in a group of the same size.

        Raises:
            ValueError: the state is another rank's or comes from another number of ranks.
        """
        complaint = self._mismatch(state)
        if complaint:
            raise ValueError(f"{complaint}; to start from zero residuals call reset() instead")
        for name, communicator in self.communicators.items():
            communicator.load_state_dict(state["memory"][name])

    def stats(self) -> str:
        """A table of what travelled: raw and wire bytes, seconds, sampled error."""
        tables = {name: c.stats() for name, c in self.communicators.items()}
        if len(tables) == 1:
            return next(iter(tables.values()))
        return "\n\n".join(f"{name}\n{table}" for name, table in tables.items())

    def reset(self) -> None:
        """Forget all residuals: after a jump in the loss, or weights loaded from elsewhere."""
        for communicator in self.communicators.values():
            communicator.reset()

    def rescale(self, factor: float) -> None:
        """Multiply all residuals by `factor`: after the loss scale changed by that factor."""
        for communicator in self.communicators.values():
            communicator.rescale(factor)

    def memory_bytes(self) -> int:
        """Bytes of residuals held on this rank."""
        return sum(c.memory_bytes() for c in self.communicators.values())

    def close(self) -> None:
        """Stop the communicators; the next use makes others, without residuals."""
        communicators, self._communicators = self._communicators or {}, None
        for communicator in communicators.values():
            channel.retire(communicator)

    # What wrapping does with a state.

    def _reconfigure(
        self, policy: PolicyLike | None, seed: int | None, timeout: float | None
    ) -> None:
        """What is not given stays; residuals stay unless the policy changes."""
        new = self.policy if policy is None else parsed(policy)
        if new != self.policy:
            self._saved = None
        elif self._communicators is not None:
            self._saved = self.state_dict()
        self.policy = new
        self.seed = self.seed if seed is None else seed
        self.timeout = self.timeout if timeout is None else timeout
        self.close()

    def _mismatch(self, state: dict[str, Any]) -> str:
        """Why `state` cannot continue here; empty where it can."""
        here, there = self._place(), (state["rank"], state["world_size"])
        if here == there:
            return ""
        return (
            f"residuals belong to one rank: these are of rank {there[0]} of {there[1]}, "
            f"this is rank {here[0]} of {here[1]}"
        )

    def _restore(self, state: dict[str, Any]) -> None:
        """Like load_state_dict, for a model unpickled on a rank that did not pickle it."""
        complaint = self._mismatch(state)
        if complaint:
            log.warning("%s; they start from zero", complaint)
        else:
            self.load_state_dict(state)


def parsed(policy: PolicyLike) -> Policy | str:
    """The policy that a user named; "auto" stays a word: it is measured on a group."""
    return "auto" if policy == "auto" else Policy.parse(policy)
