"""Which scheme for which tensor: an ordered table of rules, the first that matches wins.

    Policy.parse("int4+ef")     matrices of 1024 values and more under int4+ef, all else exact
    Policy.parse("rules.toml")  one [[rules]] table per rule; JSON is {"rules": [...]}

        [[rules]]
        scheme = "fp32"
        key = "*embed*"

        [[rules]]
        scheme = "int8+ef"
        min_numel = 1024
        from_step = 100

A policy is a value: all ranks hold the same one and compare its digest once. `choose` depends on
facts that all ranks share (key, sizes, dtype, role, step) and on nothing else.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from commlib_kernels.layout import Layout

from .algorithms import (
    AlgorithmConfig,
    Hierarchical,
    Native,
    PowerSGD,
    Ring,
    Thc,
    TwoPhase,
    algorithm,
    unknown,
)
from .modes import Delta, ErrorFeedback, Lep, Reuse
from .scheme import DTYPES, Role, Scheme, check_dtype

__all__ = [
    "AlgorithmConfig",
    "Hierarchical",
    "Native",
    "Policy",
    "PowerSGD",
    "Ring",
    "Role",
    "Rule",
    "Scheme",
    "TensorInfo",
    "Thc",
    "TwoPhase",
    "algorithm",
    "check_dtype",
    "raw",
]

# What a bare scheme text leaves exact: tensors too small to gain, and vectors (norms and biases; in
# one user's report 0.3% of the values that made four fifths of the error).
EXACT_BELOW_NDIM = 2
EXACT_BELOW_NUMEL = 1024

# Choices that a policy remembers: more tensors than a model has.
CHOICES = 1 << 14

# dtypes as policy files write them
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}

# One sample's residual would harm the next sample, so these take no error feedback; what they take.
PIPELINE_ROLES = (Role.ACTIVATION, Role.ACTIVATION_GRADIENT)
MODES = {
    Delta: (Role.ACTIVATION, Role.PARAMETER),
    Reuse: PIPELINE_ROLES,
    Lep: (Role.ACTIVATION_GRADIENT,),
}


@functools.cache
def raw() -> Scheme:
    """The scheme of what is not compressed: fp32@native, for tensors of any dtype."""
    return Scheme.parse("fp32")


class TensorInfo(NamedTuple):
    """What a policy may know of a tensor; the same on all ranks. key None: anonymous."""

    key: str | None
    numel: int
    dtype: torch.dtype
    role: Role = Role.GRADIENT
    ndim: int | None = None  # None: not known, as for a flat bucket
    step: int = 0
    shape: tuple[int, ...] | None = None  # None: not known, or not that of a whole tensor


@dataclass(frozen=True)
class Rule:
    """`scheme` for the tensors that meet every condition.

    key: fnmatch pattern, case-sensitive; an anonymous tensor matches "*" only.
    role, dtype: None takes any. min_ndim: applies where the number of dimensions is known.
    from_step: the first step at which the rule counts.
    """

    scheme: Scheme
    key: str = "*"
    role: Role | None = None
    min_numel: int = 0
    min_ndim: int = 0
    from_step: int = 0
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name in ("min_numel", "min_ndim", "from_step"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"rule: {name} is {value!r}, it must be a whole number >= 0")
        if not isinstance(self.key, str) or not self.key:
            raise ValueError(f"rule: key is {self.key!r}, it must be a pattern such as '*.weight'")
        if self.role is not None:
            if self.role not in list(Role):
                raise ValueError(f"rule: {unknown('role', str(self.role), Role)}")
            object.__setattr__(self, "role", Role(self.role))
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"rule: {unknown('dtype', _dtype_name(self.dtype), DTYPE_NAMES)}")
        if self.role is not None:
            check_mode(self.scheme, self.role)

    def matches(self, info: TensorInfo) -> bool:
        return (
            info.step >= self.from_step
            and info.numel >= self.min_numel
            and (info.ndim is None or info.ndim >= self.min_ndim)
            and (self.role is None or info.role == self.role)
            and (self.dtype is None or info.dtype is self.dtype)
            and (
                self.key == "*"
                or (info.key is not None and fnmatch.fnmatchcase(info.key, self.key))
            )
        )

    def to_dict(self) -> dict[str, str | int]:
        """The fields that differ from their defaults, as text and numbers."""
        out: dict[str, str | int] = {"scheme": str(self.scheme)}
        for f in dataclasses.fields(self)[1:]:
            value = getattr(self, f.name)
            if value != f.default:
                out[f.name] = value if isinstance(value, int) else _dtype_name(value)
        return out

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Rule:
        """A rule from a row of a policy file; ValueError names the row's wrong part."""
        names = [f.name for f in dataclasses.fields(cls)]
        for name in row:
            if name not in names:
                raise ValueError(unknown("rule field", name, names))
        if "scheme" not in row:
            raise ValueError(f"a rule needs a scheme, got {dict(row)}")
        values = dict(row)
        values["scheme"] = _scheme(row["scheme"])
        if "dtype" in row:
            name = row["dtype"]
            values["dtype"] = DTYPE_NAMES.get(name, name) if isinstance(name, str) else name
        return cls(**values)


