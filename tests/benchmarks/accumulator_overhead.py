"""What the accumulator costs against a loop written by hand, on a model whose step takes 5 ms and more on a CPU.

Run by hand: `python tests/benchmarks/accumulator_overhead.py`. The bar for the ratio is 1.01. Both loops report the window's
loss and run in turns, the order changing, so that a slow moment of the machine meets both.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from autobatch.plan import make_plan
from autobatch.training.accumulator import Accumulator

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH, TARGET, MICRO_BATCH_SIZE, PAIRS, BAR = 384, 256, 64, 400, 1.01


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


def by_hand(x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    model, optimizer = build()

    def step() -> object:
        total = torch.zeros(())
        for inputs, wanted in zip(x.split(MICRO_BATCH_SIZE), y.split(MICRO_BATCH_SIZE), strict=True):
            loss = nn.functional.mse_loss(model(inputs), wanted) / (TARGET // MICRO_BATCH_SIZE)
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def accumulated(x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    model, optimizer = build()
    plan = make_plan(target=TARGET, max_micro_batch_size=MICRO_BATCH_SIZE)
    accumulator = Accumulator(plan, model=model, optimizer=optimizer)
    return lambda: accumulator.step((x, y), lambda batch: nn.functional.mse_loss(model(batch[0]), batch[1]))


def seconds(step: Callable[[], object]) -> float:
    """Of the processor, one thread busy throughout: waiting for other programs does not count."""
    started = time.process_time()
    step()
    return time.process_time() - started


def main() -> int:
    torch.set_num_threads(1)
    x, y = torch.randn(TARGET, WIDTH), torch.randn(TARGET, 1)
    hand, ours = by_hand(x, y), accumulated(x, y)
    for _ in range(5):
        hand()
        ours()
    hand_seconds, our_seconds = [], []
    for number in range(PAIRS):
        turns = ((hand, hand_seconds), (ours, our_seconds))
        for step, times in turns if number % 2 else turns[::-1]:
            times.append(seconds(step))
    # The lower quartile: what else runs on the machine only ever adds.
    quartiles = [statistics.quantiles(times, n=4)[0] for times in (hand_seconds, our_seconds)]
    ratio = quartiles[1] / quartiles[0]
    figures = {"by_hand_ms": quartiles[0] * 1e3, "accumulator_ms": quartiles[1] * 1e3, "ratio": ratio}
    sys.stdout.write(json.dumps({name: round(value, 4) for name, value in figures.items()}, indent=2) + "\n")
    return 0 if ratio <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
