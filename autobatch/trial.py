"""One attempt at one micro-batch size, and what came of it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["Outcome", "Trial"]

# Two show the same peak as any number; some tests run whole windows all the same.
_LONGEST_WINDOW = 4096


class Outcome(enum.StrEnum):
    """What came of a trial. Everything but `FITS` counts as not fitting."""

    FITS = "fits"
    OVER_BUDGET = "over_budget"
    """No exception, but the footprint that NVML showed was above the budget."""
    THRASHES = "thrashes"
    """Ran, but the allocator still flushed its cache in steady state (after the second window)."""
    OUT_OF_MEMORY = "out_of_memory"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One attempt at one micro-batch size.

    All byte counts are of one device and one rank. A window is what lies between two optimizer
    steps: `micro_batches_per_step` forward and backward passes.
    """

    micro_batch_size: int
    """Samples in one forward and backward, at least 1 (the largest of `window`)."""
    outcome: Outcome
    micro_batches_per_step: int
    """Micro-batches before each optimizer step: 1, or 2 where the plan accumulates."""
    steps: int
    """Optimizer steps that ran to their end."""
    peak_allocated_bytes: int
    """Most bytes held by tensors at once."""
    peak_reserved_bytes: int
    """Most bytes that the caching allocator held from the driver at once."""
    footprint_bytes: int
    """What NVML showed that the device gave this process: context, modules, reserved bytes."""
    alloc_retries: int
    """Cache flushes of the allocator after the second window (`num_alloc_retries`)."""
    seconds_per_step: float | None
    """Median seconds from one optimizer step to the next; None where time means nothing."""
    seconds_per_step_deviation: float | None = None
    """Median absolute deviation of those seconds, in seconds; None where fewer than two steps were timed."""
    seconds_per_step_end: float | None = None
    """Median seconds of what comes once for each step, after its micro-batches (clipping, the optimizer, zeroing): a
    part of `seconds_per_step`. None where time means nothing."""
    timed_steps: int = 0
    """Steps behind those three figures: all that ran but the first, which loads kernels and makes the state."""
    confirmation: bool = False
    """True where the trial confirms a size of the plan rather than searches for the maximum."""
    window: tuple[int, ...] = ()
    """The sizes of one window in order; a balanced plan's confirmation mixes two. Empty on input
    means `micro_batches_per_step` times `micro_batch_size`."""
    held_at_start_bytes: int = 0
    """Bytes held by tensors when the trial began: more from trial to trial where the job keeps references."""
    held_bytes: int = 0
    """Bytes held by tensors just before the last micro-batch of a window began: weights,
    optimizer state and, under accumulation, gradients. 0 where no window got that far."""
    gradient_bytes: int = 0
    """Bytes of the gradients that a window leaves: a part of `held_bytes` under accumulation."""
    largest_segment_bytes: int = 0
    """The largest piece that the allocator held from the driver at the end: about the largest tensor. What
    cannot be used for want of a hole that large grows with it."""
    oom_request_bytes: int = 0
    """For `OUT_OF_MEMORY`: the bytes asked for when it was raised, 0 where the error does not say."""
    note: str = ""
    """What decided an ambiguous outcome, or how the trial ended; empty where nothing is to be said."""

    def __post_init__(self) -> None:
        if not 1 <= self.micro_batches_per_step <= _LONGEST_WINDOW:  # before a window of as many is made
            raise ValueError(f"micro_batches_per_step {self.micro_batches_per_step} is not from 1 to {_LONGEST_WINDOW}")
        if not self.window:
            window = (self.micro_batch_size,) * self.micro_batches_per_step
            object.__setattr__(self, "window", window)
        if self.micro_batch_size != max(self.window):
            raise ValueError(f"micro_batch_size {self.micro_batch_size} is not the largest of window {self.window}")
        if self.micro_batches_per_step != len(self.window):
            raise ValueError(f"micro_batches_per_step {self.micro_batches_per_step} but window {self.window}")
        if self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} is below 1")
        if self.outcome is Outcome.FITS and self.steps < 1:
            raise ValueError(f"a trial at {self.micro_batch_size} without an optimizer step cannot fit")

    @property
    def is_timed(self) -> bool:
        """True where any of its figures is a time."""
        seconds = (self.seconds_per_step, self.seconds_per_step_deviation, self.seconds_per_step_end)
        return self.timed_steps > 0 or any(value is not None for value in seconds)

    @property
    def fits(self) -> bool:
        """True where the size can be trained with."""
        return self.outcome is Outcome.FITS
