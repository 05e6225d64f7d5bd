"""Which micro-batch size to try next: a pure function of the trials so far.

A search is looking for the certificate of `bracket`: a size that fits, whose next larger candidate does not (or
that has none). The trials are all the state that there is, so an interrupted search goes on from its journal.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autobatch.trial import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch.trial import Trial

__all__ = ["MOST_PADDING", "Bracket", "SearchSpace", "find_bracket", "next_size", "whole_share_may_fit"]

MOST_PADDING = 16
"""Samples that a job may pad one to: as many as common shapes of tensor cores and buckets ask for."""


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """The sizes that a search may answer with, and the memory that they share.

    Attributes:
        candidates: sizes in samples, ascending, not empty; a `range` is as good as a list.
        budget_bytes: the footprint that a trial may have.
        share: samples of one rank for each optimizer step; a micro-batch of that size runs without accumulation.
        first: where to begin, from what is known of a job much like this one; None where nothing is.
    """

    candidates: Sequence[int]
    budget_bytes: int
    share: int
    first: int | None = None

    @property
    def ceiling(self) -> int:
        """The largest candidate."""
        return self.candidates[-1]

    def at_most(self, size: float) -> int:
        """The largest candidate that is not above `size`; the smallest one where all are."""
        return self.candidates[max(0, bisect.bisect_right(self.candidates, size) - 1)]

    def above(self, size: int) -> int | None:
        """The next larger candidate; None above the ceiling."""
        position = bisect.bisect_right(self.candidates, size)
        return self.candidates[position] if position < len(self.candidates) else None

    def middle(self, low: int, high: int) -> int:
        """A candidate that halves those strictly between two sizes; there must be one."""
        first, last = bisect.bisect_right(self.candidates, low), bisect.bisect_left(self.candidates, high)
        return self.candidates[(first + last) // 2]


@dataclass(frozen=True, kw_only=True)
class Bracket:
    """What the trials prove.

    Attributes:
        fits: the largest size that fitted below every size that did not; None where none did.
        fails: the smallest size that did not fit; None where every size fitted.
        monotone: False where a size fitted above `fails`.
    """

    fits: int | None
    fails: int | None
    monotone: bool


def find_bracket(trials: Sequence[Trial]) -> Bracket:
    """Read the bracket off the trials, whatever their order.

    A share that ran whole, in one micro-batch, holds no gradients of an earlier one: where smaller sizes that
    accumulate failed, it is an answer of its own, with nothing above it.
    """
    fails = min((trial.micro_batch_size for trial in trials if not trial.fits), default=None)
    fitting = {trial.micro_batch_size for trial in trials if trial.fits}
    whole = _whole_share(trials)
    if whole is not None and whole.fits and fails is not None and fails < whole.micro_batch_size:
        return Bracket(fits=whole.micro_batch_size, fails=None, monotone=False)
    if fails is not None:
        # A size that both fitted and failed counts as failing: what fails now and then is no answer.
        below = {size for size in fitting if size < fails}
        return Bracket(fits=max(below, default=None), fails=fails, monotone=all(size <= fails for size in fitting))
    return Bracket(fits=max(fitting, default=None), fails=None, monotone=True)


def _whole_share(trials: Sequence[Trial]) -> Trial | None:
    """The latest trial of a share without accumulation, among trials that accumulate; None where there is none."""
    if not trials or all(trial.micro_batches_per_step == 1 for trial in trials):
        return None
    largest = max(trial.micro_batch_size for trial in trials)
    at_largest = [trial for trial in trials if trial.micro_batch_size == largest]
    return at_largest[-1] if at_largest[-1].micro_batches_per_step == 1 else None


def next_size(trials: Sequence[Trial], space: SearchSpace) -> int | None:
    """Choose the size to try next.

    Assumption: the footprint grows about linearly with the size, from what is held apart from activations. It
    proposes only; trials decide, and where they contradict it twice in a row, bisection takes over.
    Invariant: what is proposed lies strictly inside the bracket, so each trial narrows it.
    Stopping rule: nothing lies inside the bracket.
    Cost: two sizes at the least (one that fits, one that does not); with a bracket of width w after the
    predictions were given up, log2(w) more.

    Args:
        trials: every trial so far, in the order in which they ran; those that were known before may be of any size.
        space: what may be answered.

    Returns:
        A candidate inside the bracket; None once the search is over.
    """
    inside = [trial for trial in trials if trial.micro_batch_size <= space.ceiling]
    if (opening := _opening(inside, space)) is not None:
        return opening
    bracket = find_bracket(inside)
    if bracket.fails is None:
        return _grow(inside, space, bracket)
    if bracket.fits is None:
        if bracket.fails > space.candidates[0]:
            return _shrink(inside, space, bracket.fails)
        # The gradients of an earlier micro-batch may be all that was too much: the share whole has none. What one failing
        # size tells of a sample may be far too much: a job that pads takes as much for one sample as for several.
        return space.share if _whole_share_may_fit(inside, space, bracket.fails, padding=MOST_PADDING) else None
    above = space.above(bracket.fits)
    if above is None or above >= bracket.fails:
        return space.share if _whole_share_may_fit(inside, space, bracket.fits) else None
    return _close(inside, space, bracket.fits, bracket.fails)


# Parts of the largest tensor that are taken to be lost to holes too small for it, the likeliest first. Near the budget
# the allocator flushes what it cached, so that what it reserved before says little; what it cannot give back are
# holes between live tensors, which grow with the largest one (seen on recorded curves: 0.2 to 1.2 of it).
_UNUSABLE = (0.7, 0.35, 0.0)
# And where a size failed that should have fitted.
_MORE_UNUSABLE = (1.2, 2.0)
# Samples' worth of bytes from which on what an error asked for says something of the size.
_LARGE_REQUEST = 4
# An estimate this near the ceiling is worth the ceiling itself, which ends the search if it fits.
_NEAR = 0.97
# Predictions that may fail before bisection takes over, or steps grow.
_PATIENCE = 2


# ---- proposals --------------------------------------------------------------------------------------------------


def _grow(trials: Sequence[Trial], space: SearchSpace, bracket: Bracket) -> int | None:
    """Nothing has failed yet: go where the footprint is to meet the budget."""
    low = bracket.fits
    above = None if low is None else space.above(low)
    if low is None or above is None:
        return None
    trial = _trial_at(trials, low)
    estimates = [_estimate_from_fit(trial, space, unusable) for unusable in _UNUSABLE]
    if estimates[0] >= _NEAR * space.ceiling:
        return space.ceiling
    # A size that fitted where the estimate had ended shows that less is unusable than was thought.
    beyond = [size for size in map(space.at_most, estimates) if size > low]
    proposal = max(above, beyond[0] if beyond else above)
    # Estimates that keep ending too soon (memory taken in steps, say) are left behind by doubling the last stride.
    fitting = sorted({size.micro_batch_size for size in trials})
    if len(fitting) > _PATIENCE + 1:
        proposal = max(proposal, space.at_most(low + 2 * (low - fitting[-2])))
    return proposal


def _opening(trials: Sequence[Trial], space: SearchSpace) -> int | None:
    """The first size and, where that was well known, the one beside it: if it was right, one trial more proves it."""
    if not trials:
        return space.at_most(space.first or max(space.candidates[0], math.isqrt(space.ceiling) // 2))
    if space.first is None or len(trials) > 1:
        return None
    trial = trials[0]
    if trial.fits:
        return space.above(trial.micro_batch_size)
    lower = space.at_most(trial.micro_batch_size - 1)
    return lower if lower < trial.micro_batch_size else None


def _is_whole_share_untried(trials: Sequence[Trial], space: SearchSpace) -> bool:
    return space.ceiling == space.share and all(trial.micro_batch_size != space.share for trial in trials)


def _whole_share_may_fit(trials: Sequence[Trial], space: SearchSpace, size: int, *, padding: int = 1) -> bool:
    """Whether a share in one micro-batch is untried, and would fit by the estimate that leaves nothing unusable."""
    return _is_whole_share_untried(trials, space) and whole_share_may_fit(
        _trial_at(trials, size), budget_bytes=space.budget_bytes, share=space.share, padding=padding
    )


def whole_share_may_fit(trial: Trial, *, budget_bytes: int, share: int, padding: int = 1) -> bool:
    """Whether a share in one micro-batch, which holds no gradients of an earlier one, could fit where a size failed.

    Args:
        trial: a trial that accumulated and did not fit.
        budget_bytes: the footprint that a trial may have.
        share: samples of one rank for each optimizer step.
        padding: samples that may take as much memory together as the estimate gives one.
    """
    if not trial.held_bytes:
        return False
    # Where a window never ended the gradients are not known: at most half of what is held with their weights.
    gradient_bytes = trial.gradient_bytes or trial.held_bytes // 2
    room = budget_bytes - _outside(trial) - (trial.held_bytes - gradient_bytes)
    return room * padding / _per_sample(trial) >= share


def _shrink(trials: Sequence[Trial], space: SearchSpace, high: int) -> int:
    """Nothing has fitted yet: what the error said was asked for tells how far down to go."""
    smallest = space.candidates[0]
    estimate = _estimate_from_failure(_trial_at(trials, high), space, per_sample=None)
    return max(smallest, min(space.at_most(estimate), space.at_most(high / 2)))


def _close(trials: Sequence[Trial], space: SearchSpace, low: int, high: int) -> int:
    """Both ends are known: predict inside them, or halve them where predictions have failed."""
    if _tries_inside(trials) >= _PATIENCE:
        return space.middle(low, high)
    trial = _trial_at(trials, low)
    estimates = [_estimate_from_fit(trial, space, unusable) for unusable in _UNUSABLE]
    if estimates[0] >= high:
        # The failure contradicts it. An error over one large tensor tells by how much; else more is unusable than
        # was thought.
        failed, per_sample = _trial_at(trials, high), _per_sample(trial)
        estimates = [_estimate_from_failure(failed, space, per_sample=per_sample), high - 1]
        if failed.oom_request_bytes < _LARGE_REQUEST * per_sample:
            estimates = [_estimate_from_fit(trial, space, unusable) for unusable in _MORE_UNUSABLE] + estimates
    inside = [size for estimate in estimates if low < (size := space.at_most(estimate)) < high]
    if inside:
        return inside[0]
    above = space.above(low)
    return space.middle(low, high) if above is None or estimates[-1] >= high else above


# ---- estimates --------------------------------------------------------------------------------------------------


def _trial_at(trials: Sequence[Trial], size: int) -> Trial:
    """The latest trial of a size."""
    return next(trial for trial in reversed(trials) if trial.micro_batch_size == size)


def _outside(trial: Trial) -> int:
    """What the device gave beside the allocator's reserve: context and modules."""
    return max(0, trial.footprint_bytes - trial.peak_reserved_bytes)


