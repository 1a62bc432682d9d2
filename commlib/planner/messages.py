"""A scheme for every layer where layers travel in buckets, and every message costs time of its own.

A bucket sends one message per scheme that its layers have, so a plan of many schemes may lose in
messages what it saves in bytes. With e, c the errors and seconds of `schemes` and t those of any
message:

    minimise  sum_l c[l][s_l] + t sum_b |{s_l : l in b}|    where  sum_l e[l][s_l] <= budget

The second sum is not one over layers. But there are few schemes: for each set of them the programme
of `schemes` finds the least of the first sum; run over buckets instead of layers it finds the best
plan of one message each. The best of all those plans is taken. It is never dearer than one scheme
for all.

What `policy="auto"` plans from: the budget is the error of int8 with stochastic rounding, which it
would send; the candidates have feedback and round to nearest, which halves the error of the same
bits and owes the rest to the next step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..policy import TensorInfo
from ..scheme import Scheme
from ..topology import Link, Topology
from .auto import MARGIN, Profile, Speed
from .schemes import Layer, Plan, assign, seconds

OWN = "int8"  # what auto sends by; layers that it leaves raw or takes bf16 for have no choice
DEFAULT = "int8+ef"
# fewer bits never fit in the error of int8, and every other width is one message more
CANDIDATES = ("int5+ef", "int6+ef", "int7+ef", DEFAULT)
BUCKETS = 1000  # of the budget, see `schemes`: of 300 layers all sets take about a second


@dataclass(frozen=True)
class Prices:
    """Seconds of messages on a measured group of `size` ranks.

    message: of any, its two exchanges' latency and our own path's. speeds: of the codecs, by scheme
    text, each with the residual that its scheme keeps.
    """

    size: int
    message: float
    bandwidth: float  # bytes a rank sends per second
    speeds: Mapping[str, Speed]

    @classmethod
    def of(cls, profile: Profile, speeds: Mapping[str, Speed]) -> Prices:
        """By what was measured for auto."""
        link = profile.exchange
        return cls(profile.size, profile.overhead + 2 * link.latency, link.bandwidth, speeds)

    def layer(self, info: TensorInfo, scheme: Scheme) -> float:
        """Seconds that a layer adds to its message."""
        return seconds(Topology(self.size, Link(0.0, self.bandwidth)), self.speeds)(info, scheme)

    def to_dict(self) -> dict[str, Any]:
        """Numbers and text."""
        rows = {
            text: [speed.encode, speed.decode, speed.reduce, speed.ratio]
            for text, speed in self.speeds.items()
        }
        return {
            "size": self.size,
            "message": self.message,
            "bandwidth": self.bandwidth,
            "speeds": rows,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Prices:
        speeds = {text: Speed(text, *row) for text, row in saved["speeds"].items()}
        return cls(saved["size"], saved["message"], saved["bandwidth"], speeds)


def messages(schemes: Mapping[str, str], buckets: Sequence[Collection[str]]) -> int:
    """How many messages buckets of names take where each name has its scheme."""
    return sum(len({schemes[name] for name in names if name in schemes}) for names in buckets)


def plan_messages(
    layers: Sequence[Layer], budget: float, buckets: Sequence[Collection[str]], message: float
) -> tuple[Plan, float] | None:
    """A plan within `budget` of few seconds, and its seconds; None where none is found.

    The best of these: each layer by itself, and for every set of schemes the best choice among them
    without a look at messages.

    Args:
        layers: with costs in seconds; those of one scheme have no choice.
        buckets: names of the layers that travel together.
        message: seconds of a message.
    """
    texts = list(dict.fromkeys(text for layer in layers for text in layer.schemes))
    plans = [_one_each(layers, texts, budget, buckets, message)]
    for count in range(1, len(texts) + 1):
        for some in itertools.combinations(texts, count):
            rows = [row for layer in layers if (row := _only(layer, some)) is not None]
            if len(rows) == len(layers):
                plans.append(_assigned(rows, budget))
    found: tuple[Plan, float] | None = None
    for made in plans:
        if made is not None and made.error <= budget:  # sums of sums may be off by their rounding
            total = made.cost + message * messages(made.schemes, buckets)
            if found is None or total < found[1]:
                found = made, total
    return found


def _assigned(layers: Sequence[Layer], budget: float) -> Plan | None:
    """The cheapest plan within `budget`, if any is."""
    errors, costs = [layer.errors for layer in layers], [layer.costs for layer in layers]
    places = assign(errors, costs, budget, BUCKETS)
    return None if places is None else Plan(tuple(layers), places, budget)


def _one_each(
    layers: Sequence[Layer],
    texts: Sequence[str],
    budget: float,
    buckets: Sequence[Collection[str]],
    message: float,
) -> Plan | None:
    """The cheapest plan within `budget` that gives all layers of a bucket one scheme.

    Layers without a choice may have another, which is one more message.
    """
    rows = []
    for number, names in enumerate(buckets):
        members = [layer for layer in layers if layer.name in names]
        fit = [t for t in texts if all(len(m.schemes) == 1 or t in m.schemes for m in members)]
        errors = [math.fsum(m.errors[m.place(t)] for m in members) for t in fit]
        counts = [len({m.schemes[m.place(t)] for m in members}) for t in fit]
        costs = [
            math.fsum(m.costs[m.place(t)] for m in members) + message * count
            for t, count in zip(fit, counts, strict=True)
        ]
        if not fit:
            return None
        rows.append(Layer(str(number), 1, tuple(fit), tuple(errors), tuple(costs)))
    made = _assigned(rows, budget)
    if made is None:
        return None
    pairs = zip(buckets, made.schemes.values(), strict=True)
    chosen = {name: text for names, text in pairs for name in names}
    return Plan(tuple(layers), tuple(la.place(chosen[la.name]) for la in layers), budget)


def worth(seconds: float, own: float) -> bool:
    """Whether a plan is so much faster than auto's own choice that it is worth its residuals."""
    return seconds * (1 + MARGIN) < own


def _only(layer: Layer, schemes: Collection[str]) -> Layer | None:
    """A layer with these candidates alone, as it is where it has no choice; None: with none."""
    if len(layer.schemes) == 1:
        return layer
    kept = [place for place, text in enumerate(layer.schemes) if text in schemes]
    if not kept:
        return None
    return Layer(
        layer.name,
        layer.numel,
        tuple(layer.schemes[p] for p in kept),
        tuple(layer.errors[p] for p in kept),
        tuple(layer.costs[p] for p in kept),
    )
