"""One sample at a time, x = 1, 2, 3 and y = x + 1: gradients cleared each time, against gradients that are never cleared."""

from __future__ import annotations

import torch
from torch import nn

import autobatch

SAMPLES = [(1.0, 2.0), (2.0, 3.0), (3.0, 4.0)]


def fresh_model() -> tuple[nn.Linear, torch.optim.Optimizer]:
    model = nn.Linear(1, 1, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


def sample(x: float, y: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([[x]], dtype=torch.float64), torch.tensor([[y]], dtype=torch.float64)


def gradient(model: nn.Linear) -> float:
    assert model.weight.grad is not None
    return model.weight.grad.item()


def by_hand(*, clear: bool) -> list[float]:
    """The weight's gradient at each step."""
    model, optimizer = fresh_model()
    gradients = []
    for x, y in SAMPLES:
        if clear:
            optimizer.zero_grad()
        inputs, wanted = sample(x, y)
        nn.functional.mse_loss(model(inputs), wanted).backward()
        gradients.append(gradient(model))
        optimizer.step()
    return gradients


def by_accumulator() -> list[float]:
    """The same, read in a hook before each optimizer step: cleared once a window without being asked."""
    model, optimizer = fresh_model()
    gradients: list[float] = []
    optimizer.register_step_pre_hook(lambda *_: gradients.append(gradient(model)))
    plan = autobatch.make_plan(target=1, max_micro_batch_size=1)
    accumulator = autobatch.Accumulator(plan, model=model, optimizer=optimizer)
    for x, y in SAMPLES:
        accumulator.step(sample(x, y), lambda batch: nn.functional.mse_loss(model(batch[0]), batch[1]))
    return gradients


def main() -> dict[str, list[float]]:
    return {"cleared": by_hand(clear=True), "never cleared": by_hand(clear=False), "accumulator": by_accumulator()}


if __name__ == "__main__":
    print(main())
