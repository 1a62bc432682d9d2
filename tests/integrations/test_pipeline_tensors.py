"""Pipelines through commlib: whatever travels between stages, and what stages are made of."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import ScheduleGPipe, SplitPoint, pipeline
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel as DDP

import commlib
from tests.integrations.pipeline_cases import (
    CPU,
    MICRO,
    SAMPLES,
    Result,
    alone,
    batch,
    block,
    build,
    call,
    counting,
    everywhere,
    loss,
    parameters,
    rows,
    stages_of,
    train,
)
from tests.processes import Pool

pytestmark = pytest.mark.processes


class Several(nn.Module):
    """Three tensors to the next stage: one to compress, whole numbers, and a small one."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.body, self.index = block(index), index
        self.scale = nn.Parameter(torch.ones(SAMPLES, 2))

    def forward(self, x: torch.Tensor, *rest: torch.Tensor) -> Any:
        if rest:
            mask, small = rest
            x = x * mask + small[:, :1, None]
        out = self.body(x)
        if self.index == dist.get_world_size() - 1:
            return out
        return out, (x > 0).long(), self.scale * 0.25 + x.mean()


def several_tensors() -> None:
    reference = train(build("1F1B", Several), 3)
    assert train(commlib.wrap(build("1F1B", Several), "fp32"), 3).equals(reference)
    schedule = commlib.wrap(build("1F1B", Several), "int8")
    result = train(schedule, 3)
    assert 0 < result.error(reference) < 0.03
    with counting() as count:
        call(schedule, 3)
    kinds = {dtype for dtype, _ in count.messages}
    if dist.get_rank() == 0:
        assert kinds == {torch.uint8, torch.int64, torch.float32}
        table = rows(schedule)
        assert table["stage0.forward.to1"]["scheme"].startswith("int8")
        assert table["stage0.forward.to1.1"]["ratio"] == 1.0
        assert table["stage0.forward.to1.2"]["ratio"] == 1.0
        assert "int64 tensors travel raw" in commlib.of(schedule).stats()
    else:  # gradients: of the large one coded, of the small one raw, none of whole numbers
        assert kinds == {torch.uint8, torch.float32}
        assert set(rows(schedule)) == {"stage1.backward.to0", "stage1.backward.to0.1"}


class Partly(nn.Module):
    """Its second output needs no gradient, its third has none though it could."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.body, self.index = block(index), index

    def forward(self, x: torch.Tensor, *rest: torch.Tensor) -> Any:
        if rest:
            x = x + rest[0]
        out = self.body(x)
        return out if self.index else (out, out.detach() * 0.5, out * 2.0)


def gradients_that_are_none() -> None:
    reference = train(build("GPipe", Partly), 2)
    assert train(commlib.wrap(build("GPipe", Partly), "fp32"), 2).equals(reference)
    schedule = commlib.wrap(build("GPipe", Partly), "int8")
    assert 0 < train(schedule, 2).error(reference) < 0.02
    table = rows(schedule)
    if dist.get_rank() == 0:
        assert all(row["ratio"] > 3.8 for row in table.values())
        assert len(table) == 3
    else:
        assert len(table) == 2  # torch sends zeros for the third


class Cast(nn.Module):
    def __init__(self, index: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.body, self.dtype = block(index).to(dtype), dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x.to(self.dtype))


def short_floats() -> None:
    for make in (partial(Cast, dtype=torch.bfloat16), partial(Cast, dtype=torch.float16)):
        reference = train(build("1F1B", make), 2)
        assert train(commlib.wrap(build("1F1B", make), "fp32"), 2).equals(reference)
        schedule = commlib.wrap(build("1F1B", make), "int8")
        result = train(schedule, 2)
        assert 0 < result.error(reference) < 0.03
        for row in rows(schedule).values():
            assert row["ratio"] > 1.9, row


class Turned(nn.Module):
    """Its output is a transposed view; so is the gradient of its input, or one number."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.body, self.index = block(index), index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.index:
            return self.body(x.transpose(1, 2))
        return self.body(x).transpose(1, 2)


