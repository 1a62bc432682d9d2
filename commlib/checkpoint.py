"""Checkpoints of what commlib remembers, with torch.distributed.checkpoint (DCP).

    dcp.save({"model": model, "optimizer": ..., "commlib": commlib.of(model)}, checkpoint_id=path)
    dcp.load({"model": model, "optimizer": ..., "commlib": commlib.of(model)}, checkpoint_id=path)

are all it takes where as many ranks resume as saved; `dcp.async_save` too. On another number of
ranks DCP ends with "Missing key in checkpoint state_dict: commlib.rank 0 of 2": leave the entry out
of `dcp.load`, and

    commlib.checkpoint.load(model, path)

redistributes the residuals, on as many ranks as well. Files of `torch.save` are for
`commlib.of(model).load_states`, and `redistribute` makes them into those of other ranks.

DCP writes its `.metadata` last, under another name that it then changes. A save that fails (a rank
died, a disk was full) leaves a folder without, which no load takes for a checkpoint: so give every
checkpoint a folder of its own, and the one before stays whole. In a folder that has one already DCP
writes over its files first.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_states
from torch.distributed.checkpoint.storage import StorageReader

from commlib.integrations.pipeline import Pipeline
from commlib.integrations.ranked import LABEL, MODEL, Ranks, in_world, ranked, unranked
from commlib.integrations.wrapping import of

log = logging.getLogger("commlib")

ENTRY = "commlib"


def save(model: Any, path: str | os.PathLike[str]) -> None:
    """Save what `commlib.of(model)` remembers, and nothing else, as a DCP checkpoint of its own.

    All ranks call it. Where the model is saved with DCP, `commlib.of(model)` may go along instead.

    Args:
        model: what `commlib.wrap` wrapped.
        path: of a folder, which must not hold a checkpoint yet.

    Raises: RuntimeError, on all ranks: the folder holds a checkpoint, or a rank could not write.
    """
    writer = FileSystemWriter(path, overwrite=False)
    try:
        save_states({ENTRY: of(model)}, storage_writer=writer)
    except CheckpointException as error:  # which `except Exception` would let pass
        rank, (reason, _) = next(iter(error.failures.items()))
        raise RuntimeError(
            f"saving to {path} failed, first on rank {rank}: {reason}; give every checkpoint a "
            "folder of its own"
        ) from error


def load(
    model: Any,
    source: str | os.PathLike[str] | StorageReader,
    *,
    entry: str | None = None,
    ranks: Sequence[int] | None = None,
) -> None:
    """Load what a DCP checkpoint has of commlib, saved by any number of ranks.

    Every rank reads for itself: its own state where as many ranks saved, else all of them, one
    after the other (`State.load_states`). Pipelines want as many ranks as before.

    Args:
        model: what `commlib.wrap` wrapped, with the policy that it was saved under.
        source: folder of the checkpoint, or what reads it.
        entry: the name that `commlib.of(model)` had in the checkpoint; None: the only one there is.
        ranks: which ranks of the world that saved made up the group of this model; None: all that
            have the entry.

    Raises: ValueError: the checkpoint has no such entry, or it is not of this model, see
        `State.load_state_dict`. OSError: there is no checkpoint.
    """
    reader = source if isinstance(source, StorageReader) else FileSystemReader(source)
    metadata = reader.read_metadata()
    names = _entries(metadata.state_dict_metadata, entry, source)
    if ranks is not None:
        if not set(ranks) <= names.keys():
            raise ValueError(f"{source} has entries of ranks {sorted(names)}, asked: {ranks}")
        names = {rank: names[rank] for rank in ranks}
    state = of(model)
    pipeline = isinstance(state, Pipeline)
    if pipeline:
        rank, size = state.transport.rank, state.transport.size
    else:
        rank, size = state._place()
    here = "rank {} of {}".format(*in_world(rank, size))
    places = [names[saved] for saved in sorted(names)]
    if len(places) == size:
        mine = places[rank]
    else:  # entries of other groups, too: this one's where the world is as it was
        mine = next((name for name in places if ranks is None and name.endswith(here)), "")
    if mine:
        state.load_state_dict(next(_read(reader, metadata, [mine])))
    elif pipeline:
        raise ValueError(
            f"{source} has a pipeline of {len(places)} ranks, this one has {size}; its memory "
            "belongs to its stages: start without it on all ranks"
        )
    else:
        state.load_states(_of_one_group(source, len(places), _read(reader, metadata, places)))


def redistribute(states: Iterable[dict[str, Any]], world_size: int) -> list[dict[str, Any]]:
    """The states of `world_size` ranks whose results are owed what those of `states` were.

    For files: `commlib.reshard` has the equations, and `redistribute` for a bare `Communicator`.

    Args:
        states: what `commlib.of(model).state_dict()` gave on all ranks, in rank order. They are
            read one after the other.
        world_size: how many to make; where there are as many, the same ones.

    Returns: what `load_state_dict` takes, in rank order.

    Raises: ValueError: a rank is missing or out of order, or the states are not of one run.
    """
    total, same = Ranks(), []
    for saved in states:
        state = unranked(saved, *MODEL)
        total.add(state)
        if state["world_size"] == world_size:
            same.append(saved)
    total.finish()
    if same:
        return same
    made = [total.state(rank, world_size) for rank in range(world_size)]
    if told := total.told(world_size):
        log.warning("%s", told)
    return [ranked(state, state["rank"], world_size) for state in made]


def _entries(names: Iterable[str], entry: str | None, source: Any) -> dict[int, str]:
    """The names of all ranks' states in a checkpoint, by the rank in the world that saved."""
    found: dict[str, dict[int, str]] = {}
    for name in names:
        prefix, _, last = name.rpartition(".")
        label = LABEL.fullmatch(last)
        if label is not None and entry in (None, prefix):
            found.setdefault(prefix, {})[int(label[1])] = name
    if len(found) != 1:
        what = f"has {', '.join(sorted(found))}; say which by entry=" if found else "has none"
        raise ValueError(
            f"{source}: one entry of commlib{'' if entry is None else f' named {entry!r}'} is "
            f'wanted, the checkpoint {what}. dcp.save({{"commlib": commlib.of(model), ..}}) makes '
            "one"
        )
    return next(iter(found.values()))


def _of_one_group(
    source: Any, size: int, states: Iterable[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The states as they come. ValueError where they are of several groups of ranks."""
    for saved in states:
        found = unranked(saved)["world_size"]
        if found != size:
            raise ValueError(
                f"{source}: {size} ranks have an entry, one of a group of {found}: say by ranks= "
                "which of them made up the group of this model"
            )
        yield saved


class _Planner(DefaultLoadPlanner):
    """Takes one whole entry, without pickle."""

    value: Any = None

    def load_bytes(self, read_item: Any, value: Any) -> None:
        del read_item
        self.value = torch.load(value, map_location="cpu", weights_only=True)


def _read(reader: StorageReader, metadata: Any, names: list[str]) -> Iterator[dict[str, Any]]:
    """The entries `names`, one after the other: each is read when it is asked for."""
    for name in names:
        planner = _Planner(flatten_state_dict=False)
        planner.set_up_planner({name: None}, metadata, is_coordinator=False)
        reader.set_up_storage_reader(metadata, is_coordinator=False)
        plan = reader.prepare_local_plan(planner.create_local_plan())
        reader.read_data(plan, planner).wait()
        yield {name.rpartition(".")[2]: planner.value}
