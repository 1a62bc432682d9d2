"""Plans: how the messages of one call travel, decided once from facts that all ranks share.

    call (keys, sizes, dtype, role) --policy--> one scheme per segment --> one message per scheme

Segments that stay exact ride in the first compressed message, where the owner adds them in rank
order like the rest: so the result of a parameter does not depend on the bucket it travels in. Only
under a policy that never compresses does a call go as one native collective.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from commlib_kernels.layout import Layout

from .algorithms import AlgorithmConfig, Hierarchical, Native, PowerSGD, Thc, TwoPhase, matrix_of
from .collectives.power_sgd import Shapes
from .feedback import Key, names_of
from .modes import Delta
from .policy import Policy, TensorInfo, raw
from .scheme import DTYPES, Role, Scheme, check_dtype

# A raw segment's residual would be memory for nothing; above this share of a message's elements raw
# segments travel in a message of their own, with the same bits.
RIDE_SHARE = 0.125

# Collectives that have lanes, beside all_reduce by two_phase and power_sgd.
LANED = ("reduce_scatter", "all_gather", "all_to_all")
PARTS = "all_to_all of parts"
"""all_to_all of unequal parts: a scheme for each, by its size, which its two ends know."""

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
    shapes: Shapes = ()  # of matrices, where the algorithm goes by them
    names: frozenset[str] = frozenset()  # states it changes
    name: str = ""  # of the scheme
    differences: bool = False  # it carries differences to what all ranks hold
    mark: int = 0  # of its plan and its place in it: the same on all ranks

    def __post_init__(self) -> None:
        self.names = _states(self.scheme, self.key)
        self.name = str(self.scheme)
        if isinstance(self.scheme.feedback, Delta):
            self.differences, self.scheme = True, self.scheme.stateless()

    @property
    def hierarchical(self) -> bool:
        """Whether it goes by groups of ranks within the group."""
        return isinstance(self.scheme.algorithm, Hierarchical)

    def laned(self, op: str) -> bool:
        """Whether all that it sends goes by all_to_all and all_gather, which a lane has."""
        if op == "all_reduce":
            return isinstance(self.scheme.algorithm, TwoPhase | PowerSGD)
        return op in LANED

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
    era: int = 0  # of the policy

    def __post_init__(self) -> None:
        self.lossless = all(message.scheme.lossless for message in self.messages)
        for place, message in enumerate(self.messages):
            about = (self.op, self.label, place, sorted(self.text.items()))
            message.mark = zlib.crc32(repr(about).encode())


@cache
def parse_scheme(text: str | Scheme) -> Scheme:
    """A scheme from its text; cached, as calls name it every time."""
    return text if isinstance(text, Scheme) else Scheme.parse(text)


def explicit(
    text: str | Scheme,
    key: Key,
    dtype: torch.dtype,
    role: Role,
    shape: tuple[int, ...] | None = None,
) -> Scheme:
    """The scheme that a call names for itself; ValueError where the tensor cannot take it.

    shape: where it may go as a matrix, that is in an all_reduce.
    """
    scheme = parse_scheme(text)
    check_dtype(scheme, dtype)
    if shape is not None and isinstance(scheme.algorithm, PowerSGD):
        why = scheme.algorithm.unsuited(shape, scheme.codec, dtype)
        if why:
            raise ValueError(
                f"scheme {str(scheme)!r} got a tensor of shape {shape}: {why}; use a smaller rank "
                "or min_rate, or 'fp32'"
            )
    if key is None and scheme.remembers:
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
    config, codec = rule.scheme.algorithm, rule.scheme.codec
    if isinstance(config, PowerSGD):
        why = config.unsuited(info.shape, codec, info.dtype)
        return f"under {rule.scheme}: {why or 'without a key there is nothing to start from'}"
    if isinstance(config, Thc):
        return f"under {rule.scheme}: {config.unsuited(info.numel, info.dtype)}"
    return f"{info.numel} values under {rule.scheme} would not be smaller than raw"


def single(
    op: str,
    scheme: Scheme,
    key: str | None,
    numel: int,
    dtype: torch.dtype,
    shape: tuple[int, ...] | None = None,
) -> Plan:
    """The plan of a call on one tensor. shape: where `scheme` goes by matrices."""
    shapes = (matrix_of(shape),) if shape and isinstance(scheme.algorithm, PowerSGD) else ()
    message = Message(scheme, Layout((numel,), dtype), key, (0,), shapes)
    text = {"scheme": message.name, "numel": numel, "dtype": str(dtype)}
    if shapes:
        text["shapes"] = [list(shape) for shape in shapes]
    label = "(parts)" if op == PARTS else f"({numel} values)"
    return Plan(op, key or label, [message], text)


def segmented(
    op: str,
    keys: tuple[str, ...],
    sizes: tuple[int, ...],
    schemes: Sequence[Scheme],
    dtype: torch.dtype,
    *,
    lossless: bool,
    exactly: AlgorithmConfig | None = None,
    rows: int = 0,
    shapes: Sequence[tuple[int, ...]] | None = None,
) -> Plan:
    """The plan of a call on segments back to back: one message per scheme.

    lossless: all of them raw, as one message of the library's own. exactly: how raw segments are
    summed beside compressed ones; None: two_phase. rows: how often the tensor has the segments, for
    reduce_scatter. shapes: of the tensors, which schemes that go by matrices need.
    """
    label = keys[0] if len(keys) == 1 else f"{keys[0]} +{len(keys) - 1}"
    text = {
        "keys": list(keys),
        "scheme": [str(s) for s in schemes],
        "numel": list(sizes),
        "dtype": str(dtype),
        "native": lossless,
    }
    if shapes is not None:
        text["shapes"] = [list(shape) for shape in shapes]
    if lossless or dtype not in DTYPES:
        layout = Layout((sum(sizes) * max(1, rows),), dtype)
        return Plan(op, label, [Message(raw(), layout, None, tuple(range(len(sizes))))], text)
    groups: dict[Scheme, list[int]] = {}
    plain: list[int] = []
    for place, scheme in enumerate(schemes):
        (plain if scheme.lossless else groups.setdefault(scheme, [])).append(place)
    exactly = exactly or TwoPhase()
    # Only where they are summed in the same order, whatever else is in the bucket.
    host = next((s for s in groups if _carries_raw(s, exactly, dtype)), None)
    if host is not None and plain:
        light = sum(sizes[s] for s in plain) <= RIDE_SHARE * sum(sizes[s] for s in groups[host])
        if light or isinstance(host.algorithm, PowerSGD):
            groups[host] = sorted(groups[host] + plain)
            plain = []
    if plain:
        alone = replace(raw(), algorithm=exactly)  # which a policy may have chosen for others, too
        groups[alone] = sorted(groups.get(alone, []) + plain)
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    messages = []
    for scheme, places in groups.items():
        back_to_back, low = len(groups) == 1, isinstance(scheme.algorithm, PowerSGD)
        flags = tuple(schemes[s].lossless for s in places)
        layout = Layout(
            tuple(sizes[s] for s in places),
            dtype,
            ranks=max(1, rows),
            stacked=rows > 0,
            offsets=() if back_to_back else tuple(starts[s] for s in places),
            pitch=0 if back_to_back else sum(sizes),
            exact=flags if any(flags) and (low or scheme.codec.id != "fp32") else (),
        )
        key = tuple(keys[s] for s in places)
        matrices: Shapes = ()
        if low and shapes is not None:
            matrices = tuple(
                () if flag else matrix_of(shapes[s]) for s, flag in zip(places, flags, strict=True)
            )
        messages.append(Message(scheme, layout, key, tuple(places), matrices))
    return Plan(op, label, messages, text)


def _carries_raw(scheme: Scheme, exactly: AlgorithmConfig, dtype: torch.dtype) -> bool:
    """Whether its messages sum raw segments as `exactly` would."""
    config = scheme.algorithm
    if isinstance(exactly, Hierarchical):
        return isinstance(config, Hierarchical)
    if isinstance(config, PowerSGD):  # beside its fp32 factors they would be as wide
        return dtype is torch.float32
    return not isinstance(config, Hierarchical | Native | Thc)


def _states(scheme: Scheme, key: Key) -> frozenset[str]:
    """Names of what a message changes: residuals, and the places of random streams."""
    others = (getattr(scheme.algorithm, name, None) for name in ("inner", "back"))
    stochastic = any(c.format.draws for c in (scheme.codec, *others) if c is not None)
    stochastic = stochastic or isinstance(scheme.algorithm, Thc)
    if not scheme.remembers and not stochastic:
        return frozenset()
    return frozenset(names_of(key) or ("",))
