"""commlib.wrap on FSDP2: gradients by name in every way FSDP2 reduces them, gathers, refusals."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel as DDP

import commlib
from commlib.integrations.fsdp import FSDPState
from commlib.integrations.fsdp_groups import Group
from tests.integrations.ddp_cases import batch, mlp, raises
from tests.integrations.fsdp_cases import (
    PATIENCE,
    WIDTH,
    Net,
    equal,
    gradients,
    loss,
    modules,
    relative,
    sharded,
    train,
)
from tests.processes import Pool

pytestmark = pytest.mark.processes

BF16, FP16 = torch.bfloat16, torch.float16


class Partly(Net):
    """On odd inputs the second block is not used; one bias is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0][0].bias.requires_grad_(False)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        for block in self.blocks[: 1 + self.calls % 2]:
            x = x + block(x)
        return self.head(self.norm(x))


class Tied(Net):
    """One matrix in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.last(self.first(x).relu()))


class Checkpointed(Net):
    """Blocks that are computed again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(checkpoint_wrapper(block) for block in self.blocks)


def prefetching() -> Any:
    model = sharded()
    first, second = model.blocks
    model.set_modules_to_forward_prefetch([first, second])
    model.set_modules_to_backward_prefetch([second, first])
    return model


def with_set(setter: str, *values: Any) -> Any:
    model = sharded()
    for module in modules(model):
        getattr(module, setter)(*values)
    return model


def _by_columns(model: nn.Module) -> Any:
    """Where the ranks divide dimension 1, that."""

    def place(p: nn.Parameter) -> Shard | None:
        return Shard(1) if p.dim() > 1 and p.shape[1] % dist.get_world_size() == 0 else None

    return sharded(model, shard_placement_fn=place)


