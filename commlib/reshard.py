"""Residuals of W ranks as those of W' others: what the results are owed stays the same.

A residual is a debt. With h_r the residual of rank r for a tensor, c_j the one of the owner of its
chunk j, f the factor of the sum and alpha that of `ErrorFeedback`, messages are ``Q(g_r + alpha
h_r)``, and the owner codes ``f sum_r Q(..) + alpha c``. So the next result brings

    owed = alpha (f sum_r h_r + concat_j c_j)

on top of ``f sum_r g_r``. Among W' ranks

    h'_r = 1/W  sum_r h_r        where f is 1/W, and will be 1/W'
    h'_r = 1/W' sum_r h_r        where f is a number that stays (a sum: 1)
    c'_j = concat(c), cut for W' ranks

owe the same. Of a reduce-scatter h_r has a row for each rank; the rows, one after the other, are
the tensor, and zeros up to W equal rows.

Sums run in fp32 in rank order: the error of an element is at most W 2^-24 sum_r |h_r|. Residuals
kept as bf16 or int8 are rounded once more, by at most 2^-9 of themselves or a 250th of the largest
of their block; how much that was is told.

Steps, and with them random streams, are the same on all ranks; the furthest counts. So are the
factors that PowerSGD starts from, which stay; what it leaves is owed like other residuals, with
c = 0. Other named memories belong to their rank: they are dropped, and that is told.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from commlib_kernels.layout import Layout

from .algorithms import Hierarchical, PowerSGD
from .feedback import OWNER
from .scheme import Scheme

log = logging.getLogger("commlib")

State = Mapping[str, Any]
TINY = 2.0**-100  # blocks below are zero, as in the kernels


def redistribute(states: Iterable[State], world_size: int) -> list[dict[str, Any]]:
    """The states of `world_size` ranks that owe what the ranks of `states` owe.

    Args:
        states: what `Communicator.state_dict()` gave on all ranks of a run, in rank order. They are
            read one after the other and not kept.
        world_size: how many to make; where there are as many, the same ones.

    Returns: what `Communicator.load_state_dict` takes, in rank order.

    Raises: ValueError: a rank is missing or out of order, or the states are not of one run.
    """
    total, same = Total(), []
    for state in states:
        total.add(state)
        if total.size == world_size:
            same.append(dict(state))
    total.finish()
    if total.size == world_size:
        return same
    made = [total.state(rank, world_size) for rank in range(world_size)]
    if told := total.told(world_size):
        log.warning("%s", told)
    return made


@dataclass
class _Sum:
    """All ranks' residuals of one name: added up, or an owner's chunks one after the other."""

    share: list[Any]
    dtype: torch.dtype
    shape: torch.Size  # of a rank's
    value: torch.Tensor | None = None
    chunks: list[torch.Tensor] = field(default_factory=list)


class Total:
    """What all ranks of a communicator remember, added up state by state, in rank order.

    Args:
        shapes: of the tensors of a reduce-scatter, whose rows are dimension 0 in equal parts and
            then zeros; those without one are dropped. None: they have as many elements as the rows.
        sums: whether a factor of 1 stays so. False: the result is divided afterwards, by a number
            that is not known here, and such residuals are dropped.
    """

    def __init__(
        self, shapes: Mapping[str, Sequence[int]] | None = None, *, sums: bool = True
    ) -> None:
        self._only_means = not sums
        self.size = 0  # ranks of the run
        self._added = 0
        self._shapes = shapes
        self._sums: dict[str, dict[str, _Sum]] = {}  # by compressor, by name
        self._shared: dict[str, dict[str, torch.Tensor]] = {}  # memories alike on all ranks
        self._steps: dict[str, dict[str, int]] = {}
        self._eras: dict[str, int] = {}
        self._dropped: dict[str, int] = {}  # what, and its bytes
        self._lost = self._owed = 0.0  # squares of norms: of what rounding took, and of all

    def add(self, state: State) -> None:
        """The next rank's state. ValueError where it is not the next one of this run."""
        check_next(state, self._added, self.size)
        rank, size = state["rank"], state["world_size"]
        first, self.size, self._added = not self._added, size, rank + 1
        texts = state["compressors"].keys()
        if not first and texts != self._sums.keys():
            raise ValueError(
                f"rank {rank} has residuals of {', '.join(texts) or 'nothing'}, the ranks before "
                f"it of {', '.join(self._sums) or 'nothing'}: these states are not of one moment"
            )
        for text, saved in state["compressors"].items():
            self._add(rank, text, saved)
        for name, copy in state["copies"].items():
            self._drop(f"copy of {name!r}", copy)
        _furthest(self._eras, state["steps"])

    def finish(self) -> None:
        """All have come. ValueError where that is not so."""
        if not self._added:
            raise ValueError("there are no states to redistribute")
        if self._added < self.size:
            raise ValueError(
                f"the states of ranks {self._added} to {self.size - 1} of {self.size} are missing, "
                "and with them what their residuals owe"
            )
        for sums in self._sums.values():
            for one in sums.values():
                if one.chunks:
                    one.value, one.chunks = torch.cat(one.chunks), []

    def state(self, rank: int, world_size: int) -> dict[str, Any]:
        """The state of rank `rank` of `world_size` others, after `finish`."""
        if not 0 <= rank < world_size:
            raise ValueError(f"there is no rank {rank} of {world_size}")
        compressors = {}
        for text, sums in self._sums.items():
            block = Scheme.parse(text).codec.format.block
            residuals, scales, shares = {}, {}, {}
            for name, one in sums.items():
                exact = self._part(name, one, rank, world_size)
                if exact is None:
                    continue
                residuals[name], scale = _stored(exact, one.dtype, block)
                if scale is not None:
                    scales[name] = scale
                shares[name] = [world_size, *one.share[1:]]
                if one.dtype is not torch.float32:
                    kept = _loaded(residuals[name], scale, block)
                    self._lost += float((kept - exact).square().sum())
                    self._owed += float(exact.square().sum())
            compressors[text] = {
                "residuals": residuals,
                "scales": scales,
                "shares": shares,
                "steps": dict(self._steps[text]),
                "memories": {n: memory.clone() for n, memory in self._shared[text].items()},
            }
        return {
            "rank": rank,
            "world_size": world_size,
            "compressors": compressors,
            "steps": dict(self._eras),
            "copies": {},
        }

    def told(self, world_size: int) -> str:
        """What the states made so far do not carry on; empty where they carry all."""
        lines = []
        if self._dropped:
            names = ", ".join(f"{what} ({n} bytes)" for what, n in self._dropped.items())
            lines.append(f"dropped, and starting from zero: {names}")
        if self._lost:
            share = math.sqrt(self._lost / self._owed)
            lines.append(f"rounding lost {share:.2g} of the residuals (in the l2 norm)")
        if world_size == 1 and any(self._sums.values()):
            lines.append("one rank sends nothing: its residuals wait until there are more")
        before = f"residuals of {self.size} ranks redistributed among {world_size}: "
        return before + "; ".join(lines) if lines else ""

    def _add(self, rank: int, text: str, saved: State) -> None:
        block = Scheme.parse(text).codec.format.block
        sums = self._sums.setdefault(text, {})
        _furthest(self._steps.setdefault(text, {}), saved["steps"])
        shared = self._shared.setdefault(text, {})
        low_rank = isinstance(Scheme.parse(text).algorithm, PowerSGD)
        for name, memory in saved["memories"].items():
            if not low_rank:
                self._drop(f"memory {name!r}", memory)
            elif not torch.equal(shared.setdefault(name, memory), memory):
                raise ValueError(
                    f"memory {name!r} of {text} on rank {rank} is another than on the ranks before "
                    "it: these states are not of one moment"
                )
        for name, h in saved["residuals"].items():
            share = saved["shares"][name]
            if not self._known(text, name, share, h):
                self._drop(f"residual {name!r} of {text}", h)
                continue
            if not rank:
                sums[name] = _Sum(share, h.dtype, h.shape)
            one = sums.get(name)
            if one is None or (one.share, one.dtype) != (share, h.dtype):
                raise ValueError(f"residual {name!r} of {text} on rank {rank} fits no other rank's")
            value = _loaded(h, saved["scales"].get(name), block)
            if name.endswith(OWNER):
                one.chunks.append(value)
            elif one.value is None:
                one.value = value
            elif one.shape != h.shape:
                raise ValueError(
                    f"residual {name!r} of {text} has shape {tuple(h.shape)} on rank {rank}, "
                    f"{tuple(one.shape)} on the ranks before it"
                )
            else:
                one.value += value
        if missing := [n for n in sums if n not in saved["residuals"]]:
            raise ValueError(f"rank {rank} has no residuals of {', '.join(missing)} ({text})")

    def _known(self, text: str, name: str, share: list[Any], h: torch.Tensor) -> bool:
        """Whether it is known how to share out a residual among other ranks."""
        ranks, _, factor = share
        divided = self._only_means and factor == 1.0 and not name.endswith(OWNER)
        placed = h.dim() == 1 or self._shapes is None or name in self._shapes
        # each host's part of it is on another rank
        of_hosts = isinstance(Scheme.parse(text).algorithm, Hierarchical)
        return bool(ranks == self.size and placed and not divided and not of_hosts)

    def _part(self, name: str, one: _Sum, rank: int, world_size: int) -> torch.Tensor | None:
        """In fp32 what `rank` holds of it; None where that is zero on all ranks."""
        whole = one.value
        assert whole is not None
        if not whole.any():
            return None
        if name.endswith(OWNER):
            cuts = Layout((whole.numel(),), ranks=world_size, align=one.share[1])
            begin, end = cuts.cut(0, rank)
            return whole[begin:end]
        owed = whole / (self.size if one.share[2] == "avg" else world_size)
        return owed if owed.dim() == 1 else self._rows(name, owed, world_size)

    def _rows(self, name: str, x: torch.Tensor, world_size: int) -> torch.Tensor:
        """The rows of a reduce-scatter for other ranks: dimension 0 in equal parts, then zeros."""
        shape = (x.numel(),) if self._shapes is None else self._shapes[name]
        numel = math.prod(shape)
        if self._shapes is None and numel % world_size:
            raise ValueError(
                f"residual {name!r} has {numel} elements in {self.size} rows, which are no "
                f"{world_size} equal rows"
            )
        row = -(-shape[0] // world_size) * (numel // shape[0])
        rows = x.new_zeros(world_size * row)
        rows[:numel] = x.reshape(-1)[:numel]
        return rows.view(world_size, row)

    def _drop(self, what: str, tensor: torch.Tensor) -> None:
        self._dropped[what] = self._dropped.get(what, 0) + tensor.nbytes


def check_next(state: State, rank: int, size: int) -> None:
    """ValueError where a state is not the next of a run of `size` ranks, 0 if that is not known."""
    here = state["rank"], state["world_size"]
    if here != (rank, size or here[1]):
        raise ValueError(
            f"the states of all ranks of one run must come in rank order: rank {rank}"
            f"{f' of {size}' if size else ''} is next, this is rank {here[0]} of {here[1]}"
        )


def nbytes(state: State) -> int:
    """Bytes of residuals and named memory in a communicator's state."""
    kinds = ("residuals", "scales", "memories")
    return sum(
        tensor.nbytes
        for saved in state["compressors"].values()
        for kind in kinds
        for tensor in saved[kind].values()
    )


def _furthest(steps: dict[str, int], more: Mapping[str, int]) -> None:
    for name, step in more.items():
        steps[name] = max(step, steps.get(name, 0))


def _loaded(h: torch.Tensor, scales: torch.Tensor | None, block: int) -> torch.Tensor:
    """A residual in fp32, of its own shape, in memory of its own."""
    if scales is None:
        return h.to(torch.float32, copy=True)
    count = -(-h.shape[-1] // block)
    steps = scales.view(torch.bfloat16).float().view(*h.shape[:-1], count)
    return h.float() * steps.repeat_interleave(block, -1)[..., : h.shape[-1]]


def _stored(
    x: torch.Tensor, dtype: torch.dtype, block: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A residual as it is kept, and the scales of an int8 one: a 127th of a block's largest."""
    if dtype is not torch.int8:
        return x.to(dtype, copy=True), None
    width, count = x.shape[-1], -(-x.shape[-1] // block)
    padded = torch.nn.functional.pad(x, (0, -width % block)).view(*x.shape[:-1], count, block)
    largest = padded.abs().amax(-1)
    steps = torch.where(largest < TINY, 0, largest / 127).to(torch.bfloat16)
    inverse = torch.where(steps > 0, 1 / steps.float(), 0)
    codes = (padded * inverse.unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
    codes = codes.view(*x.shape[:-1], count * block)[..., :width].contiguous()
    return codes, steps.reshape(-1).view(torch.int16)
