"""Plans: how the messages of one call travel, decided once from facts that all ranks share.

    call (keys, sizes, dtype, role) --policy--> one scheme per segment --> one message per scheme

Segments that stay exact ride in the first compressed message, where the owner adds them in rank
order like the rest: so the result of a parameter does not depend on the bucket it travels in. Only
under a policy that never compresses does a call go as one native collective.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from commlib_kernels.layout import Layout

from .feedback import Key, Plain, names_of
from .modes import Delta
from .policy import Policy, TensorInfo, raw
from .scheme import DTYPES, Native, Role, Scheme, TwoPhase, check_dtype

# A raw segment's residual would be memory for nothing; above this share of a message's elements raw
# segments travel in a message of their own, with the same bits.
RIDE_SHARE = 0.125

# Collectives whose exchanges have equal parts; all_reduce only by two_phase.
EVEN = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")

_exact_depth = 0
_exact_lock = threading.Lock()


@contextmanager
def exact() -> Iterator[None]:
    """Switch compression off for a stretch, in all threads of this process; on all ranks alike.

    Residuals stay as they are and go on where they were.
    """
    global _exact_depth
    with _exact_lock:
        _exact_depth += 1
    try:
        yield
    finally:
        with _exact_lock:
            _exact_depth -= 1


def is_exact() -> bool:
    """Whether this process is inside `exact()`."""
    return _exact_depth > 0


@dataclass
class Message:
    """One message: some segments of a call under one scheme."""

    scheme: Scheme
    layout: Layout  # of the whole tensor, with ranks=1
    key: Key
    segments: tuple[int, ...]
    names: frozenset[str] = frozenset()  # states it changes
    name: str = ""  # of the scheme
    differences: bool = False  # it carries differences to what all ranks hold

    def __post_init__(self) -> None:
        self.names = _states(self.scheme, self.key)
        self.name = str(self.scheme)
        if isinstance(self.scheme.feedback, Delta):
            self.differences, self.scheme = True, self.scheme.stateless()

    def part_bytes(self, op: str, ranks: int) -> int:
        """About what it has for each of `ranks`, where all get as much; else 0."""
        if op not in EVEN or (
            op == "all_reduce" and not isinstance(self.scheme.algorithm, TwoPhase)
        ):
            return 0
        if self.scheme.lossless:
            return self.layout.numel * self.layout.dtype.itemsize // ranks
        return self.scheme.codec.nbytes(self.layout) // ranks

    def held(self, hold: Sequence[int]) -> tuple[int, ...]:
        """`hold` (segments of the call) as segments of this message."""
        if not hold:
            return ()
        return tuple(place for place, s in enumerate(self.segments) if s in hold)


@dataclass
class Plan:
    """The messages of a call, and the text that ranks compare."""

    op: str
    label: str
    messages: list[Message]
    text: dict[str, Any]
    lossless: bool = False  # one message of the library's own

    def __post_init__(self) -> None:
        self.lossless = all(message.scheme.lossless for message in self.messages)


@cache
def parse_scheme(text: str | Scheme) -> Scheme:
    """A scheme from its text; cached, as calls name it every time."""
    return text if isinstance(text, Scheme) else Scheme.parse(text)


def explicit(text: str | Scheme, key: Key, dtype: torch.dtype, role: Role) -> Scheme:
    """The scheme that a call names for itself; ValueError where the tensor cannot take it."""
    scheme = parse_scheme(text)
    check_dtype(scheme, dtype)
    if key is None and scheme.feedback != Plain():
        raise ValueError(
            f"scheme {str(scheme)!r} remembers residuals under a key and this tensor has none: "
            f"give it a key, or use {str(scheme.stateless())!r}"
        )
    return scheme.resolve(role)


def why_raw(policy: Policy, info: TensorInfo) -> str | None:
    """Why a tensor that the policy's rules compress travels raw all the same; None: they do not."""
    if policy.lossless:
        return None
    rule = policy.rule(info)
    if rule is None or rule.scheme.lossless:
        return None
    if info.dtype not in DTYPES:
        return f"{str(info.dtype).removeprefix('torch.')} tensors travel raw"
    return f"{info.numel} values under {rule.scheme} would not be smaller than raw"


def single(op: str, scheme: Scheme, key: str | None, numel: int, dtype: torch.dtype) -> Plan:
    """The plan of a call on one tensor."""
    message = Message(scheme, Layout((numel,), dtype), key, (0,))
    text = {"scheme": message.name, "numel": numel, "dtype": str(dtype)}
    return Plan(op, key or f"({numel} values)", [message], text)


def segmented(
    op: str,
    keys: tuple[str, ...],
    sizes: tuple[int, ...],
    schemes: Sequence[Scheme],
    dtype: torch.dtype,
    *,
    lossless: bool,
    rows: int = 0,
) -> Plan:
    """The plan of a call on segments back to back: one message per scheme.

    lossless: all of them raw, as one message of the library's own. rows: how often the tensor has
    the segments, for reduce_scatter.
    """
    label = keys[0] if len(keys) == 1 else f"{keys[0]} +{len(keys) - 1}"
    text = {
        "keys": list(keys),
        "scheme": [str(s) for s in schemes],
        "numel": list(sizes),
        "dtype": str(dtype),
        "native": lossless,
    }
    if lossless or dtype not in DTYPES:
        layout = Layout((sum(sizes) * max(1, rows),), dtype)
        return Plan(op, label, [Message(raw(), layout, None, tuple(range(len(sizes))))], text)
    groups: dict[Scheme, list[int]] = {}
    plain: list[int] = []
    for place, scheme in enumerate(schemes):
        (plain if scheme.lossless else groups.setdefault(scheme, [])).append(place)
    host = next((s for s in groups if not isinstance(s.algorithm, Native)), None)
    if host is not None and plain:
        light = sum(sizes[s] for s in plain) <= RIDE_SHARE * sum(sizes[s] for s in groups[host])
        if light:
            groups[host] = sorted(groups[host] + plain)
            plain = []
    if plain:
        groups[replace(raw(), algorithm=TwoPhase())] = plain
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    messages = []
    for scheme, places in groups.items():
        back_to_back = len(groups) == 1
        flags = tuple(schemes[s].lossless for s in places)
        layout = Layout(
            tuple(sizes[s] for s in places),
            dtype,
            ranks=max(1, rows),
            stacked=rows > 0,
            offsets=() if back_to_back else tuple(starts[s] for s in places),
            pitch=0 if back_to_back else sum(sizes),
            exact=flags if any(flags) and scheme.codec.id != "fp32" else (),
        )
        key = tuple(keys[s] for s in places)
        messages.append(Message(scheme, layout, key, tuple(places)))
    return Plan(op, label, messages, text)


def _states(scheme: Scheme, key: Key) -> frozenset[str]:
    """Names of what a message changes: residuals, and the places of random streams."""
    if scheme.feedback == Plain() and not scheme.codec.format.stochastic:
        return frozenset()
    return frozenset(names_of(key) or ("",))
