"""An out-of-memory error in the third micro-batch of a window: the run completes as an undisturbed one does.

The error is thrown by the job itself at the third call with more than two samples, as a card would on which a neighbour grew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import autobatch


class Job:
    """Three windows of 16 samples, in micro-batches of 4."""

    def __init__(self, *, fails: bool) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()
        self.fails, self.large_calls = fails, 0
        self.events: list[autobatch.MemoryEvent] = []
        self.accumulator = autobatch.Accumulator(
            autobatch.make_plan(target=16, max_micro_batch_size=4),
            model=self.model,
            optimizer=torch.optim.AdamW(self.model.parameters(), lr=0.01),
            on_event=self.events.append,
        )

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        if self.fails and len(batch) > 2:
            self.large_calls += 1
            if self.large_calls >= 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        output: torch.Tensor = self.model(batch)
        return output.square().mean()

    def train(self) -> list[tuple[int, ...]]:
        x = torch.randn(48, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        return [self.accumulator.step(batch, self.loss).micro_batch_sizes for batch in x.split(16)]


def main() -> dict[str, Any]:
    undisturbed, disturbed = Job(fails=False), Job(fails=True)
    undisturbed.train()
    sizes = disturbed.train()
    pairs = zip(undisturbed.model.parameters(), disturbed.model.parameters(), strict=True)
    return {
        "sizes": sizes,
        "events": [(event.optimizer_step, event.failed_size, event.new_size) for event in disturbed.events],
        "steps": disturbed.accumulator.optimizer_steps,
        "samples": disturbed.accumulator.samples_seen,
        "difference": max(((one - other).norm() / one.norm()).item() for one, other in pairs),
    }


if __name__ == "__main__":
    print(main())
