"""A scheme for every layer: the least bytes (or seconds) whose error stays within a budget.

For layers l and candidate schemes s, with e[l][s] the squared error of coding the layer's gradient
and c[l][s] what sending it costs:

    minimise  sum_l c[l][s_l]    where  sum_l e[l][s_l] <= budget = alpha sum_l e[l][default]

Layers have very different sizes and gradients, so an error that one of them can spare costs another
many bits. It is a knapsack. The dynamic programme goes from layer to layer with those partial plans
that no other beats in both error and cost; where they become too many, it cuts the budget into
buckets and keeps the cheapest of each. So the budget is never exceeded, and what is lost is less
than layers / buckets of it: no plan that stays within the rest is cheaper. (L-GreCo rounds every
error up to whole buckets instead, which loses as much, and with few layers too.) Pure functions:
equal tables give equal plans, on all ranks.

Source: L-GreCo (Markov, Alimohammadi, Frantar, Alistarh, MLSys 2024, arXiv 2210.17357), section 4.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from commlib_kernels.layout import Layout

from ..policy import (
    EXACT_BELOW_NDIM,
    EXACT_BELOW_NUMEL,
    Policy,
    Role,
    Rule,
    TensorInfo,
    raw,
)
from ..scheme import DTYPES, Scheme
from ..topology import Topology
from .auto import FP32_BYTES, Speed

CANDIDATES = tuple(f"int{bits}+ef" for bits in range(2, 9))
DEFAULT = "int4+ef"
BUCKETS = 10_000
# Sums of errors may be off by their rounding on the way; the plan's own is summed exactly.
SLACK = 1 + 1e-12

Cost = Callable[[TensorInfo, Scheme], float]
"""What sending a tensor under a scheme costs, in any unit."""


@dataclass(frozen=True)
class Layer:
    """One tensor and its row of the tables.

    schemes: texts of the candidates. errors: squared error of each, summed over elements (and
    ranks). costs: of each, bytes or seconds. ValueError where they do not fit each other.
    """

    name: str
    numel: int
    schemes: tuple[str, ...]
    errors: tuple[float, ...]
    costs: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.schemes) == len(self.errors) == len(self.costs) > 0:
            raise ValueError(
                f"layer {self.name!r}: needs one error and one cost for each of at least one "
                f"scheme, got {len(self.schemes)} schemes, {len(self.errors)} errors, "
                f"{len(self.costs)} costs"
            )
        for what, values in (("error", self.errors), ("cost", self.costs)):
            bad = [value for value in values if not (math.isfinite(value) and value >= 0)]
            if bad:
                raise ValueError(
                    f"layer {self.name!r}: {what} {bad[0]}; errors and costs are finite and >= 0"
                )

    def place(self, scheme: str) -> int:
        """Where `scheme` stands in the row; 0 for a layer that has no choice. ValueError: none."""
        if len(self.schemes) == 1:
            return 0
        if scheme not in self.schemes:
            raise ValueError(
                f"layer {self.name!r}: scheme {scheme!r} is not among its candidates "
                f"{', '.join(self.schemes)}"
            )
        return self.schemes.index(scheme)


@dataclass(frozen=True)
class Plan:
    """Layers and the place of the scheme that each one takes."""

    layers: tuple[Layer, ...]
    places: tuple[int, ...]
    budget: float

    @property
    def schemes(self) -> dict[str, str]:
        """Scheme text by layer."""
        pairs = zip(self.layers, self.places, strict=True)
        return {layer.name: layer.schemes[place] for layer, place in pairs}

    @property
    def error(self) -> float:
        """Sum of squared errors, at most `budget`."""
        return math.fsum(la.errors[p] for la, p in zip(self.layers, self.places, strict=True))

    @property
    def cost(self) -> float:
        """Sum of costs."""
        return math.fsum(la.costs[p] for la, p in zip(self.layers, self.places, strict=True))

    def policy(self, default: str = DEFAULT) -> Policy:
        """A rule for each layer that is not exact anyway, then what the text `default` means.

        The rules are for gradients, of which the errors were measured.
        """
        rules = [
            Rule(Scheme.parse(text), key=escape(layer.name), role=Role.GRADIENT)
            for layer, text in zip(self.layers, self.schemes.values(), strict=True)
            if layer.schemes != (str(raw()),)
        ]
        return Policy((*rules, *Policy.parse(default).rules))


def uniform(layers: Sequence[Layer], scheme: str = DEFAULT) -> Plan:
    """The plan that gives every layer the same scheme; its budget is its own error."""
    places = tuple(layer.place(scheme) for layer in layers)
    errors = (layer.errors[place] for layer, place in zip(layers, places, strict=True))
    return Plan(tuple(layers), places, math.fsum(errors))


def plan(
    layers: Sequence[Layer],
    default: str = DEFAULT,
    *,
    alpha: float = 1.0,
    buckets: int = BUCKETS,
) -> Plan:
    """The cheapest plan whose squared error is at most `alpha` times that of `default` everywhere.

    Never dearer than `default` everywhere where alpha >= 1.

    Raises: ValueError: alpha is negative or not finite, or no plan stays within the budget.
    """
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha is {alpha}; it is a finite number >= 0, 1 for default's own error")
    same = uniform(layers, default)
    budget = alpha * same.budget
    rows = [layer.errors for layer in layers]
    found = assign(rows, [layer.costs for layer in layers], budget, buckets)
    made = None if found is None else Plan(tuple(layers), found, budget)
    # rounding up to buckets may hide plans at the very edge: these two are known
    least = tuple(row.index(min(row)) for row in rows)
    for places in (same.places, least):
        other = Plan(tuple(layers), places, budget)
        if other.error <= budget and (made is None or other.cost < made.cost):
            made = other
    if made is None:
        raise ValueError(
            f"no plan stays within the budget: the least squared error is "
            f"{math.fsum(map(min, rows)):.3g}, allowed is {budget:.3g} ({alpha:g} times that of "
            f"{default}); give a larger alpha, or candidates of more bits"
        )
    return made


def assign(
    errors: Sequence[Sequence[float]],
    costs: Sequence[Sequence[float]],
    budget: float,
    buckets: int = BUCKETS,
) -> tuple[int, ...] | None:
    """The dynamic programme: a place for each row, or None where none is within the budget.

    Exact as long as no more than `buckets` partial plans are worth keeping. Of equally cheap ones
    it takes the one with the least error, then the earlier places. ValueError: no budget.
    """
    if not (math.isfinite(budget) and budget >= 0) or buckets < 1:
        raise ValueError(f"budget {budget}, buckets {buckets}: finite and >= 0, at least 1")
    error, cost = np.zeros(1), np.zeros(1)  # of the partial plans: errors rise, costs fall
    trail: list[tuple[NDArray[np.int64], int]] = []
    for row, prices in zip(errors, costs, strict=True):
        sums = np.add.outer(np.asarray(row, dtype=np.float64), error).ravel()
        spent = np.add.outer(np.asarray(prices, dtype=np.float64), cost).ravel()
        order = np.argsort(sums, kind="stable")
        order = order[sums[order] <= budget * SLACK]
        if not order.size:
            return None
        falling = spent[order]
        before = np.minimum.accumulate(np.concatenate(([np.inf], falling[:-1])))
        order = order[falling < before]
        if order.size > buckets:  # of each bucket the cheapest, which is its last
            bucket = np.ceil(sums[order] * (buckets / budget))
            order = order[np.append(bucket[1:] != bucket[:-1], True)]
        trail.append((order, error.size))
        error, cost = sums[order], spent[order]
    for last in reversed(range(error.size)):  # from the cheapest
        places = _walk(trail, last)
        if math.fsum(row[place] for row, place in zip(errors, places, strict=True)) <= budget:
            return places
    return None


def _walk(trail: Sequence[tuple[NDArray[np.int64], int]], last: int) -> tuple[int, ...]:
    """The places that led to partial plan `last`: each layer's order is (place, plan before)."""
    places = []
    for order, width in reversed(trail):
        place, last = divmod(int(order[last]), width)
        places.append(place)
    return tuple(reversed(places))


