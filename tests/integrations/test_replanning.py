"""Re-planning under DDP: one plan on all ranks, from all ranks' gradients, that loses nothing."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from commlib.integrations.ddp import DDPState
from commlib.integrations.replanning import Replanner, Settings
from commlib.planner import Errors, plan
from commlib.planner.schemes import CANDIDATES
from commlib.policy import Policy, TensorInfo
from commlib.scheme import Scheme
from tests.integrations.ddp_cases import (
    DDP,
    WIDTH,
    assert_same_on_all_ranks,
    backward,
    batch,
    commlib,
    mlp,
    raises,
    ranked,
    relative,
    residuals,
    train,
    unranked,
    weights,
)
from tests.processes import Pool

processes = pytest.mark.processes
SOME = ("int2+ef", "int3+ef", "int4+ef", "int6+ef")
SMALL = {"bucket_cap_mb": 0.004}  # one bucket per layer


class Deep(nn.Module):
    """Matrices whose gradients differ by far: there is something to plan."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = x + 0.1**number * layer(x).relu()
        return self.head(x)


def planned(every: int = 2, model: type[nn.Module] = Deep, **mode: Any) -> DDP:
    wrapped = commlib.wrap(DDP(model(), **{**SMALL, **mode}), "int4+ef")
    commlib.of(wrapped).replan(every, schemes=SOME)
    return wrapped


def chosen(model: nn.Module) -> dict[str, str]:
    """The codec of each matrix by the policy in force."""
    policy = commlib.of(model).communicator.policy
    return {
        n: policy.choose(TensorInfo(n, p.numel(), p.dtype, ndim=p.dim())).codec.id
        for n, p in model.module.named_parameters()
        if p.dim() > 1 and p.numel() >= 1024
    }


def one_plan_from_all_ranks() -> None:
    model = planned()
    state = commlib.of(model)
    train(model, 2)
    assert set(chosen(model).values()) == {"int4"}  # measured; in force with the next step
    # what the plan must be: the programme on what all ranks coded in step 1
    alone = DDP(Deep(), **SMALL)
    same = commlib.wrap(DDP(Deep(), **SMALL), "int4+ef")
    train(same, 1)
    alone.load_state_dict(same.state_dict())
    table = Errors(state._tensors()["gradients"], SOME)
    for rank in range(dist.get_world_size()):
        alone.module.zero_grad()
        alone.module(batch(1, rank)).square().mean().backward()
        for name, parameter in alone.module.named_parameters():
            table.add(name, parameter.grad)
    expected = plan(table.layers("int4+ef")).policy()

    train(model, 1, start=2)
    assert state.policy == state.communicator.policy == expected
    assert len(set(chosen(model).values())) > 1
    assert_same_on_all_ranks(weights(model))
    # no residual was left behind: each is where its scheme sends it from
    for text, memory in state.communicator.state_dict()["compressors"].items():
        for name, codec in chosen(model).items():
            there = [k for k in memory["residuals"] if k.removesuffix("|reduced") == name]
            assert bool(there) == text.startswith(codec), (text, name)


def buckets_make_no_difference() -> None:
    """Five steps with two plans, whatever the buckets: the bits of the same run."""
    reference = train(planned(), 5)
    assert_same_on_all_ranks(reference)
    plain = train(DDP(Deep()), 5)
    assert 0 < relative(reference, plain) < 0.1
    for mode in (
        {"bucket_cap_mb": 25},
        {"gradient_as_bucket_view": True},
        {"static_graph": True},
        {"find_unused_parameters": True},
    ):
        assert torch.equal(train(planned(**mode), 5), reference), mode
    assert not torch.equal(train(commlib.wrap(DDP(Deep()), "int4+ef"), 5), reference)


