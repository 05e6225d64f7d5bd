"""A loop for torchrun: each rank on a card of its own, gradients averaged by DistributedDataParallel."""

from __future__ import annotations

import argparse
import contextlib
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

parser = argparse.ArgumentParser()
parser.add_argument("--batch-size", type=int, required=True)
parser.add_argument("--accumulate", type=int, required=True)
parser.add_argument("--backend", default="gloo")
options = parser.parse_args()

rank = int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(rank)
dist.init_process_group(options.backend)
model = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024)).cuda()
wrapped = DistributedDataParallel(model, device_ids=[rank])
optimizer = torch.optim.AdamW(wrapped.parameters())
for _ in range(20):
    for position in range(options.accumulate):
        with contextlib.nullcontext() if position + 1 == options.accumulate else wrapped.no_sync():
            wrapped(torch.randn(options.batch_size, 256, 1024, device="cuda")).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
dist.destroy_process_group()
