"""What CudaMemory makes of two cards with a tenant: budgets, caps, the current device, as JSON."""

from __future__ import annotations

import json
import sys

import torch

import autobatch
from autobatch.gpu.opening import open_device
from autobatch.options import ProbeOptions

GIB = 1 << 30


def budget(**options: object) -> int | str:
    try:
        with open_device(ProbeOptions(target=8, **options)) as device:  # type: ignore[arg-type]
            return device.memory.budget_bytes
    except autobatch.UsageError as error:
        return str(error)


def capped(**options: object) -> dict[str, int]:
    """How much the allocator gives under the cap before it fails, in pieces of 64 MiB, and its cap afterwards."""
    with open_device(ProbeOptions(target=8, **options)) as device:  # type: ignore[arg-type]
        device.memory.begin()
        pieces, failed = [], False
        while not failed:
            try:
                pieces.append(torch.empty(64 << 20, dtype=torch.uint8, device="cuda:0"))
            except torch.OutOfMemoryError:
                failed = True
        reading = device.memory.read()
        held = len(pieces) * (64 << 20)
        del pieces
        device.memory.end()
        budget_bytes = device.memory.budget_bytes
    fraction = torch.cuda.get_per_process_memory_fraction(0)
    return {
        "held": held,
        "footprint": reading.footprint_bytes,
        "budget": budget_bytes,
        "fraction_after": fraction,
        "free_after": torch.cuda.mem_get_info(0)[0],
    }


def library_on_second_card() -> dict[str, object]:
    torch.cuda.set_device(1)
    model = torch.nn.Linear(1024, 1024, device="cuda:1")
    optimizer = torch.optim.AdamW(model.parameters())

    def micro_step(n: int) -> None:
        model(torch.empty(n, 16384, 1024, device="cuda:1")).square().mean().backward()

    torch.cuda.set_device(0)
    report = autobatch.probe(micro_step, optimizer=optimizer, target=1 << 16, restore=[model])
    try:
        autobatch.probe(micro_step, optimizer=optimizer, target=8, restore=[model], device="cuda:0")
        refused = ""
    except autobatch.WorkloadError as error:
        refused = str(error)
    return {
        "name": report.device.name,
        "current_after": torch.cuda.current_device(),
        "peaks": [trial.peak_allocated_bytes for trial in report.trials],
        "certified": report.certified,
        "basis": report.basis,
        "refused": refused,
    }


answers = {
    "totals": [torch.cuda.get_device_properties(i).total_memory for i in range(2)],
    "whole": budget(headroom=0),
    "limited": budget(headroom=0, memory_limit="4GiB"),
    "limited_percent": budget(headroom="50%", memory_limit="4GiB"),
    "impossible": budget(headroom="5GiB", memory_limit="4GiB"),
    "cap": capped(headroom=0, memory_limit="4GiB"),
    "second": library_on_second_card(),
}
sys.stdout.write(json.dumps(answers) + "\n")
