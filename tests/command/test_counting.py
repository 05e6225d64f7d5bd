"""Windows and micro-batches are counted right, whatever a script's optimizers do."""

from __future__ import annotations

import threading

import torch
from torch import nn

from autobatch.command.counting import StepCounts


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


class Loop:
    """Calls the counts as the hooks in a script do."""

    def __init__(self) -> None:
        self.counts, self.windows = StepCounts(), 0

    def backward(self, times: int = 1) -> None:
        for _ in range(times):
            assert self.counts.enter_backward()
            self.counts.leave_backward()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        assert self.counts.enter_step(optimizer)
        assert self.counts.leave_step(optimizer)
        self.windows += self.counts.step(optimizer)


def test_a_loop_that_accumulates() -> None:
    """Three windows of two micro-batches."""
    loop, optimizer = Loop(), sgd()
    for _ in range(3):
        loop.backward(2)
        loop.step(optimizer)
    assert (loop.windows, loop.counts.fewest_in_window, loop.counts.in_window) == (3, 2, 0)


def test_one_that_steps_twice_makes_one_window() -> None:
    """As sharded optimizers step group by group; a step without a backward before it is none."""
    loop, optimizer = Loop(), sgd()
    loop.step(optimizer)
    for _ in range(3):
        loop.backward()
        loop.step(optimizer)
        loop.step(optimizer)
    assert (loop.windows, loop.counts.fewest_in_window) == (3, 1)


def test_optimizers_in_turns() -> None:
    """Of a GAN's two, the one that steps most makes the windows; the fewest micro-batches are those of either."""
    loop, critic, generator = Loop(), sgd(), sgd()
    for _ in range(3):
        for _ in range(2):
            loop.backward(4)
            loop.step(critic)
        loop.backward(2)
        loop.step(generator)
    assert (loop.windows, loop.counts.fewest_in_window) == (6, 2)
    assert [count for _, count in loop.counts.windows()] == [6, 3]


def test_steps_inside_of_a_backward() -> None:
    """One small optimizer for each parameter: a window for each backward, however many step in it."""
    loop, optimizers = Loop(), [sgd() for _ in range(5)]
    for _ in range(3):
        assert loop.counts.enter_backward()
        for optimizer in optimizers:
            loop.step(optimizer)
        loop.counts.leave_backward()
    assert (loop.windows, loop.counts.fewest_in_window) == (3, 1)


def test_a_backward_inside_of_another() -> None:
    """A checkpointed part runs its own, in a thread of the engine: it is none of the script's."""
    counts = StepCounts()
    assert counts.enter_backward()
    inner: list[bool] = []
    thread = threading.Thread(target=lambda: inner.append(counts.enter_backward()))
    thread.start()
    thread.join()
    assert inner == [False]
    counts.leave_backward()
    assert counts.backwards == 1


def test_an_optimizer_around_another() -> None:
    """The inner one's step is part of the outer one's; one that raised, and never ended, is forgotten."""
    counts, outer, inner = StepCounts(), sgd(), sgd()
    assert counts.enter_step(outer)
    assert not counts.enter_step(inner)
    assert not counts.leave_step(inner)
    assert counts.leave_step(outer)
    assert counts.enter_step(outer)  # raises inside
    assert counts.enter_step(outer)
    assert counts.leave_step(outer)
