"""Feedback: what a scheme remembers from one message to the next, as values.

Of increments (gradients), what rounding threw away is added to the next message, with g the
gradient, h the residual and Q the codec::

    v  = g + alpha h            what is coded
    h' = beta h + omega (g - Q(v))

Classic error feedback is (1, 1, 1) (Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847),
ECQ-SGD is (alpha, beta, 1) (Wu et al. 2018, arXiv 1806.08054), LoCo is (1, 1, 1 - b) (Xie et al.
2024, arXiv 2407.04480).

Activations are values: the residual of one sample would harm the next. What helps is a reference m
of the same sample that both ends hold, and coding the difference to it::

    send Q(a - m);    m' = m + Q(a - m)    at both ends

`Delta` holds one reference per sample (AQ-SGD, Wang et al. 2022, arXiv 2206.01299), `Reuse` one per
micro-batch that stays for several steps (Clapping, Kong et al. 2025, arXiv 2509.19029). `Lep` is
the residual of one micro-batch's activation gradient added to the next one's: their weights are the
same (lazy error propagation of Optimus-CC, Song et al. 2023).
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, ClassVar, Literal

import torch

from commlib.codecs.base import Codec

RESIDUAL_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


@dataclass(frozen=True)
class Plain:
    """No memory: what rounding throws away is gone."""

    id: ClassVar[str] = ""

    def check(self, codec: Codec, numel: int | None = None) -> None:
        """Every codec may be used without memory."""

    def __str__(self) -> str:
        return ""


@dataclass(frozen=True)
class ErrorFeedback:
    """``h' = beta h + omega (g - Q(g + alpha h))``.

    Args:
        alpha: how much of the residual joins the next message.
        beta: how much of the residual stays.
        omega: how much of the new error is taken up (below 1: a moving average, LoCo).
        dtype: of the residual: fp32, bf16 (half the memory), int8 (a quarter and 2 bytes a block).
    """

    id: ClassVar[str] = "ef"
    alpha: float = 1.0
    beta: float = 1.0
    omega: float = 1.0
    dtype: Literal["fp32", "bf16", "int8"] = "fp32"

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "omega"):
            number = getattr(self, name)
            if not (isinstance(number, int | float) and math.isfinite(number)):
                raise ValueError(f"ef: {name}={number!r}; allowed: a finite number")
            # 1 and 1.0 are one configuration and have one text.
            object.__setattr__(self, name, float(number))
        if self.dtype not in RESIDUAL_DTYPES:
            raise ValueError(f"ef: dtype={self.dtype!r}; allowed: {', '.join(RESIDUAL_DTYPES)}")

    def check(self, codec: Codec, numel: int | None = None) -> None:
        """Refuse a pair whose residual would grow without bound.

        With gamma the codec's worst ``|Q(v) - v|^2 / |v|^2``: an unbiased codec needs
        ``omega^2 alpha^2 gamma + (beta - omega alpha)^2 < 1``, a biased one
        ``|beta - omega alpha| + omega |alpha| sqrt(gamma) < 1``.

        Args:
            numel: elements that share a scale, for codecs with ``block=tensor``; None: not known
                yet, such a pair is checked when the first tensor comes.

        Raises:
            ValueError: with the numbers and what to do.
        """
        gamma = codec.gamma(numel)
        if math.isinf(gamma):
            return
        carry = self.beta - self.omega * self.alpha
        gain = abs(self.omega * self.alpha)
        if codec.unbiased:
            growth, rule = (
                gain**2 * gamma + carry**2,
                "omega^2 alpha^2 gamma + (beta - omega alpha)^2",
            )
        else:
            growth, rule = (
                gain * math.sqrt(gamma) + abs(carry),
                "omega alpha sqrt(gamma) + |beta - omega alpha|",
            )
        if growth >= 1:
            raise ValueError(
                f"{codec}+{self} diverges: {rule} = {growth:.3g} must be below 1, with "
                f"gamma = {gamma:.3g} for {codec}; use nearest rounding, more bits, a smaller "
                "block, or a smaller alpha"
            )

    def __str__(self) -> str:
        return _text(self)


@dataclass(frozen=True)
class Delta:
    """The difference to the same sample's last reconstruction, which both ends store (AQ-SGD).

    A sample's first `raw` visits travel raw. The store is bounded: what was visited longest ago
    makes room, and is a first visit when it comes again.

    Args:
        store: where references are kept: "device", "host" memory, or a "disk" file.
        cap: bytes that one end of one boundary may store, as `512MiB`, `8GiB` or a number.
        folder: of the files of `store=disk`; empty: the system's folder for temporary files.
        raw: visits before differences are coded. 1 for a model that was trained before. From
            scratch 2: at the second visit an activation differs from its first by about its own
            size, so its difference costs as much error as it would itself.
    """

    id: ClassVar[str] = "delta"
    store: Literal["device", "host", "disk"] = "host"
    cap: str = "1GiB"
    folder: str = ""
    raw: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "cap", str(self.cap))  # a number and its text are one value
        if self.store not in ("device", "host", "disk"):
            raise ValueError(f"delta: store={self.store!r}; allowed: device, host, disk")
        if self.folder and self.store != "disk":
            raise ValueError(f"delta: folder={self.folder!r} needs store=disk, not {self.store}")
        if set(self.folder) & set(":@()") or self.folder != self.folder.strip():
            raise ValueError(
                f"delta: folder={self.folder!r}; allowed: a path without : @ ( ) and spaces at its "
                "ends, which the text of a scheme could not carry; name a link to it"
            )
        if self.raw < 1:
            raise ValueError(f"delta: raw={self.raw}; allowed: 1 or more visits")
        if self.cap_bytes < 1:
            raise ValueError(f"delta: cap={self.cap!r}; allowed: at least one byte")

    @property
    def cap_bytes(self) -> int:
        """`cap` in bytes."""
        found = re.fullmatch(r"(\d+)([KMGT]iB|)", self.cap)
        if found is None:
            raise ValueError(f"delta: cap={self.cap!r}; allowed: such as 512MiB, 8GiB, 1000000")
        return int(found[1]) * UNITS[found[2]]

    def check(self, codec: Codec, numel: int | None = None) -> None:
        """Refuse a codec whose references would run away; see `check_difference`."""
        check_difference(self, codec, numel)

    def __str__(self) -> str:
        return _text(self)


@dataclass(frozen=True)
class Reuse:
    """The difference to the last message of the same micro-batch, kept while a batch stays.

    Args:
        first: how a fresh batch travels: "raw" (Clapping-FU) or "coded" (Clapping-FC).
    """

    id: ClassVar[str] = "reuse"
    first: Literal["raw", "coded"] = "raw"

    def __post_init__(self) -> None:
        if self.first not in ("raw", "coded"):
            raise ValueError(f"reuse: first={self.first!r}; allowed: raw, coded")

    def check(self, codec: Codec, numel: int | None = None) -> None:
        """As `Delta.check`."""
        check_difference(self, codec, numel)

    def __str__(self) -> str:
        return _text(self)


@dataclass(frozen=True)
class Lep:
    """Lazy error propagation: classic error feedback from one micro-batch to the next.

    Args:
        dtype: of the residual, as in `ErrorFeedback`.
    """

    id: ClassVar[str] = "lep"
    dtype: Literal["fp32", "bf16", "int8"] = "fp32"

    def __post_init__(self) -> None:
        if self.dtype not in RESIDUAL_DTYPES:
            raise ValueError(f"lep: dtype={self.dtype!r}; allowed: {', '.join(RESIDUAL_DTYPES)}")

    @property
    def residual(self) -> ErrorFeedback:
        """The rule it follows."""
        return ErrorFeedback(dtype=self.dtype)

    def check(self, codec: Codec, numel: int | None = None) -> None:
        """As `ErrorFeedback.check`."""
        self.residual.check(codec, numel)

    def __str__(self) -> str:
        return _text(self)


RUNAWAY = 1.5
"""gamma of l2-scaled codecs from which the difference to a reference grows with every visit."""


def check_difference(memory: Delta | Reuse, codec: Codec, numel: int | None = None) -> None:
    """Refuse a codec under which the difference ``e = a - m`` grows: ``e' = e - Q(e)``.

    Scaled by the block's maximum nothing grows, whatever gamma is: no element's error exceeds a
    step, which is the largest difference divided by the levels. Scaled by its l2 norm a step can be
    larger than every element. |e|^2 per visit of one Gaussian vector, measured over visits 25 to 50
    (QSGD, the levels and block): x 0.60 (4, 64: gamma 1.02), 0.98 (4, 80: 1.27), 1.02 (7, 288:
    1.49), 1.00 (16, 1536: 1.52), 1.09 (4, 96: 1.52), 1.13 (4, 128: 2.03), 1.16 (4, 1024: 8.06).
    Stochastic rounding by the maximum only converges slowly where it has one level (int2): 0.81 at
    block 64, 0.95 at 512. Nearest: below 0.3 at both.

    Args:
        numel: elements that share a scale, for codecs with ``block=tensor``; None: not known yet.

    Raises:
        ValueError: with the numbers and what to do.
    """
    gamma = codec.gamma(numel)
    if codec.format.sparse is not None and codec.format.sparse.scaled and gamma >= 1:
        raise ValueError(
            f"{codec}+{memory} diverges: the difference to the reference grows where values that "
            f"were chosen at random are sent {gamma + 1:.3g} times too large; use scale=none"
        )
    if codec.format.scale == "l2" and RUNAWAY <= gamma < math.inf:
        raise ValueError(
            f"{codec}+{memory} diverges: the difference to the reference grows with every visit "
            f"where gamma of an l2-scaled codec is {RUNAWAY} or more, and it is {gamma:.3g} for "
            f"{codec}; use intN, qsgd:norm=max, more levels or a smaller block"
        )


Feedback = Plain | ErrorFeedback | Delta | Reuse | Lep
OF_PIPELINES = (Delta, Reuse, Lep)
"""Modes of a boundary between stages; no collective has them."""

_NAMED: dict[str, type[ErrorFeedback | Delta | Reuse | Lep]] = {
    kind.id: kind for kind in (ErrorFeedback, Delta, Reuse, Lep)
}

_READ: dict[Any, Callable[[str], object]] = {float: float, int: int}
"""How an option is read, by its type; others are text."""


def feedback(text: str) -> Feedback:
    """The feedback that a text names: ``""`` or ``NAME[:option=value]``, such as ``ef:beta=0.9``.

    Raises:
        ValueError: says which part is unknown and what is allowed.
    """
    name, *given = text.strip().split(":")
    if name == "" and not given:
        return Plain()
    if name not in _NAMED:
        close = get_close_matches(name, _NAMED, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"feedback {name!r} does not exist; allowed: {', '.join(_NAMED)}{meant}")
    kind = _NAMED[name]
    allowed = {f.name: f.type for f in fields(kind)}
    values: dict[str, Any] = {}
    for option in given:
        key, equals, value = option.partition("=")
        if not equals or key not in allowed:
            close = get_close_matches(key, allowed, n=1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            choice = ", ".join(allowed) or "none"
            raise ValueError(f"{name}: option {option!r}; allowed: {choice}{meant}")
        if key in values:
            raise ValueError(f"{name}: option {key!r} is given twice; leave one out")
        try:
            values[key] = _READ.get(allowed[key], str)(value)
        except ValueError:
            kind_of = "whole number" if allowed[key] is int else "number"
            raise ValueError(f"{name}: {key}={value!r}; allowed: a {kind_of}") from None
    return kind(**values)


def _text(memory: ErrorFeedback | Delta | Reuse | Lep) -> str:
    options = [
        f":{f.name}={_number(getattr(memory, f.name))}"
        for f in fields(memory)
        if getattr(memory, f.name) != f.default
    ]
    return memory.id + "".join(options)


def _number(x: object) -> str:
    return f"{x:g}" if isinstance(x, float) and float(f"{x:g}") == x else str(x)
