"""How one tensor travels: a codec, what it remembers, and the collective that moves it.

    CODEC{|CODEC}[+FEEDBACK][@ALGORITHM]        each part with :name=value options

    int8    int4:block=64+ef    int3+ef:beta=0.9    bf16@ring    int2+ef@two_phase:back=int4
    int4+ef@hierarchical    int4+ef@hierarchical:inner=bf16    fp32+ef@power_sgd:rank=2
    fp32+ef@thc:bits=4

A value in parentheses is taken as it stands, so that a codec with options can be an option itself:
`back=(int4:block=64)`.
The algorithm is left out where it is the codec's default: `native` for fp32, whose payloads the
network itself adds (bitwise the library's own collective), `two_phase` for all others.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar

import torch

from .codecs import Codec, RandK, Round, codec
from .feedback import ErrorFeedback, Feedback, Plain, feedback

# What codecs take. Everything else travels raw.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Role(StrEnum):
    """What a tensor is in the training step; rules and defaults depend on it."""

    GRADIENT = "gradient"
    PARAMETER = "parameter"
    ACTIVATION = "activation"
    ACTIVATION_GRADIENT = "activation_gradient"
    OTHER = "other"

    def __repr__(self) -> str:
        return f"Role.{self.name}"


def default_round(feedback: Feedback, role: Role) -> Round:
    """Rounding where the user's text has no `round=`.

    Nearest has the smaller error and the residual undoes its bias; without a residual the bias of
    nearest would add up in a gradient over the steps, and stochastic rounding has none.
    """
    return "stochastic" if role is Role.GRADIENT and feedback == Plain() else "nearest"


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


@dataclass(frozen=True)
class Scheme:
    """Codec, feedback and algorithm of a tensor; `Scheme.parse(str(s)) == s`.

    algorithm: None takes the codec's default. Raises ValueError where the parts do not go together:
    feedback that diverges with the codec (with the numbers), a codec that the network cannot add
    under `native`, or whose values are no numbers to multiply with under `power_sgd`.
    """

    codec: Codec
    feedback: Feedback = dataclasses.field(default_factory=Plain)
    algorithm: AlgorithmConfig | None = None

    def __post_init__(self) -> None:
        if self.algorithm is None:
            object.__setattr__(self, "algorithm", _default_algorithm(self.codec))
        self.feedback.check(self.codec)
        if isinstance(self.algorithm, TwoPhase) and self.algorithm.back is not None:
            self.feedback.check(self.algorithm.back)
        if isinstance(self.algorithm, Native) and self.codec.sum_dtype is None:
            raise ValueError(
                f"{self.codec}@native: the network cannot add {self.codec.id} payloads; "
                "native takes fp32, fp16, bf16 and randk of these, the others take two_phase or "
                "ring"
            )
        if isinstance(self.algorithm, PowerSGD):
            _check_power_sgd(self.codec, self.feedback)
        if isinstance(self.algorithm, Thc):
            _check_thc(self.codec, self.feedback)
        if isinstance(self.algorithm, Hierarchical | Ring):
            inner = getattr(self.algorithm, "inner", None)
            for part in (self.codec, inner or self.codec):
                check_fixed_size(part, self.algorithm.id, "two_phase")
        if isinstance(self.algorithm, TwoPhase) and (self.algorithm.slices or 0) > VARIABLE_SLICES:
            for part in (self.codec, self.algorithm.back or self.codec):
                what = f"slices={self.algorithm.slices}"
                check_fixed_size(part, what, f"slices={VARIABLE_SLICES} or fewer")
        if isinstance(self.codec, RandK):
            _check_choices(self.codec, self.algorithm)

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """The scheme that `text` names. ValueError says which part is wrong and what is allowed."""
        text = text.strip()
        if not text:
            raise ValueError("the scheme text is empty; write for example int8+ef, int4:block=64")
        body, at, end = _cut(text, "@")
        front, plus, middle = _cut(body, "+")
        if _cut(end, "+")[1]:
            raise ValueError(
                f"scheme {text!r}: the feedback stands before the algorithm: "
                "CODEC+FEEDBACK@ALGORITHM"
            )
        try:
            parsed = codec(front)
            if plus and not middle:
                raise ValueError("no feedback after '+'; write for example +ef, or leave '+' out")
            memory = feedback(middle)
            return cls(parsed, memory, algorithm(end) if at else None)
        except ValueError as error:  # each says which part it is about
            raise ValueError(f"scheme {text!r}: {error}") from error

    def __str__(self) -> str:
        memory = str(self.feedback)
        text = f"{self.codec}+{memory}" if memory else str(self.codec)
        if self.algorithm == _default_algorithm(self.codec):
            return text
        return f"{text}@{self.algorithm}"

    @property
    def lossless(self) -> bool:
        """Whether this is bitwise the library's own collective: fp32@native."""
        return self.codec.id == "fp32" and isinstance(self.algorithm, Native)

    @property
    def remembers(self) -> bool:
        """Whether it keeps state under keys: residuals, or the factor that PowerSGD starts from."""
        return self.feedback != Plain() or isinstance(self.algorithm, PowerSGD)

    def resolve(self, role: Role = Role.GRADIENT) -> Scheme:
        """The same scheme with every rounding that the user left open chosen for `role`."""
        rounding = default_round(self.feedback, role)
        chosen = replace(self, codec=self.codec.rounded(rounding))
        config = chosen.algorithm
        if isinstance(config, TwoPhase) and config.back is not None:
            config = replace(config, back=config.back.rounded(rounding))
            chosen = replace(chosen, algorithm=config)
        if isinstance(config, Hierarchical) and config.inner is not None:
            alone = default_round(Plain(), role)  # it has no memory that would undo a bias
            config = replace(config, inner=config.inner.rounded(alone))
            chosen = replace(chosen, algorithm=config)
        return chosen

    def flat(self) -> Scheme:
        """The same scheme for collectives that know neither hosts, matrices nor sums of codes: the
        codec alone."""
        if not isinstance(self.algorithm, Hierarchical | PowerSGD | Thc):
            return self
        return replace(self, algorithm=_default_algorithm(self.codec))

    def stateless(self) -> Scheme:
        """The same scheme without memory: for tensors without a key, and for activations.

        Of PowerSGD, which is nothing without it, the codec alone.
        """
        if isinstance(self.algorithm, PowerSGD):
            return Scheme(self.codec)
        return self if self.feedback == Plain() else replace(self, feedback=Plain())


