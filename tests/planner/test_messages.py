"""Plans of layers that travel in buckets: the least of bytes and messages together."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from commlib.planner import Curve, Errors, Prices, Profile, Speed, plan_messages
from commlib.planner.messages import CANDIDATES, OWN, messages, worth
from commlib.planner.schemes import Layer, nbytes
from commlib.policy import TensorInfo
from commlib.scheme import Scheme
from commlib.topology import Link

TEXTS = ("int5+ef", "int6+ef", "int8+ef")
NAMES = "abcd"


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[Layer], float, list[list[str]], float]:
    layers = []
    for name in NAMES[: draw(st.integers(1, 4))]:
        some = draw(st.sampled_from([TEXTS, TEXTS, TEXTS[2:]]))
        errors = draw(st.lists(st.floats(0, 10), min_size=len(some), max_size=len(some)))
        costs = draw(st.lists(st.integers(0, 20), min_size=len(some), max_size=len(some)))
        layers.append(Layer(name, 1, some, tuple(errors), tuple(map(float, costs))))
    cut = draw(st.integers(0, len(layers)))
    names = [layer.name for layer in layers]
    return layers, draw(st.floats(0, 30)), [names[:cut], names[cut:]], draw(st.floats(0, 20))


ALIKE = Layer("a", 1, TEXTS, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
FIXED = Layer("b", 1, TEXTS[2:], (0.0,), (0.0,))


@settings(deadline=None, max_examples=200)
@given(tables())
@example(([ALIKE, FIXED], 0.0, [["a", "b"], []], 1.0))  # one message, not two
def test_it_is_never_over_the_budget_and_beats_every_plan_of_one_scheme_a_bucket(
    table: tuple[list[Layer], float, list[list[str]], float],
) -> None:
    layers, budget, buckets, message = table
    cut = len(buckets[0])
    found = plan_messages(layers, budget, buckets, message)
    every = {}
    for places in itertools.product(*(range(len(layer.schemes)) for layer in layers)):
        pairs = list(zip(layers, places, strict=True))
        chosen = {layer.name: layer.schemes[p] for layer, p in pairs}
        if math.fsum(layer.errors[p] for layer, p in pairs) <= budget:
            cost = math.fsum(layer.costs[p] for layer, p in pairs)
            every[tuple(chosen.values())] = cost + message * messages(chosen, buckets)
    if found is None:
        assert not every
        return
    made, seconds = found
    assert made.error <= budget
    assert seconds == pytest.approx(every[tuple(made.schemes.values())])
    assert seconds >= min(every.values()) - 1e-9
    alike = [v for k, v in every.items() if len(set(k[:cut])) <= 1 and len(set(k[cut:])) <= 1]
    assert seconds <= min(alike, default=math.inf) + 1e-9
    if message == 0:
        assert seconds == pytest.approx(min(every.values()))


def test_what_a_scheme_saves_must_pay_for_its_message() -> None:
    layers = [
        Layer("a", 1, TEXTS[1:], (4.0, 1.0), (6.0, 8.0)),
        Layer("b", 1, TEXTS[1:], (1.0, 0.0), (6.0, 8.0)),
    ]
    together, apart = [["a", "b"]], [["a"], ["b"]]
    made, seconds = plan_messages(layers, 2.0, together, 1.0)  # type: ignore[misc]
    assert (made.schemes, seconds) == ({"a": "int8+ef", "b": "int6+ef"}, 16.0)
    made, seconds = plan_messages(layers, 2.0, together, 3.0)  # type: ignore[misc]
    assert (made.schemes, seconds) == ({"a": "int8+ef", "b": "int8+ef"}, 19.0)
    made, seconds = plan_messages(layers, 2.0, apart, 3.0)  # type: ignore[misc]
    assert (made.schemes, seconds) == ({"a": "int8+ef", "b": "int6+ef"}, 20.0)
    # however dear a message is, buckets that have one each anyway may differ
    made, seconds = plan_messages(layers, 2.0, apart, 1e6)  # type: ignore[misc]
    assert made.schemes == {"a": "int8+ef", "b": "int6+ef"}
    assert plan_messages(layers, 0.5, together, 1.0) is None
    assert messages({"a": "x", "b": "y"}, [["a", "b", "raw"], ["b"], []]) == 3


def test_prices_are_of_what_was_measured() -> None:
    curve = Curve("fp32", (4096, 8192), (1.0, 2.0))
    profile = Profile(4, (curve,), (), Link(1.0, 1.0), Link(1e-3, 25e6), 5e-4)
    speeds = {text: Speed(text, 1e9, 2e9, 4e9, 0.25) for text in (OWN, *CANDIDATES)}
    prices = Prices.of(profile, speeds)
    assert prices.message == pytest.approx(2.5e-3)
    info = TensorInfo("w", 4096, torch.float32, ndim=2)
    for text in CANDIDATES:
        scheme = Scheme.parse(text)
        wire = 2 * 3 / 4 * nbytes(info, scheme) / 25e6
        assert prices.layer(info, scheme) == pytest.approx(wire + 4 * 4096 * 1.75e-9)
    assert Prices.from_dict(json.loads(json.dumps(prices.to_dict()))) == prices
    assert worth(1.0, 1.11)
    assert not worth(1.0, 1.09)


def test_a_sample_tells_of_the_whole() -> None:
    """Within five standard deviations of the mean of so many blocks; all of a small tensor."""
    info = TensorInfo("w", 512 * 2048, torch.float32, ndim=2)
    g = torch.randn(512, 2048, generator=torch.Generator().manual_seed(1))
    g *= 1 + torch.arange(2048) % 1024 / 256  # columns differ, in step with the sampled runs
    tables = {}
    for sample in (None, 1 << 16, 10):
        tables[sample] = Errors({"w": info}, TEXTS, sample=sample)
        tables[sample].add("w", g)
    whole, part = tables[None].table, tables[1 << 16].table
    assert (part / whole - 1).abs().max() < 0.1
    assert (tables[10].table > 0).all()  # one run
    again = Errors({"w": info}, TEXTS, sample=1 << 16)
    again.add("w", g)
    assert torch.equal(again.table, part)
    small = Errors({"w": info._replace(numel=4096)}, TEXTS, sample=4096)
    small.add("w", g.flatten()[:4096])
    exact = Errors({"w": info._replace(numel=4096)}, TEXTS)
    exact.add("w", g.flatten()[:4096])
    assert torch.equal(small.table, exact.table)