MODES: dict[str, Callable[[], Any]] = {
    "plain": sharded,
    "blocks only": lambda: _blocks_only(Net()),
    "not resharded": partial(sharded, reshard_after_forward=False),
    "bf16, summed in fp32": partial(
        sharded, mp_policy=MixedPrecisionPolicy(BF16, reduce_dtype=torch.float32)
    ),
    "bf16": partial(sharded, mp_policy=MixedPrecisionPolicy(BF16)),
    "fp16 sums": partial(sharded, mp_policy=MixedPrecisionPolicy(reduce_dtype=FP16)),
    "sums": partial(with_set, "set_force_sum_reduction_for_comms", True),
    "prefetching": prefetching,
    "unused and frozen": lambda: sharded(Partly()),
    "unused are zeros": lambda: _with_zeros(sharded(Partly())),
    "tied": lambda: sharded(Tied()),
    "checkpointed": lambda: sharded(Checkpointed()),
    "on the host": partial(sharded, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "by columns": lambda: _by_columns(Net()),
    "fp64": lambda: sharded(Net().double()),
}


def _blocks_only(model: Any) -> Any:
    for block in model.blocks:
        fully_shard(block)
    for part in (model.norm, model.head):  # not FSDP2's: nobody averages them
        part.requires_grad_(False)
    model.set_requires_gradient_sync = lambda sync: None
    return model


def _with_zeros(model: Any) -> Any:
    model.set_reduce_scatter_unused_params(True)
    return model


def every_mode(names: list[str]) -> None:
    """fp32 is bitwise the unwrapped run; int8 is near it, and was compressed."""
    alone = dist.get_world_size() == 1
    for name in names:
        make = MODES[name]
        plain = train(make(), 2)
        assert equal(train(commlib.wrap(make(), "fp32", parameters="fp32"), 2), plain), name
        model = commlib.wrap(make(), "int8+ef", parameters="int8")
        error = relative(train(model, 2), plain)
        if alone or name == "fp64":
            assert error == 0, name
        else:
            assert 0 < error < 0.02, (name, error)


def accumulation_and_clipping() -> None:
    for how in ({"accumulate": 2}, {"accumulate": 2, "clip": 0.1}):
        plain = train(sharded(), 2, **how)
        assert equal(train(commlib.wrap(sharded(), "fp32"), 2, **how), plain), how
        error = relative(train(commlib.wrap(sharded(), "int8+ef"), 2, **how), plain)
        assert 0 < error < 0.01, (how, error)


def factors_are_exact() -> None:
    """AVG, SUM and PREMUL_SUM are one sum times a number: powers of two change no bit."""
    size = dist.get_world_size()

    def gradient(**settings: Any) -> dict[str, torch.Tensor]:
        model = commlib.wrap(sharded(), "int8+ef")
        for module in modules(model):
            for name, value in settings.items():
                getattr(module, name)(value)
        loss(model, 0).backward()
        return gradients(model)

    average = gradient()
    halved = gradient(set_gradient_divide_factor=2.0 * size)
    assert equal({name: 2 * g for name, g in halved.items()}, average)
    summed = gradient(set_gradient_divide_factor=0.5 * size, set_force_sum_reduction_for_comms=True)
    assert relative({name: g / 2 for name, g in summed.items()}, average) < 1e-7


def made_on_meta() -> None:
    """Wrapped before there is any memory, or after; before and after the first forward."""
    plain = train(sharded(), 3)
    for when in ("meta", "empty", "trained"):
        with torch.device("meta"):
            model = Net()
        model = sharded(model)
        if when == "meta":
            commlib.wrap(model, "int8+ef", parameters="int8")
        model.to_empty(device="cpu")
        if when == "empty":
            commlib.wrap(model, "int8+ef", parameters="int8")
        for p, q in zip(model.parameters(), sharded().parameters(), strict=True):
            p.detach().copy_(q.detach())
        if when == "trained":
            loss(model, 7).backward()
            model.zero_grad()
            commlib.wrap(model, "int8+ef", parameters="int8")
        assert 0 < relative(train(model, 3), plain) < 0.01, when


def feedback_makes_the_mean_exact() -> None:
    """With a constant gradient the mean over T steps tends to it as 1/T."""
    plain = sharded()
    loss(plain, 0).backward()
    want, errors = gradients(plain), {}
    for policy in ("int4:round=nearest", "int4+ef"):
        model, total = commlib.wrap(sharded(), policy), {n: 0 * g for n, g in want.items()}
        for _ in range(30):
            model.zero_grad()
            loss(model, 0).backward()
            total = {name: total[name] + g / 30 for name, g in gradients(model).items()}
        errors[policy] = relative(total, want)
    assert errors["int4+ef"] < min(0.02, errors["int4:round=nearest"] / 5), errors


def late_results_are_the_same() -> None:
    """Whether a gradient is waited for at once changes nothing, and it is not where nobody looks.
    It is where somebody does: a hook, a gradient to add to."""
    decided: list[bool] = []
    may_be_late = Group.may_be_late

    def spied(self: Group, x: torch.Tensor, op: Any) -> bool:
        decided.append(may_be_late(self, x, op))
        return decided[-1]

    Group.may_be_late = spied  # type: ignore[method-assign]
    try:
        late = train(commlib.wrap(sharded(), "int4+ef"), 3)
        assert all(decided)
        assert len(decided) == 9

        seen: dict[str, torch.Tensor] = {}
        model = commlib.wrap(sharded(), "int4+ef")
        for name, p in model.named_parameters():
            p.register_post_accumulate_grad_hook(
                lambda p, name=name: seen.update({name: p.grad.to_local().clone()})
            )
        decided.clear()
        loss(model, 0).backward()
        assert not any(decided)
        assert equal(seen, gradients(model))
        for p in model.parameters():
            p._post_accumulate_grad_hooks.clear()
        loss(model, 0).backward()  # added to what is there
        assert not any(decided)

        Group.may_be_late = lambda *_: False  # type: ignore[method-assign]
        assert equal(train(commlib.wrap(sharded(), "int4+ef"), 3), late)
    finally:
        Group.may_be_late = may_be_late  # type: ignore[method-assign]


def gathered_weights_are_the_same_everywhere() -> None:
    """In evaluation too, and also where the scheme is lossy; norms and biases are exact."""
    for parameters in ("int8", "int4+delta"):
        model = commlib.wrap(sharded(), "int8+ef", parameters=parameters)
        train(model, 2)
        exact = {n: p.full_tensor() for n, p in model.named_parameters()}
        for mode in (torch.no_grad, torch.inference_mode, nullcontext):
            with mode():
                model(batch(0, 0))  # the same inputs on all ranks
        for module in modules(model):
            module.unshard()
        with torch.no_grad():
            whole = {n: p.detach().clone() for n, p in model.named_parameters()}
        for name, p in whole.items():
            everywhere = [torch.empty_like(p) for _ in range(dist.get_world_size())]
            dist.all_gather(everywhere, p.contiguous())
            assert all(torch.equal(p, other) for other in everywhere), name
            if p.dim() < 2:
                assert torch.equal(p, exact[name]), name
            else:
                assert 0 < (p - exact[name]).norm() < 0.01 * exact[name].norm(), name
        for module in modules(model):
            module.reshard()


def differences_follow_the_weights() -> None:
    """Of int4+delta nothing travels in backward, and loaded weights arrive as they are."""
    model = commlib.wrap(sharded(), "fp32", parameters="int4+delta")
    state = commlib.of(model)
    sent = state.communicators["parameters"].transport
    train(model, 1)
    numel = sum(p.numel() for p in model.parameters())
    assert state.memory_bytes() >= 4 * numel
    before = sent.bytes_sent
    value = loss(model, 0)
    forward = sent.bytes_sent - before
    value.backward()
    model.zero_grad()
    assert sent.bytes_sent == before + forward
    # a quarter of what int8 sends in both passes; the exact ones and scales come on top
    assert 0 < forward < 0.6 * numel

    other = sharded(Net(seed=5))
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(model(batch(0, 0)), other(batch(0, 0)))


def compiled_and_checkpointed_names() -> None:
    """What is remembered fits the model with and without torch.compile and checkpointing."""
    plain = commlib.of(commlib.wrap(sharded(), "int4+ef"))
    wrapped = sharded(Checkpointed())
    commlib.wrap(torch.compile(wrapped, backend="eager"), "int4+ef")
    assert commlib.of(wrapped).shapes == plain.shapes
    assert list(plain.shapes) == [n for n, _ in sorted(Net().named_parameters(), key=_place(plain))]
    assert {n: tuple(s) for n, s in plain.shapes.items()} == {
        n: tuple(p.shape) for n, p in Net().named_parameters()
    }
    tied = commlib.of(commlib.wrap(sharded(Tied()), "int4+ef"))
    assert set(tied.shapes) == {name for name, _ in Tied().named_parameters()}


def _place(state: FSDPState) -> Callable[[tuple[str, Any]], int]:
    return lambda pair: list(state.shapes).index(pair[0])


def ranks_that_disagree_hear_of_it() -> None:
    model = commlib.wrap(sharded(), "int8+ef" if dist.get_rank() else "int4+ef")
    raises(RuntimeError, "int8", "int4")(lambda: loss(model, 0).backward())


def refusals() -> None:
    value_error = partial(raises, ValueError)
    value_error("a model sharded by", "torch.distributed.fsdp.fully_shard", "Linear")(
        lambda: commlib.wrap(nn.Linear(2, 2), "int8")
    )
    value_error("FSDP1", "fully_shard")(
        lambda: commlib.wrap(FullyShardedDataParallel(mlp(), device_id=torch.device("cpu")))
    )
    value_error("not wrapped", "commlib.wrap(model, policy)")(lambda: commlib.of(sharded()))
    value_error("parameters=", "fully_shard")(
        lambda: commlib.wrap(DDP(mlp()), "int8", parameters="int8")
    )
    value_error("backward=", "pipelines")(lambda: commlib.wrap(sharded(), backward="int8"))
    value_error("int8+ef", "residual has no place", "int8+delta")(
        lambda: commlib.wrap(sharded(), parameters="int8+ef")
    )
    value_error("does not take +reuse")(lambda: commlib.wrap(sharded(), parameters="int8+reuse"))
    value_error("'auto' is not measured")(lambda: commlib.wrap(sharded(), parameters="auto"))
    value_error("does not take +delta", "'int8'")(lambda: commlib.wrap(sharded(), "int8+delta"))
    value_error("int8@ring", "leave @ring out")(lambda: commlib.wrap(sharded(), "int8@ring"))

    whole, parts = commlib.wrap(sharded(), "int4+ef"), sharded()
    for block in whole.blocks:  # which would have one residual for both
        value_error("'0.weight'", "'blocks.", "rules by key")(lambda b=block: commlib.wrap(b))
    assert str(commlib.of(commlib.wrap(whole)).policy).startswith("int4")
    for block in parts.blocks:
        commlib.wrap(block, "int8+ef")
    value_error("'blocks.0.0.weight'", "'0.weight'")(lambda: commlib.wrap(parts))

    class Own:
        def __call__(self, *_: Any) -> None: ...

        def allocate(self, *_: Any, **__: Any) -> None: ...

    taken = sharded()
    taken.set_custom_reduce_scatter(Own())
    value_error("Own", "set_custom_reduce_scatter", "leave that call out")(
        lambda: commlib.wrap(taken)
    )
    gathering = sharded()
    gathering.set_custom_all_gather(Own())
    value_error("Own")(lambda: commlib.wrap(gathering, parameters="int8"))
    commlib.wrap(gathering)  # whose gathers stay its own
    assert isinstance(commlib.of(gathering), FSDPState)
    assert all(isinstance(module, FSDPModule) for module in modules(gathering))


def one_after_the_other(*parts: Callable[[], None]) -> None:
    for part in parts:
        torch.manual_seed(0)
        part()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_mode_of_fsdp(pool: Pool, ranks: int) -> None:
    few = ["plain", "bf16, summed in fp32", "unused are zeros"]
    pool.run(every_mode, list(MODES) if ranks == 2 else few, ranks=ranks, timeout=PATIENCE)


def test_gradients(pool: Pool) -> None:
    pool.run(
        one_after_the_other,
        accumulation_and_clipping,
        factors_are_exact,
        made_on_meta,
        late_results_are_the_same,
        ranks=3,
        timeout=PATIENCE,
    )


def test_feedback(pool: Pool) -> None:
    pool.run(feedback_makes_the_mean_exact, ranks=2)


def test_parameters(pool: Pool) -> None:
    pool.run(
        one_after_the_other,
        gathered_weights_are_the_same_everywhere,
        differences_follow_the_weights,
        ranks=3,
        timeout=PATIENCE,
    )


def test_names_and_refusals(pool: Pool) -> None:
    pool.run(
        one_after_the_other,
        compiled_and_checkpointed_names,
        refusals,
        ranks_that_disagree_hear_of_it,
        ranks=2,
        timeout=PATIENCE,
    )