def candidates(info: TensorInfo, schemes: Sequence[str]) -> tuple[str, ...]:
    """Those of `schemes` that a tensor may take; raw alone for what a scheme text leaves exact."""
    small = info.numel < EXACT_BELOW_NUMEL or (info.ndim or EXACT_BELOW_NDIM) < EXACT_BELOW_NDIM
    if small or info.dtype not in DTYPES:
        return (str(raw()),)
    size = info.numel * info.dtype.itemsize
    fit = (s for s in schemes if s == str(raw()) or nbytes(info, Scheme.parse(s)) < size)
    return tuple(fit) or (str(raw()),)


def nbytes(info: TensorInfo, scheme: Scheme) -> int:
    """Bytes of the tensor's payload, a `Cost`."""
    return scheme.codec.expected(Layout((info.numel,), info.dtype, align=scheme.codec.align))


def seconds(topology: Topology, speeds: Mapping[str, Speed]) -> Cost:
    """Seconds of a two-phase all_reduce without its latency, a `Cost`.

    speeds: of the codecs, by scheme text; what is not in it codes in no time.
    """
    factor = 2 * (topology.size - 1) / topology.size

    def cost(info: TensorInfo, scheme: Scheme) -> float:
        wire = factor * nbytes(info, scheme) / topology.link.bandwidth
        speed = speeds.get(str(scheme))
        coding = 0.0 if speed is None else speed.seconds_per_byte
        return wire + info.numel * FP32_BYTES * coding

    return cost


def escape(name: str) -> str:
    """The rule pattern (fnmatch) that matches `name` and nothing else."""
    return re.sub(r"([*?[])", r"[\1]", name)