def check_fixed_size(codec: Codec, what: str, instead: str) -> None:
    """Refuse a codec whose sizes depend on the data where they must be known before (ValueError).

    instead: what takes it.
    """
    if not codec.fixed_size:
        inner = str(codec).removesuffix("|entropy")
        raise ValueError(
            f"{codec}: {what} needs messages whose size is known before they are coded; use "
            f"{inner}" + (f", or {instead}" if instead else "")
        )


def check_dtype(scheme: Scheme, dtype: torch.dtype) -> None:
    """Refuse a tensor that `scheme` was named for explicitly and cannot carry (ValueError).

    Without an explicit scheme such a tensor travels raw: `Policy.choose` says so.
    """
    if not scheme.lossless and dtype not in DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(
            f"scheme {str(scheme)!r} got a {dtype} tensor; it takes {allowed}. "
            "Use scheme 'fp32', which sends any tensor raw, or name no scheme"
        )


def algorithm(text: str) -> AlgorithmConfig:
    """The algorithm config that `text` names: `two_phase:slices=4`, `ring`."""
    name, *options = _split(text.strip(), ":")
    if name not in CONFIGS:
        raise ValueError(unknown("algorithm", name, CONFIGS))
    return typing.cast(AlgorithmConfig, _construct(CONFIGS[name], name, options))


def unknown(what: str, got: str, allowed: Iterable[str]) -> str:
    """The message for a name that is not in a table: what it is, what is allowed, the nearest."""
    names = [str(name) for name in allowed]
    near = difflib.get_close_matches(got, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {got!r}; allowed: {', '.join(names)}{hint}"


def _check_slices(config: TwoPhase | Hierarchical) -> None:
    if config.slices is not None and not 1 <= config.slices <= MAX_SLICES:
        raise ValueError(f"{config.id}: slices is {config.slices}, allowed: 1 to {MAX_SLICES}")


def _check_power_sgd(codec: Codec, feedback: Feedback) -> None:
    if codec.sum_dtype is None or codec.format.sparse is not None:
        raise ValueError(
            f"{codec}@power_sgd: the codec is that of the factors, which are made orthogonal and "
            "multiplied; power_sgd takes fp32, fp16 and bf16"
        )
    if feedback not in (Plain(), ErrorFeedback()):
        raise ValueError(
            f"{codec}+{feedback}@power_sgd: the residual is all that the factors leave of a "
            f"matrix, in fp32; power_sgd takes {codec}+ef without options, or {codec} alone"
        )


def _check_thc(codec: Codec, feedback: Feedback) -> None:
    if codec.id != "fp32":
        raise ValueError(
            f"{codec}@thc: codes of {codec.id} are not of a grid that all ranks share, and cannot "
            "be added; thc has codes of its own: write fp32+ef@thc:bits=4"
        )
    if feedback not in (Plain(), ErrorFeedback()):
        raise ValueError(
            f"{codec}+{feedback}@thc: the residual is what rounding and clamping leave, in fp32; "
            f"thc takes {codec}+ef without options, or {codec} alone"
        )


def _check_choices(codec: RandK, config: AlgorithmConfig | None) -> None:
    """Refuse what would choose again from what was chosen, and scale it once too often."""
    second = [getattr(config, name, None) for name in ("back", "inner")]
    if isinstance(config, Ring) or any(isinstance(c, RandK) for c in second):
        raise ValueError(
            f"{codec}@{config}: what was chosen at random would be scaled, and chosen again; take "
            "two_phase, native or hierarchical, with no other randk"
        )


def _default_algorithm(codec: Codec) -> AlgorithmConfig:
    return Native() if codec.sum_dtype is torch.float32 else TwoPhase()


def _split(text: str, mark: str) -> list[str]:
    """`text` cut at every `mark` outside parentheses."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == mark and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]]


def _cut(text: str, mark: str) -> tuple[str, str, str]:
    """`str.partition` that leaves parentheses alone."""
    head = _split(text, mark)[0]
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


def _construct(cls: type[Any], name: str, options: list[str]) -> Any:
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
