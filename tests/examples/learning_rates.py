"""Learning rates follow optimizer steps, never micro-batches: warm-up then decay, a plateau, and a rate set by hand."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

import autobatch

WARM_UP, UPDATES, PEAK = 4, 12, 0.1
PLAN = autobatch.make_plan(target=4, max_micro_batch_size=1)


def fresh() -> tuple[nn.Linear, torch.optim.Optimizer]:
    model = nn.Linear(2, 1)
    return model, torch.optim.SGD(model.parameters(), lr=PEAK)


def update(accumulator: autobatch.Accumulator, model: nn.Linear, optimizer: torch.optim.Optimizer) -> list[float]:
    """One optimizer step of four micro-batches: the rate that each of them saw."""
    rates = []

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    for micro_batch in torch.ones(4, 2).split(1):
        rates.append(rate(optimizer))
        accumulator.add(micro_batch, loss)
    return rates


def rate(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])


def warm_up_then_decay() -> list[list[float]]:
    """Rates of every micro-batch, update by update; the rate after the last comes alone."""
    model, optimizer = fresh()
    scheduler = LambdaLR(
        optimizer, lambda step: (step + 1) / WARM_UP if step < WARM_UP else (UPDATES - step) / (UPDATES - WARM_UP)
    )
    accumulator = autobatch.Accumulator(PLAN, model=model, optimizer=optimizer, scheduler=scheduler)
    return [*(update(accumulator, model, optimizer) for _ in range(UPDATES)), [rate(optimizer)]]


def plateau() -> list[float]:
    """The rate after each update whose metric is one of these."""
    model, optimizer = fresh()
    scheduler = ReduceLROnPlateau(
        optimizer, factor=0.1, patience=1, threshold=0.01, threshold_mode="abs", min_lr=1e-3, eps=1e-8
    )
    accumulator = autobatch.Accumulator(PLAN, model=model, optimizer=optimizer, scheduler=scheduler)
    rates = []
    for metric in (1.0, 0.995, 0.995, 0.5, 0.5, 0.5, 0.5, 0.5):
        update(accumulator, model, optimizer)
        accumulator.step_plateau(metric)
        rates.append(rate(optimizer))
    return rates


def by_hand_and_resumed() -> dict[str, Any]:
    """The rate set in `param_groups` holds, and a run resumed with its saved optimizer keeps it and its weights."""
    torch.manual_seed(0)
    model, optimizer = fresh()
    accumulator = autobatch.Accumulator(PLAN, model=model, optimizer=optimizer)
    update(accumulator, model, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.025
    update(accumulator, model, optimizer)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), accumulator.state_dict()])
    update(accumulator, model, optimizer)

    resumed_model, resumed_optimizer = fresh()
    resumed = autobatch.Accumulator(PLAN, model=resumed_model, optimizer=resumed_optimizer)
    for part, state in zip((resumed_model, resumed_optimizer, resumed), saved, strict=True):
        part.load_state_dict(state)  # type: ignore[attr-defined]
    rates = update(resumed, resumed_model, resumed_optimizer)
    return {
        "rates": rates,
        "steps": resumed.optimizer_steps,
        "equal": all(map(torch.equal, model.state_dict().values(), resumed_model.state_dict().values())),
    }


def main() -> dict[str, Any]:
    return {"warm_up": warm_up_then_decay(), "plateau": plateau(), "by_hand": by_hand_and_resumed()}


if __name__ == "__main__":
    print(main())
