"""Lightning: wrap from a callback, once the strategy has made its DDP.

torchrun --nproc-per-node 2 lightning_ddp.py
"""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import commlib


class Compress(lightning.Callback):
    def on_train_start(self, trainer, module):
        commlib.wrap(trainer.strategy.model)  # by COMMLIB_POLICY, else "int8+ef"

    def on_train_end(self, trainer, module):
        self.sent = commlib.of(trainer.strategy.model).bytes_sent()


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.Linear(512, 10)
        )
        self.losses, self.total = [], 0.0

    def training_step(self, batch, index):
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self.layers(inputs), labels)
        self.total += loss.item()
        return loss

    def on_train_epoch_end(self):
        self.losses.append(self.total / self.trainer.num_training_batches)
        self.total = 0.0
        self.print(f"epoch {self.current_epoch}: loss {self.losses[-1]:.4f}")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


torch.manual_seed(0)  # the same made-up data and weights on every rank
x = torch.randn(1024, 64)
data = TensorDataset(x, (x @ torch.randn(64, 10)).argmax(1))
model, compress = Classifier(), Compress()
trainer = lightning.Trainer(
    accelerator="cpu",
    devices=2,
    strategy="ddp",
    max_epochs=3,
    callbacks=[compress],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, DataLoader(data, batch_size=64, shuffle=True))
first, last = model.losses[0], model.losses[-1]
if trainer.is_global_zero:
    print(f"loss {first:.4f} -> {last:.4f}, {compress.sent} bytes sent by this rank")
