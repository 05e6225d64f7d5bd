"""A rank on an emulated card: `probe WRAPPER… UNIT` finds plans, `run WRAPPER N K` trains with K micro-batches of N a step.

`accumulate WRAPPER` trains an epoch by `Accumulator`, whose last window is incomplete. `take-up FILE` takes up
the plan in a file.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

folder, what, *words = sys.argv[1:]
WIDTH, FEATURES = 4096, 65536
dist.init_process_group("nccl")
rank = dist.get_rank()
torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


class Job:
    """Two layers of 1 GiB each, wrapped."""

    def __init__(self, wrapper: str) -> None:
        plain = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, FEATURES)).cuda()
        if wrapper == "ddp":
            self.model: nn.Module = nn.parallel.DistributedDataParallel(plain, device_ids=[torch.cuda.current_device()])
        else:
            for layer in plain:
                fully_shard(layer)
            self.model = fully_shard(plain)
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    def micro_step(self, n: int) -> None:
        self.model(torch.zeros(n, FEATURES, device="cuda")).square().mean().backward()


def probe(wrapper: str, multiple_of: str) -> object:
    """Find the plan."""
    import autobatch

    job = Job(wrapper)
    asked = {"target": 65536, "headroom": 0, "multiple_of": int(multiple_of), "workload": wrapper}
    report = autobatch.probe(job.micro_step, optimizer=job.optimizer, restore=[job.model], **asked)
    return json.loads(report.to_json())


def run(wrapper: str, size: str, steps: str) -> str:
    """Train without autobatch."""
    job = Job(wrapper)
    flushes = []
    try:
        for _ in range(4):
            flushes.append(torch.cuda.memory_stats()["num_alloc_retries"])
            for _ in range(int(steps)):
                job.micro_step(int(size))
            job.optimizer.step()
            job.optimizer.zero_grad()
    except torch.OutOfMemoryError:
        return "out of memory"
    settled = (
        torch.cuda.memory_stats()["num_alloc_retries"] == flushes[2]
    )  # two steps have made all that there is to hold
    return "fits" if settled else "flushes"


def accumulate(wrapper: str) -> dict[str, int]:
    """Train on two windows of three micro-batches and the half of a third."""
    import autobatch

    job = Job(wrapper)
    plan = autobatch.make_plan(target=12, max_micro_batch_size=2, world_size=2)
    training = autobatch.Accumulator(plan, model=job.model, optimizer=job.optimizer)
    for _ in range(7):
        training.add(torch.zeros(2, FEATURES, device="cuda"), lambda x: job.model(x).square().mean())
    training.finish()
    return {"steps": training.optimizer_steps, "samples": training.samples_seen}


def take_up(path: str) -> object:
    """Take up a plan that was found on another machine."""
    import autobatch

    try:
        plan = autobatch.plan_from_env(device=f"cuda:{rank}", environment={"AUTOBATCH_PLAN_FILE": path})
    except autobatch.PlanError as error:
        return str(error)
    return [plan.micro_batch_size, plan.accumulation_steps]


if what == "probe":
    *wrappers, multiple = words
    answer: object = {wrapper: probe(wrapper, multiple) for wrapper in wrappers}
elif what == "take-up":
    answer = take_up(*words)
elif what == "accumulate":
    answer = accumulate(*words)
else:
    answer = run(*words)
Path(folder, f"{rank}.json").write_text(json.dumps(answer))
sys.stdout.flush()
os._exit(0)