def resume_is_bitwise() -> None:
    """After the measured step (the table is in the state), after the plan, and before both."""
    for cut in (1, 2, 3, 4):
        whole = planned()
        uninterrupted = train(whole, 6)
        model = planned()
        train(model, cut)
        file = io.BytesIO()
        saved = {"model": model.module.state_dict(), "commlib": commlib.of(model).state_dict()}
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        again = planned(bucket_cap_mb=25)
        again.module.load_state_dict(saved["model"])
        commlib.of(again).load_state_dict(saved["commlib"])
        assert torch.equal(train(again, 6 - cut, start=cut), uninterrupted), cut
        assert commlib.of(again).policy == commlib.of(whole).policy
        # wrapping again keeps plan, table and residuals
        third = planned()
        train(third, cut)
        commlib.wrap(third, timeout=30.0)
        assert torch.equal(train(third, 6 - cut, start=cut), uninterrupted), cut


def a_plan_without_replanning_stays_in_states() -> None:
    first = planned()
    train(first, 3)
    state = commlib.of(first).state_dict()
    for _ in range(2):
        model = commlib.wrap(DDP(Deep(), **SMALL), "int4+ef")
        commlib.of(model).load_state_dict(state)
        assert chosen(model) == chosen(first)
        train(model, 2, start=3)
        state = commlib.of(model).state_dict()


def a_state_that_is_refused_changes_nothing() -> None:
    """One with a plan: of other parameters, or with a table of other schemes."""
    first = planned()
    train(first, 4)
    saved = commlib.of(first).state_dict()
    other = commlib.wrap(DDP(mlp()), "int4+ef")
    fewer = commlib.wrap(DDP(Deep(), **SMALL), "int4+ef")
    commlib.of(fewer).replan(5, schemes=("int4+ef", "int8+ef"))
    for model, why in ((other, "unknown parameter"), (fewer, "error table")):
        train(model, 2)
        state = commlib.of(model)
        policy, before, replanner = state.policy, residuals(model), state._replanner
        raises(ValueError, why)(lambda state=state: state.load_state_dict(saved))
        assert state.policy is policy
        assert state.communicator.policy is policy
        assert state._replanner is replanner
        assert replanner is None or replanner.steps == 2
        after = residuals(model)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[path], x) for path, x in before.items())


def other_ranks_take_the_plan_but_not_the_table() -> None:
    model = planned()
    train(model, 4)
    mine = unranked(commlib.of(model).state_dict())
    assert {"policy", "steps", "table"} == mine["planned"].keys()
    size = dist.get_world_size() + 1
    states = [ranked({**mine, "rank": r, "world_size": size}, r, size) for r in range(size)]
    for state in states:
        (entry,) = next(iter(state.values()))
        rank = entry["rank"]
        memory = entry["memory"]["gradients"]
        entry["memory"] = {"gradients": {**memory, "rank": rank, "world_size": size}}
        for saved in entry["memory"]["gradients"]["compressors"].values():
            saved["residuals"] = {}
            saved["shares"] = {}
    again = planned()
    commlib.of(again).load_states(states)
    assert commlib.of(again).policy == commlib.of(model).policy
    assert commlib.of(again)._replanner.state_dict() == {"steps": 4}


def a_step_that_is_not_finite_changes_nothing() -> None:
    model = planned()
    train(model, 1)
    inputs = batch(1)
    if dist.get_rank() == 0:
        inputs[0, 0] = torch.nan
    model.zero_grad()
    model(inputs).square().mean().backward()
    was = commlib.of(model).policy
    backward(model, 2)
    assert commlib.of(model).policy is was
    train(model, 2, start=3)  # the next period plans
    assert commlib.of(model).policy != was


def a_rank_without_data_plans_along() -> None:
    """Under join the other rank's hook sees zeros, and counts its steps."""
    model = planned(find_unused_parameters=False)
    steps = 6 if dist.get_rank() == 0 else 3
    with model.join():
        train(model, steps)
    assert_same_on_all_ranks(weights(model))
    assert commlib.of(model)._replanner.steps == 6
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, commlib.of(model).policy.digest())
    assert len(set(digests)) == 1
    assert len(set(chosen(model).values())) > 1


