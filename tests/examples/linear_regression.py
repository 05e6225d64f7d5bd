"""Linear regression on 640 samples: batch 64 against 4 × 16, and batch 32 against 4 × 8 where only 8 fit.

The loop written by hand divides each mean loss by the number of steps; the accumulator is given the loss as it is.
"""

from __future__ import annotations

import torch
from torch import nn

import autobatch

SAMPLES, EPOCHS, LEARNING_RATE = 640, 500, 0.01
TRUE_WEIGHTS, TRUE_BIAS = (5.0, 10.0), 1.0


def data() -> tuple[torch.Tensor, torch.Tensor]:
    features = torch.randn(SAMPLES, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return features, features @ torch.tensor([TRUE_WEIGHTS], dtype=torch.float64).T + TRUE_BIAS


def fresh_model() -> tuple[nn.Linear, torch.optim.Optimizer]:
    model = nn.Linear(2, 1, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model, torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)


def learned(model: nn.Linear) -> list[float]:
    return [*model.weight.flatten().tolist(), model.bias.item()]


def train_whole(batch_size: int) -> list[float]:
    """Every effective batch at once."""
    x, y = data()
    model, optimizer = fresh_model()
    for _ in range(EPOCHS):
        for start in range(0, SAMPLES, batch_size):
            loss = nn.functional.mse_loss(model(x[start : start + batch_size]), y[start : start + batch_size])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return learned(model)


def train_by_hand(batch_size: int, micro_batch_size: int) -> list[float]:
    """The loss divided by the steps, a step after each `batch_size` samples."""
    x, y = data()
    model, optimizer = fresh_model()
    steps = batch_size // micro_batch_size
    for _ in range(EPOCHS):
        for number, start in enumerate(range(0, SAMPLES, micro_batch_size), start=1):
            piece = slice(start, start + micro_batch_size)
            (nn.functional.mse_loss(model(x[piece]), y[piece]) / steps).backward()
            if number % steps == 0:
                optimizer.step()
                optimizer.zero_grad()
    return learned(model)


def train_accumulated(batch_size: int, micro_batch_size: int) -> list[float]:
    """The same by the accumulator."""
    x, y = data()
    model, optimizer = fresh_model()
    plan = autobatch.make_plan(target=batch_size, max_micro_batch_size=micro_batch_size)
    accumulator = autobatch.Accumulator(plan, model=model, optimizer=optimizer)
    for _ in range(EPOCHS):
        for start in range(0, SAMPLES, batch_size):
            accumulator.step(
                (x[start : start + batch_size], y[start : start + batch_size]),
                lambda batch: nn.functional.mse_loss(model(batch[0]), batch[1]),
            )
    return learned(model)


def main() -> dict[str, list[float]]:
    return {
        "64 whole": train_whole(64),
        "64 by hand": train_by_hand(64, 16),
        "64 accumulated": train_accumulated(64, 16),
        "32 whole": train_whole(32),
        "32 accumulated": train_accumulated(32, 8),
    }


if __name__ == "__main__":
    print(main())
