"""FSDP2 within each of two pipeline stages, on a mesh as torchtitan makes it: gradients,
gathered parameters and activations travel compressed.

torchrun --nproc-per-node 4 fsdp2_pp.py
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import commlib

SCHEME = os.environ.get("COMMLIB_POLICY", "int8")
MICROBATCHES = 4

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("pp", "dp"))
pp, dp = mesh["pp"], mesh["dp"]
torch.manual_seed(0)  # the same made-up data and weights on every rank
x = torch.randn(1024, 64)
y = (x @ torch.randn(64, 10)).argmax(1)
halves = [
    nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256)),
    nn.Sequential(nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)),
]
model = fully_shard(halves[pp.get_local_rank()], mesh=dp, reshard_after_forward=False)
stage = PipelineStage(model, pp.get_local_rank(), 2, torch.device("cpu"), group=pp.get_group())
schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn=nn.functional.cross_entropy)

commlib.wrap(model, f"{SCHEME}+ef", parameters=SCHEME)
commlib.wrap(schedule, SCHEME)

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
losses = []
for epoch in range(3):
    total = []
    batches = torch.randperm(len(x)).view(-1, dp.size(), 64)  # the seed is every rank's
    for batch in batches[:, dp.get_local_rank()]:
        optimizer.zero_grad()
        if stage.is_first:
            schedule.step(x[batch])
        else:
            schedule.step(target=y[batch], losses=total)
        optimizer.step()
    if stage.is_last:
        losses.append(torch.stack(total).mean().item())
        if dp.get_local_rank() == 0:
            print(f"epoch {epoch}: loss {losses[-1]:.4f}")

if stage.is_last and dp.get_local_rank() == 0:
    sent = commlib.of(model).bytes_sent() + commlib.of(schedule).transport.bytes_sent
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, {sent} bytes sent by this rank")
dist.destroy_process_group()
