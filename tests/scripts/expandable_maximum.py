"""A small GPT-2's maximum under expandable segments: by a probe, and by brute force around it without a cap, as JSON."""

from __future__ import annotations

import gc
import json
import sys

import torch

from autobatch.gpu.opening import open_device
from autobatch.options import ProbeOptions
from autobatch.probing import conduct_probe
from autobatch.workload.builtin import build_gpt2
from autobatch.workload.running import TrialRunner


def job():
    return build_gpt2(layers=2)


class Source:
    """Trials in this process, each with a job of its own."""

    def __init__(self, device, runner):
        self.facts, self._runner = device.facts, runner

    def run_trial(self, window, *, confirmation):
        return self._runner(window, confirmation=confirmation)

    def remarks(self):
        from autobatch.facts import AnswerRemarks

        return AnswerRemarks()


def fits(n: int) -> bool:
    """Three windows of two micro-batches run, and the allocator flushes nothing after the second."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    retries = []
    made = job()
    try:
        for _ in range(3):
            made.micro_step(n)
            made.micro_step(n)
            made.optimizer.step()
            made.optimizer.zero_grad()
            retries.append(torch.cuda.memory_stats()["num_alloc_retries"])
    except torch.OutOfMemoryError:
        return False
    return retries[-1] == retries[-2]


options = ProbeOptions(target=4096, headroom=0)
with open_device(options) as device:
    report = conduct_probe(
        Source(device, TrialRunner(job, device.memory, timed=False)), options, workload="gpt2?layers=2"
    )
found = report.max_micro_batch_size
around = {n: fits(n) for n in range(found - 3, found + 4)}
failing = [n for n, ok in around.items() if not ok]
answer = {"found": found, "brute_force": min(failing) - 1, "certified": report.certified, "around": around}
sys.stdout.write(json.dumps(answer) + "\n")
