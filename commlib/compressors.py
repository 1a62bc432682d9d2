"""Compressors: one per (codec, feedback) of a communicator, and all they remember."""

from __future__ import annotations

from typing import Any, get_args

import torch

from commlib_kernels import backend_for

from .codecs.base import Codec, Round
from .feedback import Compressor, Feedback, Plain
from .modes import OF_PIPELINES
from .scheme import AlgorithmConfig, Hierarchical, PowerSGD, Scheme, TwoPhase


class Compressors:
    """Made on first use, with their kernels compiled.

    Those of hierarchical schemes are others: they remember sums of a host, and of its part alone.
    So are those of low rank, which remember a factor of that rank.

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
        warmup = getattr(backend_for(self._device), "warmup", None)
        if warmup is not None:
            warmup(codec.format, self._device)


def apart(scheme: Scheme) -> AlgorithmConfig | None:
    """The algorithm of `scheme` where what it remembers is of no use to others."""
    config = scheme.algorithm
    if isinstance(config, Hierarchical):
        return Hierarchical()
    return PowerSGD(config.rank) if isinstance(config, PowerSGD) else None


def text_of(codec: Codec, memory: Feedback, of: AlgorithmConfig | None = None) -> str:
    """`CODEC+FEEDBACK`: a scheme's text, with no algorithm but one that is `apart`."""
    text = f"{codec}+{memory}" if str(memory) else str(codec)
    return text if of is None else f"{text}@{of}"
