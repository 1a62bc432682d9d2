"""PPRS and what it is measured against: equations, perturbations, resuming."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bench.pprs_problem import Problem, run
from commlib.optim import GD, PPRS, Nesterov, Pipeline, Schedule
from commlib.optim import noise as noise_module
from commlib.optim.noise import normals
from commlib.transport import Transport, run_ranks
from tests.optim.models import WIDTH, Shift, data, error, here, modules, parameters, same


def reference(copies: int, gamma: float, eta: float, seed: int, steps: int) -> list[torch.Tensor]:
    """PPRS by its equations and plain autograd."""
    stages, (samples, targets) = modules(), data()
    x = [p.detach().clone() for stage in stages for p in stage.parameters()]
    y, growth = list(x), 0.0
    for t in range(steps):
        total: list[torch.Tensor] | None = None
        for sample, target in zip(samples, targets, strict=True):
            for k in range(copies):
                place, leaves = 0, []
                for number, stage in enumerate(stages):
                    own = x[place : place + len(list(stage.parameters()))]
                    numel = sum(p.numel() for p in own)
                    drawn = normals(numel, range(k, k + 1), seed=seed, step=t, stage=number)[0]
                    parts = drawn.split([p.numel() for p in own])
                    for p, part in zip(own, parts, strict=True):
                        leaves.append((p + gamma * part.view(p.shape)).requires_grad_())
                    place += len(own)
                names = [
                    f"{n}.{name}" for n, s in enumerate(stages) for name, _ in s.named_parameters()
                ]
                model = nn.Sequential(*stages)
                output = torch.func.functional_call(
                    model, dict(zip(names, leaves, strict=True)), sample
                )
                found = torch.autograd.grad(error(output, target), leaves)
                total = (
                    list(found)
                    if total is None
                    else [a + b for a, b in zip(total, found, strict=True)]
                )
        assert total is not None
        following = (1 + math.sqrt(1 + 4 * growth**2)) / 2
        mu = (following - 1) / ((1 + math.sqrt(1 + 4 * following**2)) / 2)
        moved = [p - eta * (g / (len(samples) * copies)) for p, g in zip(x, total, strict=True)]
        x = [(1 + mu) * new - mu * old for new, old in zip(moved, y, strict=True)]
        y, growth = moved, following
    return x


@pytest.mark.parametrize(("copies", "gamma"), [(1, 0.0), (1, 0.1), (3, 0.1)])
def test_pprs_is_its_equations(copies: int, gamma: float) -> None:
    optimizer = PPRS(here(), copies, gamma, 1e-2, seed=5)
    for _ in range(4):
        optimizer.step(*data())
    assert same(parameters(optimizer.pipeline), reference(copies, gamma, 1e-2, 5, 4))


def test_one_copy_without_perturbation_is_nesterovs_method() -> None:
    smoothed, plain = PPRS(here(), 1, 0.0, 1e-2), Nesterov(here(), 1e-2)
    for _ in range(4):
        assert smoothed.step(*data()) == plain.step(*data())
    assert same(parameters(smoothed.pipeline), parameters(plain.pipeline))


def test_without_momentum_it_is_descent() -> None:
    smoothed, plain = PPRS(here(), 1, 0.0, 1e-2, momentum=False), GD(here(), 1e-2)
    for _ in range(4):
        smoothed.step(*data())
        plain.step(*data())
    for one, other in zip(parameters(smoothed.pipeline), parameters(plain.pipeline), strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-7)


def test_the_subgradient_method_decays() -> None:
    pipeline = Pipeline([Shift()], loss=lambda x: x.sum())
    optimizer, start = GD(pipeline, 1.0, decay=True), parameters(pipeline)[0]
    for _ in range(3):
        optimizer.step([torch.zeros(2, WIDTH)])
    moved = 1 + 1 / math.sqrt(2) + 1 / math.sqrt(3)
    assert torch.allclose(parameters(pipeline)[0], start - moved)


def test_perturbations_are_made_again_bitwise(monkeypatch: pytest.MonkeyPatch) -> None:
    how = {"seed": 1, "step": 2, "stage": 3}
    drawn = normals(37, range(5), **how)
    assert drawn.shape == (5, 37)
    assert torch.equal(drawn, normals(37, range(5), **how))
    assert torch.equal(drawn[3:4], normals(37, range(3, 4), **how))
    assert torch.equal(drawn[:, :20], normals(20, range(5), **how))
    monkeypatch.setattr(noise_module, "CHUNK", 7)
    assert torch.equal(drawn, normals(37, range(5), **how))
    assert normals(0, range(5), **how).shape == (5, 0)


@settings(max_examples=30)
@given(*(st.tuples(*[st.integers(0, 1 << 31)] * 4) for _ in range(2)))
def test_perturbations_differ_between_seeds_steps_copies_and_stages(
    one: tuple[int, ...], other: tuple[int, ...]
) -> None:
    def drawn(seed: int, step: int, copy: int, stage: int) -> torch.Tensor:
        return normals(8, range(copy, copy + 1), seed=seed, step=step, stage=stage)

    assert torch.equal(drawn(*one), drawn(*other)) == (one == other)


def test_perturbations_are_normal() -> None:
    drawn = normals(50_000, range(4), seed=0, step=0, stage=0).double()
    assert drawn.isfinite().all()
    flat = drawn.view(-1)
    moments = [float((flat**power).mean()) for power in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.05)
    assert torch.corrcoef(drawn).fill_diagonal_(0).abs().max() < 0.03
    neighbours = torch.corrcoef(torch.stack([flat[:-1], flat[1:]]))
    assert neighbours[0, 1].abs() < 0.01


MAKERS: list[Callable[[Pipeline], GD | Nesterov]] = [
    lambda pipeline: GD(pipeline, 1e-2, decay=True),
    lambda pipeline: Nesterov(pipeline, 1e-2),
    lambda pipeline: PPRS(pipeline, 3, 0.1, 1e-2, seed=9),
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("activations", [None, "int4+reuse"])
def test_a_resumed_run_is_the_uninterrupted_one(
    make: Callable[[Pipeline], GD | Nesterov], activations: str | None
) -> None:
    whole = make(here(activations=activations))
    for _ in range(3):
        whole.step(*data())
    state, weights = whole.state_dict(), parameters(whole.pipeline)
    losses = [whole.step(*data()) for _ in range(3)]

    resumed = make(here(activations=activations))
    places = [p for stage in resumed.pipeline.stages for p in stage.parameters]
    with torch.no_grad():
        for place, saved in zip(places, weights, strict=True):
            place.copy_(saved)
    resumed.load_state_dict(state)
    assert [resumed.step(*data()) for _ in range(3)] == losses
    assert same(parameters(resumed.pipeline), parameters(whole.pipeline))
    assert resumed.state_dict()["steps"] == 6


RANDOM = [("int4:round=stochastic", None), (None, "qsgd:levels=4:block=64"), ("int4+reuse", "int4")]


def resume(
    make: Callable[[], GD | Nesterov], steps: int = 3, old: bool = False
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The parameters after a run, and after one that went on from a file in its middle.

    old: from a state as it was before hops were in it.
    """
    whole = make()
    for _ in range(steps):
        whole.step(*data())
    file, reached = io.BytesIO(), parameters(whole.pipeline)
    torch.save(whole.state_dict(), file)
    for _ in range(steps):
        whole.step(*data())

    resumed = make()
    places = [p for stage in resumed.pipeline.stages for p in stage.parameters]
    with torch.no_grad():
        for place, saved in zip(places, reached, strict=True):
            place.copy_(saved)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    if old:
        del state["hops"]
    resumed.load_state_dict(state)
    for _ in range(steps):
        resumed.step(*data())
    return parameters(whole.pipeline), parameters(resumed.pipeline)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(("activations", "gradients"), RANDOM)
