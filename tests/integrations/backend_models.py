"""Training and meshes over the backend: what the ranks of its tests run."""

from __future__ import annotations

import gc
import tempfile
import weakref
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import commlib
from commlib.integrations import groups
from tests.integrations.backend_cases import N, c10d, mine, near, sent, total, values, world
from tests.integrations.ddp_cases import (
    DDP,
    assert_same_on_all_ranks,
    backward,
    gradients,
    mlp,
    relative,
    train,
)

# Gradients of 48 x 48 weights under int8: both codings err by at most half a step of a block's
# largest value, 1/127 of it, and a block's largest is a few times its mean.
GRADIENTS = 0.03


def ddp_gradients(steps: int) -> list[torch.Tensor]:
    model = DDP(mlp(), bucket_cap_mb=0.02)
    found = []
    for step in range(steps):
        backward(model, step)
        found.append(gradients(model))
    return found


def ddp_has_gloos_gradients() -> None:
    """Over gloo, commlib with fp32 (bitwise) and with int8 (within its bound, equal on all)."""
    found = {}
    for backend, policy in (("gloo", None), ("commlib", "fp32"), ("commlib", "int8")):
        with world(policy, backend):
            found[policy] = ddp_gradients(3)
            if policy == "int8":
                raw, wire = sent()
                size = dist.get_world_size()
                assert 2 * (size - 1) / size * raw > 3.5 * wire > 0  # what gloo would have sent
                assert_same_on_all_ranks(found[policy][-1])
    for plain, exact, coded in zip(found[None], found["fp32"], found["int8"], strict=True):
        assert torch.equal(plain, exact)
        assert 1e-4 < relative(coded, plain) < GRADIENTS


def ddp_wrapped_as_well() -> None:
    """commlib.wrap on a DDP of the backend: by its own policy, with its memory, coded once."""
    model = commlib.wrap(DDP(mlp()), "int4+ef")
    plain = DDP(mlp())
    plain.register_comm_hook(None, exact_hook)
    before = sent()
    for step in range(3):
        backward(model, step)
        backward(plain, step)
        assert 1e-3 < relative(gradients(model), gradients(plain)) < 0.3
    assert commlib.of(model).communicator.memory_bytes() > 0
    assert sent() == before


def ddp_in_a_compiled_step() -> None:
    """DDP calls the group in backward, behind a graph break, where dynamo still looks on."""
    expected = train(DDP(mlp()), 3)
    got = torch.compile(train, backend="eager")(DDP(mlp()), 3)
    assert_same_on_all_ranks(got)
    assert relative(got, expected) < GRADIENTS  # rounded at random, so not to the bit
    torch._dynamo.reset()


