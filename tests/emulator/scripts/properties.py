"""Says what torch knows of each card, as JSON."""

from __future__ import annotations

import json
import sys

import torch

FIELDS = (
    "name",
    "major",
    "minor",
    "total_memory",
    "multi_processor_count",
    "L2_cache_size",
    "max_threads_per_multi_processor",
    "shared_memory_per_block",
    "shared_memory_per_block_optin",
    "shared_memory_per_multiprocessor",
    "regs_per_multiprocessor",
    "warp_size",
    "pci_bus_id",
)
cards = []
for ordinal in range(torch.cuda.device_count()):
    properties = torch.cuda.get_device_properties(ordinal)
    cards.append({field: getattr(properties, field) for field in FIELDS if hasattr(properties, field)})
    cards[-1]["uuid"] = str(properties.uuid)
    cards[-1]["mem_get_info_total"] = torch.cuda.mem_get_info(ordinal)[1]
sys.stdout.write(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "cards": cards}))
