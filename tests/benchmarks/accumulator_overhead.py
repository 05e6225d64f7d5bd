"""What the accumulator costs against a loop written by hand, on models whose step takes 5 ms and more on a CPU.

    python tests/benchmarks/accumulator_overhead.py [--quick] [--write]

The bar for the ratio is 1.01, for a model whose every micro-batch
takes 5 ms and more; a smaller one, whose whole window of four takes so long, is shown beside it. Both loops report the window's
loss and run in turns, the order changing, so that a slow moment of the machine meets both.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from results import Result, machine, markdown_table, run_benchmark

from autobatch.plan import make_plan
from autobatch.training.accumulator import Accumulator

if TYPE_CHECKING:
    from collections.abc import Callable

TARGET, MICRO_BATCH_SIZE, ROUNDS, BAR = 256, 64, 8, 1.01
WIDE, NARROW = 768, 384


def build(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


def by_hand(x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    model, optimizer = build(x.shape[1])

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
    model, optimizer = build(x.shape[1])
    plan = make_plan(target=TARGET, max_micro_batch_size=MICRO_BATCH_SIZE)
    accumulator = Accumulator(plan, model=model, optimizer=optimizer)
    return lambda: accumulator.step((x, y), lambda batch: nn.functional.mse_loss(model(batch[0]), batch[1]))


def seconds(step: Callable[[], object]) -> float:
    """Of the processor, one thread busy throughout: waiting for other programs does not count."""
    started = time.process_time()
    step()
    return time.process_time() - started


def compare(width: int, pairs: int, rounds: int) -> dict[str, float]:
    """Milliseconds of a window by hand, what the accumulator takes more, and the ratio."""
    x, y = torch.randn(TARGET, width), torch.randn(TARGET, 1)
    hand_seconds: list[float] = []
    our_seconds: list[float] = []
    for _ in range(rounds):  # where its tensors come to lie in memory makes a model faster or slower than its twin
        hand, ours = by_hand(x, y), accumulated(x, y)
        for _ in range(5):
            hand()
            ours()
        for number in range(pairs):
            turns = ((hand, hand_seconds), (ours, our_seconds))
            for step, times in turns if number % 2 else turns[::-1]:
                times.append(seconds(step))
    # What else runs on the machine meets both of a pair alike, and the median is deaf to the pairs that it split.
    hand_median = statistics.median(hand_seconds)
    extra = statistics.median(ours - by_hand for by_hand, ours in zip(hand_seconds, our_seconds, strict=True))
    figures = {"by_hand_ms": hand_median * 1e3, "extra_ms": extra * 1e3, "ratio": 1 + extra / hand_median}
    return {name: round(value, 4) for name, value in figures.items()}


def measure(*, quick: bool) -> Result:
    """Compare on a model whose micro-batches are long, and on one whose window is."""
    torch.set_num_threads(1)
    pairs, rounds = (4, 2) if quick else (60, ROUNDS)
    figures = {
        "micro_batch_of_5_ms": compare(WIDE, pairs, rounds),
        "window_of_5_ms": compare(NARROW, pairs * 5 // 3, rounds),
    }
    ratio = figures["micro_batch_of_5_ms"]["ratio"]
    names = {"micro_batch_of_5_ms": "each micro-batch takes about 5 ms", "window_of_5_ms": "each window of four does"}
    rows = [
        (names[name], f"{one['by_hand_ms']:.2f}", f"{one['extra_ms']:.3f}", f"{one['ratio']:.4f}")
        for name, one in figures.items()
    ]
    head = ("model", "window by hand (ms)", "more with the accumulator (ms)", "ratio")
    text = (
        f"# The accumulator against a loop by hand\n\n{machine()}, on one thread. The bar is {BAR:g} for the first.\n\n"
        f"{markdown_table(head, rows)}"
    )
    misses = () if ratio <= BAR or quick else (f"ratio {ratio:.4f}, the bar is {BAR:g}",)
    return Result(
        name="accumulator_overhead", data={"machine": machine(), "bar": BAR, **figures}, text=text, misses=misses
    )


if __name__ == "__main__":
    sys.exit(run_benchmark(measure, __doc__))
