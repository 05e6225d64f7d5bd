"""Of the sizes that fit, the one that gets through an effective batch in the least time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from autobatch.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from autobatch.options import ProbeOptions
    from autobatch.trial import Trial

__all__ = ["BatchTime", "batch_time", "choose_fastest", "describe_times", "sizes_to_time", "windows_per_trial"]

# Kernels fill a card long before its memory is full: sizes below a quarter of the largest are not faster.
_SMALLEST_PART = 4
_MOST_SIZES = 5
# The first step of a trial is not timed. Of six, a median stands that one or two slow ones do not move.
_WINDOWS = 7
# What separates two runs of the same work on one card, where a trial's own steps happen to lie closer together.
_LEAST_NOISE = 0.02


@dataclass(frozen=True, kw_only=True)
class BatchTime:
    """What one effective batch takes at some size."""

    seconds: float
    """Time of all its micro-batches and of one end of a step."""
    noise_seconds: float
    """How far it may be off: the spread of the steps that were timed, in proportion."""

    def is_within_noise(self, other: BatchTime) -> bool:
        """Whether the two differ by less than both spreads together, or by less than 2 % of the lesser."""
        noise = max(self.noise_seconds + other.noise_seconds, _LEAST_NOISE * min(self.seconds, other.seconds))
        return abs(self.seconds - other.seconds) <= noise


def windows_per_trial(options: ProbeOptions) -> int:
    """Windows that each trial runs at least: more than were asked for where they are to be timed."""
    return max(options.min_windows, _WINDOWS) if options.objective == "throughput" else options.min_windows


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


def batch_time(trial: Trial, options: ProbeOptions) -> BatchTime | None:
    """Time of one effective batch at a trial's size: the plan's micro-batches, and one end of a step.

    The optimizer steps once for each effective batch, however many micro-batches it has: only the rest of a trial's
    time is multiplied. Where a trial does not tell the two apart, all of it is.

    None where the trial did not fit, knows no time or mixes sizes, or where no plan has its size as micro-batch.
    """
    if not trial.fits or trial.seconds_per_step is None or len(set(trial.window)) > 1:
        return None
    try:
        plan = options.make_plan(trial.micro_batch_size)
    except PlanError:  # so small that the plan would be too long to list
        return None
    if plan.micro_batch_size != trial.micro_batch_size:
        return None
    windows = plan.accumulation_steps / len(trial.window)
    end_seconds = min(trial.seconds_per_step_end or 0.0, trial.seconds_per_step)
    return BatchTime(
        seconds=(trial.seconds_per_step - end_seconds) * windows + end_seconds,
        # Not its root: what moves the clock of a card for one step moves it for the next ones too.
        noise_seconds=(trial.seconds_per_step_deviation or 0.0) * max(1.0, windows),
    )


def choose_fastest(trials: Sequence[Trial], options: ProbeOptions, largest: int) -> int:
    """Choose the size with the least time per effective batch; the largest of those that the noise does not tell from it."""
    times = _batch_times(trials, options, largest)
    return max(_as_fast_as_any(times)) if times else largest


def describe_times(trials: Sequence[Trial], options: ProbeOptions, chosen: int) -> str:
    """Say in one line what the sizes took, with the noise, and why this one was chosen; empty where only one was timed.

    Args:
        trials: those of the probe.
        options: what the probe was asked.
        chosen: the size of the plan.
    """
    fitting = [trial.micro_batch_size for trial in trials if trial.fits]
    times = _batch_times(trials, options, max(fitting, default=0))
    if len(times) < 2 or chosen not in times:
        return ""
    taken = ", ".join(
        f"{_number(times[size].seconds)} ± {_number(times[size].noise_seconds)} s at {size}"
        for size in sorted(times, reverse=True)
    )
    fastest = min(times, key=lambda size: times[size].seconds)
    why = (
        f"{chosen} is the fastest"
        if chosen == fastest
        else f"{chosen} and {fastest} differ within the noise, and {chosen} takes fewer steps"
    )
    return f"time per effective batch by micro-batch size: {taken}; {why}"


def _number(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds < 1000 else f"{seconds:.0f}"  # not 1.58e+03


def _batch_times(trials: Sequence[Trial], options: ProbeOptions, largest: int) -> Mapping[int, BatchTime]:
    return {
        trial.micro_batch_size: time
        for trial in trials
        if trial.micro_batch_size <= largest and (time := batch_time(trial, options)) is not None
    }


def _as_fast_as_any(times: Mapping[int, BatchTime]) -> list[int]:
    """The sizes whose time the noise does not tell from the least."""
    least = min(times.values(), key=lambda time: time.seconds)
    return [size for size, time in times.items() if time.is_within_noise(least)]
