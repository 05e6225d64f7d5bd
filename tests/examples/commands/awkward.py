"""Ways of training that hooks have missed: in a forked child, by ranks without a launcher, by autograd.grad, after the CPU."""

from __future__ import annotations

import argparse
import multiprocessing
import os

import torch
import torch.distributed as dist
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("way")
parser.add_argument("--batch-size", type=int, required=True)
parser.add_argument("--accumulate", type=int, default=1)
options = parser.parse_args()


def train() -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(30):
        for _ in range(options.accumulate):
            loss = model(torch.randn(options.batch_size, 64, 256, device="cuda")).square().mean()
            if options.way == "two-backwards":
                loss.backward(retain_graph=True)
            if options.way == "autograd-grad":
                gradients = torch.autograd.grad(loss, list(model.parameters()))
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            else:
                loss.backward()
        if options.way == "resets-peaks":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        optimizer.zero_grad()


def train_rank(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    train()


def train_on_cpu() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters())
    for _ in range(5):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()


if options.way == "fork":
    child = multiprocessing.get_context("fork").Process(target=train)
    child.start()
    child.join()
    raise SystemExit(child.exitcode)
if options.way == "ranks":
    workers = [
        multiprocessing.get_context("fork").Process(target=train_rank, args=(rank, os.environ["STORE"]))
        for rank in (0, 1)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    raise SystemExit(0)
if options.way.startswith("cpu"):
    train_on_cpu()
if options.way != "cpu-alone":
    train()
