"""Hugging Face accelerate: wrap what `prepare` gave.

accelerate launch --cpu --num_processes 2 accelerate_ddp.py      (or torchrun)
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import commlib

accelerator = Accelerator(cpu=True)
torch.manual_seed(0)  # the same made-up data and weights on every rank
x = torch.randn(1024, 64)
data = TensorDataset(x, (x @ torch.randn(64, 10)).argmax(1))
model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.Linear(512, 10))
model, optimizer, loader = accelerator.prepare(
    model,
    torch.optim.AdamW(model.parameters(), lr=1e-3),
    DataLoader(data, batch_size=64, shuffle=True),
)

model = commlib.wrap(model)  # by COMMLIB_POLICY, else "int8+ef"

losses = []
for epoch in range(3):
    total = 0.0
    for inputs, labels in loader:
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        total += loss.item()
    losses.append(total / len(loader))
    accelerator.print(f"epoch {epoch}: loss {losses[-1]:.4f}")

sent = commlib.of(model).bytes_sent()
accelerator.print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, {sent} bytes sent by this rank")
accelerator.end_training()
