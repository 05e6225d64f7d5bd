"""How much the allocator gives under a cap of 4 GiB, in pieces of 64 MiB, by its own account and by NVML's, as JSON."""

from __future__ import annotations

import json

import torch

from autobatch.gpu.nvml import NvmlSession
from autobatch.gpu.opening import open_device
from autobatch.options import ProbeOptions

with NvmlSession() as session, open_device(ProbeOptions(target=8, headroom=0, memory_limit="4GiB")) as device:
    card = session.device(0)
    tenants = device.facts.memory.other_tenants_bytes or 0
    device.memory.begin()
    pieces = []
    try:
        while True:
            pieces.append(torch.empty(64 << 20, dtype=torch.uint8, device="cuda"))
    except torch.OutOfMemoryError:
        pass
    reading = device.memory.read()
    context_bytes = device.memory.context_bytes  # NVML's, without what keeps the rest of the card out of reach
    nvml_footprint = context_bytes + torch.cuda.memory_reserved()
    pieces.clear()
    device.memory.end()
    memory = card.memory()
    occupied = memory.total_bytes - memory.reserved_bytes - memory.free_bytes
    print(
        json.dumps(
            {
                "budget": device.memory.budget_bytes,
                "footprint": reading.footprint_bytes,
                "nvml_footprint": nvml_footprint,
                "held_after": occupied - tenants - context_bytes,
            }
        )
    )
