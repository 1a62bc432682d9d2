"""The programme that chooses a scheme per layer: never over the budget, as good as brute force."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commlib.planner.auto import Speed
from commlib.planner.schemes import (
    CANDIDATES,
    DEFAULT,
    Layer,
    assign,
    candidates,
    escape,
    nbytes,
    plan,
    seconds,
    uniform,
)
from commlib.policy import Policy, Role, TensorInfo
from commlib.scheme import Scheme
from commlib.topology import Link, Topology

SCHEMES = ("int2+ef", "int4+ef", "int6+ef", "int8+ef")
# also far below a bucket, zero, at an edge, and beyond any budget drawn here
error = st.floats(0, 100) | st.sampled_from([0.0, 1e-300, 1e-9, 1.0, 1e30])
cost = st.integers(0, 40).map(float)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[list[float]], list[list[float]]]:
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    errors = [draw(st.lists(error, min_size=n, max_size=n)) for n in lengths]
    costs = [draw(st.lists(cost, min_size=n, max_size=n)) for n in lengths]
    return errors, costs


def every(table: list[list[float]]) -> itertools.product[tuple[int, ...]]:
    return itertools.product(*(range(len(row)) for row in table))


def total(table: list[list[float]], places: tuple[int, ...]) -> float:
    return math.fsum(row[place] for row, place in zip(table, places, strict=True))


def least(errors: list[list[float]], costs: list[list[float]], budget: float) -> float:
    """Brute force; infinity where nothing is within the budget."""
    within = (total(costs, p) for p in every(errors) if total(errors, p) <= budget)
    return min(within, default=math.inf)


@settings(deadline=None, max_examples=300)
@given(tables(), st.floats(0, 200) | st.sampled_from([0.0, 1.0, 1e-300]))
def test_it_equals_brute_force_and_is_never_over_the_budget(
    table: tuple[list[list[float]], list[list[float]]], budget: float
) -> None:
    errors, costs = table
    found = assign(errors, costs, budget)
    if found is None:
        assert least(errors, costs, budget) == math.inf
    else:
        assert total(errors, found) <= budget
        assert total(costs, found) == least(errors, costs, budget)


@settings(deadline=None, max_examples=300)
@given(tables(), st.floats(0.1, 200), st.integers(1, 20))
def test_few_buckets_lose_no_more_than_their_share_of_the_budget(
    table: tuple[list[list[float]], list[list[float]]], budget: float, buckets: int
) -> None:
    errors, costs = table
    found = assign(errors, costs, budget, buckets)
    rest = budget * (1 - len(errors) / buckets) * (1 - 1e-9)
    spared = least(errors, costs, rest) if rest >= 0 else math.inf
    if found is None:
        assert spared == math.inf
    else:
        assert total(errors, found) <= budget
        assert least(errors, costs, budget) <= total(costs, found) <= spared


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_a_plan_is_within_its_budget_and_no_dearer_than_the_default(data: st.DataObject) -> None:
    numbers = st.lists(st.floats(0, 1e3), min_size=4, max_size=4)
    rows = data.draw(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6))
    layers = [Layer(f"l{i}", 1, SCHEMES, tuple(e), tuple(c)) for i, (e, c) in enumerate(rows)]
    made, same = plan(layers), uniform(layers)
    assert made.error <= made.budget == same.error
    assert made.cost <= same.cost
    assert plan(layers) == made


def halving(norms: list[float], bits: range = range(2, 9)) -> list[Layer]:
    """Layers of one size whose error is 4^-bits norm^2."""
    texts = tuple(f"int{b}+ef" for b in bits)
    return [
        Layer(f"l{i}", 1000, texts, tuple(4.0**-b * n * n for b in bits), tuple(map(float, bits)))
        for i, n in enumerate(norms)
    ]


def test_bits_go_where_the_gradient_is() -> None:
    # default: 66 / 256; these: 1/16 + 1/16 + 64/1024
    made = plan(halving([1.0, 1.0, 8.0]))
    assert list(made.schemes.values()) == ["int2+ef", "int2+ef", "int5+ef"]
    assert (made.error, made.budget) == (3 / 16, 66 / 256)
    # nothing to gain where all are alike: rounding to nearest bits leaves the default
    assert set(plan(halving([1.0] * 4)).schemes.values()) == {"int4+ef"}


def test_alpha_buys_bytes_for_error() -> None:
    layers = halving([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    costs = [plan(layers, alpha=alpha).cost for alpha in (0.1, 1.0, 10.0)]
    assert costs[0] > costs[1] > costs[2]


def test_ties_go_the_same_way_every_time() -> None:
    assert assign([[1, 1], [1, 1]], [[5, 5], [5, 5]], 10) == (0, 0)
    # equally cheap: the one that loses less
    assert assign([[9, 1]], [[5, 5]], 10) == (1,)


@pytest.mark.parametrize(
    ("errors", "budget", "places"),
    [
        ([[0.0, 0.0], [0.0]], 0.0, (1, 0)),  # nothing is lost: the cheapest
        ([[1e-300, 0.0], [0.0]], 0.0, (1, 0)),
        ([[1e-300], [0.0]], 0.0, None),
        ([[1.0]], 1.0, (0,)),  # all of it
        ([[math.nextafter(1.0, 2)]], 1.0, None),
        ([[0.5], [0.5 + 2**-51]], 1.0, None),
        ([[5e-324]], 5e-324, (0,)),  # the smallest numbers there are
        ([], 1.0, ()),
    ],
)
def test_the_edges_of_the_budget(
    errors: list[list[float]], budget: float, places: tuple[int, ...] | None
) -> None:
    costs = [[float(len(row) - place) for place in range(len(row))] for row in errors]
    assert assign(errors, costs, budget) == places


def test_the_default_itself_fits_its_own_error() -> None:
    # thirds, whose sum rounds; no choice, then one bucket only
    rows = [(1 / 3 + i, 1e-9) for i in range(50)]
    fixed = [Layer(f"l{i}", 9, (DEFAULT,), (error,), (9.0,)) for i, (error, _) in enumerate(rows)]
    assert plan(fixed).places == (0,) * 50
    dear = [Layer(f"l{i}", 9, (DEFAULT, "fp32"), row, (1.0, 9.0)) for i, row in enumerate(rows)]
    for buckets in (1, 7, 10_000):
        assert plan(dear, buckets=buckets).places == (0,) * 50


def test_many_layers_are_planned_within_the_budget() -> None:
    """More partial plans than buckets; the bound is that of the continuous relaxation."""
    layers = halving([1.5 ** (i % 13) * (1 + i / 1000) for i in range(200)])
    made, coarse = plan(layers), plan(layers, buckets=50)
    assert made.error <= made.budget
    assert coarse.error <= coarse.budget
    assert made.cost <= coarse.cost < uniform(layers).cost

    def relaxed(weight: float) -> float:
        """Lagrange: a lower bound of the cost of any plan within the budget, for any weight."""
        best = (
            min(c + weight * e for c, e in zip(la.costs, la.errors, strict=True)) for la in layers
        )
        return math.fsum(best) - weight * made.budget

    bound = max(relaxed(10.0**k) for k in [x / 20 for x in range(-100, 100)])
    # at best one layer of the relaxation lies between two schemes
    assert bound - 1e-6 <= made.cost <= bound + 2


def test_a_budget_that_nothing_meets_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"least squared error is .*allowed is .*larger alpha"):
        plan(halving([1.0, 2.0], range(4, 6)), alpha=1e-3)
    for alpha in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="alpha is"):
            plan(halving([1.0]), alpha=alpha)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0])
def test_a_table_of_no_numbers_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="layer 'w': error"):
        Layer("w", 1, SCHEMES[:1], (wrong,), (1.0,))
    with pytest.raises(ValueError, match="layer 'w': cost"):
        Layer("w", 1, SCHEMES[:1], (1.0,), (wrong,))
    with pytest.raises(ValueError, match="needs one error and one cost"):
        Layer("w", 1, SCHEMES, (1.0,), (1.0,))


def test_a_default_that_was_not_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="'int3\\+ef' is not among its candidates int2"):
        plan([Layer("w", 1, SCHEMES, (1.0,) * 4, (1.0,) * 4)], "int3+ef")


# Policies


@pytest.mark.parametrize(
    "name", ["layer.weight", "a[0].w", "a*", "w?", "[!x]", "*", "a[[]", "x]y", "ü\n\\"]
)
def test_a_rule_matches_its_own_layer_alone(name: str) -> None:
    texts = ("int2+ef", DEFAULT)
    others = ["layerxweight", "a0.w", "ab", "wx", "y", "a[", "a[]", "other", name + "x", "x" + name]
    made = plan([Layer(name, 4096, texts, (0.0, 0.0), (1.0, 2.0))])
    policy = made.policy()
    of = TensorInfo(name, 4096, torch.float32, ndim=2)
    assert str(policy.choose(of).codec).startswith("int2")
    for other in others:
        if other != name:
            assert str(policy.choose(of._replace(key=other)).codec).startswith("int4"), other
    # what is not a gradient was not measured
    assert "int2" not in str(policy.choose(of._replace(role=Role.PARAMETER)))
    assert escape("layer.weight") == "layer.weight"


def test_a_policy_survives_text_and_has_one_digest() -> None:
    made = plan(halving([1.0, 3.0, 9.0, 27.0]))
    policy = made.policy()
    assert Policy.parse(policy.to_json()) == policy == plan(halving([1.0, 3.0, 9.0, 27.0])).policy()
    assert Policy.parse(json.loads(policy.to_json())).digest() == policy.digest()
    assert len({rule.scheme for rule in policy.rules[:4]}) > 1
    # what is not in the plan goes as the default text says: vectors exact
    vector = TensorInfo("norm.weight", 4096, torch.float32, ndim=1)
    assert policy.choose(vector).lossless
    assert str(policy.choose(vector._replace(ndim=2))) == str(Scheme.parse(DEFAULT).resolve())


def test_a_layer_that_chose_raw_stays_raw() -> None:
    made = plan([Layer("w", 4096, ("fp32", DEFAULT), (0.0, 1.0), (1.0, 2.0))])
    assert made.policy().choose(TensorInfo("w", 4096, torch.float32, ndim=2)).lossless
    # one that is exact anyway takes no line
    exact = plan([Layer("norm", 4096, ("fp32",), (0.0,), (1.0,))])
    assert exact.policy() == Policy.parse(DEFAULT)


# What may be chosen, and what it costs


@pytest.mark.parametrize(
    "info",
    [
        TensorInfo("bias", 10**6, torch.float32, ndim=1),
        TensorInfo("small", 1023, torch.float32, ndim=2),
        TensorInfo("double", 10**6, torch.float64, ndim=2),
    ],
)
def test_what_has_to_stay_exact(info: TensorInfo) -> None:
    assert candidates(info, CANDIDATES) == ("fp32",)
    assert nbytes(info, Scheme.parse("fp32")) >= info.numel * 4


def test_what_is_no_smaller_is_no_candidate() -> None:
    half = TensorInfo("w", 4096, torch.bfloat16, ndim=2)
    assert candidates(half, ("fp32", "bf16", "int8+ef")) == ("fp32", "int8+ef")
    assert candidates(half._replace(dtype=torch.float32), ("bf16",)) == ("bf16",)
    assert candidates(half._replace(ndim=None), CANDIDATES) == CANDIDATES


def test_bytes_are_those_of_the_wire() -> None:
    info = TensorInfo("w", 128 * 100, torch.float32, ndim=2)
    # 100 blocks of 128 x 4 bits and a scale of 2 bytes, in sections of 16 bytes
    assert nbytes(info, Scheme.parse("int4+ef")) == 100 * 64 + 208


def test_seconds_are_those_of_the_wire_and_of_the_codec() -> None:
    info, scheme = TensorInfo("w", 128 * 100, torch.float32, ndim=2), Scheme.parse("int4+ef")
    link = Topology(4, Link(1e-3, 1e6))
    wire = 1.5 * nbytes(info, scheme) / 1e6
    assert seconds(link, {})(info, scheme) == pytest.approx(wire)
    speed = Speed("int4+ef", 1e9, 2e9, 4e9, 0.129)
    coding = 4 * info.numel * (1e-9 + 0.5e-9 + 0.25e-9)
    assert seconds(link, {"int4+ef": speed})(info, scheme) == pytest.approx(wire + coding)
    assert seconds(Topology(1, link.link), {})(info, scheme) == 0


def test_a_slow_codec_is_taken_where_the_link_is_slower() -> None:
    info = TensorInfo("w", 10**6, torch.float32, ndim=2)
    speeds = {"int4+ef": Speed("int4+ef", 1e9, 1e9, 1e9, 0.13)}

    def chosen(rate: float) -> str:
        cost = seconds(Topology(4, Link(0.0, rate)), speeds)
        costs = tuple(cost(info, Scheme.parse(text)) for text in ("fp32", "int4+ef"))
        layer = Layer("w", info.numel, ("fp32", "int4+ef"), (0.0, 1.0), costs)
        return plan([layer], DEFAULT).schemes["w"]

    assert chosen(1e8) == "int4+ef"
    assert chosen(1e11) == "fp32"
