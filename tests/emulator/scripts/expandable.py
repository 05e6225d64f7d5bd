"""The allocator's expandable segments: they grow, fill the card and give it back, as JSON."""

from __future__ import annotations

import json
import sys

import torch

MIB = 1 << 20
torch.cuda.init()
free = torch.cuda.mem_get_info()[0]
tensors = [torch.empty(100 * MIB, dtype=torch.uint8, device="cuda") for _ in range(20)]
taken = free - torch.cuda.mem_get_info()[0]
expandable = any(segment["is_expandable"] for segment in torch.cuda.memory_snapshot())
try:
    torch.empty(free, dtype=torch.uint8, device="cuda")
    overfull = False
except torch.OutOfMemoryError:
    overfull = True
del tensors
torch.cuda.empty_cache()
left = free - torch.cuda.mem_get_info()[0]
again = torch.empty(free // MIB * MIB - 40 * MIB, dtype=torch.uint8, device="cuda").numel()
sys.stdout.write(
    json.dumps({"taken": taken, "expandable": expandable, "overfull": overfull, "left": left, "again": again})
)
