"""Gradient accumulation under fp16 autocast with a GradScaler: nothing is sent but with the last
of each 4 batches, and residuals follow the scale.

torchrun --nproc-per-node 2 amp_accumulation.py
"""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import commlib

ACCUMULATE = 4

dist.init_process_group("gloo")
torch.manual_seed(0)  # the same made-up data and weights on every rank
x = torch.randn(4096, 64)
data = TensorDataset(x, (x @ torch.randn(64, 10)).argmax(1))
sampler = DistributedSampler(data)
loader = DataLoader(data, batch_size=64, sampler=sampler)
model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.Linear(512, 10))

model = commlib.wrap(DDP(model))  # by COMMLIB_POLICY, else "int8+ef"

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)  # too high: it backs off by itself
losses, skipped = [], 0
for epoch in range(3):
    sampler.set_epoch(epoch)
    total = 0.0
    for number, (inputs, labels) in enumerate(loader, 1):
        last = number % ACCUMULATE == 0
        with nullcontext() if last else model.no_sync():
            with torch.autocast("cpu", torch.float16):
                loss = nn.functional.cross_entropy(model(inputs), labels)
            scaler.scale(loss / ACCUMULATE).backward()
        total += loss.item()
        if last:
            scale = scaler.get_scale()
            scaler.step(optimizer)  # on no rank where a gradient of one overflowed
            scaler.update()
            optimizer.zero_grad()
            if scaler.get_scale() != scale:
                commlib.of(model).rescale(scaler.get_scale() / scale)
            skipped += scaler.get_scale() < scale
    losses.append(total / len(loader))
    if dist.get_rank() == 0:
        print(f"epoch {epoch}: loss {losses[-1]:.4f}")

if dist.get_rank() == 0:
    sent = commlib.of(model).bytes_sent()
    print(f"{skipped} steps skipped, scale {scaler.get_scale():.0f}")
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, {sent} bytes sent by this rank")
dist.destroy_process_group()
