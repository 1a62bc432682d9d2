"""How one tensor travels: a codec, what it remembers, and the collective that moves it.

    CODEC{|CODEC}[+FEEDBACK][@ALGORITHM]        each part with :name=value options

    int8    int4:block=64+ef    int3+ef:beta=0.9    bf16@ring    int2+ef@two_phase:back=int4
    int4+ef@hierarchical    int4+ef@hierarchical:inner=bf16    fp32+ef@power_sgd:rank=2
    fp32+ef@thc:bits=4

A value in parentheses is taken as it stands, so that a codec with options can be an option itself:
`back=(int4:block=64)`.
The algorithm is left out where it is the codec's default: `native` for fp32 (bitwise the library's
own collective) and `randk|fp32`, whose payloads the network itself adds in fp32; for all others
`two_phase`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from enum import StrEnum

import torch

from .algorithms import (
    VARIABLE_SLICES,
    AlgorithmConfig,
    Hierarchical,
    Native,
    PowerSGD,
    Ring,
    Thc,
    TwoPhase,
    algorithm,
    cut,
)
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
        if not isinstance(text, str):
            raise ValueError(f"a scheme is text such as 'int8+ef', or a Scheme, got {text!r}")
        text = text.strip()
        if not text:
            raise ValueError("the scheme text is empty; write for example int8+ef, int4:block=64")
        body, at, end = cut(text, "@")
        front, plus, middle = cut(body, "+")
        if cut(end, "+")[1]:
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