def exact_hook(_, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations
    with commlib.exact():
        x = bucket.buffer()
        dist.all_reduce(x, dist.ReduceOp.AVG)
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(x)
    return future


def groups_of_ranks() -> None:
    """Under gloo: subgroups of the backend, of ranks that are not their places in it."""
    size, rank = dist.get_world_size(), dist.get_rank()
    members = [0, 2]
    group = dist.new_group(members, backend="commlib", pg_options=commlib.Options("int8", seed=7))
    plain = dist.new_group(list(range(size)))
    assert dist.get_backend(plain) == "gloo"
    if rank in members:
        assert dist.get_backend(group) == "commlib"
        assert groups.communicator(group).seed == 7
        x = values(rank, N)
        dist.all_reduce(x, group=group)
        near(x, values(0, N) + values(2, N))
        assert_same_on_all_ranks(x, group)
        x = values(rank, N)
        dist.broadcast(x, src=2, group=group)  # a rank of the world
        assert torch.equal(x, values(2, N))
        if rank == 2:
            dist.send(values(2, N), 0, group=group)
        else:
            x = torch.empty(N)
            assert dist.recv(x, group=group) == 2
            near(x, values(2, N))
        dist.destroy_process_group(group)
        with_new_policy = groups.policy(group)
        assert str(with_new_policy) == "int8"
    x = mine(N)
    dist.all_reduce(x, group=plain)
    near(x, total(N), lossy=False)
    dist.barrier()


def devices_of_other_backends() -> None:
    """ "cpu:gloo,cuda:commlib": torch gives all of it to commlib, which leaves the CPU to gloo."""
    size, following = dist.get_world_size(), (dist.get_rank() + 1) % dist.get_world_size()
    for backend, lossy in (("cpu:gloo,cuda:commlib", False), ("cpu:commlib", True)):
        group = dist.new_group(backend=backend, pg_options=commlib.Options("int8"))
        x = mine(N)
        dist.all_reduce(x, group=group)
        near(x, total(N), lossy=lossy)
        y = torch.empty(N)
        ops = [
            dist.P2POp(dist.isend, mine(N), following, group),
            dist.P2POp(dist.irecv, y, (dist.get_rank() - 1) % size, group),
        ]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        near(y, values((dist.get_rank() - 1) % size, N), lossy=lossy)
        dist.destroy_process_group(group)


def policy_is_found_and_changed() -> None:
    """Under commlib: a new group inherits the backend; its policy is its own, and can change."""
    import commlib.distributed as ours

    group = dist.new_group(list(range(dist.get_world_size())))
    assert dist.get_backend(group) == "commlib"
    assert groups.policy(groups.member(group)) == "auto"  # neither options nor COMMLIB_POLICY
    x = mine(100)
    dist.all_reduce(x, group=group)
    near(x, total(100), lossy=False)
    for policy, lossy in (("int8", True), ("fp32", False), ("int8", True)):
        ours.set_policy(policy, group)
        for verbs in (dist, ours):
            x = mine(N)
            verbs.all_reduce(x, group=group)
            near(x, total(N), lossy=lossy)
    x = mine(N)
    ours.all_reduce(x, group=group, scheme="fp32")
    near(x, total(N), lossy=False)
    dist.destroy_process_group(group)


def auto_measures_once_and_is_right() -> None:
    """Without a policy: the first large tensor measures the group, then every call is as chosen."""
    mean = torch.linspace(-1, 1, 1 << 18)
    for _ in range(3):
        x = mean * (dist.get_rank() + 1)
        dist.all_reduce(x, op=dist.ReduceOp.AVG)
        expected = mean * (dist.get_world_size() + 1) / 2
        assert (x - expected).norm() < 0.02 * expected.norm()
    chosen = groups.communicator(groups.member(None), x.device).policy
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, chosen.digest())
    assert len(set(everywhere)) == 1


def meshes() -> None:
    """Under gloo with 4 ranks: one dimension of a mesh over commlib, the other over gloo."""
    options = commlib.Options("int8")
    mesh = init_device_mesh(
        "cpu",
        (2, 2),
        mesh_dim_names=("dp", "tp"),
        backend_override={"dp": ("commlib", options)},
    )
    assert dist.get_backend(mesh.get_group("dp")) == "commlib"
    assert dist.get_backend(mesh.get_group("tp")) == "gloo"
    row = dist.get_rank() % 2
    x = mine(N)
    dist.all_reduce(x, group=mesh.get_group("dp"))
    near(x, values(row, N) + values(row + 2, N))
    first = 2 * (dist.get_rank() // 2)
    x = mine(N)
    dist.all_reduce(x, group=mesh.get_group("tp"))
    near(x, values(first, N) + values(first + 1, N), lossy=False)


def functional_collectives() -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (size,))
    assert dist.get_backend(mesh.get_group()) == "commlib"
    near(wait(funcol.all_reduce(mine(64, 64), "sum", mesh)), total(64, 64))
    near(wait(funcol.all_reduce(mine(64, 64), "avg", mesh)), total(64, 64) / size)
    both = funcol.all_reduce_coalesced([mine(64, 64), mine(8)], "sum", mesh)
    near(wait(both[0]), total(64, 64))
    near(wait(both[1]), total(8), lossy=False)
    rows = torch.cat([values(r, 64, 64) for r in range(size)])
    assert torch.equal(wait(funcol.all_gather_single(mine(64, 64), 0, mesh)), rows)
    found = wait(funcol.reduce_scatter_single(mine(64 * size, 64), "sum", 0, mesh))
    near(found, total(64 * size, 64).chunk(size)[rank])
    found = wait(funcol.all_to_all_single(mine(64 * size, 64), None, None, mesh))
    near(found, torch.cat([values(r, 64 * size, 64).chunk(size)[rank] for r in range(size)]))
    assert torch.equal(wait(funcol.broadcast(mine(64, 64), 0, mesh)), values(0, 64, 64))


def wait(x: Any) -> torch.Tensor:
    found: torch.Tensor = funcol.wait_tensor(x)
    return found


