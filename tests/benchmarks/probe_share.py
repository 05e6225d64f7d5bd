"""How much of a probe's time is not the training steps that it runs.

    python tests/benchmarks/probe_share.py [--quick] [--write]

The library call probes a job in a process on an emulated card; then the windows of the very trials that it ran are run again by a
plain loop, out-of-memory errors included. What the call took beyond the loop is the search, the reading of NVML and the
allocator, and putting the state back bit for bit. No kernel computes on an emulated card, so the steps are as short as they can
be and the share as large: on a real one the same work stands beside steps that take their time.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

from results import Result, machine, markdown_table, run_benchmark

JOBS = ("gpt2?seq_len=512", "resnet50?image=512", "vit?image=384")
QUICK_JOBS = ("gpt2?seq_len=128&layers=2&width=256&heads=4",)
CARD = "L4"
_ON_CARD = "--on-card"


def on_card(workload: str) -> dict[str, float]:
    """Probe, and run the same windows by hand; in a process that has the card."""
    import torch

    import autobatch
    from autobatch.workload.loader import WorkloadName, load_factory, make_job

    name = WorkloadName.parse(workload)
    job = make_job(name, load_factory(name))
    (optimizer,) = job.optimizers()
    job.micro_step(1)  # what is loaded once is loaded now
    optimizer.step()
    optimizer.zero_grad()
    parameters = torch.nn.ParameterList(one for group in optimizer.param_groups for one in group["params"])
    began = time.perf_counter()
    report = autobatch.probe(job.micro_step, optimizer=optimizer, target=256, restore=[parameters])
    probe_seconds = time.perf_counter() - began
    torch.cuda.set_per_process_memory_fraction(
        report.memory.budget_bytes / torch.cuda.get_device_properties(0).total_memory
    )
    began = time.perf_counter()
    for trial in report.trials:
        torch.cuda.empty_cache()
        with contextlib.suppress(torch.OutOfMemoryError):
            for _ in range(report.options.min_windows):
                for size in trial.window:
                    job.micro_step(size)
                optimizer.step()
                optimizer.zero_grad()
        optimizer.zero_grad()
    steps_seconds = time.perf_counter() - began
    return {"probe_seconds": probe_seconds, "steps_seconds": steps_seconds, "trials": len(report.trials)}


def measure(*, quick: bool) -> Result:
    """Each job in a process of its own."""
    found: dict[str, Any] = {}
    for workload in QUICK_JOBS if quick else JOBS:
        command = [
            sys.executable,
            "-m",
            "autobatch",
            "emulate",
            CARD,
            "--",
            sys.executable,
            __file__,
            _ON_CARD,
            workload,
        ]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'server'}"}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        figures = json.loads(ended.stdout.splitlines()[-1])
        figures["share"] = 1 - figures["steps_seconds"] / figures["probe_seconds"]
        found[workload] = {key: round(value, 3) for key, value in figures.items()}
    rows = [
        (
            f"`{name}`",
            one["trials"],
            f"{one['probe_seconds']:.2f}",
            f"{one['steps_seconds']:.2f}",
            f"{one['share']:.0%}",
        )
        for name, one in found.items()
    ]
    head = ("job", "trials", "probe (s)", "its steps by hand (s)", "share that is not steps")
    text = f"# The probe's own share of its time, on an emulated {CARD}\n\n{machine()}.\n\n{markdown_table(head, rows)}"
    return Result(name="probe_share", data={"machine": machine(), "card": CARD, "jobs": found}, text=text)


if __name__ == "__main__":
    if _ON_CARD in sys.argv:
        print(json.dumps(on_card(sys.argv[-1])))
    else:
        sys.exit(run_benchmark(measure, __doc__))