@dataclass(frozen=True)
class Policy:
    """Rules in order; a tensor that none matches travels raw."""

    rules: tuple[Rule, ...]
    # choices already made: `choose` stands in the hot path of every bucket
    _chosen: dict[TensorInfo, Scheme] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))

    @classmethod
    def parse(cls, source: str | Path | Scheme | Policy | Mapping[str, Any]) -> Policy:
        """A policy from a scheme (or its text), a policy file, its text in JSON, or its dict.

        ValueError says what is wrong and what is allowed, and names the file.
        """
        if isinstance(source, Policy):
            return source
        if isinstance(source, Scheme):
            return cls._of_scheme(source)
        if isinstance(source, Mapping):
            return cls._of_dict(source)
        if not isinstance(source, str | Path):
            raise ValueError(
                "a policy is a scheme text such as 'int8+ef', a Scheme, a Policy, a table or the "
                f"path of a policy file, got {source!r}"
            )
        if isinstance(source, Path) or source.strip().endswith((".toml", ".json")):
            return cls._of_file(Path(source))
        text = source.strip()
        if text == "auto":
            raise ValueError(
                "'auto' is not a policy yet: it is measured on a group. Give policy='auto' to "
                "commlib.wrap or Communicator, or name a scheme such as int8+ef"
            )
        if text.startswith("{"):
            return cls._of_dict(_read_json(text, "policy text"))
        return cls._of_scheme(Scheme.parse(text))

    @classmethod
    def _of_scheme(cls, scheme: Scheme) -> Policy:
        if scheme.lossless:
            return cls((Rule(scheme),))
        lossy = Rule(scheme, min_numel=EXACT_BELOW_NUMEL, min_ndim=EXACT_BELOW_NDIM)
        return cls((lossy, Rule(raw())))

    @classmethod
    def _of_dict(cls, source: Mapping[str, Any]) -> Policy:
        for name in source:
            if name != "rules":
                raise ValueError(unknown("policy field", name, ["rules"]))
        rows = source.get("rules")
        if not isinstance(rows, list | tuple) or not all(isinstance(r, Mapping) for r in rows):
            raise ValueError(f"a policy is a table `rules`, one entry per rule, got rules={rows!r}")
        rules = []
        for number, row in enumerate(rows, 1):
            try:
                rules.append(Rule.from_dict(row))
            except ValueError as error:
                raise ValueError(f"policy, rule {number}: {error}") from error
        return cls(tuple(rules))

    @classmethod
    def _of_file(cls, path: Path) -> Policy:
        if path.suffix not in (".toml", ".json"):
            raise ValueError(f"policy file {str(path)!r}: the name must end in .toml or .json")
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"policy file {str(path)!r} cannot be read: {error}") from error
        try:
            read = _read_json if path.suffix == ".json" else _read_toml
            return cls._of_dict(read(text, "the text"))
        except ValueError as error:
            raise ValueError(f"policy file {str(path)!r}: {error}") from error

    def rule(self, info: TensorInfo) -> Rule | None:
        """The rule that a tensor falls under."""
        return next((rule for rule in self.rules if rule.matches(info)), None)

    def choose(self, info: TensorInfo) -> Scheme:
        """The scheme of a tensor, every rounding resolved.

        Raw (`fp32`) where no rule matches, where codecs do not take the dtype, and where the
        payload would not be smaller than the tensor. A tensor without a key and an activation get
        the scheme without its memory: no key, no memory.
        """
        info = info._replace(step=self.era(info.step))
        chosen = self._chosen.get(info)
        if chosen is None:
            if len(self._chosen) >= CHOICES:
                self._chosen.clear()
            chosen = self._chosen[info] = self._choose(info)
        return chosen

    def _choose(self, info: TensorInfo) -> Scheme:
        if info.dtype not in DTYPES:
            return raw()
        rule = self.rule(info)
        scheme = raw() if rule is None else rule.scheme
        residual = isinstance(scheme.feedback, ErrorFeedback)
        if info.key is None or (residual and info.role in PIPELINE_ROLES):
            scheme = scheme.stateless()
        if isinstance(scheme.algorithm, PowerSGD):
            if scheme.algorithm.unsuited(info.shape, scheme.codec, info.dtype):
                return raw()
        elif isinstance(scheme.algorithm, Thc):
            if scheme.algorithm.unsuited(info.numel, info.dtype):
                return raw()
        elif scheme.codec.id != "fp32":
            payload = scheme.codec.expected(Layout(sizes=(info.numel,), dtype=info.dtype))
            if payload >= info.numel * info.dtype.itemsize:
                return raw()
        return scheme.resolve(info.role)

    def era(self, step: int) -> int:
        """The last step, not after `step`, at which the rules changed: plans hold within an era."""
        return max((r.from_step for r in self.rules if r.from_step <= step), default=0)

    def ahead(self, info: TensorInfo) -> dict[int, Scheme]:
        """The schemes of a tensor by step: of `info.step`, and of later ones where rules change."""
        later = {rule.from_step for rule in self.rules if rule.from_step > info.step}
        steps = [info.step, *sorted(later)]
        return {step: self.choose(info._replace(step=step)) for step in steps}

    @property
    def shaped(self) -> bool:
        """Whether a scheme depends on the shapes of tensors: PowerSGD."""
        return any(isinstance(rule.scheme.algorithm, PowerSGD) for rule in self.rules)

    @property
    def lossless(self) -> bool:
        """Whether no rule ever compresses."""
        return all(rule.scheme.lossless for rule in self.rules)

    def to_dict(self) -> dict[str, list[dict[str, str | int]]]:
        return {"rules": [rule.to_dict() for rule in self.rules]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def to_toml(self) -> str:
        tables = []
        for rule in self.rules:
            lines = [f"{name} = {_toml(value)}" for name, value in rule.to_dict().items()]
            tables.append("\n".join(["[[rules]]", *lines]) + "\n")
        return "\n".join(tables) or "rules = []\n"

    def digest(self) -> str:
        """16 hex digits, equal for equal policies on all machines."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def __str__(self) -> str:
        """The scheme text this policy came from, or else its JSON; `parse` takes both."""
        for rule in self.rules[:1]:
            if self == Policy._of_scheme(rule.scheme):
                return str(rule.scheme)
        return self.to_json()


def check_mode(scheme: Scheme, role: Role) -> None:
    """Refuse a memory that does not suit the role (ValueError)."""
    memory = scheme.feedback
    if role in PIPELINE_ROLES and isinstance(memory, ErrorFeedback):
        better = "delta or +reuse" if role is Role.ACTIVATION else "lep or +reuse"
        raise ValueError(
            f"role {str(role)!r} takes no error feedback, got {str(scheme)!r}: the residual of one "
            f"sample harms the next; use {str(scheme.stateless())!r}, or a memory that belongs to "
            f"the message: +{better}"
        )
    allowed = MODES.get(type(memory))
    if allowed is not None and role not in allowed:
        raise ValueError(
            f"role {str(role)!r} does not take +{memory}, which is for roles "
            f"{' and '.join(allowed)}; use {str(scheme.stateless())!r}"
        )


def _dtype_name(value: object) -> str:
    return str(value).removeprefix("torch.")


def _scheme(value: object) -> Scheme:
    if isinstance(value, Scheme):
        return value
    if not isinstance(value, str):
        raise ValueError(f"scheme is {value!r}, it must be a scheme text such as 'int8+ef'")
    return Scheme.parse(value)


def _once(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table whose names are there once; JSON itself takes the last."""
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{where}: {twice!r} is given twice")
    return table


def _read_json(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=functools.partial(_once, where))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f'{where} must be an object {{"rules": [...]}}, got {value!r}')
    return value


def _read_toml(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where} is not TOML: {error}") from error


def _toml(value: str | int) -> str:
    # a JSON string is a TOML basic string, but for DEL
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
