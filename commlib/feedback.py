"""Compressor: a codec and what it remembers under keys.

What there is to remember, and by what rule: `modes`.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from commlib.codecs.base import Codec
from commlib.counters import Step, counters
from commlib.modes import RESIDUAL_DTYPES, ErrorFeedback, Feedback, Plain, feedback
from commlib_kernels import Layout, Memory, Tag
from commlib_kernels.layout import blocks

__all__ = ["Compressor", "ErrorFeedback", "Feedback", "Key", "Plain", "feedback"]

Key = str | tuple[str, ...] | None
"""Names of a message's segments; None: anonymous, which has no memory."""

Start = Callable[[], torch.Tensor]
"""What gives a named state its first value."""

OWNER = "|reduced"
CPU = torch.device("cpu")


def owner_key(key: Key) -> Key:
    """The key of the side that reduces: its residual is another than the sender's."""
    if key is None:
        return None
    return tuple(name + OWNER for name in names_of(key))


def names_of(key: Key) -> tuple[str, ...]:
    """The names in a key, one per segment."""
    return () if key is None else (key,) if isinstance(key, str) else key


class _Arena(NamedTuple):
    """The residuals of one message's segments, back to back as the kernels want them.

    Of a stacked message one row per repetition; a segment's is then a strip (repetitions, numel).
    """

    residual: torch.Tensor
    scales: torch.Tensor | None


