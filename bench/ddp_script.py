"""Data-parallel training as one writes it with PyTorch alone: a small GPT over bytes, under DDP.

    torchrun --nproc-per-node 2 bench/ddp_script.py --backend gloo

Nothing in here knows of commlib, and `--backend commlib` is all that changes. Every rank writes a
line per step: its loss and what its network interface has sent so far, as the kernel counts it.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 4, 256, 4, 64, 8


class GPT(nn.Module):
    """Predicts the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        h = self.bytes(x) + self.places.weight
        logits: torch.Tensor = self.head(self.norm(self.blocks(h, mask=mask, is_causal=True)))
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="gloo")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--interface", default=os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    parser.add_argument("--log", type=Path, default=Path("ddp"), help="PATH: PATH-0.jsonl, ...")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    dist.init_process_group(args.backend)
    rank = dist.get_rank()
    model = DistributedDataParallel(GPT())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # any text that all ranks have: the standard library's
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    generator = torch.Generator().manual_seed(1 + rank)
    sent = Path(f"/sys/class/net/{args.interface}/statistics/tx_bytes")

    with Path(f"{args.log}-{rank}.jsonl").open("w") as log:
        for step in range(args.steps):
            starts = torch.randint(len(text) - CONTEXT - 1, (BATCH, 1), generator=generator)
            window = text[starts + torch.arange(CONTEXT + 1)]
            logits = model(window[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            row = {"step": step, "loss": loss.item(), "tx_bytes": int(sent.read_text())}
            print(json.dumps(row), file=log, flush=True)
            if rank == 0:
                print(f"step {step:3d}  loss {loss.item():.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
