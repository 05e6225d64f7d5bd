"""Five points of y = 2x in micro-batches of 2, two a window: the last window holds one point.

From weight 0 and with a step of 0 nothing moves, so that every figure is the gradient of one window: of the points 1 to 4, and
of the point 5 alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import autobatch

X = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]], dtype=torch.float64)
Y = 2 * X
MICRO_BATCH_SIZE, STEPS = 2, 2
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def mean(output: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(output, wanted)


def total(output: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(output, wanted, reduction="sum")


def fresh_model() -> nn.Linear:
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    return model


def of_points(loss: Loss, points: slice) -> float:
    """The gradient of these points at once."""
    model = fresh_model()
    loss(model(X[points]), Y[points]).backward()
    assert model.weight.grad is not None
    return model.weight.grad.item()


def by_hand(loss: Loss, *, divide_by: int) -> list[float]:
    """Each micro-batch's loss divided by a fixed number, the last window stepped as it is."""
    model, gradients = fresh_model(), []
    pieces = list(zip(X.split(MICRO_BATCH_SIZE), Y.split(MICRO_BATCH_SIZE), strict=True))
    for number, (x, y) in enumerate(pieces, start=1):
        (loss(model(x), y) / divide_by).backward()
        if number % STEPS == 0 or number == len(pieces):
            assert model.weight.grad is not None
            gradients.append(model.weight.grad.item())
            model.zero_grad()
    return gradients


def by_accumulator(loss: Loss, *, reduction: str) -> list[float]:
    """By what each window really held."""
    model, gradients = fresh_model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: gradients.append(model.weight.grad.item()))  # type: ignore[union-attr]
    accumulator = autobatch.Accumulator(
        autobatch.make_plan(target=4, max_micro_batch_size=MICRO_BATCH_SIZE),
        model=model,
        optimizer=optimizer,
        loss_reduction=reduction,  # type: ignore[arg-type]
    )
    for micro_batch in zip(X.split(MICRO_BATCH_SIZE), Y.split(MICRO_BATCH_SIZE), strict=True):
        accumulator.add(micro_batch, lambda batch: loss(model(batch[0]), batch[1]))
    accumulator.finish()
    return gradients


def main() -> dict[str, list[float]]:
    windows = (slice(0, 4), slice(4, 5))
    return {
        "mean wanted": [of_points(mean, points) for points in windows],
        "mean accumulated": by_accumulator(mean, reduction="mean"),
        "mean divided by the steps": by_hand(mean, divide_by=STEPS),
        "mean undivided": by_hand(mean, divide_by=1),
        "sum wanted": [of_points(total, points) for points in windows],
        "sum accumulated": by_accumulator(total, reduction="sum"),
    }


if __name__ == "__main__":
    print(main())
