"""Trials of earlier probes of the same job: which of them still hold for a question, and which one shows whether they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from autobatch.errors import PlanError
from autobatch.evidence import micro_batches_needed
from autobatch.search import find_bracket

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from autobatch.evidence import SizeFailure
    from autobatch.options import ProbeOptions
    from autobatch.trial import Trial

__all__ = ["KnownTrials", "bears_on", "is_repeated_by", "still_holding", "trial_to_repeat"]

# The same work allocates the same, but for what a library keeps or chooses at run time.
_LEAST_DIFFERENCE_BYTES = 8 << 20
_LEAST_DIFFERENCE = 0.01


@dataclass(frozen=True, kw_only=True)
class KnownTrials:
    """What earlier probes of a job leave to a new one."""

    trials: tuple[Trial, ...]
    """Those that hold for its question, each window once; none where only `limit` says something."""
    measured_at: str
    """When the newest of them ran: ISO 8601 in UTC."""
    measurements: tuple[str, ...]
    """The ids under which they are kept, the newest first."""
    limit: int | None = None
    """The largest size that may be answered, since a training ran out of memory with the next one; None where none did."""
    unchanged: bool = True
    """Whether the files that the job is made of are as they were."""
    certified: bool = True
    """Whether all that they come from was certified."""
    notes: tuple[str, ...] = ()
    """What the reader of an answer should know of them, one line each."""


def still_holding(
    trials: Iterable[Trial], options: ProbeOptions, *, budget_then: int, budget_now: int, limit: int | None = None
) -> tuple[Trial, ...]:
    """Choose the trials that say something for a question, under a budget that may be another.

    A trial whose footprint stayed within a budget runs the same under it: it never meets the cap. One that did not fit fails
    under a smaller budget too, and under a larger one where its footprint was above that. (What an out-of-memory error asked
    for, and the peak before it, say nothing of a larger budget: they were not there at once.) Accumulation only adds memory:
    what fitted with it fits without, what failed without it fails with it, and nothing is concluded the other way round.

    Args:
        trials: those of one series (same job, card and versions), in any order.
        options: the question.
        budget_then: the footprint in bytes that they might have.
        budget_now: the footprint in bytes that a trial may have now.
        limit: the largest size that may be answered; None where there is none but the question's own.

    Returns:
        Those that hold, in their order.
    """
    largest = options.candidates()[-1]
    ceiling = largest if limit is None else min(limit, largest)
    kept = []
    for trial in trials:
        if trial.micro_batch_size > ceiling or (trial.fits and trial.micro_batch_size < options.multiple_of):
            continue
        needed = options.micro_batches_per_step(trial.micro_batch_size)
        if trial.fits:
            holds = trial.footprint_bytes <= budget_now and trial.micro_batches_per_step >= needed
        else:
            fails_still = budget_now <= budget_then or trial.footprint_bytes > budget_now
            holds = fails_still and micro_batches_needed(trial) <= needed
        if holds:
            kept.append(trial)
    return tuple(kept)


def trial_to_repeat(trials: Sequence[Trial], options: ProbeOptions) -> Trial | None:
    """Choose the trial that, run again, shows best whether all of them still hold: the plan's own where it has run.

    Args:
        trials: what is known.
        options: the question.

    Returns:
        One of the trials that ran; None where there is none.
    """
    fitting = [trial for trial in trials if trial.fits]
    largest = find_bracket(trials).fits
    if largest is None:
        return min(
            (trial for trial in trials if not trial.fits), key=lambda trial: trial.micro_batch_size, default=None
        )
    try:
        window = options.make_plan(largest).confirmation_windows[0]
    except PlanError:
        window = ()
    exact = [trial for trial in fitting if trial.window == window]
    at_largest = [trial for trial in fitting if trial.micro_batch_size == largest]
    alike = exact or at_largest
    return alike[-1] if alike else None


def is_repeated_by(before: Trial, now: Trial) -> bool:
    """Whether a trial that was run again came out as before: the same verdict, and the same tensors to within 1 % or 8 MiB."""
    if not before.fits or not now.fits:
        return before.fits == now.fits
    allowed = max(_LEAST_DIFFERENCE_BYTES, _LEAST_DIFFERENCE * before.peak_allocated_bytes)
    return abs(before.peak_allocated_bytes - now.peak_allocated_bytes) <= allowed


def bears_on(failure: SizeFailure, options: ProbeOptions) -> bool:
    """Whether a size that ran out of memory in a training says something for a question: it would be trained the same way."""
    size = failure.micro_batch_size
    return size <= options.ceiling and failure.micro_batches_per_step <= options.micro_batches_per_step(size)