def test_codecs_that_round_at_random_go_on_bitwise(
    make: Callable[[Pipeline], GD | Nesterov], activations: str | None, gradients: str | None
) -> None:
    whole, resumed = resume(lambda: make(here(activations=activations, gradients=gradients)))
    assert same(whole, resumed)


@pytest.mark.parametrize(("activations", "gradients"), RANDOM)
def test_ranks_go_on_bitwise(activations: str | None, gradients: str | None) -> None:
    """Both ends of a hop load their own, and settle its form anew."""
    depth = 3

    def body(transport: Transport) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        def make() -> PPRS:
            mine, how = [modules(depth)[transport.rank]], {"activations": activations}
            pipeline = Pipeline(mine, loss=error, transport=transport, gradients=gradients, **how)
            return PPRS(pipeline, 3, 0.1, 1e-2, seed=9)

        return resume(make)

    whole = PPRS(here(depth, activations=activations, gradients=gradients), 3, 0.1, 1e-2, seed=9)
    for _ in range(6):
        whole.step(*data())
    ranks = run_ranks(depth, body)
    assert all(same(one, other) for one, other in ranks)
    assert same([p for one, _ in ranks for p in one], parameters(whole.pipeline))


def test_a_live_pipeline_goes_back_bitwise() -> None:
    """With the optimizer that saved; what is loaded is a copy, and is told before the next step."""
    optimizer = GD(here(activations="int4:round=stochastic", gradients="int4"), 1e-2)
    for _ in range(2):
        optimizer.step(*data())
    state, start = optimizer.state_dict(), parameters(optimizer.pipeline)
    ends = []
    for _ in range(2):
        places = [p for stage in optimizer.pipeline.stages for p in stage.parameters]
        with torch.no_grad():
            for place, saved in zip(places, start, strict=True):
                place.copy_(saved)
        optimizer.load_state_dict(state)
        assert optimizer.state_dict() == state
        for _ in range(2):
            optimizer.step(*data())
        ends.append(parameters(optimizer.pipeline))
    assert same(*ends)