def what_is_refused() -> None:
    register = DDPState("int4+ef")
    raises(ValueError, "knows of no model", "commlib.wrap")(register.replan)
    model = commlib.wrap(DDP(Deep()), "int8:block=64+ef")
    state = commlib.of(model)
    raises(ValueError, "layers.0.weight goes by int8:block=64", "wrap the model")(state.replan)
    # nor could residuals of rules that begin before the first plan does
    rules = [{"scheme": "int8:block=64+ef", "from_step": 2}, {"scheme": "fp32"}]
    commlib.wrap(model, {"rules": rules})
    raises(ValueError, "layers.0.weight goes by int8:block=64", "wrap the model")(state.replan)
    rules[1]["scheme"] = "int4+ef"
    refused = raises(ValueError, "from step 2 on by int8:block=64", "cut at 128")
    refused(lambda: commlib.wrap(DDP(Deep()), {"rules": rules}))
    # ranks that differ all raise, and train on as they were
    commlib.wrap(model, "int4+ef")
    differs = raises(RuntimeError, "every")
    differs(lambda: commlib.of(model).replan(2 + dist.get_rank()))
    train(model, 3)
    assert set(chosen(model).values()) == {"int4"}
    # a policy of the user's ends it
    commlib.of(model).replan(1)
    train(model, 2)
    assert set(chosen(model).values()) != {"int4"}
    commlib.wrap(model, "int8+ef")
    train(model, 3)
    assert set(chosen(model).values()) == {"int8"}


def seconds_decide() -> None:
    """Costs are measured, the same on all ranks, and so is the plan."""
    model = commlib.wrap(DDP(Deep(), **SMALL), "int4")
    schemes = ("fp32", "bf16", "int4", "int8")
    state = commlib.of(model)
    state.replan(1, schemes=schemes, default="int4", objective="seconds")
    train(model, 3)
    assert_same_on_all_ranks(weights(model))
    policy = state.communicator.policy
    assert policy.rules[0].key == "layers.0.weight"
    cost = state._replanner._cost
    infos = state._tensors()["gradients"]
    digests: list[Any] = [None] * dist.get_world_size()
    costs = [cost(infos["layers.0.weight"], Scheme.parse(text)) for text in schemes]
    dist.all_gather_object(digests, (policy.digest(), costs))
    assert len(set(map(str, digests))) == 1
    assert all(c > 0 for c in costs)
    assert costs[0] != infos["layers.0.weight"].numel * 4  # not bytes


@processes
@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        (one_plan_from_all_ranks, 3),
        (buckets_make_no_difference, 2),
        (a_plan_without_replanning_stays_in_states, 2),
        (resume_is_bitwise, 2),
        (a_state_that_is_refused_changes_nothing, 2),
        (other_ranks_take_the_plan_but_not_the_table, 2),
        (a_step_that_is_not_finite_changes_nothing, 2),
        (a_rank_without_data_plans_along, 2),
        (what_is_refused, 2),
        (seconds_decide, 2),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_replanning(pool: Pool, case: Any, ranks: int) -> None:
    pool.run(case, ranks=ranks)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"every": 0}, "every is 0"),
        ({"every": 1.5}, "every is 1.5"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"objective": "joules"}, "allowed: bytes, seconds"),
        ({"schemes": ("int4+ef",)}, "two or more"),
        ({"schemes": ()}, "schemes are none"),
        ({"default": "int4:block=64+ef"}, "the default int4:block=64.ef among them"),
        ({"schemes": ("int4+ef", "fp32")}, "fp32 cannot take turns with int4.ef"),
        ({"schemes": ("int4+ef", "int4:block=64+ef")}, "int4:block=64.ef cannot take turns"),
        ({"schemes": ("int4+ef", "int2+ef:omega=0.5")}, "the same feedback"),
        ({"schemes": ("int4+ef", "int2+ef@ring")}, "int2.ef@ring cannot"),
        ({"schemes": ("int4+ef", "ternary+ef")}, "ternary"),  # diverges
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Settings(**settings)