class Summed(nn.Module):
    """The gradient of its input is one number, seen many times."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.body, self.index = block(index), index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum((1, 2)) if self.index else self.body(x)


def not_contiguous() -> None:
    """Torch refuses to send such tensors over gloo; coded they travel."""
    for name in ("GPipe", "1F1B"):
        schedule = commlib.wrap(build(name, Turned), "int8")
        assert 0 < train(schedule, 1).error(alone(2)) < 0.02
        assert all(row["ratio"] > 3.8 for row in rows(schedule).values())
    schedule = build("GPipe", Summed, loss_fn=lambda out, target: out.sum())
    commlib.wrap(schedule, "int8")
    for _ in range(2):
        result = train(schedule, 1, lr=0.0)
    if dist.get_rank() == 0:
        model = block(0)
        model(batch()).sum().backward()
        expected = Result(gradients=[p.grad / MICRO for p in model.parameters()])  # type: ignore[operator]
        assert result.error(expected) < 0.01
    else:
        assert rows(schedule)["stage1.backward.to0"]["ratio"] > 3.8


class Split(nn.Module):
    """A layer whose weight's rows are spread over a mesh, and so are its outputs."""

    def __init__(self, index: int, mesh: Any) -> None:
        super().__init__()
        self.index, self.mesh = index, mesh
        weight = next(block(index).parameters()).detach()
        self.weight = nn.Parameter(
            DTensor.from_local(
                weight.chunk(mesh.size())[mesh.get_local_rank()], mesh, [Shard(0)], run_check=False
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(x, DTensor):
            x = x.redistribute(placements=[Replicate()])
        else:
            x = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
        out = torch.tanh(x @ self.weight.t())
        if self.index == 0:
            return out
        return out.redistribute(placements=[Replicate()]).to_local()


def dtensors() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    group = mesh.get_group("pp")

    def made() -> Any:
        return build(
            make=lambda index: Split(index, mesh["tp"]),
            group=group,
            get_mesh=lambda names, layout: mesh["tp"],
        )

    def gradients(schedule: Any) -> list[torch.Tensor]:
        for _ in range(2):
            for p in parameters(schedule):
                p.grad = None
            call(schedule)
        return [p.grad.full_tensor() for p in parameters(schedule)]  # type: ignore[union-attr]

    reference = Result(gradients=gradients(made()))
    assert Result(gradients=gradients(commlib.wrap(made(), "fp32"))).equals(reference)
    schedule = commlib.wrap(made(), "int8")
    assert 0 < Result(gradients=gradients(schedule)).error(reference) < 0.02
    assert all(row["ratio"] > 3.8 for row in rows(schedule).values())
    assert len(rows(schedule)) == 1


def data_parallel() -> None:
    """Two pipelines of two stages; DDP or FSDP2 inside, DDP with commlib's gradients too."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
    pp, dp = mesh.get_group("pp"), mesh.get_group("dp")
    found = {}
    for kind in ("ddp", "ddp+commlib", "fsdp", "fsdp, fp32", "ddp, fp32", "none"):

        def make(index: int, kind: str = kind) -> nn.Module:
            module = block(index)
            if "fsdp" in kind:
                return fully_shard(module, mesh=mesh["dp"])
            if "ddp" in kind:
                ddp = DDP(module, process_group=dp)
                return commlib.wrap(ddp, "int8+ef") if "commlib" in kind else ddp
            return module

        schedule = build("1F1B", make, group=pp)
        if kind != "none":
            commlib.wrap(schedule, "fp32" if "fp32" in kind else "int8")
        offset = 10 * dist.get_rank(dp)  # every pipeline has its own data
        for p in parameters(schedule):
            p.grad = None
        call(schedule, offset)
        for p in parameters(schedule):
            p.grad = None
        call(schedule, offset)
        grads = []
        for p in parameters(schedule):
            grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            assert grad is not None
            grad = grad.clone()
            if kind == "none":
                dist.all_reduce(grad, group=dp)
                grad /= 2
            grads.append(grad)
        found[kind] = Result(gradients=grads)
        if kind not in ("none",) and "fp32" not in kind:
            assert all(row["ratio"] > 3.8 for row in rows(schedule).values()), kind
        if "commlib" in kind:
            module = stages_of(schedule)[0].submod
            assert "ef" in commlib.of(module).stats()
        del schedule
        gc.collect()
    for kind, result in found.items():
        if "fp32" in kind:
            assert result.error(found["none"]) < 1e-5, kind
        elif kind != "none":
            assert 1e-4 < result.error(found["none"]) < 0.02, (kind, result.error(found["none"]))
    del module
    gc.collect()


class Skipping(nn.Module):
    """Its first part hands a tensor to its third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = block(0), block(1), block(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        far = x * 2.0
        return self.c(self.b(x) + 0.0) + far


def skip_connection() -> None:
    def made() -> Any:
        pipe = pipeline(
            Skipping(),
            mb_args=(batch()[:SAMPLES],),
            split_spec={"b": SplitPoint.BEGINNING, "c": SplitPoint.BEGINNING},
        )
        return ScheduleGPipe(pipe.build_stage(dist.get_rank(), CPU), MICRO, loss_fn=loss)

    reference = train(made(), 2)
    assert train(commlib.wrap(made(), "fp32"), 2).equals(reference)
    schedule = commlib.wrap(made(), "int8")
    assert 0 < train(schedule, 2).error(reference) < 0.02
    keys = set().union(*everywhere(set(rows(schedule))))
    assert {"stage0.forward.to1", "stage0.forward.to2", "stage2.backward.to0"} <= keys
    assert all(row["ratio"] > 3.8 for row in rows(schedule).values())


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        (several_tensors, 2),
        (gradients_that_are_none, 2),
        (short_floats, 2),
        (not_contiguous, 2),
        (dtensors, 4),
        (data_parallel, 4),
        (skip_connection, 3),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_tensors(pool: Pool, case: Any, ranks: int) -> None:
    pool.run(case, ranks=ranks)
