"""One training step of a compiled model, as JSON."""

from __future__ import annotations

import json
import sys

import torch

network = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64)).cuda()
optimizer = torch.optim.AdamW(network.parameters())
compiled = torch.compile(network)
for _ in range(2):
    compiled(torch.randn(32, 64, device="cuda")).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
from torch._dynamo.utils import counters  # noqa: E402 - importing it before `compile` would start the compiler's own set-up

sys.stdout.write(json.dumps({"graphs": counters["stats"]["unique_graphs"], "allocated": torch.cuda.memory_allocated()}))