def test_without_feedback_schemes_of_all_kinds_take_turns() -> None:
    schemes = ("int4", "fp32", "bf16", "int4:block=64")
    assert Settings(schemes=schemes, default="int4").schemes == schemes
    assert Settings(schemes=("int4+ef", "int2+ef", "int4+ef")).schemes == ("int4+ef", "int2+ef")
    assert Settings().schemes == CANDIDATES


def test_a_table_of_other_parameters_is_refused() -> None:
    infos = {"w": TensorInfo("w", 4096, torch.float32, ndim=2)}
    replanner = Replanner(Settings(every=1), infos)
    replanner.see(["w", "unknown"], [torch.ones(4096), torch.ones(4096)], last=True)
    state = replanner.state_dict()
    assert state["steps"] == 1
    assert state["table"].shape == (1, 8)
    other = Replanner(Settings(every=1), {**infos, "v": infos["w"]._replace(key="v")})
    with pytest.raises(ValueError, match=r"\(1, 8\) entries.*\(2, 8\)"):
        other.load_state_dict(state, torch.device("cpu"))
    same = Replanner(Settings(every=1), infos)
    same.load_state_dict(state, torch.device("cpu"))
    assert torch.equal(same.state_dict()["table"], state["table"])


class Two:
    """A communicator of two ranks as far as planning minds: rank 1 has sent its table."""

    rank, size = 0, 2

    def __init__(self, other: torch.Tensor) -> None:
        self.other, self.policies = other, []

    def gather(self, mine: torch.Tensor, what: str) -> torch.Tensor:
        assert what == "error tables of step 0"
        return torch.stack([mine.reshape(-1), self.other.reshape(-1)])

    def set_policy(self, policy: Policy, tensors: Any) -> None:
        self.policies.append(policy)


def test_the_plan_is_of_all_ranks_gradients() -> None:
    infos = {n: TensorInfo(n, 4096, torch.float32, ndim=2) for n in "ab"}
    ramp = torch.linspace(-1, 1, 4096)
    tables = [Errors(infos, CANDIDATES) for _ in range(3)]
    for table, (a, b) in zip(tables, ((100, 1), (1, 10_000), (0, 0)), strict=True):
        table.add("a", a * ramp)
        table.add("b", b * ramp)
    replanner = Replanner(Settings(every=1), infos)
    replanner.see(["a", "b"], [100 * ramp, ramp], last=True)
    both = Two(tables[1].table)
    made = replanner.before_step(both)  # type: ignore[arg-type]
    tables[2].table = tables[0].table + tables[1].table
    assert both.policies == [made] == [plan(tables[2].layers("int4+ef")).policy()]
    assert made != plan(tables[0].layers("int4+ef")).policy()
    assert replanner.before_step(both) is None  # type: ignore[arg-type]  # nothing was measured


def test_it_measures_the_last_step_of_a_period() -> None:
    infos = {"w": TensorInfo("w", 4096, torch.float32, ndim=2)}
    replanner = Replanner(Settings(every=3), infos)
    seen = []
    for _ in range(7):
        replanner.see(["w"], [torch.ones(4096)], last=False)
        replanner.see([], [], last=True)
        seen.append("table" in replanner.state_dict())
        replanner._errors = None
    assert seen == [False, False, True, False, False, True, False]


def test_a_planned_policy_is_a_file_that_wrap_takes(tmp_path: Any) -> None:
    infos = {"w": TensorInfo("w", 4096, torch.float32, ndim=2)}
    table = Errors(infos, CANDIDATES)
    table.add("w", torch.linspace(-1, 1, 4096))
    made = plan(table.layers("int4+ef"), alpha=10)
    policy = made.policy()
    path = tmp_path / "plan.json"
    path.write_text(policy.to_json())
    assert DDPState(str(path)).policy == Policy.parse(path) == policy
    assert f"{policy.choose(infos['w']).codec.id}+ef" == made.schemes["w"] < "int4+ef"
