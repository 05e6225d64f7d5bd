"""A hand-written training loop, as most scripts are: arguments, gradients accumulated, a checkpoint at the end, an `atexit`."""

from __future__ import annotations

import argparse
import atexit
import importlib.util
import pathlib
import sys

if importlib.util.find_spec("torch") is None:  # as libraries look for it before they import it
    sys.exit("torch is not installed")
import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--batch-size", type=int, required=True)
parser.add_argument("--accumulate", type=int, default=1)
parser.add_argument("--width", type=int, default=2048)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--output", type=pathlib.Path)
options = parser.parse_args()

model = nn.Sequential(
    nn.Linear(options.width, 4 * options.width), nn.GELU(), nn.Linear(4 * options.width, options.width)
).cuda()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
if options.output:
    atexit.register((options.output / "uploaded").touch)

with torch.no_grad():  # an evaluation before training
    model(torch.randn(4, 256, options.width, device="cuda"))

try:
    for _ in range(options.steps):
        for _ in range(options.accumulate):
            batch = torch.randn(options.batch_size, 256, options.width, device="cuda")
            (model(batch).square().mean() / options.accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
finally:
    if options.output:
        torch.save(model.state_dict(), options.output / "checkpoint.pt")
print("trained", options.steps, "steps")
