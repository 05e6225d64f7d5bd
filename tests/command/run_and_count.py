"""Run a script to its end, or to its tenth optimizer step, and print whether it fitted as a trial has it: brute force."""

from __future__ import annotations

import runpy
import sys

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

count = {"steps": 0, "retries": 0}


def figures() -> tuple[int, int]:
    stats = torch.cuda.memory_stats()
    return stats.get("num_ooms", 0), stats.get("num_alloc_retries", 0)


def note_step(*_: object) -> None:
    count["steps"] += 1
    if count["steps"] == 2:
        count["retries"] = figures()[1]
    if count["steps"] == 10:
        raise SystemExit(0)


register_optimizer_step_post_hook(note_step)
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ended:
    if ended.code not in {0, None}:
        raise
except torch.OutOfMemoryError:
    print("out of memory")
    sys.exit(0)
ooms, after = figures()
print("fits" if not ooms and after == count["retries"] else f"{ooms} errors, {after - count['retries']} flushes")
