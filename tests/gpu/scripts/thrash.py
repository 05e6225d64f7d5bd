"""A trial whose blocks cannot all be kept under the cap, so that the allocator flushes its cache again and again, as JSON."""

from __future__ import annotations

import itertools
import json

import torch

from autobatch import TrainingJob
from autobatch.gpu.opening import open_device
from autobatch.options import ProbeOptions
from autobatch.workload.running import TrialRunner

MIB = 1 << 20


asked = itertools.count(1000, 64)


def job() -> TrainingJob:
    """Each micro-batch has a larger block than all before it: what is kept of them never serves, and has to be given back."""
    weight = torch.nn.Parameter(torch.ones(1024, device="cuda"))

    def micro_step(n: int) -> None:
        block = torch.empty(n * next(asked) * MIB, dtype=torch.uint8, device="cuda")
        del block
        weight.square().sum().backward()

    return TrainingJob(micro_step=micro_step, optimizer=torch.optim.SGD([weight], lr=0.1))


with open_device(ProbeOptions(target=8, headroom=0, memory_limit="2.5GiB")) as device:
    trial = TrialRunner(job, device.memory)((1, 1))
    print(json.dumps({"outcome": trial.outcome, "retries": trial.alloc_retries}))
