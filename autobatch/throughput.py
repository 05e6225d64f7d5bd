"""Of the sizes that fit, the one that gets through an effective batch in the least time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autobatch.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch.options import ProbeOptions
    from autobatch.trial import Trial

__all__ = ["choose_fastest", "seconds_per_batch", "sizes_to_time"]

# Kernels fill a card long before its memory is full: sizes below a quarter of the largest are not faster.
_SMALLEST_PART = 4
_MOST_SIZES = 5
# Two sizes nearer than this in time are one: the larger is taken, whose steps are fewer.
_NOISE = 0.02


def sizes_to_time(options: ProbeOptions, largest: int) -> tuple[int, ...]:
    """Choose the sizes of a throughput comparison: those of the plans with the fewest steps.

    Args:
        options: what the probe is asked.
        largest: the largest size that fits.

    Returns:
        At most five sizes, the largest first, each the micro-batch of one plan.
    """
    sizes: list[int] = []
    limit = largest
    while limit >= max(options.multiple_of, largest / _SMALLEST_PART) and len(sizes) < _MOST_SIZES:
        try:
            size = options.make_plan(limit).micro_batch_size
        except PlanError:
            break
        if size < largest / _SMALLEST_PART:
            break
        sizes.append(size)
        limit = size - options.multiple_of
    return tuple(sizes)


def seconds_per_batch(trial: Trial, options: ProbeOptions) -> float | None:
    """Time of one effective batch at a trial's size: its seconds per micro-batch times the plan's steps.

    None where the trial did not fit or knows no time, or where no plan has its size as micro-batch.
    """
    if not trial.fits or trial.seconds_per_step is None:
        return None
    try:
        plan = options.make_plan(trial.micro_batch_size)
    except PlanError:  # so small that the plan would be too long to list
        return None
    if plan.micro_batch_size != trial.micro_batch_size:
        return None
    return trial.seconds_per_step / len(trial.window) * plan.accumulation_steps


def choose_fastest(trials: Sequence[Trial], options: ProbeOptions, largest: int) -> int:
    """Choose the size with the least time per effective batch; the largest of those within 2 % of it."""
    times = {
        trial.micro_batch_size: seconds
        for trial in trials
        if trial.micro_batch_size <= largest and (seconds := seconds_per_batch(trial, options)) is not None
    }
    if not times:
        return largest
    least = min(times.values())
    return max(size for size, seconds in times.items() if seconds <= (1 + _NOISE) * least)
