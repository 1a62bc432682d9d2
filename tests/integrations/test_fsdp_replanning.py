"""Re-planning under FSDP2: as under DDP, for rows of shards and averages between replicas."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.utils.checkpoint import checkpoint

import commlib
from commlib.integrations.fsdp_groups import Segments
from commlib.integrations.fsdp_replanning import Watched
from commlib.integrations.ranked import ranked, unranked
from commlib.planner import Errors, plan
from commlib.policy import TensorInfo
from tests.integrations.ddp_cases import raises
from tests.integrations.fsdp_cases import (
    PATIENCE,
    Net,
    equal,
    local,
    loss,
    mesh,
    relative,
    sharded,
    shards,
)
from tests.processes import Pool

pytestmark = pytest.mark.processes

SOME = ("int2+ef", "int3+ef", "int4+ef", "int6+ef")


def net() -> Net:
    """Matrices whose gradients differ by far: there is something to plan."""
    model = Net()
    with torch.no_grad():
        model.blocks[1][2].weight.mul_(0.01)
    return model


def planned(every: int = 2, make: Callable[[], Any] = lambda: sharded(net()), **how: Any) -> Any:
    model = commlib.wrap(make(), "int4+ef", **how)
    commlib.of(model).replan(every, schemes=SOME)
    return model


def steps(model: Any, which: range) -> dict[str, torch.Tensor]:
    for step in which:
        loss(model, step).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
                p.grad = None
    return shards(model)


def chosen(model: Any, use: str = "gradients") -> dict[str, str]:
    policy = commlib.of(model).communicators[use].policy
    return {
        n: policy.choose(TensorInfo(n, p.numel(), p.dtype, ndim=p.dim())).codec.id
        for n, p in model.named_parameters()
        if p.dim() > 1
    }


def one_plan_from_all_ranks() -> None:
    model = planned()
    steps(model, range(2))
    assert set(chosen(model).values()) == {"int4"}  # measured; in force with the next step
    state = commlib.of(model)
    table = state._watched["gradients"].replanner.state_dict()["table"]
    steps(model, range(2, 3))
    assert len(set(chosen(model).values())) > 1
    assert state._watched["gradients"].state_dict()["steps"] == 3
    # the plan is the programme on the sum of what each rank has coded
    tables = [torch.empty_like(table) for _ in range(dist.get_world_size())]
    dist.all_gather(tables, table)
    errors = Errors(state._tensors()["gradients"], SOME)
    for other in tables:
        errors.table += other
    assert state.communicators["gradients"].policy == plan(errors.layers("int4+ef")).policy()
    # every residual is where its scheme sends it from
    for text, memory in state.communicators["gradients"].state_dict()["compressors"].items():
        for name, codec in chosen(model).items():
            assert (name in memory["residuals"]) == text.startswith(codec), (text, name)


def steps_are_backwards() -> None:
    """With and without synchronising, however many groups; an unused block is no step."""
    model = planned(every=100)
    replanner = commlib.of(model)._watched["gradients"].replanner
    for step in range(3):
        model.set_requires_gradient_sync(False)
        loss(model, step).backward()
        model.set_requires_gradient_sync(True)
        loss(model, step).backward()
        assert replanner.steps == step
    assert commlib.of(model)._watched["gradients"].state_dict()["steps"] == 3
    steps(model, range(1))
    assert replanner.steps == 3


def recomputing_is_no_step() -> None:
    """Reentrant checkpointing runs a backward of its own for every block."""

    class Recomputed(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.requires_grad_()
            for block in self.blocks:
                x = x + checkpoint(block, x, use_reentrant=True)
            return self.head(self.norm(x))

    model = planned(every=2, make=lambda: sharded(Recomputed()))
    reference = planned(every=2, make=lambda: sharded(Net()))
    replanner = commlib.of(model)._watched["gradients"].replanner
    for step in range(4):
        for m in (model, reference):
            loss(m, step).backward()
        assert replanner.steps == step
    assert chosen(model) == chosen(reference)


def a_state_that_is_refused_changes_nothing() -> None:
    first, model = planned(), commlib.wrap(sharded(Net()), "int8+ef")
    steps(first, range(3))
    steps(model, range(1))
    saved, state = commlib.of(first).state_dict(), commlib.of(model)
    unranked(saved)["memory"]["gradients"]["compressors"]["int4:round=nearest+ef"]["residuals"] = {
        "elsewhere": torch.ones(1)
    }
    policy, bits = state.communicators["gradients"].policy, state.memory_bytes()
    raises(ValueError, "elsewhere")(lambda: state.load_state_dict(saved))
    assert state.communicators["gradients"].policy is policy
    assert state.memory_bytes() == bits
    assert not state._plans


def what_is_owed_stays() -> None:
    """With constant weights: gradients given = arrived + residuals, across three plans."""
    model, plain = planned(every=1), sharded(net())
    arrived: dict[str, torch.Tensor] = {}
    given: dict[str, torch.Tensor] = {}
    for step in range(4):
        for m, total in ((model, arrived), (plain, given)):
            loss(m, step).backward()
            for name, p in m.named_parameters():
                total[name] = total.get(name, 0) + local(p.grad).double()
                p.grad = None
    found: dict[str, torch.Tensor] = {}
    schemes = set()
    memory = unranked(commlib.of(model).state_dict())["memory"]["gradients"]["compressors"]
    for text, saved in memory.items():
        for name, rows in saved["residuals"].items():
            if rows.any():
                schemes.add(text)
                total = rows.double()
                dist.all_reduce(total)
                found[name] = total[dist.get_rank()] / dist.get_world_size()
    assert len(schemes) > 1
    for name, want in given.items():
        missing = (want - arrived[name]).flatten()
        owed = found.get(name, torch.zeros(0).double())[: missing.numel()]
        owed = torch.nn.functional.pad(owed, (0, missing.numel() - owed.numel()))
        assert (missing - owed).norm() < 1e-5 * want.norm() + 1e-9, name


def resume_is_bitwise() -> None:
    for make in (lambda: sharded(net()), lambda: sharded(net(), mesh=mesh(2, 1))):
        whole = planned(make=make, parameters="int8")
        reference = steps(whole, range(5))
        use = "replicas" if "replicas" in commlib.of(whole).communicators else "gradients"
        assert len(set(chosen(whole, use).values())) > 1
        for cut in (1, 2, 3):
            model = planned(make=make, parameters="int8")
            steps(model, range(cut))
            file = io.BytesIO()
            torch.save(commlib.of(model).state_dict(), file)
            file.seek(0)
            again = planned(make=make, parameters="int8")
            again.load_state_dict(model.state_dict())
            commlib.of(again).load_state_dict(torch.load(file, weights_only=True))
            assert equal(steps(again, range(cut, 5)), reference), cut
            # wrapping again keeps plan, table and residuals
            commlib.wrap(model, timeout=30.0)
            assert equal(steps(model, range(cut, 5)), reference), cut


def replicas_plan_too() -> None:
    def replicated() -> Any:
        model = net()
        for block in model.blocks:
            replicate(block)
        return replicate(model)

    for make in (replicated, lambda: sharded(net(), mesh=mesh(2, 2))):
        model, plain = planned(make=make), make()
        error = relative(steps(model, range(5)), steps(plain, range(5)))
        assert len(set(chosen(model, "replicas").values())) > 1
        assert 0 < error < 0.05


def other_numbers_of_ranks_take_the_plan() -> None:
    model = planned()
    steps(model, range(4))
    mine = unranked(commlib.of(model).state_dict())
    size = dist.get_world_size() + 1
    states = []
    for r in range(size):
        entry = {**mine, "rank": r, "world_size": size}
        memory = {**mine["memory"]["gradients"], "rank": r, "world_size": size, "compressors": {}}
        states.append(ranked({**entry, "memory": {"gradients": memory}}, r, size))
    again = planned()
    commlib.of(again).load_states(states)
    assert chosen(again) == chosen(model)
    assert commlib.of(again)._watched["gradients"].state_dict() == {"steps": 4}


def what_ends_it() -> None:
    model = planned(every=1)
    steps(model, range(2))
    was = chosen(model)
    commlib.of(model).replan(None)  # the schemes stay
    steps(model, range(2, 4))
    assert chosen(model) == was
    # the same text as before is not what residuals are under: they start from zero
    commlib.wrap(model, "int4+ef")
    assert commlib.of(model).memory_bytes() == 0
    steps(model, range(4, 6))
    assert set(chosen(model).values()) == {"int4"}
    blocks = commlib.wrap(sharded(net()), "int8:block=64+ef")
    raises(ValueError, "goes by int8:block=64", "wrap the model")(commlib.of(blocks).replan)
    rules = [{"scheme": "fp32", "from_step": 2}, {"scheme": "int4+ef"}]
    refused = raises(ValueError, "from step 2 on by fp32", "no memory")
    refused(lambda: commlib.wrap(sharded(net()), {"rules": rules}))
    differs = raises(RuntimeError, "every")
    differs(lambda: commlib.of(model).replan(2 + dist.get_rank()))


def a_plan_without_replanning_stays_in_states() -> None:
    first = planned()
    steps(first, range(3))
    state = commlib.of(first).state_dict()
    for _ in range(2):
        model = commlib.wrap(sharded(net()), "int4+ef")
        commlib.of(model).load_state_dict(state)
        assert chosen(model) == chosen(first)
        steps(model, range(3, 5))
        state = commlib.of(model).state_dict()


def saving_ends_a_step_outside_of_autograd() -> None:
    """As pipelines reduce: what is due is planned in the next step, whoever saves before it."""
    begun = []

    class Spy:
        def before_step(self, communicator: Any) -> None:
            begun.append(seen[-1])

        def see(self, names: Any, gradients: Any, *, last: bool) -> None:
            pass

        def state_dict(self) -> dict[str, Any]:
            return {}

    watched: Any = Watched(Spy())  # type: ignore[arg-type]
    seen = []
    for step in range(3):
        for key in "ab":
            seen.append((step, key))
            segments = Segments((key,), (4,), (1,), (4,))
            watched.see(None, segments, torch.zeros(4))
        if step == 0:
            watched.state_dict()
    assert begun == [(0, "a"), (1, "a"), (2, "a")]


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        (one_plan_from_all_ranks, 2),
        (steps_are_backwards, 2),
        (recomputing_is_no_step, 2),
        (a_state_that_is_refused_changes_nothing, 2),
        (what_is_owed_stays, 3),
        (resume_is_bitwise, 2),
        (replicas_plan_too, 4),
        (other_numbers_of_ranks_take_the_plan, 2),
        (what_ends_it, 2),
        (a_plan_without_replanning_stays_in_states, 2),
        (saving_ends_a_step_outside_of_autograd, 1),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_replanning(pool: Pool, case: Callable[[], None], ranks: int) -> None:
    pool.run(case, ranks=ranks, timeout=PATIENCE)