def dtensors() -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (size,))
    summed = total(64 * size, 64)
    partial = DTensor.from_local(mine(64 * size, 64), mesh, [Partial()])
    near(partial.redistribute(placements=[Replicate()]).to_local(), summed)
    near(partial.redistribute(placements=[Shard(0)]).to_local(), summed.chunk(size)[rank])
    whole = values(9, 64 * size, 64 * size)
    sharded = distribute_tensor(whole, mesh, [Shard(0)])
    assert torch.equal(sharded.full_tensor(), whole)
    turned = sharded.redistribute(placements=[Shard(1)]).to_local()
    assert torch.equal(turned, whole.chunk(size, 1)[rank])  # on CPU torch gathers for that


def tensor_parallel() -> None:
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 64 * size), nn.ReLU(), nn.Linear(64 * size, 64))
    x = values(3, 32, 64)
    expected = plain(x)
    expected.square().mean().backward()
    grad = plain[0].weight.grad
    assert isinstance(grad, torch.Tensor)
    plain.zero_grad()
    before = sent()
    model = parallelize_module(plain, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    found = model(x)
    near(found.detach(), expected.detach())
    found.square().mean().backward()
    sharded: Any = model[0].weight.grad
    assert relative(sharded.full_tensor(), grad) < GRADIENTS
    assert sent() > before


def checkpoints() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = values(1, 64, 64)
    state = {"w": distribute_tensor(whole, mesh, [Shard(0)]), "step": 3}
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder, src=0)
    dcp.save(state, checkpoint_id=folder[0])
    loaded = {"w": distribute_tensor(torch.zeros(64, 64), mesh, [Shard(0)]), "step": 0}
    dcp.load(loaded, checkpoint_id=folder[0])
    w: Any = loaded["w"]
    assert torch.equal(w.full_tensor(), whole)
    assert loaded["step"] == 3


def fsdp() -> None:
    """fully_shard, also as HSDP on a mesh of two dimensions: gradients coded, weights raw."""
    size = dist.get_world_size()
    expected = mlp()
    backward_sum(expected)
    meshes = [init_device_mesh("cpu", (size,))]
    if size == 4:
        meshes.append(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    for mesh in meshes:
        for factor in (None, 3.0):
            model = sharded(mesh)
            if factor is not None:  # a PREMUL_SUM
                for layer in model.modules():
                    if isinstance(layer, FSDPModule):
                        layer.set_gradient_divide_factor(factor)
            backward(model, 0)
            times = 1.0 if factor is None else size / factor
            grads: list[Any] = [parameter.grad for parameter in model.parameters()]
            whole = torch.cat([grad.full_tensor().flatten().double() for grad in grads])
            error = relative(whole, times * gradients(expected))
            assert 1e-4 < error < GRADIENTS, (mesh, factor, error)
            for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
                gathered: Any = ours
                assert torch.equal(gathered.full_tensor(), theirs.detach())
    model = sharded(meshes[0], mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    backward(model, 0)
    assert sum(sent()) > 0


def sharded(mesh: DeviceMesh, **how: Any) -> nn.Module:
    model = mlp()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, **how)
    fully_shard(model, mesh=mesh, **how)
    return model


def backward_sum(model: nn.Module) -> None:
    """The mean of all ranks' gradients, by torch alone."""
    backward(model, 0)
    for parameter in model.parameters():
        assert parameter.grad is not None
        grad = parameter.grad.double()  # travels raw
        dist.all_reduce(grad, dist.ReduceOp.AVG)
        parameter.grad.copy_(grad)


def once_more() -> None:
    """Destroyed and made again; under TORCH_DISTRIBUTED_DEBUG=DETAIL the second time."""
    for level in (dist.DebugLevel.OFF, dist.DebugLevel.DETAIL):
        dist.set_debug_level(level)
        try:
            with world(commlib.Options("int8")) as group:
                kind = type(group._get_backend(torch.device("cpu"))).__name__
                wrapped = level is dist.DebugLevel.DETAIL
                assert kind == ("_ProcessGroupWrapper" if wrapped else "ProcessGroupGloo")
                x = mine(N)
                dist.all_reduce(x)
                near(x, total(N))
                backward(DDP(mlp()), 0)
                group.monitored_barrier()
                assert len(c10d._world.pg_map) == 2  # the group, and its communicator's channel
        finally:
            dist.set_debug_level(dist.DebugLevel.OFF)
    gone = weakref.ref(group)
    dist.destroy_process_group()
    del group
    gc.collect()
    assert gone() is None  # else gloo's threads abort the process at its end
