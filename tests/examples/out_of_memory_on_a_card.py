"""A window meets the allocator's own out-of-memory error on a card, and completes with the right steps and samples.

The plan's micro-batch is larger than what the card holds. Runs on an emulated card as on a real one.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

import autobatch

WIDTH, TARGET, WINDOWS = 1024, 64, 3


def main() -> dict[str, Any]:
    free = torch.cuda.mem_get_info()[0]
    # One activation of a sample takes a sixteenth of what is free, and several are alive at once: 8 run out, and 4, but not 2.
    rows = free // 16 // (4 * WIDTH)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1)).cuda()
    events: list[autobatch.MemoryEvent] = []
    accumulator = autobatch.Accumulator(
        autobatch.make_plan(target=TARGET, max_micro_batch_size=8),
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        on_event=events.append,
    )

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return model(batch.unsqueeze(1).expand(-1, rows, -1)).mean()

    sizes = [accumulator.step(torch.ones(TARGET, WIDTH, device="cuda"), loss).micro_batch_sizes for _ in range(WINDOWS)]
    return {
        "sizes": sizes,
        "events": [(event.failed_size, event.new_size) for event in events],
        "message": events[0].message if events else "",
        "steps": accumulator.optimizer_steps,
        "samples": accumulator.samples_seen,
    }


if __name__ == "__main__":
    print(json.dumps(main()))
