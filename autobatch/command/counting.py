"""Count the windows and micro-batches of a script that knows nothing of it."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["StepCounts"]


class StepCounts:
    """Backward passes and optimizer steps, each counted where it is the outermost.

    A window of an optimizer is a step before which a backward ran since its step before: one that steps twice (as sharded
    optimizers do, group by group) is counted once, and so are the many small ones that step inside of one backward.
    """

    def __init__(self) -> None:
        self.backwards = 0
        self.grads = 0
        """Calls of `torch.autograd.grad` outside of a backward: what makes gradients where no backward does."""
        self.fewest_in_window: int | None = None
        """Backward passes before a step of any optimizer, the fewest of all windows; None before the first."""
        self._at_any_step = 0
        self._at_step: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()
        self._windows: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()
        self._most_windows = 0
        # Not one for each thread: a checkpointed part's own backward runs in a thread of the autograd engine.
        self._lock = threading.Lock()
        self._is_in_backward = False
        self._stepping: list[int] = []

    def enter_backward(self) -> bool:
        """Begin a backward; False where it runs inside of another."""
        with self._lock:
            if self._is_in_backward:
                return False
            self._is_in_backward = True
            self.backwards += 1
            return True

    def leave_backward(self) -> None:
        """End the outermost backward."""
        self._is_in_backward = False

    def note_grad(self) -> None:
        """Count a call of `torch.autograd.grad`, which is a gradient penalty unless nothing else makes gradients."""
        if not self._is_in_backward:
            self.grads += 1

    @property
    def passes(self) -> int:
        """What made gradients so far."""
        return self.backwards or self.grads

    @property
    def in_window(self) -> int:
        """Backward passes since the last step of any optimizer."""
        return self.passes - self._at_any_step

    def enter_step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Begin a step; False where it runs inside of another optimizer's."""
        if id(optimizer) in self._stepping:  # its step before raised, and never came to its end
            del self._stepping[self._stepping.index(id(optimizer)) :]
        self._stepping.append(id(optimizer))
        return len(self._stepping) == 1

    def leave_step(self, optimizer: torch.optim.Optimizer) -> bool:
        """End a step; False where it ran inside of another optimizer's."""
        if id(optimizer) in self._stepping:
            del self._stepping[self._stepping.index(id(optimizer)) :]
        return not self._stepping

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Count a step; True where it makes a window more, of the optimizer that made most."""
        if self.in_window:
            self.fewest_in_window = min(self.in_window, self.fewest_in_window or self.in_window)
            self._at_any_step = self.passes
        if self.passes <= self._at_step.get(optimizer, 0):
            return False
        self._at_step[optimizer] = self.passes
        self._windows[optimizer] = self._windows.get(optimizer, 0) + 1
        if self._windows[optimizer] <= self._most_windows:
            return False
        self._most_windows = self._windows[optimizer]
        return True

    def windows(self) -> list[tuple[torch.optim.Optimizer, int]]:
        """Each optimizer that stepped, and its windows."""
        return list(self._windows.items())
