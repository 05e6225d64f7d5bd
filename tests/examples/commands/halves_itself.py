"""A script that catches its own out-of-memory error and goes on with half of the batch."""

from __future__ import annotations

import json
import pathlib
import sys

import torch
from torch import nn

settings = json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))["train"]
size = settings["batch_size"]
model = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024)).cuda()
optimizer = torch.optim.AdamW(model.parameters())
done = 0
while done < 50:
    try:
        for _ in range(settings["accumulate"]):
            model(torch.randn(size, 256, 1024, device="cuda")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        done += 1
    except torch.OutOfMemoryError:
        optimizer.zero_grad()
        size //= 2
        print("going on with", size)
print("ended with", size)
