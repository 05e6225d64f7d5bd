"""A loop on accelerate whose steps `tune` sets. The argument is the target."""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator

from autobatch.integrations.accelerate import tune

accelerator = Accelerator(mixed_precision="bf16")
network = torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 1024))
model, optimizer = accelerator.prepare(network, torch.optim.AdamW(network.parameters()))


def loss_of(n: int) -> torch.Tensor:
    """The loss of the largest batch of n samples that training sees."""
    loss: torch.Tensor = model(torch.randn(n, 512, 1024, device=accelerator.device)).float().square().mean()
    return loss


report = tune(accelerator, loss_of, model=model, optimizer=optimizer, target=int(sys.argv[1]), max_grad_norm=1.0)
plan = report.plan
steps = 0
for _ in range(2 * plan.accumulation_steps):
    with accelerator.accumulate(model):
        accelerator.backward(loss_of(plan.micro_batch_size))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += accelerator.sync_gradients
        optimizer.zero_grad()
if accelerator.is_main_process:
    print(plan.micro_batch_size, plan.accumulation_steps, "steps:", steps)
accelerator.end_training()
