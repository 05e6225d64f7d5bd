"""Two optimizers in turns: the critic steps twice for each step of the generator. Read from variables, not arguments."""

from __future__ import annotations

import os

import torch
from torch import nn

size, accumulate = int(os.environ["AUTOBATCH_MICRO_BATCH_SIZE"]), int(os.environ["AUTOBATCH_ACCUMULATION_STEPS"])


def network(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, 4096), nn.GELU(), nn.Linear(4096, 4096), nn.GELU(), nn.Linear(4096, outputs)
    ).cuda()


generator, critic = network(128, 1024), network(1024, 1)
of_generator = torch.optim.AdamW(generator.parameters())
of_critic = torch.optim.AdamW(critic.parameters())

for _ in range(30):
    for _ in range(2):
        for _ in range(accumulate):
            with torch.no_grad():
                made = generator(torch.randn(size, 32, 128, device="cuda"))
            loss = critic(made).mean() - critic(torch.randn(size, 32, 1024, device="cuda")).mean()
            (loss / accumulate).backward()
        of_critic.step()
        of_critic.zero_grad()
    for _ in range(accumulate):
        (-critic(generator(torch.randn(size, 32, 128, device="cuda"))).mean() / accumulate).backward()
    of_generator.step()
    of_generator.zero_grad()
