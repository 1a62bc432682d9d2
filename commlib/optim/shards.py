"""A centre in shards: several owners keep a part of the values each, and a worker links to all.

    owner r      center = Center(shards(named_parameters, count)[r], push="int4")
                 Server(center, store, name=f"shard{r}").start()
    worker       center = connect_shards(store, named_parameters, "w3", count, name="shard")
                 EASGD(optimizer, center, moving_rate=0.9 / workers)

So no process carries the traffic of all workers. An owner may be a process of its own or a worker
that serves beside its training. Shards are centres: each has its own version, and a worker may find
them at different versions. Updates of elements do not depend on one another, so elastic averaging
and DOWNPOUR work as they do with one centre; bit for bit where the codec goes by blocks, of which
`align` is a multiple, and rounds to nearest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from commlib.optim.link import Link, References, references
from commlib.optim.rules import Takes
from commlib.optim.serving import TIMEOUT, connect
from commlib.optim.ticks import check_count

ALIGN = 1024

Named = list[tuple[str, torch.Tensor]]


def shards(
    params: Iterable[tuple[str, torch.Tensor]], count: int, *, align: int = ALIGN
) -> list[Named]:
    """What each of `count` owners keeps: consecutive pieces of the parameters, cut evenly.

    A parameter on the border between two owners is cut where it is nearest to an even cut: at its
    ends, or at a multiple of `align` elements from its beginning. Pieces are flat, share the memory
    of contiguous parameters, and bear the name with their elements, as "weight[0:1024]".

    Raises: ValueError: a count or an alignment below 1, or so many owners that one gets nothing.
    """
    check_count("shards: count", count)
    check_count("shards: align", align)
    named = list(params)
    total = sum(tensor.numel() for _, tensor in named)
    owned: list[Named] = [[] for _ in range(count)]
    begin, owner = 0, 0
    for name, tensor in named:
        flat, place = tensor.detach().reshape(-1), 0
        while owner < count - 1 and begin + flat.numel() >= (owner + 1) * total / count:
            even = (owner + 1) * total / count - begin
            near = min(flat.numel(), round(even / align) * align)
            cut = near if abs(near - even) < flat.numel() - even else flat.numel()
            if cut > place:
                owned[owner].append(piece(name, flat, place, cut))
            place, owner = max(place, cut), owner + 1
        if place < flat.numel():
            owned[owner].append(piece(name, flat, place, flat.numel()))
        begin += flat.numel()
    empty = [place for place, pieces in enumerate(owned) if not pieces]
    if empty:
        raise ValueError(
            f"shards: {count} owners of {total} elements, of whom {empty[0]} gets none; allowed: "
            f"fewer owners, or cuts at smaller multiples than align={align}"
        )
    return owned


def piece(name: str, flat: torch.Tensor, begin: int, end: int) -> tuple[str, torch.Tensor]:
    """Elements of a parameter, under a name of their own; all of it, under its own."""
    whole = begin == 0 and end == flat.numel()
    return (name, flat) if whole else (f"{name}[{begin}:{end}]", flat[begin:end])


class Sharded:
    """A worker's end of all shards, to be used as a `Link` is.

    A pull sends its requests to all shards before it waits for the first answer.

    Args:
        links: to the shards, in their order.

    Raises: ValueError: no links, of several dtypes, or to rules that take different things.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        dtypes = {str(link.copy.dtype) for link in links}
        rules = {link.takes for link in links}
        if len(dtypes) != 1 or len(rules) != 1:
            raise ValueError(
                f"Sharded: links of {sorted(dtypes)} to rules that take {sorted(rules)}, allowed: "
                "some, of one dtype, to rules that take the same"
            )
        self.links = tuple(links)
        self.given: References = ()  # pieces are no parameters; `connect_shards` knows of what
        self.takes: Takes = links[0].takes
        self.additive = all(link.additive for link in links)
        self.sizes = tuple(size for link in links for size in link.sizes)
        """Elements of each piece."""
        self.copy = torch.cat([link.copy for link in links])
        """What this worker knows of the values of all; the links' copies are views of it."""
        for link, part in zip(self.links, self._split(self.copy), strict=True):
            link.copy = part

    def pull(self) -> torch.Tensor:
        """Renew the copy, and return it (not to be written to).

        Raises: RuntimeError: an owner is gone; the others' parts have been renewed.
        """
        lost: RuntimeError | None = None
        asked = []
        for link in self.links:
            try:
                link.request()
                asked.append(link)
            except RuntimeError as error:
                lost = lost or error
        for link in asked:
            try:
                link.receive()
            except RuntimeError as error:  # the others have answered: they are heard, or are late
                lost = lost or error
        if lost is not None:
            raise lost
        return self.copy

    def push(self, update: torch.Tensor) -> torch.Tensor:
        """Send flat `update`, a part to each shard; returns what of it arrives.

        Raises: ValueError: another shape or dtype than the copy's; nothing has changed.
            RuntimeError: an owner is gone; the others may have got their parts.
        """
        wanted = (self.copy.shape, self.copy.dtype)
        if (update.shape, update.dtype) != wanted:
            raise ValueError(
                f"Sharded: an update of shape {tuple(update.shape)}, {update.dtype}, allowed: "
                f"{tuple(wanted[0])}, {wanted[1]}"
            )
        parts = zip(self.links, self._split(update), strict=True)
        return torch.cat([link.push(part) for link, part in parts])

    def close(self) -> None:
        """Leave all. RuntimeError: an owner is gone; the others know."""
        with contextlib.ExitStack() as stack:
            for link in self.links:
                stack.callback(link.close)

    def state_dict(self) -> dict[str, Any]:
        """The links' states, in their order: `connect_shards` goes on from it."""
        return {"links": [link.state_dict() for link in self.links]}

    @property
    def bytes_sent(self) -> int:
        """To all shards."""
        return sum(link.bytes_sent for link in self.links)

    @property
    def bytes_received(self) -> int:
        """From all shards."""
        return sum(link.bytes_received for link in self.links)

    def _split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.split(x, [sum(link.sizes) for link in self.links])


def connect_shards(
    store: Any,
    params: Iterable[tuple[str, torch.Tensor]],
    worker: str,
    count: int,
    *,
    name: str = "shard",
    align: int = ALIGN,
    timeout: float = TIMEOUT,
    state: Mapping[str, Any] | None = None,
) -> Sharded:
    """Link this process to the centres `name`0, `name`1, ... of `store`, as `worker`.

    Args:
        params: named tensors on the CPU, all of them.
        count, align: as the owners gave to `shards`.
        timeout: seconds an answer may take.
        state: of an earlier `Sharded.state_dict()`, to go on from.

    Raises: RuntimeError: an owner does not serve; ValueError: an owner has other pieces, or the
        state is of another number of shards.
    """
    links: list[Link] = []
    named = list(params)
    states = [None] * count if state is None else state["links"]
    if len(states) != count:
        raise ValueError(f"connect_shards: the state is of {len(states)} shards, not of {count}")
    with contextlib.ExitStack() as stack:  # where one owner is not there, leave the others
        for place, pieces in enumerate(shards(named, count, align=align)):
            one = f"{name}{place}"
            link = connect(store, pieces, worker, name=one, timeout=timeout, state=states[place])
            stack.callback(link.close)
            links.append(link)
        stack.pop_all()
    sharded = Sharded(links)
    sharded.given = references(tensor for _, tensor in named)
    return sharded
