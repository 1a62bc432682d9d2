"""Compressors: one per (codec, feedback) of a communicator, and all they remember."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, get_args

import torch

from commlib_kernels import backend_for

from .algorithms import AlgorithmConfig, Hierarchical, PowerSGD, Thc, TwoPhase
from .codecs import Entropy
from .codecs.base import Codec, Round
from .feedback import OWNER, Compressor, ErrorFeedback, Feedback, Plain
from .modes import OF_PIPELINES
from .scheme import Scheme


class Move(NamedTuple):
    """The residual under `key` goes from one compressor to another, or nowhere."""

    key: str
    source: Compressor
    to: Compressor | None


class Compressors:
    """Made on first use, with their kernels compiled.

    Those of hierarchical schemes are others: they remember sums of a host, and of its part alone.
    So are those of low rank, which remember a factor of that rank, and those of thc, whose owners
    owe nothing.

    seed: of the random streams. rank: of this process in its group.
    """

    def __init__(self, device: torch.device, seed: int, rank: int) -> None:
        self._device, self._seed, self._rank = device, seed, rank
        self._made: dict[tuple[Codec, Feedback, AlgorithmConfig | None], Compressor] = {}

    def of(self, scheme: Scheme) -> Compressor:
        """The compressor of `scheme`."""
        return self._get(scheme.codec, scheme.feedback, apart(scheme))

    def plain(self, codec: Codec) -> Compressor:
        """The compressor of a codec without memory."""
        return self._get(codec, Plain(), None)

    def back(self, scheme: Scheme) -> Compressor | None:
        """The compressor of its second half, where that is another one."""
        config = scheme.algorithm
        codec = config.back if isinstance(config, TwoPhase) else None
        if codec is None or codec == scheme.codec:
            return None
        return self._get(codec, scheme.feedback, None)

    def moves(self, schemes: Mapping[str, Scheme]) -> list[Move]:
        """Which residuals go where if tensors travel by other schemes from now on.

        schemes: by name; residuals of other names stay where they are.

        Raises: ValueError: one cannot go on under its new scheme.
        """
        found: list[Move] = []
        for (codec, memory, of), compressor in list(self._made.items()):
            for key in compressor.residual_keys():
                name = key.removesuffix(OWNER)
                scheme = schemes.get(name)
                if scheme is None:
                    continue
                to, why = self._home(scheme, owner=key != name), ""
                if to is None:
                    why = "the new one has no memory" if compressor.owes(key) else ""
                elif to is not compressor:
                    why = compressor.why_not(key, to, _align(scheme))
                    alike = of == apart(scheme)
                    why = why or ("" if alike else "one of them is of hosts, of low rank, or thc's")
                if why:
                    raise ValueError(
                        f"the residual of {name!r} under {text_of(codec, memory, of)} cannot "
                        f"go on under {scheme}: {why}; reset() forgets all residuals"
                    )
                if to is not compressor:
                    found.append(Move(key, compressor, to))
        return found

    def move(self, moves: Sequence[Move]) -> None:
        """Carry out what `moves` found."""
        by_ends: dict[tuple[int, int], list[Move]] = {}
        for move in moves:
            by_ends.setdefault((id(move.source), id(move.to)), []).append(move)
        for group in by_ends.values():
            group[0].source.hand_over([move.key for move in group], group[0].to)

    def _home(self, scheme: Scheme, *, owner: bool) -> Compressor | None:
        """The compressor that has the residuals of a scheme's tensors; None: it has none."""
        if not _has_residuals(scheme):
            return None
        back = self.back(scheme) if owner else None
        return back or self.of(scheme)

    def warmup(self, scheme: Scheme) -> None:
        """Compile what `scheme` needs, whichever rounding it gets where it leaves that open."""
        config = scheme.algorithm
        other = config.back if isinstance(config, TwoPhase) else None
        other = config.inner if isinstance(config, Hierarchical) else other
        for codec in {scheme.codec, other or scheme.codec}:
            for rounding in get_args(Round):
                self._compile(codec.rounded(rounding))

    def state_dict(self) -> dict[str, Any]:
        """What each remembers, by `CODEC+FEEDBACK`, and the algorithm that alone has use for it."""
        return {text_of(*made): compressor.state_dict() for made, compressor in self._made.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`; what is not in it is forgotten.

        Raises: ValueError: it is no such state, and nothing has changed.
        """
        old, self._made = self._made, {}
        try:
            for text, saved in state.items():
                self.of(Scheme.parse(text)).load_state_dict(saved)
        except BaseException:
            self._made = old
            raise

    def reset(self, *, in_place: bool = False) -> None:
        for compressor in self._made.values():
            compressor.reset(in_place=in_place)

    def reset_hosts(self) -> int:
        """Forget what hierarchical schemes remember; how many bytes that was."""
        found = [made for (_, _, of), made in self._made.items() if isinstance(of, Hierarchical)]
        held = sum(compressor.nbytes() for compressor in found)
        for compressor in found:
            compressor.reset()
        return held

    def rescale(self, factor: float) -> None:
        for compressor in self._made.values():
            compressor.rescale(factor)

    def nbytes(self) -> int:
        return sum(compressor.nbytes() for compressor in self._made.values())

    def _get(self, codec: Codec, memory: Feedback, of: AlgorithmConfig | None) -> Compressor:
        made = self._made.get((codec, memory, of))
        return made if made is not None else self._make(codec, memory, of)

    def _make(self, codec: Codec, memory: Feedback, of: AlgorithmConfig | None) -> Compressor:
        if isinstance(memory, OF_PIPELINES):
            raise ValueError(
                f"{codec}+{memory}: {memory.id} is a mode of pipeline stages, which no collective "
                f"has; use {codec}+ef for gradients"
            )
        made = Compressor(codec, memory, self._seed, self._rank, self._device)
        self._compile(codec)  # before ranks wait for each other: a first compilation takes seconds
        self._made[codec, memory, of] = made
        return made

    def _compile(self, codec: Codec) -> None:
        if isinstance(codec, Entropy):
            codec.warmup(self._device)
        warmup = getattr(backend_for(self._device), "warmup", None)
        if warmup is not None:
            warmup(codec.format, self._device)


def check_turns(name: str | None, schemes: Mapping[int, Scheme], *, owners: bool) -> None:
    """Refuse schemes of a tensor where a residual could not go on from one to the next.

    schemes: by the step they begin at. owners: those that reduce have residuals too, of chunks.

    Raises: ValueError naming the tensor, the step and both schemes.
    """
    for (_, old), (step, new) in pairwise(schemes.items()):
        why = _why_stuck(old, new, owners=owners) if name is not None and old != new else ""
        if why:
            raise ValueError(
                f"{name!r} goes by {old}, and from step {step} on by {new}, where its residual "
                f"cannot go on: {why}; let from_step begin a scheme with the same feedback and "
                "blocks, or at that step reset() and set another policy"
            )


def _why_stuck(old: Scheme, new: Scheme, *, owners: bool) -> str:
    """Why residuals under `old` cannot go on under `new`; empty where they can."""
    if not _has_residuals(old):
        return ""
    if not _has_residuals(new):
        return "the new one has no memory"
    if old.feedback != new.feedback:
        return f"it is of +{old.feedback}, not of +{new.feedback}"
    if apart(old) != apart(new):
        return "one of them is of hosts, of low rank, or thc's"
    scaled = isinstance(old.feedback, ErrorFeedback) and old.feedback.dtype == "int8"
    if scaled and old.codec.format.block != new.codec.format.block:
        return "its int8 scales are of other blocks"
    if owners and _align(old) != _align(new):
        return f"owners' chunks are cut at {_align(old)} elements, not at {_align(new)}"
    return ""


def _has_residuals(scheme: Scheme) -> bool:
    return not scheme.lossless and not isinstance(scheme.feedback, (Plain, *OF_PIPELINES))


def _align(scheme: Scheme) -> int:
    """Chunks of a scheme's messages are cut at multiples of this."""
    config = scheme.algorithm
    back = config.back if isinstance(config, TwoPhase) else None
    return math.lcm(scheme.codec.align, (back or scheme.codec).align)


def apart(scheme: Scheme) -> AlgorithmConfig | None:
    """The algorithm of `scheme` where what it remembers is of no use to others."""
    config = scheme.algorithm
    if isinstance(config, Hierarchical):
        return Hierarchical()
    if isinstance(config, Thc):
        return config
    return PowerSGD(config.rank) if isinstance(config, PowerSGD) else None


def text_of(codec: Codec, memory: Feedback, of: AlgorithmConfig | None = None) -> str:
    """`CODEC+FEEDBACK`: a scheme's text, with no algorithm but one that is `apart`."""
    text = f"{codec}+{memory}" if str(memory) else str(codec)
    return text if of is None else f"{text}@{of}"
