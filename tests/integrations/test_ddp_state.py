"""What outlives a step of DDP: checkpoints, copies, compiled models; and what is refused, how."""

from __future__ import annotations

import copy
import importlib
import io
import logging
import pickle
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from tests.integrations.ddp_cases import (
    DDP,
    DDPState,
    assert_same_on_all_ranks,
    backward,
    batch,
    commlib,
    gradients,
    hook,
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

pytestmark = pytest.mark.processes


def resume_is_bitwise(folder: str) -> None:
    """Interrupted after 3 steps, read back with weights_only: the weights of 6 steps in one go.

    `int4` draws random numbers: its counters are part of the state.
    """
    for policy in ("int4+ef", "int4"):
        uninterrupted = train(commlib.wrap(DDP(mlp(), bucket_cap_mb=0.004), policy), 6)
        model = commlib.wrap(DDP(mlp(), bucket_cap_mb=0.004), policy)
        train(model, 3)
        path = Path(folder) / f"{policy}-{dist.get_rank()}.pt"
        torch.save(
            {"model": model.module.state_dict(), "commlib": commlib.of(model).state_dict()}, path
        )
        saved = torch.load(path, weights_only=True)
        again = commlib.wrap(DDP(mlp(seed=5)), policy)  # other buckets
        again.module.load_state_dict(saved["model"])
        commlib.of(again).load_state_dict(saved["commlib"])
        assert torch.equal(train(again, 3, start=3), uninterrupted), policy


def resume_by_hosts_is_bitwise() -> None:
    """Under @hierarchical a rank remembers its part of its host's sum, not whole tensors."""
    with mock.patch.dict("os.environ", {"NCCL_HOSTID": "aabb"[dist.get_rank()]}):
        policy = "int4+ef@hierarchical"
        uninterrupted = train(commlib.wrap(DDP(mlp()), policy), 6)
        model = commlib.wrap(DDP(mlp()), policy)
        train(model, 2)
        commlib.wrap(model, timeout=20.0)  # which carries the residuals over
        train(model, 1, start=2)
        again = commlib.wrap(DDP(mlp(seed=5)), policy)
        again.module.load_state_dict(model.module.state_dict())
        commlib.of(again).load_state_dict(commlib.of(model).state_dict())
        assert torch.equal(train(again, 3, start=3), uninterrupted)


def state_is_of_one_rank() -> None:
    model = commlib.wrap(DDP(mlp()), "int8+ef")
    train(model, 1)
    state = unranked(commlib.of(model).state_dict())
    other = (dist.get_rank() + 1) % dist.get_world_size()
    for change in ({"rank": other}, {"world_size": 64}):
        saved = ranked({**state, **change}, 0, 64)
        words = [f"{what} {n}" for what, n in (("rank", other), ("of", 64)) if n in change.values()]
        raises(ValueError, *words, "load_states()", "reset()")(
            lambda saved=saved: commlib.of(model).load_state_dict(saved)
        )


def memory_is_told_reset_and_rescaled() -> None:
    model = commlib.wrap(DDP(mlp()), "int4+ef")
    state = commlib.of(model)
    train(model, 2)
    assert state.memory_bytes() >= 4 * 2 * 48 * 48
    assert "int4" in state.stats()
    before = residuals(model)
    state.rescale(0.5)
    for path, x in residuals(model).items():
        if x.is_floating_point():
            assert torch.equal(x, 0.5 * before[path])
    state.reset()
    assert not any(x.any() for x in residuals(model).values() if x.is_floating_point())
    train(model, 1)
    assert_same_on_all_ranks(weights(model))


def wrap_again() -> None:
    """The same policy keeps the residuals, another one starts anew; the hook stays the one."""
    reference = train(commlib.wrap(DDP(mlp()), "int4+ef", seed=7), 4)
    model = DDP(mlp())
    assert commlib.wrap(model, "int4+ef", seed=7) is model
    train(model, 2)
    assert commlib.wrap(model, timeout=20.0) is model
    assert commlib.of(model).communicator.transport.timeout == 20.0
    assert torch.equal(train(model, 2, start=2), reference)
    commlib.wrap(model, "fp32")
    assert residuals(model) == {}
    plain = DDP(mlp())
    plain.load_state_dict(model.state_dict())
    backward(model, 9)
    backward(plain, 9)
    assert relative(gradients(model), gradients(plain)) < 1e-6
    raises(ValueError, "int9")(lambda: commlib.wrap(model, "int9+ef"))
    # what is refused changes nothing
    commlib.wrap(model, "int4+ef")
    train(model, 2)
    before = residuals(model)
    for how, words in (({"seed": -1}, "seed is -1"), ({"timeout": 0}, "timeout is 0")):
        raises(ValueError, words)(partial(commlib.wrap, model, "int8", **how))
        raises(ValueError, words)(partial(DDPState, "int8", **how))
    raises(ValueError, "empty")(lambda: commlib.wrap(model, ""))
    assert str(commlib.of(model).policy) == str(commlib.Policy.parse("int4+ef"))
    assert all(torch.equal(before[path], x) for path, x in residuals(model).items())
    train(model, 1)


def copies_lose_the_hook_and_get_it_back() -> None:
    def by_file(model: nn.Module) -> nn.Module:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    reference = train(commlib.wrap(DDP(mlp()), "int4+ef"), 5)
    for duplicate in (copy.deepcopy, by_file):
        model = commlib.wrap(DDP(mlp()), "int4+ef")
        train(model, 3)
        twin = duplicate(model)
        raises(RuntimeError, "copied or unpickled", "commlib.wrap")(lambda t=twin: commlib.of(t))
        assert commlib.wrap(twin) is twin
        assert str(commlib.of(twin).communicator.policy) == "int4+ef"
        assert torch.equal(train(twin, 2, start=3), reference)
        assert torch.equal(train(model, 2, start=3), reference)  # the first one kept its own


def state_of_another_rank_is_dropped_loudly() -> None:
    """Rank 0's pickled model, read by all: residuals of others start from zero."""
    model = commlib.wrap(DDP(mlp()), "int4+ef")
    train(model, 2)
    sent = [pickle.dumps(model)]
    dist.broadcast_object_list(sent, src=0)
    twin = commlib.wrap(pickle.loads(sent[0]))
    assert bool(residuals(twin)) == (dist.get_rank() == 0)
    train(twin, 2)
    assert_same_on_all_ranks(weights(twin))


def compiled() -> None:
    """torch.compile around DDP or inside it: the same bits, and the same names in the state."""
    reference = commlib.wrap(DDP(mlp()), "int4+ef")
    expected, names = train(reference, 4), set(residuals(reference))
    outside = torch.compile(DDP(mlp()), backend="eager")
    assert commlib.wrap(outside, "int4+ef") is outside
    inside = DDP(torch.compile(mlp(), backend="eager"))
    for model in (outside, commlib.wrap(inside, "int4+ef")):
        assert torch.equal(train(model, 4), expected)
        assert set(residuals(model)) == names
    whole = commlib.wrap(DDP(mlp()), "int4+ef")
    torch.compile(train, backend="eager")(whole, 4)  # the hook runs behind a graph break
    assert torch.equal(weights(whole), expected)
    traced = torch.compile(commlib.wrap(DDP(mlp()), "int4+ef"), backend="aot_eager")
    train(traced, 2)
    assert_same_on_all_ranks(weights(traced))
    torch._dynamo.reset()


def hook_by_hand() -> None:
    """As frameworks register it: by path, with a state that was built before it saw a model."""
    by_path = importlib.import_module("commlib.integrations.ddp").hook
    expected = train(commlib.wrap(DDP(mlp()), "int4+ef"), 4)
    model = DDP(mlp())
    model.register_comm_hook(DDPState("int4+ef"), by_path)
    assert torch.equal(train(model, 4), expected)  # nearest rounding: names do not matter
    names = "".join(residuals(model))
    assert "parameter0" in names
    assert "weight" not in names
    # wrapping knows the names, of it and of its copy; what is owed goes along
    twin, other = copy.deepcopy(model), copy.deepcopy(model)
    expected = train(commlib.wrap(DDP(mlp()), "int4+ef"), 6)
    for named in (commlib.wrap(twin), commlib.wrap(model)):
        assert any("0.weight|reduced" in path for path in residuals(named))
        assert "parameter0" not in "".join(residuals(named))
        assert torch.equal(train(named, 2, start=4), expected)
    # what is of no parameter that the model has is dropped
    other._comm_hooks[0][1]._were.clear()
    assert not residuals(commlib.wrap(other))
    train(other, 2)
    model = DDP(mlp())
    model.register_comm_hook(None, hook)
    raises(Exception, "DDPState")(lambda: backward(model, 0))


def refused() -> None:
    raises(ValueError, "DistributedDataParallel", "Sequential", "fully_shard")(
        lambda: commlib.wrap(mlp(), "int8+ef")
    )
    raises(ValueError, "commlib.wrap")(lambda: commlib.of(DDP(mlp())))
    raises(ValueError, "int9")(lambda: commlib.wrap(DDP(mlp()), "int9"))

    model = DDP(mlp())
    model.register_comm_hook(None, default_hooks.allreduce_hook)
    raises(ValueError, "allreduce_hook", "takes one")(lambda: commlib.wrap(model))

    model = DDP(mlp())
    model._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    raises(RuntimeError, "built-in")(lambda: commlib.wrap(model))

    from torch.distributed.optim import _apply_optimizer_in_backward  # warns when imported

    model = mlp()
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    raises(ValueError, "inside backward")(lambda: commlib.wrap(DDP(model)))

    sparse = DDP(nn.Sequential(nn.Embedding(16, 8, sparse=True)))
    raises(ValueError, "sparse=False", "got it from 0")(lambda: commlib.wrap(sparse))

    with torch._dynamo.config.patch(optimize_ddp="python_reducer"):
        model = DDP(mlp())
    raises(ValueError, "python_reducer")(lambda: commlib.wrap(model))

    late = mlp()
    model = DDP(
        late,
        delay_all_reduce_named_params=[("0.bias", late[0].bias)],
        param_to_hook_all_reduce=late[2].weight,
    )
    raises(ValueError, "delay_all_reduce_named_params")(lambda: commlib.wrap(model))


def mixed_precision_is_refused() -> None:
    from torch.nn.parallel.distributed import _MixedPrecision

    model = DDP(mlp(), mixed_precision=_MixedPrecision(param_dtype=torch.bfloat16))
    raises(ValueError, "mixed_precision", "autocast")(lambda: commlib.wrap(model, "int8+ef"))


def ranks_that_disagree_are_told() -> None:
    """An error of the communicator comes out of backward, with its text, on every rank."""
    train(commlib.wrap(DDP(mlp()), "int4+ef"), 1)
    train(commlib.wrap(DDP(mlp()), "int8+ef"), 1)  # kernels are compiled
    policy = "int8+ef" if dist.get_rank() else "int4+ef"

    def step() -> None:
        model = commlib.wrap(DDP(mlp()), policy, timeout=5.0)
        model(batch(0)).square().mean().backward()

    raises(RuntimeError, "int8", "int4")(step)


def a_rank_that_does_not_come_is_named() -> None:
    model = commlib.wrap(DDP(mlp()), "int8+ef")
    train(model, 3)  # buckets are regrouped, kernels compiled
    commlib.wrap(model, timeout=1.5)
    train(model, 1)  # all plans are agreed on
    dist.barrier()
    if dist.get_rank() == 0:
        raises(RuntimeError, "timed out after 1.5", "no answer from rank 1", "4.bias")(
            lambda: train(model, 1)
        )
        raises(RuntimeError, "did not arrive")(lambda: commlib.of(model).state_dict())
    dist.barrier()


def rules_that_match_nothing_are_told() -> None:
    """Once, on rank 0: DDP's own prefix is not part of the names. Other roles are not DDP's."""
    rules = [
        {"scheme": "fp32", "key": "module.0.*"},
        {"scheme": "fp32", "key": "2.*"},
        {"scheme": "int8", "key": "stage*", "role": "activation"},
        {"scheme": "int4+ef"},
    ]
    with mock.patch.object(logging.getLogger("commlib"), "warning") as told:
        commlib.wrap(DDP(mlp()), {"rules": rules[1:]})
        assert not told.called
        commlib.wrap(DDP(mlp()), {"rules": rules})
    said = [call.args[0] % call.args[1:] for call in told.call_args_list]
    if dist.get_rank() == 0:
        (text,) = said
        for words in ("the keys 'module.0.*', which", "0.bias, 0.weight", "and 2 more"):
            assert words in text, text
    else:
        assert not said


def rules_by_name_and_exact_stretches() -> None:
    rules = {"rules": [{"scheme": "fp32", "key": "2.*"}, {"scheme": "int4+ef", "min_numel": 1024}]}
    model, plain = commlib.wrap(DDP(mlp()), rules), DDP(mlp())
    backward(model, 0)
    backward(plain, 0)
    named = dict(plain.module.named_parameters())
    errors = {n: relative(p.grad, named[n].grad) for n, p in model.module.named_parameters()}
    assert errors["2.weight"] < 1e-6 < 1e-3 < errors["0.weight"]
    assert not any("2.weight" in path and x.any() for path, x in residuals(model).items())
    before = residuals(model)
    with commlib.exact():
        backward(model, 1)
    backward(plain, 1)
    assert relative(gradients(model), gradients(plain)) < 1e-6
    assert all(torch.equal(x, before[path]) for path, x in residuals(model).items())


def one_rank() -> None:
    model, plain = commlib.wrap(DDP(mlp()), "int4+ef"), DDP(mlp())
    assert torch.equal(train(model, 3), train(plain, 3))


@pytest.mark.parametrize(
    "case",
    [
        state_is_of_one_rank,
        memory_is_told_reset_and_rescaled,
        wrap_again,
        copies_lose_the_hook_and_get_it_back,
        state_of_another_rank_is_dropped_loudly,
        compiled,
        hook_by_hand,
        refused,
        mixed_precision_is_refused,
        ranks_that_disagree_are_told,
        a_rank_that_does_not_come_is_named,
        rules_that_match_nothing_are_told,
        rules_by_name_and_exact_stretches,
    ],
    ids=lambda case: case.__name__,
)
def test_ddp_state(pool: Pool, case: Any) -> None:
    pool.run(case, ranks=2)


def test_resume_by_hosts_is_bitwise(pool: Pool) -> None:
    pool.run(resume_by_hosts_is_bitwise, ranks=4)


def test_one_rank_is_exact(pool: Pool) -> None:
    pool.run(one_rank, ranks=1)


def test_resume_is_bitwise(pool: Pool, tmp_path: Path) -> None:
    pool.run(resume_is_bitwise, str(tmp_path), ranks=2)
