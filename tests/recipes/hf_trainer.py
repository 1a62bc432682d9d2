"""Hugging Face Trainer: a callback wraps the model when training begins.

torchrun --nproc-per-node 2 hf_trainer.py
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import commlib


class Compress(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **others):
        commlib.wrap(self.trainer.model_wrapped)  # by COMMLIB_POLICY, else "int8+ef"


torch.manual_seed(0)  # the same made-up data and weights on every rank
step = torch.arange(32)
text = (torch.randint(64, (512, 1)) + torch.randint(1, 4, (512, 1)) * step) % 64
data = [{"input_ids": line, "labels": line} for line in text]  # even steps of 1, 2 or 3
config = GPT2Config(
    vocab_size=64,
    n_positions=32,
    n_embd=128,
    n_layer=2,
    n_head=4,
    bos_token_id=0,
    eos_token_id=0,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
)
trainer = Trainer(
    GPT2LMHeadModel(config),  # random weights: nothing is downloaded
    TrainingArguments(
        output_dir="out",
        num_train_epochs=3,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        ddp_backend="gloo",
        disable_tqdm=True,
    ),
    train_dataset=data,
)
trainer.add_callback(Compress(trainer))
trainer.train()

losses = [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]
if trainer.is_world_process_zero():
    sent = commlib.of(trainer.model_wrapped).bytes_sent()
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, {sent} bytes sent by this rank")
torch.distributed.destroy_process_group()