def test_a_state_without_hops_loads() -> None:
    """As it was saved before they were in it: where nothing is random, bitwise as ever."""
    assert same(*resume(lambda: Nesterov(here(), 1e-2), old=True))
    assert same(*resume(lambda: GD(here(activations="int8"), 1e-2), old=True))
    random = {"activations": "int4:round=stochastic"}
    assert not same(*resume(lambda: GD(here(**random), 1e-2), old=True))


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        ({}, "the state is of the coded hops \\[\\], allowed: \\['activations of stage 0', "),
        ({"activations": "int8"}, "activations of stage 0: the state is of scheme 'int8"),
        ({"activations": "int4", "gradients": "int4"}, "coded hops .*gradients of stage 1"),
    ],
)
def test_a_state_of_other_hops_is_refused_and_changes_nothing(
    saved: dict[str, Any], told: str
) -> None:
    other, mine = Nesterov(here(**saved), 1e-2), Nesterov(here(activations="int4"), 1e-2)
    other.step(*data())
    before = mine.state_dict()
    with pytest.raises(ValueError, match=told):
        mine.load_state_dict(other.state_dict())
    after = mine.state_dict()
    assert [after[one] for one in ("steps", "hops", "lambda")] == [0, before["hops"], 0.0]
    assert all(same(ones, after["y"][stage]) for stage, ones in before["y"].items())


def test_a_state_with_a_hop_that_is_none_is_refused_before_a_step() -> None:
    optimizer = GD(here(activations="int4"), 1e-2)
    optimizer.step(*data())
    state = optimizer.state_dict()
    state["hops"]["activations of stage 2"]["boundary"] = {}
    with pytest.raises(ValueError, match="no state of a compressor"):
        GD(here(activations="int4"), 1e-2).load_state_dict(state)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Schedule(0, 1), "Schedule: stages is 0, allowed: a whole number of at least 1"),
        (lambda: Schedule(1, 1.5), "Schedule: passes is 1.5"),  # type: ignore[arg-type]
        (lambda: Schedule(2, 1).operations(2), "stage is 2, allowed: 0 to 1"),
        (lambda: Pipeline([]), "number of stages is 0"),
        (lambda: here(activations="int8+ef"), "activations is 'int8\\+ef', allowed: a codec, or"),
        (lambda: here(gradients="int8+reuse"), "gradients is 'int8\\+reuse', allowed: a codec$"),
        (lambda: here(activations="int9"), "int9"),
        (lambda: here().run([]), "number of samples is 0"),
        (lambda: here().run(data()[0], []), "got 0 targets for 2 samples, allowed: one for each"),
        (lambda: here().run(*data(), copies=0), "copies is 0"),
        (lambda: Pipeline(modules()).run(data()[0]), "loss has shape \\(2, 12\\), allowed: one"),
        (lambda: Pipeline([nn.LSTM(WIDTH, 3)]).run(data()[0]), "stage 0 made tuple"),
        (lambda: PPRS(here(), 0, 0.1, 0.1), "PPRS: K is 0"),
        (lambda: PPRS(here(), True, 0.1, 0.1), "PPRS: K is True"),
        (lambda: PPRS(here(), 1, -0.1, 0.1), "PPRS: gamma is -0.1, allowed: a finite number of"),
        (lambda: PPRS(here(), 1, 0.1, 0.0), "PPRS: eta is 0.0, allowed: a finite number above 0"),
        (lambda: GD(here(), math.nan), "GD: eta is nan"),
        (lambda: Nesterov(here(), "1"), "Nesterov: eta is '1'"),  # type: ignore[arg-type]
        (lambda: GD(here(), 1.0).load_state_dict({}), "GD: the state has \\[\\], allowed"),
        (
            lambda: Nesterov(here(), 1.0).load_state_dict(Nesterov(here(2), 1.0).state_dict()),
            "Nesterov: the state is of stages with shapes",
        ),
        (
            lambda: here(activations="int8").run(
                [torch.ones(1, WIDTH), torch.ones(2, WIDTH)], [0, 0]
            ),
            "activations of stage 0: got shape \\(2, 12\\)",
        ),
    ],
)
def test_refusals(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_deep_pipelines_gain() -> None:
    """The bench's problem: of ten stages PPRS needs less time than descent, of one more."""
    problem = Problem()
    for depth in (1, 10):
        descent = run(problem, GD(problem.pipeline(depth), 0.3, decay=True), 200)
        smoothed = run(problem, PPRS(problem.pipeline(depth), 8, 0.007, 0.02), 200)
        assert descent.exact
        assert smoothed.exact
        assert descent.iterations is not None
        assert smoothed.iterations is not None
        assert (smoothed.ticks < descent.ticks) == (depth == 10)
