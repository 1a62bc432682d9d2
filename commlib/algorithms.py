"""The algorithms that a scheme can name, as values: which collective moves the bytes, and how.

    native    ring    two_phase:back=int4:slices=4    hierarchical:inner=bf16    power_sgd:rank=2
    thc:bits=4

A value in parentheses is taken as it stands, so that a codec with options can be an option itself:
`back=(int4:block=64)`. What they do: `collectives`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .codecs import Codec, codec


@dataclass(frozen=True)
class Native:
    """The library's own collective on the payload viewed as numbers; only codecs it can add."""

    id: ClassVar[str] = "native"

    def __str__(self) -> str:
        return _format(self)


MAX_SLICES = 1024
"""Each has two exchanges, and a message numbers its exchanges (lane.py)."""
VARIABLE_SLICES = MAX_SLICES // 2
"""The same where sizes travel before payloads."""


@dataclass(frozen=True)
class TwoPhase:
    """Compressed reduce-scatter, then compressed all-gather: two quantizations whatever the ranks.

    back: the codec of the second half; None takes the scheme's own.
    slices: pieces of a message in flight at a time; None lets the collective choose by size.
    """

    id: ClassVar[str] = "two_phase"
    back: Codec | None = None
    slices: int | None = None

    def __post_init__(self) -> None:
        _check_slices(self)

    def __str__(self) -> str:
        return _format(self)


@dataclass(frozen=True)
class Hierarchical:
    """Sums inside every host first, then two_phase between hosts, for which the codec is.

    An all-reduce; the other collectives know no hosts and go as under two_phase, which is said.

    inner: codec of what travels inside a host, without memory; None: raw.
    slices: as in TwoPhase.
    """

    id: ClassVar[str] = "hierarchical"
    inner: Codec | None = None
    slices: int | None = None

    def __post_init__(self) -> None:
        _check_slices(self)

    def __str__(self) -> str:
        return _format(self)


@dataclass(frozen=True)
class Ring:
    """A ring that re-encodes at every hop: its error grows with the ranks; for comparison."""

    id: ClassVar[str] = "ring"

    def __str__(self) -> str:
        return _format(self)


MAX_RANK = 256
THC_BITS = (2, 4, 8)


