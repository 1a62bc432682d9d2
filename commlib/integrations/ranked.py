"""States that belong to one rank, and how those of all ranks lie beside each other.

    torch.save(commlib.of(model).state_dict(), f"{rank}.pt")
    dcp.save({"model": model, "commlib": commlib.of(model)}, checkpoint_id=path)

torch.distributed.checkpoint (DCP) keeps one of all entries of a name, whichever rank's that is, and
takes dicts apart into tensors, whose sizes a reader must know beforehand. So a state is one entry,
whole in a tuple, under the name of its rank: among other ranks that name is missing, and DCP says
so instead of handing out another rank's residuals.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from commlib.reshard import Total, nbytes

MODEL = ("memory", "shapes", "sums")  # what the state of a model has
LABEL = re.compile(r"rank (\d+) of (\d+)")


def ranked(state: dict[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    """A state under the name of its rank."""
    return {f"rank {rank} of {world_size}": (state,)}


def in_world(rank: int, size: int) -> tuple[int, int]:
    """This rank and how many there are in the world: a rank of a group is not the only one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (rank, size)


def unranked(saved: Any, *keys: str) -> dict[str, Any]:
    """The state in what `ranked` gave, with `keys`. ValueError where it is something else."""
    if isinstance(saved, Mapping) and len(saved) == 1:
        ((label, value),) = saved.items()
        if LABEL.fullmatch(str(label)) and isinstance(value, tuple) and len(value) == 1:
            state = value[0]
            if isinstance(state, dict) and {"rank", "world_size", *keys} <= state.keys():
                return state
    got = ", ".join(map(str, saved)) if isinstance(saved, Mapping) else type(saved).__name__
    raise ValueError(
        "not what commlib.of(...).state_dict() gives, one entry such as 'rank 0 of 4', with "
        f"{', '.join(keys)} in it; got {got[:200] or 'nothing'}"
    )


class Ranks:
    """The states of all ranks of a model, added up one after the other, in rank order."""

    def __init__(self) -> None:
        self._totals: dict[str, Total] = {}
        self._dropped: dict[str, int] = {}  # communicators, and the bytes they remember
        self._first: dict[str, Any] = {}  # what all states have alike

    def add(self, state: Mapping[str, Any]) -> None:
        """The next rank's state, as `unranked` gives it."""
        # what this rank alone has measured for the next plan is not among it
        planned = _without("table", state.get("planned", {}))
        self._first = self._first or {
            "shapes": state["shapes"], "sums": state["sums"], "planned": planned
        }  # fmt: skip
        for name, saved in state["memory"].items():
            if saved["world_size"] != state["world_size"]:  # groups of ranks, by no rule known here
                self._dropped[name] = self._dropped.get(name, 0) + nbytes(saved)
                continue
            if name not in self._totals:
                shapes = state["shapes"].get(name, {})
                self._totals[name] = Total(shapes, sums=state["sums"])
            self._totals[name].add(saved)

    def finish(self) -> None:
        """All have come. ValueError where that is not so."""
        if not self._first:
            raise ValueError("there are no states to redistribute")
        for total in self._totals.values():
            total.finish()

    def state(self, rank: int, world_size: int) -> dict[str, Any]:
        """The state of `rank` of `world_size` others, as `unranked` gives it."""
        memory = {name: total.state(rank, world_size) for name, total in self._totals.items()}
        return {**self._first, "rank": rank, "world_size": world_size, "memory": memory}

    def told(self, world_size: int) -> str:
        """What the states made so far do not carry on; empty where they carry all."""
        lines = [total.told(world_size) for total in self._totals.values()]
        lines += [
            f"the residuals of communicator {name!r} ({size} bytes) are of groups among the ranks: "
            "dropped, and starting from zero"
            for name, size in self._dropped.items()
            if size
        ]
        return "; ".join(filter(None, lines))


def _without(key: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state without `key`, and so the states in it."""
    return {
        k: _without(key, v) if isinstance(v, Mapping) else v for k, v in state.items() if k != key
    }