@dataclass
class Compressor:
    """A codec and what it remembers, under keys. Without a key it remembers nothing.

    Residuals belong to names (parameters), not to messages: when names are grouped into other
    messages (DDP rebuilds its buckets after the first step), their residuals move along.

    Args:
        codec: what makes the bytes.
        feedback: what is remembered.
        seed: of the run, the same on all ranks.
        rank: of this process, for private random numbers.
        device: of the tensors.
    """

    codec: Codec
    feedback: Plain | ErrorFeedback = field(default_factory=Plain)
    seed: int = 0
    rank: int = 0
    device: torch.device = CPU

    def __post_init__(self) -> None:
        self.feedback.check(self.codec)
        self._residuals: dict[str, _Arena] = {}  # views into the arenas, or loaded state
        self._arenas: dict[tuple[tuple[str, ...], tuple[int, ...], int], _Arena] = {}
        self._counters = counters(self.device, stochastic=self.codec.format.draws)
        self._memories: dict[tuple[str, str], torch.Tensor] = {}
        self._starts: dict[tuple[str, str], Start] = {}
        self._streams: dict[Key, tuple[int, ...]] = {}
        self._shares: dict[str, list[Any]] = {}  # how each residual joins the result
        self._factors: dict[Key, float] = {}  # of the last sum, by the owner's key

    def check(self, key: Key, layout: Layout) -> None:
        """Refuse a message that the memory of `key` cannot serve, before anything is sent.

        Args:
            layout: of the whole message.

        Raises:
            ValueError: a residual is of another size; or the pair diverges at this one, for
                codecs with one scale per tensor.
        """
        if isinstance(self.feedback, Plain):
            return
        for index, name in enumerate(names_of(key)):
            numel = layout.sizes[index] * _rows(layout)
            old = self._residuals.get(name)
            if old is not None and old.residual.numel() != numel:
                raise ValueError(
                    f"the residual of {name!r} has {old.residual.numel()} elements, this tensor "
                    f"{numel}; a key names one tensor of one size: use another key, or reset()"
                )
            if self.codec.format.per_segment and numel and not layout.is_exact(index):
                self.feedback.check(self.codec, layout.sizes[index])

    def advance(self, key: Key) -> None:
        """Begin the next message of `key`: its next stream of random numbers."""
        self._counters.advance(names_of(key) or ("",))

    def step(self, key: Key) -> Step:
        """The number of the message of `key` that is under way."""
        return self._counters.of(names_of(key) or ("",))

    def compress(
        self,
        key: Key,
        x: torch.Tensor,
        wire: torch.Tensor,
        layout: Layout,
        *,
        hold: Sequence[int] = (),
    ) -> int:
        """Code flat `x` into `wire`, with the residual of `key`; returns the bytes used.

        Args:
            hold: segments whose residual is neither sent nor changed.
        """
        memory = self._memory(key, layout, x.device, owner=layout.dense, hold=hold)
        return self.codec.encode(x, wire, layout, self._tag(key), memory)

    def decompress(
        self, key: Key, wire: torch.Tensor, out: torch.Tensor, layout: Layout, *, add: bool = False
    ) -> None:
        """Decode `wire` into flat `out`, or add it."""
        self.codec.decode(wire, out, layout, self._tag(key), add=add)

    def reduce(
        self,
        key: Key,
        wires: torch.Tensor,
        out: torch.Tensor,
        layout: Layout,
        *,
        factor: float = 1.0,
        hold: Sequence[int] = (),
    ) -> int:
        """Sum all ranks' payloads of one chunk, into a wire (with `key`'s residual) or dense.

        Args:
            hold: as in `compress`.

        Returns: the bytes used of `out`.
        """
        self._factors[key] = factor
        coded = out.dtype == torch.uint8
        memory = self._memory(key, layout, out.device, owner=True, hold=hold) if coded else None
        tag = self._tag(key)
        return self.codec.reduce(wires, out, layout, tag, factor=factor, memory=memory)

    def residual(self, name: str, numel: int, ranks: int, factor: float) -> torch.Tensor:
        """The fp32 residual of a tensor, flat, in memory of its own; zeros on first use.

        For collectives that renew it themselves: what `compress` knows is kept side by side.

        Args:
            ranks, factor: of the sum that the tensor is part of.
        """
        self.check(name, Layout((numel,)))
        held = self._residuals.get(name)
        if held is None or held.residual.device != self.device:  # loaded state is on the CPU
            with torch.inference_mode(False):
                kept = torch.zeros(numel, dtype=torch.float32, device=self.device)
                if held is not None:
                    kept.copy_(held.residual)
            held = self._residuals[name] = _Arena(kept, None)
        share = "avg" if ranks > 1 and factor == 1 / ranks else factor
        self._shares[name] = [ranks, 1, share]
        return held.residual

    def memory(
        self, key: str, name: str, like: torch.Tensor, start: Start | None = None
    ) -> torch.Tensor:
        """Named state of a key (PowerSGD's Q, delta references), made on first use.

        Args:
            start: gives the state at first, and after a reset in place; None: zeros.

        Raises:
            ValueError: it is there, with another shape.
        """
        place = (key, name)
        if start is not None:
            self._starts[place] = start
        held = self._memories.get(place)
        if held is not None and held.shape != like.shape:
            raise ValueError(
                f"{name} of {key!r} has shape {tuple(held.shape)}, this tensor needs "
                f"{tuple(like.shape)}; a key names one tensor of one shape: use another key, or "
                "reset()"
            )
        if held is None or held.device != like.device:
            with torch.inference_mode(False):
                first = held if held is not None else start() if start is not None else None
                held = torch.zeros_like(like)
                if first is not None:
                    held.copy_(first)
            self._memories[place] = held
        return held

    def nbytes(self) -> int:
        """Bytes of all memory."""
        return sum(t.numel() * t.itemsize for t in self._held())

    def _held(self) -> list[torch.Tensor]:
        held = [t for arena in self._residuals.values() for t in arena if t is not None]
        return [*held, *self._memories.values()]

    def reset(self, *, in_place: bool = False) -> None:
        """Forget all residuals and named state; steps go on.

        Args:
            in_place: set them to zero where they are, for a CUDA graph that works on them.
        """
        if in_place:
            for tensor in self._held():
                tensor.zero_()
            for place, start in self._starts.items():
                if place in self._memories:
                    self._memories[place].copy_(start())
            return
        self._residuals.clear()
        self._arenas.clear()
        self._memories.clear()

    def rescale(self, factor: float) -> None:
        """Multiply all residuals, e.g. by the ratio of two loss scales."""
        for residual, scales in self._residuals.values():
            if scales is None:
                residual.mul_(factor)
            else:
                as_bf16 = scales.view(torch.bfloat16)
                as_bf16.mul_(factor)

    def residual_keys(self) -> tuple[str, ...]:
        """The names that have a residual here, of senders and (with OWNER) of owners."""
        return tuple(self._residuals)

    def owes(self, key: str) -> bool:
        """Whether the residual under `key` is anything but zero; on CUDA the host waits for it."""
        return bool(self._residuals[key].residual.any())

    def why_not(self, key: str, other: "Compressor", align: int) -> str:
        """Why the residual under `key` cannot go on in `other`; empty where it can.

        align: of the messages there. An owner's residual is of its chunk, cut at multiples of that.
        """
        if key in other._residuals:
            return f"{other.codec}+{other.feedback} has one too"
        if self.feedback != other.feedback:
            return f"it is of +{self.feedback}, not of +{other.feedback}"
        scaled = self._residuals[key].scales is not None
        if scaled and self.codec.format.block != other.codec.format.block:
            return "its int8 scales are of other blocks"
        if key.endswith(OWNER) and self._shares[key][1] != align:
            return f"owners' chunks are cut at {self._shares[key][1]} elements, not at {align}"
        return ""

    def hand_over(self, keys: Sequence[str], other: "Compressor | None") -> None:
        """Give `other` the residuals under `keys`; None: forget them."""
        self._told_shares()
        for key in keys:
            arena, share = self._residuals.pop(key), self._shares.pop(key)
            if other is not None:
                other._residuals[key], other._shares[key] = arena, share
        # what stays is laid out anew with the next message: old arenas have places for what is gone
        for place in [p for p in self._arenas if not set(keys).isdisjoint(p[0])]:
            del self._arenas[place]

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Residuals, steps and named state by name, copied to the CPU.

        Tensors, numbers and strings only (``weights_only``).
        """
        held = self._residuals.items()
        residuals = {n: _copy(a.residual) for n, a in held}
        scales = {n: _copy(a.scales) for n, a in held if a.scales is not None}
        memories = {f"{k}|{n}": _copy(t) for (k, n), t in self._memories.items()}
        return {
            "residuals": residuals,
            "scales": scales,
            "shares": self._told_shares(),
            "steps": self._counters.state(),
            "memories": memories,
        }

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Take up what `state_dict` gave.

        Raises:
            ValueError: it is no such state, or a residual has another dtype than this feedback
                keeps.
        """
        missing = {"residuals", "scales", "shares", "steps", "memories"} - state.keys()
        missing |= state.get("residuals", {}).keys() - state.get("shares", {}).keys()
        if missing:
            raise ValueError(f"no state of a compressor: it has no {', '.join(sorted(missing))}")
        want = None if isinstance(self.feedback, Plain) else RESIDUAL_DTYPES[self.feedback.dtype]
        for name, residual in state["residuals"].items():
            if residual.dtype != want:
                raise ValueError(
                    f"residual of {name!r} is {residual.dtype}, but {self.codec}+{self.feedback} "
                    f"keeps {want}; load it into the scheme that saved it"
                )
        self._arenas.clear()
        self._factors.clear()
        self._shares = {name: list(share) for name, share in state["shares"].items()}
        self._residuals = {
            name: _Arena(
                residual.clone(),
                s.clone() if (s := state["scales"].get(name)) is not None else None,
            )
            for name, residual in state["residuals"].items()
        }
        self._counters.load(state["steps"])
        self._memories = {}
        for label, tensor in state["memories"].items():
            key, _, name = label.rpartition("|")
            self._memories[key, name] = tensor.clone()

    def _told_shares(self) -> dict[str, list[Any]]:
        """Of each residual: the ranks of its message, where that was cut, and its factor.

        The factor is what the result takes the residual times, apart from alpha: "avg" where that
        was one over the ranks, and so would be another number among others. An owner's is 1, as is
        that of a message whose sum is not coded again.
        """
        for key, factor in self._factors.items():
            for name in names_of(key):
                share = self._shares.get(name.removesuffix(OWNER))
                if share is not None:
                    share[2] = "avg" if share[0] > 1 and factor == 1 / share[0] else factor
        return {name: list(self._shares[name]) for name in self._residuals}

    def _tag(self, key: Key) -> Tag:
        names = names_of(key)
        if key not in self._streams:
            self._streams[key] = tuple(zlib.crc32(name.encode()) for name in names) or (0,)
        return Tag(self.seed, self._streams[key], self.step(key), self.rank)

    def _memory(
        self,
        key: Key,
        layout: Layout,
        device: torch.device,
        *,
        owner: bool,
        hold: Sequence[int] = (),
    ) -> Memory | None:
        if isinstance(self.feedback, Plain) or key is None:
            return None
        names = names_of(key)
        if len(names) != len(layout.sizes):
            raise ValueError(f"key has {len(names)} names for {len(layout.sizes)} segments")
        if owner:
            rank = layout.payloads[0]
            cuts = (layout.cut(s, rank) for s in range(len(names)))
            sizes, rows = tuple(b - a for a, b in cuts), 0
        else:
            sizes, rows = layout.sizes, layout.ranks if layout.stacked else 0
        place = (names, sizes, rows)
        arena = self._arenas.get(place) or self._arrange(*place, layout, device)
        f = self.feedback
        return Memory(arena.residual, arena.scales, f.alpha, f.beta, f.omega, tuple(hold))

    def _arrange(
        self,
        names: tuple[str, ...],
        sizes: tuple[int, ...],
        rows: int,
        layout: Layout,
        device: torch.device,
    ) -> _Arena:
        """Lay the residuals of `names` back to back, moving those that exist already.

        rows: of a stacked message; 0 for others.
        """
        assert isinstance(self.feedback, ErrorFeedback)
        fmt, dtype = self.codec.format, RESIDUAL_DTYPES[self.feedback.dtype]
        if len(set(names)) != len(names):
            raise ValueError(f"a key names a segment twice: {names}")
        for index, (name, n) in enumerate(zip(names, sizes, strict=True)):
            old, numel = self._residuals.get(name), n * max(1, rows)
            if old is not None and old.residual.numel() != numel:
                raise RuntimeError(
                    f"residual of {name!r} has {old.residual.numel()} elements, the tensor now "
                    f"needs {numel}; a key names one tensor of one size (reset() forgets it)"
                )
            if fmt.per_segment and n and not layout.is_exact(index):
                self.feedback.check(self.codec, n)
        shape = (rows,) if rows else ()
        residual = torch.zeros(*shape, sum(sizes), dtype=dtype, device=device)
        scales = None
        if dtype is torch.int8:
            scales = torch.zeros(*shape, blocks(sizes, fmt), dtype=torch.int16, device=device)
        start = block = 0
        for name, n in zip(names, sizes, strict=True):
            count = blocks((n,), fmt)
            self._check_scales(name, count * max(1, rows))
            place = _Arena(
                residual[..., start : start + n],
                None if scales is None else scales[..., block : block + count],
            )
            for new, old_part in zip(place, self._residuals.get(name, (None, None)), strict=True):
                if new is not None and old_part is not None:
                    new.copy_(old_part.reshape(new.shape))
            self._residuals[name] = place
            start, block = start + n, block + count
        # Arenas that held one of these names are stale now: their residual moved here.
        for other in [k for k in self._arenas if not set(names).isdisjoint(k[0])]:
            del self._arenas[other]
        self._shares |= {name: [layout.ranks, layout.align, 1.0] for name in names}
        flat = _Arena(residual.view(-1), None if scales is None else scales.view(-1))
        self._arenas[names, sizes, rows] = flat
        return flat

    def _check_scales(self, name: str, count: int) -> None:
        """Refuse an int8 residual that was kept with other blocks."""
        scales = self._residuals[name].scales if name in self._residuals else None
        if scales is not None and scales.numel() != count:
            raise RuntimeError(
                f"int8 residual of {name!r} has {scales.numel()} scales, blocks of "
                f"{self.codec.format.block} elements need {count}; load it into the scheme that "
                "saved it (reset() forgets it)"
            )


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU: a file's tensor then goes to any device, not to the one it came from."""
    return tensor.to("cpu", copy=True)


def _rows(layout: Layout) -> int:
    """Repetitions of the segments."""
    return layout.ranks if layout.stacked else 1