def _per_sample(trial: Trial) -> float:
    """Bytes of tensors that one more sample adds to what is held apart from activations."""
    return max(1.0, (trial.peak_allocated_bytes - trial.held_bytes) / trial.micro_batch_size)


def _estimate_from_fit(trial: Trial, space: SearchSpace, unusable: float) -> float:
    """The size at which tensors, and holes of a part `unusable` of the largest one, fill the budget."""
    largest_per_sample = trial.largest_segment_bytes / trial.micro_batch_size
    room = space.budget_bytes - _outside(trial) - trial.held_bytes
    return room / (_per_sample(trial) + unusable * largest_per_sample)


def _estimate_from_failure(trial: Trial, space: SearchSpace, *, per_sample: float | None) -> float:
    """The size at which what an out-of-memory error lacked would not have been lacking.

    It lacked at least what was held and asked for beyond the budget. Where nothing is known of a sample's
    part, what the trial held is taken to be its samples' alone, which is most of it where nothing has fitted.
    """
    size = trial.micro_batch_size
    if trial.outcome is not Outcome.OUT_OF_MEMORY:
        return size - 1
    needed = trial.peak_allocated_bytes + trial.oom_request_bytes
    lacking = needed - space.budget_bytes
    if lacking <= 0:
        return size - 1
    if per_sample is None:
        per_sample = max(1.0, needed / size)
    return min(size - 1, size - lacking / per_sample)


def _tries_inside(trials: Sequence[Trial]) -> int:
    """Trials since both ends were known: each was a prediction that left the bracket open."""
    first_fail = next(i for i, trial in enumerate(trials) if not trial.fits)
    first_fit = next(i for i, trial in enumerate(trials) if trial.fits)
    return len(trials) - 1 - max(first_fail, first_fit)
