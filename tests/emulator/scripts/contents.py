"""Writes small numbers to an emulated card and reads them back, before and after a kernel: what came back, as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

answer: dict[str, Any] = {}
# Nothing here launches a kernel: copies alone.
numbers = torch.tensor([3, -5, 1 << 40], dtype=torch.int64)
on_card = numbers.to("cuda")
answer["before"] = on_card.cpu().tolist()
answer["part"] = on_card[1:].cpu().tolist()

# As DistributedDataParallel does at its start: the shapes of this rank to the card, gathered there, back and compared.
gathered = torch.empty(2, 3, dtype=torch.int64, device="cuda")
for row in gathered:
    row.copy_(on_card, non_blocking=True)
torch.cuda.synchronize()
answer["gathered"] = gathered.cpu().tolist()
answer["of_a_size"] = [bool((torch.arange(n).cuda().cpu() == torch.arange(n)).all()) for n in (1, 1000, 8192)]

# A block that held such a copy goes from one tensor to the next: a layer's parameters, and what a kernel makes after them.
held = torch.arange(1.0, 9.0).cuda()
answer["held"] = held.cpu().tolist()
address = held.data_ptr()
del held
made = torch.randn(3, device="cuda")
answer["reused"] = made.data_ptr() == address
answer["made"] = made.cpu().tolist()
answer["nonzero"] = list(torch.nonzero(made).shape)
answer["written_earlier"] = on_card.cpu().tolist()

layer = torch.nn.Linear(8, 8).cuda()
del layer  # its weight and its bias were such copies
noise = [torch.randn(3, device="cuda") for _ in range(4)]
answer["after_a_layer"] = [[part.cpu().tolist(), torch.nonzero(part).shape[0]] for part in noise]

again = numbers.to("cuda")
answer["written_again"] = again.cpu().tolist()
again.zero_()
answer["cleared"] = again.cpu().tolist()
sys.stdout.write(json.dumps(answer))
