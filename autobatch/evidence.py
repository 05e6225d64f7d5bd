"""What stored trials prove about a question that was not the probe's own: another target, another world size.

Trials of one series (same job, card, versions and memory limits) are evidence about sizes, not about targets. Where they
reach, the answer is arithmetic; where they do not, it is `unknown`, never a guess.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from autobatch.errors import PlanError
from autobatch.plan import LARGEST_LISTING
from autobatch.search import MOST_PADDING, whole_share_may_fit
from autobatch.trial import Outcome, Trial

if TYPE_CHECKING:
    from collections.abc import Iterable

    from autobatch.options import ProbeOptions
    from autobatch.plan import Plan

__all__ = ["Bound", "Evidence", "SizeFailure", "StoredAnswer", "Verdict", "micro_batches_needed"]

Verdict = Literal["fits", "does_not_fit", "unknown"]


@dataclass(frozen=True, kw_only=True)
class SizeFailure:
    """A size that ran out of memory outside a probe, such as in the training that a plan was made for."""

    micro_batch_size: int
    """Samples in one micro-batch, at least 1."""
    micro_batches_per_step: int
    """1 without accumulation, 2 with it (more than two hold no more memory than two)."""

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} is below 1")
        if self.micro_batches_per_step not in (1, 2):
            raise ValueError(f"micro_batches_per_step {self.micro_batches_per_step} is neither 1 nor 2")


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What is proven of the sizes that run under one kind of accumulation."""

    micro_batches_per_step: int
    """1 without accumulation, 2 with it."""
    largest_fitting: int | None
    """The largest size in samples that ran and fitted below every trial that did not, or what a failure outside a probe
    left of it; None where none did."""
    smallest_failing: int | None
    """The smallest size in samples that did not fit; None where none failed."""


@dataclass(frozen=True, kw_only=True)
class StoredAnswer:
    """What the evidence says to one question."""

    verdict: Verdict
    plan: Plan | None
    """The plan, for the verdict `fits`; every one of its sizes lies within the bound."""
    bound: Bound
    """The bound that decided."""
    reason: str
    """One sentence that says why."""
    missing_bytes: int | None = None
    """For `does_not_fit`: by about how many bytes the smallest size is too large, from the most that tensors held and what the
    error asked for; None where no trial says."""


