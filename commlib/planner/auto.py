"""`policy="auto"`: compress where measurement says it is clearly faster, and nowhere else.

A `Profile` holds what was measured once on a group: per candidate scheme the seconds of the real
all_reduce on a grid of sizes, and what it is made of (links, codec speeds). Between two sizes of
the grid seconds are linear in bytes, above it they go on along the last two; nothing is taken from
a model where the group itself was measured. For a group of another size:

    native     latency + f n / B                       f = 2 (W - 1) / W, n bytes of fp32
    two_phase  overhead + 2 latency + f n ratio / B + n (1/encode + 1/reduce + 1/decode)

All functions are pure; the same profile gives the same choice on every rank.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import TypeVar

import torch

from ..policy import EXACT_BELOW_NDIM, Policy, Rule, raw
from ..scheme import DTYPES, Scheme
from ..topology import Link

CANDIDATES = ("fp32", "bf16", "int8")
RAW = CANDIDATES[0]

# Compress only where the measurement says this much faster: the machine may be busier later than it
# was then, and the promise is never to be more than 5% slower than plain.
MARGIN = 0.1

FP32_BYTES = 4


@dataclass(frozen=True)
class Curve:
    """Measured seconds of one scheme's all_reduce of an fp32 tensor, over its bytes (ascending).

    `planner.measure` says what counts as its seconds: for candidates, a cautious figure.
    """

    scheme: str
    nbytes: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.nbytes, self.nbytes[1:], strict=False))
        if len(self.nbytes) < 2 or len(self.nbytes) != len(self.seconds) or not ascending:
            raise ValueError(
                f"curve of {self.scheme}: needs two or more ascending sizes, one time each, "
                f"got nbytes={self.nbytes}, seconds={self.seconds}"
            )

    def at(self, nbytes: float) -> float:
        """Seconds at `nbytes`: piecewise linear; the last slope above, the first time below."""
        if nbytes <= self.nbytes[0]:
            return self.seconds[0]
        high = min(bisect_left(self.nbytes, nbytes), len(self.nbytes) - 1)
        n0, n1 = self.nbytes[high - 1], self.nbytes[high]
        t0, t1 = self.seconds[high - 1], self.seconds[high]
        if nbytes > n1:
            t1 = max(t1, t0)  # noise must not make large messages free
        return t0 + (t1 - t0) * (nbytes - n0) / (n1 - n0)

    def around(self, nbytes: int) -> tuple[int, ...]:
        """The measured sizes on both sides of `nbytes`: the last two above the grid, none below."""
        if nbytes < self.nbytes[0]:
            return ()
        if nbytes >= self.nbytes[-1]:
            return self.nbytes[-2:]
        high = bisect_right(self.nbytes, nbytes)
        return self.nbytes[high - 1 : high + 1]


@dataclass(frozen=True)
class Speed:
    """A codec alone: encode, decode, reduce in bytes of fp32 per second; wire bytes per such byte.

    All ranks ran at once, the slowest counts.
    """

    scheme: str
    encode: float
    decode: float
    reduce: float
    ratio: float

    @property
    def seconds_per_byte(self) -> float:
        """What one rank computes per byte of a two-phase all_reduce."""
        return 1 / self.encode + 1 / self.reduce + 1 / self.decode


Row = TypeVar("Row", Curve, Speed)


@dataclass(frozen=True)
class Profile:
    """What was measured on a group of `size` ranks.

    native: of the library's own all_reduce; exchange: of the all_to_all and all_gather that
    two_phase is made of; both per message, bandwidth in bytes a rank sends per second.
    overhead: seconds per message that our path adds to the exchange.
    """

    size: int
    curves: tuple[Curve, ...]
    speeds: tuple[Speed, ...]
    native: Link
    exchange: Link
    overhead: float

    def curve(self, scheme: str) -> Curve:
        return _named(self.curves, scheme)

    def speed(self, scheme: str) -> Speed:
        return _named(self.speeds, scheme)

    @property
    def compressing(self) -> tuple[str, ...]:
        """The candidates other than raw."""
        return tuple(speed.scheme for speed in self.speeds)


def predict(
    profile: Profile, scheme: str, numel: int, size: int, dtype: torch.dtype = torch.float32
) -> float:
    """Seconds of an all_reduce of `numel` elements of `dtype` over `size` ranks under `scheme`.

    Raw cost follows the tensor's bytes, compressed cost its elements.
    """
    nbytes = numel * (dtype.itemsize if scheme == RAW else FP32_BYTES)
    if size == profile.size:
        return profile.curve(scheme).at(nbytes)
    sent = 2 * (size - 1) / size * nbytes
    if scheme == RAW:
        return profile.native.seconds(sent)
    speed = profile.speed(scheme)
    wire = profile.exchange.seconds(sent * speed.ratio, messages=2)
    return profile.overhead + wire + nbytes * speed.seconds_per_byte


def choose(
    profile: Profile, numel: int, dtype: torch.dtype, size: int, margin: float = MARGIN
) -> str:
    """The candidate to use for an all_reduce of `numel` elements of `dtype` over `size` ranks.

    Raw, unless a candidate is faster by `margin` at the measured sizes on both sides of this one
    (one lucky measurement is not enough) and here. dtypes that codecs do not take, messages below
    the smallest measured one and groups of one rank stay raw.
    """
    if margin < 0:
        raise ValueError(f"margin is {margin}, it must be >= 0")
    if dtype not in DTYPES or size < 2:
        return RAW

    def wins(scheme: str) -> bool:
        if profile.speed(scheme).ratio * FP32_BYTES >= dtype.itemsize:
            return False  # the payload would not be smaller than the tensor
        around = profile.curve(scheme).around(numel * FP32_BYTES)
        places = [numel, *(nbytes // FP32_BYTES for nbytes in around)]
        return bool(around) and all(
            predict(profile, scheme, place, size, dtype) * (1 + margin)
            < predict(profile, RAW, place, size, dtype)
            for place in places
        )

    winners = [scheme for scheme in profile.compressing if wins(scheme)]
    return min(winners, key=lambda s: predict(profile, s, numel, size, dtype), default=RAW)


def policy(profile: Profile, margin: float = MARGIN) -> Policy:
    """`choose` as a policy for the group that was measured: rules by dtype and number of elements.

    Vectors stay exact, as under every scheme text.
    """
    rules = []
    for dtype in DTYPES:
        steps: list[tuple[int, str]] = [(0, RAW)]
        for nbytes in profile.curve(RAW).nbytes:
            numel = nbytes // FP32_BYTES
            taken = choose(profile, numel, dtype, profile.size, margin)
            if taken != steps[-1][1]:
                steps.append((numel, taken))
        rules += [
            Rule(Scheme.parse(taken), min_numel=numel, min_ndim=EXACT_BELOW_NDIM, dtype=dtype)
            for numel, taken in reversed(steps[1:])
        ]
    return Policy((*rules, Rule(raw())))


def _named(rows: tuple[Row, ...], scheme: str) -> Row:
    for row in rows:
        if row.scheme == scheme:
            return row
    known = ", ".join(row.scheme for row in rows) or "nothing"
    raise ValueError(f"scheme {scheme!r} was not measured; this profile knows {known}")