@dataclass(frozen=True)
class PowerSGD:
    """Low rank: a matrix travels as two thin factors (Vogels et al. 2019, arXiv 1905.13727).

    An all-reduce of whole matrices, of more dimensions as first x rest. The codec is that of the
    factors. Tensors that it does not suit travel raw.

    rank: of what is sent: n x m becomes n x rank and m x rank.
    min_rate: raw where (n + m) rank min_rate > n m; PyTorch's min_compression_rate.
    """

    id: ClassVar[str] = "power_sgd"
    rank: int = 1
    min_rate: int = 2

    def __post_init__(self) -> None:
        for name, most in (("rank", MAX_RANK), ("min_rate", None)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not whole or (most is not None and value > most):
                allowed = f"1 to {most}" if most else "1 and more"
                raise ValueError(f"{self.id}: {name} is {value!r}, allowed: {allowed}")

    def unsuited(self, shape: Sequence[int] | None, codec: Codec, dtype: torch.dtype) -> str:
        """Why a tensor of `shape` (None: not known) travels raw; empty where it does not."""
        if shape is None:
            return "low rank is for all_reduce of whole matrices, and no shape is known here"
        n, m = matrix_of(shape)
        values = (n + m) * self.rank
        wide = 4 if codec.sum_dtype is torch.float32 else 2
        if values * self.min_rate > n * m or values * wide >= n * m * dtype.itemsize:
            return (
                f"rank {self.rank} of a {n} x {m} matrix is {values} values, not {self.min_rate} "
                f"times fewer than {n * m}"
            )
        return ""

    def __str__(self) -> str:
        return _format(self)


@dataclass(frozen=True)
class Thc:
    """Codes that are added without being decoded (Li et al. 2024, arXiv 2302.08545).

    An all-reduce: all ranks agree on a scale per chunk, round to one grid, and integers are summed.
    It has no codec beside itself: the scheme's is fp32, what the sums are decoded to.

    bits: of a code, 2, 4 or 8; sums take 8 bits, or 16 where ranks x (2^bits - 1) > 255.
    """

    id: ClassVar[str] = "thc"
    bits: int = 4

    def __post_init__(self) -> None:
        if self.bits not in THC_BITS or isinstance(self.bits, bool):
            allowed = ", ".join(map(str, THC_BITS))
            raise ValueError(f"{self.id}: bits is {self.bits!r}, allowed: {allowed}")

    def unsuited(self, numel: int, dtype: torch.dtype) -> str:
        """Why a tensor of so many elements travels raw; empty where it does not.

        By bytes of codes and sums among few ranks, and of a scale: tensors of a few elements.
        """
        padded = -(-numel // 4096) * 4096 if numel > 4096 else 1 << max(3, (numel - 1).bit_length())
        if padded * (self.bits + 8) // 8 + 8 >= 2 * numel * dtype.itemsize:
            return f"codes and sums of {numel} values would not be smaller than raw"
        return ""

    def __str__(self) -> str:
        return _format(self)


def matrix_of(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor as a matrix: the first dimension x the rest."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


AlgorithmConfig = Native | TwoPhase | Hierarchical | Ring | PowerSGD | Thc
CONFIGS: Mapping[str, type[AlgorithmConfig]] = {
    c.id: c for c in (Native, TwoPhase, Hierarchical, Ring, PowerSGD, Thc)
}


def algorithm(text: str) -> AlgorithmConfig:
    """The algorithm config that `text` names: `two_phase:slices=4`, `ring`."""
    name, *options = split(text.strip(), ":")
    if name not in CONFIGS:
        raise ValueError(unknown("algorithm", name, CONFIGS))
    return typing.cast(AlgorithmConfig, construct(CONFIGS[name], name, options))


def unknown(what: str, got: str, allowed: Iterable[str]) -> str:
    """The message for a name that is not in a table: what it is, what is allowed, the nearest."""
    names = [str(name) for name in allowed]
    near = difflib.get_close_matches(got, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {got!r}; allowed: {', '.join(names)}{hint}"


def _check_slices(config: TwoPhase | Hierarchical) -> None:
    if config.slices is not None and not 1 <= config.slices <= MAX_SLICES:
        raise ValueError(f"{config.id}: slices is {config.slices}, allowed: 1 to {MAX_SLICES}")


def split(text: str, mark: str) -> list[str]:
    """`text` cut at every `mark` outside parentheses."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == mark and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]]


def cut(text: str, mark: str) -> tuple[str, str, str]:
    """`str.partition` that leaves parentheses alone."""
    head = split(text, mark)[0]
    return (head, mark, text[len(head) + 1 :]) if len(head) < len(text) else (head, "", "")


def _format(config: AlgorithmConfig) -> str:
    """`id:name=value` with the fields that differ from their defaults."""
    words = [config.id]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            shown = str(value)
            words.append(f"{field.name}=({shown})" if ":" in shown else f"{field.name}={shown}")
    return ":".join(words)


def construct(cls: type[Any], name: str, options: list[str]) -> Any:
    """An instance of the dataclass `cls` from `name=value` options, by its fields' types."""
    hints = typing.get_type_hints(cls)
    fields = [field.name for field in dataclasses.fields(cls)]
    values: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if key not in fields:
            if not fields:
                raise ValueError(f"{name} takes no options, got {option!r}")
            raise ValueError(f"{name}: {unknown('option', key, fields)}")
        if not equals or not value:
            raise ValueError(f"{name}: option {option!r} has no value; write {key}=VALUE")
        if key in values:
            raise ValueError(f"{name}: option {key!r} is given twice")
        values[key] = _convert(hints[key], value, f"{name}: {key}")
    return cls(**values)


def _convert(hint: Any, value: str, where: str) -> Any:
    if value.startswith("(") and value.endswith(")"):
        value = value[1:-1]
    kinds = typing.get_args(hint) or (hint,)
    if Codec in kinds:
        try:
            return codec(value)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if int in kinds:
        try:
            return int(value)
        except ValueError:
            raise ValueError(f"{where} is {value!r}, it must be a whole number") from None
    raise TypeError(f"{where}: options of type {hint} have no text form")  # a bug in a config class