class Evidence:
    """The bounds that trials of one series prove.

    Accumulation only adds memory (the gradients stay alive), so a size that fitted with it also fits without, and one that
    failed without it also fails with it; nothing is concluded the other way round.
    """

    def __init__(self, trials: Iterable[Trial], *, budget_bytes: int, failures: Iterable[SizeFailure] = ()) -> None:
        """Read the bounds off the trials.

        Args:
            trials: trials of one series, in any order.
            budget_bytes: the footprint that each of them might have.
            failures: sizes that ran out of memory elsewhere; each lowers the bounds, whatever a trial says.
        """
        self._trials = tuple(trials)
        self._budget_bytes = budget_bytes
        self._failures = tuple(failures)
        self.whole = self._bound(1)
        self.accumulating = self._bound(2)

    def _bound(self, micro_batches: int) -> Bound:
        # What opens a window meets no gradients: only what follows it was tried under accumulation.
        fitting = {size for trial in self._trials if trial.fits for size in trial.window[micro_batches - 1 :]}
        failing = min((trial.micro_batch_size for trial in self._failing_trials(micro_batches)), default=None)
        # A trial's failure contradicts the sizes above it: of those that fitted, only smaller ones count.
        largest = max((size for size in fitting if failing is None or size < failing), default=None)
        reported = [one.micro_batch_size for one in self._failures if one.micro_batches_per_step <= micro_batches]
        lowest = min(reported, default=None)
        if lowest is not None:
            # A failure outside the probe takes its own size and all above it; what lies below fitted as before.
            failing = lowest if failing is None else min(failing, lowest)
            largest = None if largest is None else min(largest, lowest - 1) or None
        return Bound(micro_batches_per_step=micro_batches, largest_fitting=largest, smallest_failing=failing)

    def _failing_trials(self, micro_batches: int) -> list[Trial]:
        """Trials whose failure holds under this accumulation too."""
        return [trial for trial in self._trials if not trial.fits and micro_batches_needed(trial) <= micro_batches]

    def answer(self, options: ProbeOptions, *, most_listed: int = LARGEST_LISTING) -> StoredAnswer:
        """Answer for a target, a world size and a split.

        `fits` needs a plan whose sizes all lie within a bound, and that no untested size could better: it is the plan that a
        probe would end with. `does_not_fit` needs the smallest size that may be used to have failed.

        Args:
            options: the question; what concerns trials alone (device, headroom, limits) is passed over.
            most_listed: micro-batches above which a plan is too long to be listed.

        Returns:
            The answer, `unknown` where the bounds do not reach.

        Raises:
            PlanError: the target cannot be hit under the split, whatever fits or with the sizes that do.
        """
        options.make_plan(options.ceiling, most_listed=most_listed)
        if options.ceiling == options.share:
            whole = self._answer_whole(options)
            if whole is not None:
                return whole
        return self._answer_accumulating(options, most_listed)

    def _answer_whole(self, options: ProbeOptions) -> StoredAnswer | None:
        """Answer for a rank's share in one micro-batch; None where it fails and accumulation decides."""
        share, bound = options.share, self.whole
        if bound.largest_fitting is not None and bound.largest_fitting >= share:
            return _fits(options.make_plan(share), bound)
        if bound.smallest_failing is not None and bound.smallest_failing <= share:
            return self._does_not_fit(bound, share) if share == options.multiple_of else None
        if not self._whole_may_fit(share):
            return None
        return _unknown(bound, f"a rank's share of {share} in one micro-batch has not been tried, and could fit")

    def _answer_accumulating(self, options: ProbeOptions, most_listed: int) -> StoredAnswer:
        """Answer for a share in several micro-batches, where it does not fit whole."""
        bound, smallest = self.accumulating, options.multiple_of
        if bound.smallest_failing is not None and bound.smallest_failing <= smallest:
            return self._does_not_fit(bound, smallest)
        if bound.largest_fitting is None or bound.largest_fitting < smallest:
            return _unknown(bound, f"no size from {smallest} on has been tried with accumulation")
        below = options.ceiling if options.ceiling < options.share else options.share - 1
        best = below if bound.smallest_failing is None else min(bound.smallest_failing - 1, below)
        better = options.make_plan(best, most_listed=most_listed)  # raises where even this leaves no plan
        try:
            plan = options.make_plan(min(bound.largest_fitting, best), most_listed=most_listed)
        except PlanError:
            plan = None
        if plan is None or (better.sizes, better.accumulation_steps) != (plan.sizes, plan.accumulation_steps):
            upper = "" if bound.smallest_failing is None else f" and below {bound.smallest_failing}"
            return _unknown(
                bound,
                f"sizes above {bound.largest_fitting}{upper} have not been tried with accumulation, and could give a better plan",
            )
        return _fits(plan, bound)

    def _whole_may_fit(self, share: int) -> bool:
        """Whether a share that was not tried whole could fit, by the estimate on which the search decides that too."""
        tried = [trial for trial in self._trials if trial.micro_batch_size <= share]
        failing = min((trial.micro_batch_size for trial in tried if not trial.fits), default=None)
        if failing is None:
            return True
        # What fitted tells a sample's bytes in full; what ran out of memory, only those that it came to.
        largest = self.accumulating.largest_fitting
        # A plan's confirmation that mixes sizes tells less: its peak may be a smaller micro-batch's.
        telling = [trial for trial in tried if trial.fits and trial.window[1:] and set(trial.window) == {largest}]
        telling = telling or [trial for trial in tried if not trial.fits and trial.micro_batch_size == failing]
        padding = MOST_PADDING if largest is None else 1
        return any(
            whole_share_may_fit(trial, budget_bytes=self._budget_bytes, share=share, padding=padding)
            for trial in telling
        )

    def _does_not_fit(self, bound: Bound, smallest: int) -> StoredAnswer:
        lacking = [
            _missing_bytes(trial, self._budget_bytes)
            for trial in self._failing_trials(bound.micro_batches_per_step)
            if trial.micro_batch_size <= smallest
        ]
        return StoredAnswer(
            verdict="does_not_fit",
            plan=None,
            bound=bound,
            reason=f"micro-batch {bound.smallest_failing} did not fit, and none smaller may be used",
            missing_bytes=max(filter(None, lacking), default=None),
        )


def micro_batches_needed(trial: Trial) -> int:
    """With how many micro-batches per step a trial's failure comes: 1 where the first one of all, without gradients, failed."""
    in_first = trial.outcome is Outcome.OUT_OF_MEMORY and trial.steps == 0 and not trial.held_bytes
    return 1 if in_first and trial.window[0] == trial.micro_batch_size else trial.micro_batches_per_step


def _missing_bytes(trial: Trial, budget_bytes: int) -> int | None:
    """About what a trial that did not fit lacked; None where fragments, or what it did not say, hide it.

    What the allocator held beside tensors counts for nothing: it may have been of use.
    """
    needed = trial.footprint_bytes
    if trial.outcome is Outcome.OUT_OF_MEMORY:
        outside = max(0, trial.footprint_bytes - trial.peak_reserved_bytes)
        needed = outside + trial.peak_allocated_bytes + trial.oom_request_bytes
    return needed - budget_bytes if needed > budget_bytes else None


def _fits(plan: Plan, bound: Bound) -> StoredAnswer:
    how = "with accumulation" if bound.micro_batches_per_step > 1 else "in one micro-batch per step"
    limit = "nothing larger failed" if bound.smallest_failing is None else f"{bound.smallest_failing} did not"
    chosen = f"the plan takes {plan.micro_batch_size} × {plan.accumulation_steps}"
    reason = f"up to {bound.largest_fitting} samples fit {how}, {limit}; {chosen}"
    return StoredAnswer(verdict="fits", plan=plan, bound=bound, reason=reason)


def _unknown(bound: Bound, reason: str) -> StoredAnswer:
    return StoredAnswer(verdict="unknown", plan=None, bound=bound, reason=reason)
