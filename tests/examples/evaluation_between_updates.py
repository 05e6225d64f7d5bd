"""Evaluation every three optimizer steps, nested in the update: it never sees a held gradient."""

from __future__ import annotations

import torch
from torch import nn

import autobatch

EVERY = 3


def main() -> dict[str, object]:
    torch.manual_seed(0)
    x, y = torch.randn(96, 4), torch.randn(96, 1)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = autobatch.Accumulator(
        autobatch.make_plan(target=8, max_micro_batch_size=2), model=model, optimizer=optimizer
    )
    evaluated_at, held, boundaries = [], 0, []
    for micro_batch in zip(x.split(2), y.split(2), strict=True):
        result = accumulator.add(micro_batch, lambda batch: nn.functional.mse_loss(model(batch[0]), batch[1]))
        boundaries.append(accumulator.at_boundary)
        if result is not None and accumulator.optimizer_steps % EVERY == 0:
            held += sum(parameter.grad is not None for parameter in model.parameters())
            with torch.no_grad():
                nn.functional.mse_loss(model(x), y)
            evaluated_at.append(accumulator.optimizer_steps)
    return {"evaluated_at": evaluated_at, "held_gradients": held, "boundaries": boundaries}


if __name__ == "__main__":
    print(main())
