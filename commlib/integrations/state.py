"""What commlib knows about a wrapped model on this rank: its communicators and what they remember.

`commlib.of(model)` gives one: `DDPState`, `FSDPState`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

from commlib.communicator import Communicator
from commlib.engine import check_settings
from commlib.integrations import channel
from commlib.integrations.fits import check_fits
from commlib.integrations.ranked import MODEL, Ranks, in_world, ranked, unranked
from commlib.policy import Policy, Scheme, TensorInfo
from commlib.reshard import check_next

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

    _sums = True  # whether a sum is what the model takes, see `Total`

    def __init__(
        self, policy: PolicyLike | None = None, *, seed: int = 0, timeout: float | None = None
    ) -> None:
        check_settings(seed, timeout)
        given = os.environ.get("COMMLIB_POLICY") or DEFAULT if policy is None else policy
        self.policy: Policy | str = parsed(given)
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

    def _tensors(self) -> dict[str, dict[str, TensorInfo]]:
        """What a communicator carries, by name, as its policy sees it; none where not known."""
        return {}

    def _shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Of what a communicator reduce-scatters, by name: dimension 0 is what is cut."""
        return {}

    def _planned(self) -> dict[str, Any]:
        """What re-planning has made of the policy, and goes on with; empty without."""
        return {}

    def _plans_in(self, saved: Mapping[str, Any]) -> dict[str, tuple[Policy, bool]]:
        """The policies in what `_planned` gave, by communicator, and whether each is auto's.

        Those that `_load_planned` will take up. ValueError where it cannot.
        """
        return {}

    def _load_planned(self, saved: Mapping[str, Any]) -> None:
        """Take up what `_planned` gave."""

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

        They belong to this rank, and say so: `{"rank 3 of 4": (...,)}`. Save one file per rank, or
        give this object itself to torch.distributed.checkpoint. A resumed run is bitwise the
        uninterrupted one.
        """
        rank, size = self._place()
        state = {
            "rank": rank,
            "world_size": size,
            "memory": {name: c.state_dict() for name, c in self.communicators.items()},
            "shapes": self._shapes(),
            "sums": self._sums,
            "planned": self._planned(),
        }
        return ranked(state, *in_world(rank, size))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()` of the same rank in a group of the same size.

        Raises:
            ValueError: the state is another rank's or comes from another number of ranks (then
                `load_states` takes those of all ranks), or its residuals would not be sent here: of
                other parameters, or of another scheme.
        """
        mine = unranked(state, *MODEL)
        complaint = self._mismatch(mine)
        if complaint:
            raise ValueError(
                f"{complaint}; load_states() takes those of all ranks, reset() starts from zero"
            )
        self._load(mine)

    def load_states(self, states: Iterable[dict[str, Any]]) -> None:
        """Continue from the states of all ranks of a run with any number of ranks.

        What the results are owed stays the same (`commlib.reshard` has the equations). From as many
        ranks as there are here each takes its own. What cannot be carried on is told by rank 0.

        Args:
            states: what `state_dict()` gave on each rank, in rank order; read one after the other,
                such as `(torch.load(f"{r}.pt") for r in range(4))`.

        Raises: ValueError: a rank is missing or out of order; and as `load_state_dict`.
        """
        rank, size = self._place()
        ranks, same = Ranks(), False
        for number, saved in enumerate(states):
            state = unranked(saved, *MODEL)
            same = same or state["world_size"] == size
            if not same:
                ranks.add(state)
                continue
            check_next(state, number, size)
            if number == rank:
                self._load(state)
                return
        if same:
            raise ValueError(f"the state of rank {rank} of {size} is missing")
        ranks.finish()
        self._load(ranks.state(rank, size))
        told = ranks.told(size)
        if told and rank == 0:
            log.warning("%s", told)

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
        """Multiply all residuals by `factor`, of senders and of owners.

        A residual h is in the units of the gradient. Where these change, it must change alike:

            GradScaler's scale went from S to S'     gradients are S g        rescale(S' / S)
            the learning rate of SGD jumped from
            a to b                                   h still owes a step a h  rescale(a / b)

        For SGD the second keeps ``w - lr h``, the weights as they would be without compression,
        where they are across the jump: a step ``w' = w - lr Q(g + h)``, ``h' = g + h - Q(g + h)``
        moves them by ``- lr g``, as it should. Smooth schedules do without; under momentum and Adam
        it holds approximately. int8 residuals are off by 2^-9 of themselves where the factor is no
        power of two.

        Raises: ValueError: `factor` is not finite.
        """
        for communicator in self.communicators.values():
            communicator.rescale(factor)

    def memory_bytes(self) -> int:
        """Bytes of residuals held on this rank."""
        return sum(c.memory_bytes() for c in self.communicators.values())

    def bytes_sent(self) -> int:
        """Bytes this rank has sent through these communicators, without TCP's headers."""
        return sum(c.transport.bytes_sent for c in self.communicators.values())

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
        check_settings(seed, timeout)
        new = self.policy if policy is None else parsed(policy)
        if new != self.policy:
            self._saved = None
        elif self._communicators is not None:
            self._saved = self.state_dict()
        self.policy = new
        self.seed = self.seed if seed is None else seed
        self.timeout = self.timeout if timeout is None else timeout
        self.close()

    def _load(self, state: dict[str, Any]) -> None:
        """Take up an unranked state of this rank, if it is of this model."""
        memory, mine = state["memory"], self.communicators
        if not memory.keys() <= mine.keys():
            raise ValueError(
                f"the state is of communicators {', '.join(memory)}, this model has "
                f"{', '.join(mine)}"
            )
        planned = state.get("planned") or {}
        plans, tensors, shapes = self._plans_in(planned), self._tensors(), self._shapes()
        for name, saved in memory.items():
            infos, rows = tensors.get(name, {}), shapes.get(name, {})
            check_fits(mine[name], infos, rows, saved, plans.get(name))
        if planned:  # nothing has changed so far
            self._load_planned(planned)
        for name, communicator in mine.items():
            if name in memory:
                communicator.load_state_dict(memory[name])
            else:
                communicator.reset()

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
        complaint = self._mismatch(unranked(state, *MODEL))
        if complaint:
            log.warning("%s; they start from zero", complaint)
        else:
            self.load_state_dict(state)


def parsed(policy: PolicyLike) -> Policy | str:
    """The policy that a user named; "auto" stays a word: it is measured on a group."""
    return "auto" if policy == "auto" else Policy.parse(policy)
