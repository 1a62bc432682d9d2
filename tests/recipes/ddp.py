"""Plain DDP: one line more.

torchrun --nproc-per-node 2 ddp.py      (COMMLIB_POLICY=fp32 ... compares)
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import commlib

dist.init_process_group("gloo")
torch.manual_seed(0)  # the same made-up data and weights on every rank
x = torch.randn(1024, 64)
data = TensorDataset(x, (x @ torch.randn(64, 10)).argmax(1))
sampler = DistributedSampler(data)
loader = DataLoader(data, batch_size=64, sampler=sampler)
model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.Linear(512, 10))

model = commlib.wrap(DDP(model))  # by COMMLIB_POLICY, else "int8+ef"

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
losses = []
for epoch in range(3):
    sampler.set_epoch(epoch)
    total = 0.0
    for inputs, labels in loader:
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()  # the gradients are averaged here, compressed
        optimizer.step()
        total += loss.item()
    losses.append(total / len(loader))
    if dist.get_rank() == 0:
        print(f"epoch {epoch}: loss {losses[-1]:.4f}")

if dist.get_rank() == 0:
    sent = commlib.of(model).bytes_sent()
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, {sent} bytes sent by this rank")
dist.destroy_process_group()
