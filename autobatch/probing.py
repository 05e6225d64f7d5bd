"""Conduct a probe: run the trials that the search asks for, make the plan and confirm each of its sizes."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from autobatch._version import __version__
from autobatch.errors import AutobatchError, BusyError, NothingFitsError, PlanError, UsageError, WorkloadError
from autobatch.facts import AnswerRemarks, DeviceFacts
from autobatch.known import is_repeated_by, trial_to_repeat
from autobatch.report import Cached, Memory, Report, Versions, describe_age, fingerprint, utc_timestamp
from autobatch.search import Bracket, SearchSpace, find_bracket, next_size
from autobatch.throughput import choose_fastest, describe_times, sizes_to_time, windows_per_trial
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autobatch.breakdown import MemoryBreakdown
    from autobatch.known import KnownTrials
    from autobatch.options import ProbeOptions
    from autobatch.plan import Plan
    from autobatch.trial import Trial

__all__ = [
    "Noted",
    "ProbeEvent",
    "TrialEnded",
    "TrialSource",
    "TrialStarted",
    "conduct_probe",
    "itemized",
    "nothing_fits",
    "unitemized",
]

# Less than this may be a cache that a library keeps.
_LEAST_LEAK_BYTES = 1 << 20


class TrialSource(Protocol):
    """Where trials run: this process, or a child of its own."""

    @property
    def facts(self) -> DeviceFacts:
        """The device that the trials run on."""

    def run_trial(self, window: Sequence[int], *, confirmation: bool) -> Trial:
        """Run one trial of a window of micro-batch sizes."""

    def remarks(self) -> AnswerRemarks:
        """What is to be said of the answer, asked for after the trials."""


@dataclass(frozen=True, kw_only=True)
class TrialStarted:
    """A trial is about to run."""

    window: tuple[int, ...]
    confirmation: bool
    bracket: Bracket
    ceiling: int
    """The largest size that may be answered."""


@dataclass(frozen=True, kw_only=True)
class TrialEnded:
    """A trial has run."""

    trial: Trial
    bracket: Bracket
    seconds: float
    """What it took by the clock, the making of the job included."""


@dataclass(frozen=True, kw_only=True)
class Noted:
    """Something to be said meanwhile, in one line."""

    text: str


ProbeEvent = DeviceFacts | TrialStarted | TrialEnded | Noted


def conduct_probe(
    source: TrialSource,
    options: ProbeOptions,
    *,
    workload: str,
    first: int | None = None,
    known: KnownTrials | None = None,
    confirm: bool = True,
    progress: Callable[[ProbeEvent], None] | None = None,
) -> Report:
    """Find the maximum, plan for the target, and confirm the plan's sizes.

    Of trials that are known, one runs again, the plan's own where there is one: comes it out the same, all of them count as
    if they had run now, and the search goes on from them; else they are left aside.

    Args:
        source: where the trials run.
        options: what is asked.
        workload: the training job's name, for the report.
        first: the size to begin with, where something is known of a job much like this one.
        known: trials of earlier probes of this job that hold for this question.
        confirm: whether one of them is run again, or all are trusted.
        progress: called with each event as it comes.

    Returns:
        The report; its plan is None where nothing fits.

    Raises:
        PlanError: the target cannot be hit under the split, whatever fits; or a size that fitted leaves no plan, since
            the smallest one did not.
        UsageError: the throughput is asked for on an emulated card, which knows no time.
        BusyError: the deadline passed, or the GPU is taken by others.
        WorkloadError: the job failed, but not for want of memory; or it leaks memory until no size fits any more.
    """
    if options.objective == "throughput" and source.facts.basis == "emulated":
        raise UsageError("objective 'throughput' needs a real GPU: an emulated one knows no time; use max or plan")
    options.make_plan(options.ceiling)  # says before the first trial that the target cannot be hit
    probe = _Probe(source, options, progress or (lambda _: None), first)
    if known is not None:
        probe.recall(known, confirm=confirm)
    plan = probe.find_plan()
    return probe.report(plan, workload)


class _Probe:
    """One probe under way."""

    def __init__(
        self,
        source: TrialSource,
        options: ProbeOptions,
        progress: Callable[[ProbeEvent], None],
        first: int | None,
    ) -> None:
        self._source = source
        self._options = options
        self._progress = progress
        self._trials: list[Trial] = []
        self._ran: list[Trial] = []
        self._known: KnownTrials | None = None
        self._confirmed = False
        self._space = SearchSpace(
            candidates=options.candidates(),
            budget_bytes=source.facts.memory.budget_bytes,
            share=options.share,
            first=first,
        )
        self._deadline = None if options.deadline is None else time.monotonic() + options.deadline
        progress(source.facts)

    def recall(self, known: KnownTrials, *, confirm: bool) -> None:
        """Begin with known trials, if the one that is run again comes out as before.

        Raises:
            NothingFitsError: a training ran out of memory with the smallest size that may be used.
        """
        space = self._space
        if known.limit is not None:
            self._space = self._limited(space, known)
        self._known = known
        before = trial_to_repeat(known.trials, self._options)
        if before is None:
            return
        self._trials = list(known.trials)
        how = "one runs again to show whether they hold" if confirm else "trusted as they stand"
        trials = f"{len(known.trials)} trial{'s' if len(known.trials) > 1 else ''}"
        self._progress(Noted(text=f"cached: {trials}, measured {describe_age(known.measured_at)}; {how}"))
        if not confirm:
            return
        now = self._run(before.window, confirmation=True)
        self._trials = [trial for trial in self._trials if trial is not before]
        self._confirmed = is_repeated_by(before, now)
        if not self._confirmed:
            self._trials, self._known, self._space = [now], None, space
            self._progress(
                Noted(text=f"{_difference(before, now)}: what was known is left aside, and all is tried anew")
            )

    def _limited(self, space: SearchSpace, known: KnownTrials) -> SearchSpace:
        """The sizes up to a limit."""
        candidates = space.candidates[: bisect.bisect_right(space.candidates, known.limit or 0)]
        if not candidates:
            raise NothingFitsError(f"nothing smaller may be used, and {known.notes[0]}", trials=())
        return dataclasses.replace(space, candidates=candidates)

    def find_plan(self) -> Plan | None:
        """Search, plan and confirm until a plan stands whose sizes have all run."""
        while True:
            while (size := next_size(self._trials, self._space)) is not None:
                self._run((size,) * self._options.micro_batches_per_step(size))
            bracket = find_bracket(self._trials)
            if bracket.fits is None:
                self._check_that_nothing_fitted()
                return None
            plan = self._confirmed_plan(bracket.fits)
            if plan is not None:
                return plan
            # What failed lowers the bracket, and the search goes on below it.
            if find_bracket(self._trials) == bracket:
                raise self._not_monotone()

    def _confirmed_plan(self, largest: int) -> Plan | None:
        """Plan for the largest size and run what of the plan has not run; None where some of it failed."""
        if self._options.objective == "throughput" and not self._time_sizes(largest):
            return None
        fastest = self._options.objective == "throughput"
        plan = self._options.make_plan(choose_fastest(self._trials, self._options, largest) if fastest else largest)
        for window in plan.confirmation_windows:
            if not self._has_run(window) and not self._run(window, confirmation=True).fits:
                return None
        return plan

    def _time_sizes(self, largest: int) -> bool:
        """Run the sizes of a throughput comparison that have not run; False where one failed that had not before."""
        for size in sizes_to_time(self._options, largest):
            window = (size,) * self._options.micro_batches_per_step(size)
            has_failed = any(not trial.fits and trial.window == window for trial in self._trials)
            if not has_failed and not self._has_run(window) and not self._run(window, confirmation=True).fits:
                return False
        return True

    def _check_that_nothing_fitted(self) -> None:
        if any(trial.fits for trial in self._trials):
            raise self._not_monotone()

    def _not_monotone(self) -> PlanError | WorkloadError:
        largest = max(trial.micro_batch_size for trial in self._trials if trial.fits)
        failing = min(trial.micro_batch_size for trial in self._trials if not trial.fits)
        if leak := _describe_leak(self._ran):
            return WorkloadError(f"micro-batch {largest} fitted, but {failing} did not: {leak}")
        return PlanError(
            f"micro-batch {largest} fitted, but {failing} did not: memory is not monotone here, and no plan of the "
            f"{self._options.split} split stands; another --split or --target, or --multiple-of {largest}, keeps away from it"
        )

    def _has_run(self, window: tuple[int, ...]) -> bool:
        """Whether a trial that fitted ran these sizes, in as many micro-batches or more."""
        return any(
            trial.fits and len(trial.window) >= len(window) and trial.window[-len(window) :] == window
            for trial in self._trials
        )

    def _run(self, window: tuple[int, ...], *, confirmation: bool = False) -> Trial:
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise BusyError(
                f"the deadline of {self._options.deadline:g} s passed after {len(self._trials)} trials: give --deadline more, "
                "or lower --max-micro-batch"
            )
        bracket = find_bracket(self._trials)
        self._progress(
            TrialStarted(window=window, confirmation=confirmation, bracket=bracket, ceiling=self._space.ceiling)
        )
        started = time.monotonic()
        trial = self._source.run_trial(window, confirmation=confirmation)
        self._trials.append(trial)
        self._ran.append(trial)
        self._progress(TrialEnded(trial=trial, bracket=find_bracket(self._trials), seconds=time.monotonic() - started))
        return trial

    def report(self, plan: Plan | None, workload: str) -> Report:
        """Put together what was found."""
        facts, remarks = self._source.facts, self._source.remarks()
        bracket = find_bracket(self._trials)
        largest = bracket.fits
        ceiling_reached = largest == self._space.ceiling
        answer = next(
            (trial for trial in reversed(self._trials) if trial.micro_batch_size == largest), self._trials[-1]
        )
        warnings = [] if plan is None else list(plan.warnings)
        warnings.extend(self._known.notes if self._known else ())
        if not bracket.monotone:
            failing = min(trial.micro_batch_size for trial in self._trials if not trial.fits)
            warnings.append(
                f"micro-batch {failing}, which accumulates, did not fit, but the whole share of {largest} in one did"
                if bracket.fails is None
                else f"a size above {failing} fitted although {failing} did not: memory is not monotone here"
            )
        if self._options.objective == "throughput" and plan is not None:
            warnings.append(describe_times(self._trials, self._options, plan.micro_batch_size))
        warnings.append(_describe_leak(self._ran))
        warnings.extend(remarks.warnings)
        unaccumulated = remarks.unaccumulated if plan is not None and plan.accumulation_steps > 1 else ""
        warnings.append(unaccumulated)
        if remarks.data_dependent:
            warnings.append(
                f"shapes are read from the device by {', '.join(remarks.data_dependent)}: an emulated card holds no values, "
                "so this under-measures and is not certified; probe on a real GPU"
            )
        return Report(
            basis=facts.basis,
            workload=workload,
            fingerprint=_fingerprint(facts, workload, self._options),
            plan=plan,
            objective=self._options.objective,
            measured_at=utc_timestamp() if self._ran or self._known is None else self._known.measured_at,
            micro_batches_per_step=answer.micro_batches_per_step,
            max_micro_batch_size=largest,
            smallest_failing=bracket.fails,
            ceiling_reached=ceiling_reached,
            monotone=bracket.monotone,
            device=facts.device,
            memory=_memory_seen(facts.memory, self._trials),
            trials=tuple(self._trials),
            versions=Versions(autobatch=__version__, torch=facts.torch_version, cuda=facts.cuda_version),
            options=self._options,
            certified=not unaccumulated
            and not remarks.data_dependent
            and (largest is not None or bracket.fails is not None),
            data_dependent=remarks.data_dependent,
            not_modelled=remarks.not_modelled,
            expected_error=remarks.expected_error,
            warnings=tuple(filter(None, warnings)),
            cached=self._cached(),
        )

    def _cached(self) -> Cached | None:
        if self._known is None or not self._known.trials:
            return None
        return Cached(
            measured_at=self._known.measured_at,
            measurement=self._known.measurements[0],
            num_trials=len(self._trials) - len(self._ran),
            confirmed=self._confirmed,
        )


def itemized(
    report: Report,
    itemize: Callable[[tuple[int, ...]], MemoryBreakdown | None],
    progress: Callable[[ProbeEvent], None] | None = None,
) -> Report:
    """Add to a report what the memory of its plan's largest window is made of.

    The answer stands already: where that cannot be found, the report says why.

    Args:
        report: a probe's; where it has no plan, nothing is run.
        itemize: runs a window once more and takes its memory apart; None where it did not fit this time.
        progress: called with each event as it comes.
    """
    if report.plan is None:
        return report
    window = max(report.plan.confirmation_windows, key=max)
    if progress is not None:
        progress(Noted(text=f"one trial more at {max(window)}, to see what the memory is made of"))
    try:
        breakdown = itemize(window)
    except AutobatchError as error:
        return unitemized(report, str(error))
    if breakdown is None:
        return unitemized(report, "its trial ran out of memory, or made no step")
    return dataclasses.replace(report, breakdown=breakdown)


def unitemized(report: Report, why: str) -> Report:
    """Say in a report why it does not tell what the memory is made of."""
    return dataclasses.replace(report, warnings=(*report.warnings, f"what the memory is made of is not known: {why}"))


def nothing_fits(report: Report) -> NothingFitsError:
    """The error for a report without a plan: what was too small, and the ways out."""
    smallest = min(trial.micro_batch_size for trial in report.trials)
    ways = ["a larger card", "a smaller model", "shorter sequences", "activation checkpointing"]
    if report.memory.headroom_bytes:
        ways.append(f"less headroom than {format_bytes(report.memory.headroom_bytes)}")
    return NothingFitsError(
        f"micro-batch {smallest} does not fit into the budget of {format_bytes(report.memory.budget_bytes)} on "
        f"{report.device.name}: {', '.join(ways[:-1])} or {ways[-1]} would help",
        trials=report.trials,
    )


def _difference(before: Trial, now: Trial) -> str:
    """Say how a trial that ran again differs."""
    if before.fits != now.fits:
        words = {True: "fitted", False: "did not fit"}
        return f"micro-batch {now.micro_batch_size} {words[before.fits]} before and {words[now.fits]} now"
    return (
        f"micro-batch {now.micro_batch_size} took {format_bytes(before.peak_allocated_bytes)} of tensors before and "
        f"{format_bytes(now.peak_allocated_bytes)} now"
    )


def _describe_leak(trials: Sequence[Trial]) -> str:
    """Say that trials leave memory behind; empty where they do not.

    A cache that is made once, or that grows with the largest size so far, stops growing: a leak is what every trial that
    fitted adds to, and at least two trials did.
    """
    pairs = list(itertools.pairwise(trials))
    grew = [after.held_at_start_bytes > before.held_at_start_bytes for before, after in pairs]
    always = all(rose for rose, (before, _) in zip(grew, pairs, strict=True) if before.fits)
    if sum(grew) < 2 or not always:
        return ""
    first, last = trials[0].held_at_start_bytes, trials[-1].held_at_start_bytes
    if last - first <= _LEAST_LEAK_BYTES:
        return ""
    return (
        f"the job leaks memory: tensors held {format_bytes(first)} when the first trial began and {format_bytes(last)} when the "
        f"last of {len(trials)} did, so that later ones had less room; a list of losses or outputs that is never emptied does "
        "that: keep loss.item() or loss.detach() in it"
    )


def _memory_seen(memory: Memory, trials: Sequence[Trial]) -> Memory:
    """Add what the trials showed outside the allocator: the context, grown by the kernels that they loaded."""
    seen = [trial.footprint_bytes - trial.peak_reserved_bytes for trial in trials if trial.fits]
    context_bytes = max(0, min(seen)) if seen else memory.context_bytes
    return Memory(
        budget_bytes=memory.budget_bytes,
        headroom_bytes=memory.headroom_bytes,
        other_tenants_bytes=memory.other_tenants_bytes,
        context_bytes=context_bytes,
    )


def _fingerprint(facts: DeviceFacts, workload: str, options: ProbeOptions) -> str:
    """Hash what the trials depend on; the target and the split are arithmetic on them."""
    return fingerprint(
        workload=workload,
        basis=facts.basis,
        card=facts.device.name,
        total_bytes=facts.device.total_bytes,
        torch=facts.torch_version,
        cuda=facts.cuda_version,
        driver=facts.device.driver,
        allocator=facts.allocator_settings,
        headroom=options.headroom,
        memory_limit=options.memory_limit,
        min_windows=windows_per_trial(options),
    )
