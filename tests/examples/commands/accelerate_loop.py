"""accelerate's `Accelerator`, which accumulates by itself and wraps the optimizer."""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--batch-size", type=int, required=True)
parser.add_argument("--accumulate", type=int, required=True)
options = parser.parse_args()

accelerator = Accelerator(gradient_accumulation_steps=options.accumulate)
model = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024))
data = torch.utils.data.TensorDataset(torch.zeros(1, 1, 1).expand(1 << 16, 64, 1024))
model, optimizer, loader = accelerator.prepare(
    model, torch.optim.AdamW(model.parameters()), torch.utils.data.DataLoader(data, batch_size=options.batch_size)
)
for (batch,) in loader:
    with accelerator.accumulate(model):
        accelerator.backward(model(batch).square().mean())
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
accelerator.save_state("state")
