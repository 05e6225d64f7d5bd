"""Trials of earlier probes leave a probe with the answer that it would have found by itself, and with fewer trials to run."""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING

import pytest
from fakes import ScriptedMemory, scripted_device
from recorded_jobs import JOBS, Job, question, without_warnings

from autobatch.errors import NothingFitsError, PlanError
from autobatch.evidence import SizeFailure
from autobatch.facts import AnswerRemarks, DeviceFacts
from autobatch.known import KnownTrials, bears_on, is_repeated_by, still_holding, trial_to_repeat
from autobatch.options import ProbeOptions
from autobatch.probing import Noted, conduct_probe
from autobatch.trial import Outcome, Trial

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch.probing import ProbeEvent
    from autobatch.report import Report

MIB = 1 << 20
WHEN = "2026-11-20T10:00:00Z"


def known_from(
    trials: Sequence[Trial], options: ProbeOptions, *, budget: int, budget_then: int | None = None
) -> KnownTrials | None:
    held = still_holding(trials, options, budget_then=budget_then or budget, budget_now=budget)
    return KnownTrials(trials=held, measured_at=WHEN, measurements=("mea_1",)) if held else None


@pytest.mark.parametrize("name", JOBS)
def test_what_is_known_never_changes_the_answer(name: str) -> None:
    """Over every recorded job: after one probe, another question is answered as brute force answers it, and its sizes ran."""
    job, draw = JOBS[name], random.Random(name)
    near = max(size or 1 for size in job.right_sizes(ProbeOptions(target=100_000)))
    for _ in range(12):
        before = question(draw, near)
        try:
            first = conduct_probe(job, before, workload="job")
        except PlanError:
            continue
        for asked in [before, *(question(draw, near) for _ in range(6))]:
            known = known_from(first.trials, asked, budget=job.budget_bytes)
            try:
                report = conduct_probe(job, asked, workload="job", known=known, confirm=draw.random() < 0.7)
            except PlanError:
                assert not any(job.right_answers(asked)), (name, asked)
                continue
            check(job, asked, report)


def check(job: Job, asked: ProbeOptions, report: Report) -> None:
    """The plan is right, and each of its sizes ran as training will run it."""
    plan = report.plan
    assert (None if plan is None else without_warnings(plan)) in job.right_answers(asked), (
        job.name,
        asked,
        report.trials,
    )
    if plan is None:
        return
    for window in plan.confirmation_windows:
        assert any(
            trial.fits and len(trial.window) >= len(window) and trial.window[-len(window) :] == window
            for trial in report.trials
        )


def test_the_same_question_takes_one_trial_and_none_where_trusted() -> None:
    """The certificate is there already: one trial shows that it holds, and it stands for the one before."""
    counts = []
    for job in JOBS.values():
        options = ProbeOptions(target=256)
        try:
            first = conduct_probe(job, options, workload="job")
        except PlanError:
            continue
        known = known_from(first.trials, options, budget=job.budget_bytes)
        assert known is not None
        again = conduct_probe(job, options, workload="job", known=known)
        trusted = conduct_probe(job, options, workload="job", known=known, confirm=False)
        for report in (again, trusted):
            assert report.plan == first.plan
            assert report.certified == first.certified
            assert (report.max_micro_batch_size, report.smallest_failing) == (
                first.max_micro_batch_size,
                first.smallest_failing,
            )
            assert report.cached is not None
        assert again.cached is not None
        assert trusted.cached is not None
        assert (again.cached.confirmed, trusted.cached.confirmed) == (True, False)
        assert trusted.measured_at == WHEN
        assert trusted.cached.num_trials == len(trusted.trials) == len(again.trials) == again.cached.num_trials + 1
        counts.append(len(first.trials))
    assert len(counts) > 20
    assert sum(counts) > 3 * len(counts)


# ---- a job of which one sample takes 1 MiB ---------------------------------------------------------------------------


class Line:
    """A job on a card: 100 MiB, and `per_sample` for each sample of a micro-batch, or of a second one with gradients of 50."""

    def __init__(self, *, budget: int, per_sample: int = 1) -> None:
        self.budget, self.per_sample = budget, per_sample
        self.ran: list[tuple[int, ...]] = []
        known = scripted_device(ScriptedMemory(budget_bytes=budget * MIB)).facts
        self.facts = DeviceFacts(**{**vars(known), "basis": "emulated"})

    def run_trial(self, window: Sequence[int], *, confirmation: bool) -> Trial:
        self.ran.append(tuple(window))
        needed = 100 + max(window) * self.per_sample + (50 if len(window) > 1 else 0)
        fits = needed <= self.budget
        used = min(needed, self.budget) * MIB
        return Trial(
            micro_batch_size=max(window),
            outcome=Outcome.FITS if fits else Outcome.OUT_OF_MEMORY,
            micro_batches_per_step=len(window),
            window=tuple(window),
            steps=3 if fits else 0,
            peak_allocated_bytes=used,
            peak_reserved_bytes=used,
            footprint_bytes=used,
            alloc_retries=0,
            seconds_per_step=None,
            held_bytes=100 * MIB,
            gradient_bytes=50 * MIB,
            confirmation=confirmation,
            oom_request_bytes=0 if fits else (needed - self.budget) * MIB,
        )

    def remarks(self) -> AnswerRemarks:
        return AnswerRemarks()


def probe(
    job: Line, options: ProbeOptions, trials: Sequence[Trial] = (), *, budget_then: int | None = None, **rest: object
) -> Report:
    known = known_from(
        trials, options, budget=job.budget * MIB, budget_then=None if budget_then is None else budget_then * MIB
    )
    return conduct_probe(job, options, workload="line", known=known, **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [300, 350, 399, 400, 401, 420, 500, 900])
def test_under_another_budget_only_what_still_holds_counts(budget: int) -> None:
    """With more or less of the card, the answer is that of a probe of its own; where nothing moved past it, one trial says so."""
    options = ProbeOptions(target=1024)
    first = probe(Line(budget=400), options)
    assert first.max_micro_batch_size == 250
    job = Line(budget=budget)
    report = probe(job, options, first.trials, budget_then=400)
    fresh = probe(Line(budget=budget), options)
    assert report.plan == fresh.plan
    assert report.max_micro_batch_size == fresh.max_micro_batch_size
    assert report.certified
    if budget == 400:
        assert len(job.ran) == 1


def test_what_an_error_asked_for_says_nothing_of_a_larger_budget() -> None:
    """The most that tensors held may have been given back before: the two were not there at once."""
    trial = Line(budget=400).run_trial((300, 300), confirmation=False)
    early = dataclasses.replace(trial, peak_allocated_bytes=399 * MIB, oom_request_bytes=300 * MIB)
    options = ProbeOptions(target=1024)
    assert still_holding([early], options, budget_then=400 * MIB, budget_now=400 * MIB) == (early,)
    assert still_holding([early], options, budget_then=400 * MIB, budget_now=401 * MIB) == ()
    over = dataclasses.replace(trial, outcome=Outcome.OVER_BUDGET, footprint_bytes=450 * MIB)
    assert still_holding([over], options, budget_then=400 * MIB, budget_now=449 * MIB) == (over,)
    assert still_holding([over], options, budget_then=400 * MIB, budget_now=450 * MIB) == ()


def test_a_failure_above_the_sizes_of_a_question_is_none_of_it() -> None:
    """Of the sizes at which the number of steps changes, the largest may lie below what is known to fail."""
    first = probe(Line(budget=489), ProbeOptions(target=676, max_micro_batch=400))
    assert (first.max_micro_batch_size, first.smallest_failing) == (339, 340)
    report = probe(Line(budget=489), ProbeOptions(target=676, max_micro_batch=400, objective="plan"), first.trials)
    assert report.plan is not None
    assert (report.plan.micro_batch_size, report.ceiling_reached, report.smallest_failing) == (338, True, None)


def test_a_job_that_grew_is_probed_anew_and_what_was_known_is_not_in_the_report() -> None:
    """The trial that runs again takes other memory than before: that is said with both figures, and nothing old is kept."""
    options = ProbeOptions(target=1024)
    first = probe(Line(budget=400), options)
    told: list[ProbeEvent] = []
    job = Line(budget=400, per_sample=2)
    report = probe(job, options, first.trials, progress=told.append)
    assert report.max_micro_batch_size == 125
    assert report.cached is None
    assert len(report.trials) == len(job.ran)
    notes = [event.text for event in told if isinstance(event, Noted)]
    assert "measured" in notes[0]
    assert "one runs again" in notes[0]
    assert "fitted before and did not fit now" in notes[1]
    assert "tried anew" in notes[1]


def test_a_job_that_shrank_is_probed_anew_too() -> None:
    """It fits as before, with fewer tensors: the maximum is another one."""
    options = ProbeOptions(target=1024)
    first = probe(Line(budget=700, per_sample=2), options)
    report = probe(Line(budget=700), options, first.trials)
    assert report.max_micro_batch_size == 550
    assert report.cached is None


def limited(trials: Sequence[Trial], options: ProbeOptions, limit: int, *, budget: int) -> KnownTrials:
    held = still_holding(trials, options, budget_then=budget * MIB, budget_now=budget * MIB, limit=limit)
    note = f"micro-batch {limit + 1} counts as too large"
    return KnownTrials(trials=held, measured_at=WHEN, measurements=("mea_1",), limit=limit, notes=(note,))


def test_a_failure_of_a_training_lowers_the_answer_at_the_cost_of_few_trials() -> None:
    """Nothing from that size on is answered or tried again, though a trial fitted there; the plan's own sizes run."""
    options = ProbeOptions(target=1000)
    first = probe(Line(budget=400), options)
    assert first.plan is not None
    assert first.plan.micro_batch_size == 250
    job = Line(budget=400)
    known = limited(first.trials, options, 249, budget=400)
    report = conduct_probe(job, options, workload="line", known=known)
    assert report.plan is not None
    assert report.plan.micro_batch_size == 200
    assert (200, 200) in job.ran
    assert max(max(window) for window in job.ran) <= 249
    assert len(job.ran) <= 3
    assert report.certified
    assert (report.ceiling_reached, report.smallest_failing) == (True, None)
    assert "micro-batch 250 counts as too large" in report.warnings


def test_a_failure_where_nothing_else_is_known_limits_the_search() -> None:
    """Trials that no longer hold leave the limit."""
    options = ProbeOptions(target=1000)
    job = Line(budget=400)
    report = conduct_probe(job, options, workload="line", known=limited((), options, 99, budget=400))
    assert report.max_micro_batch_size == 99
    assert report.cached is None
    assert report.warnings


def test_a_failure_of_the_smallest_size_leaves_nothing() -> None:
    """Where the smallest size ran out of memory in training, nothing fits, whatever trials said: no trial runs."""
    options = ProbeOptions(target=64, multiple_of=8)
    job = Line(budget=400)
    with pytest.raises(NothingFitsError, match="nothing smaller may be used, and micro-batch 8 counts as too large"):
        conduct_probe(job, options, workload="line", known=limited((), options, 7, budget=400))
    assert job.ran == []


def test_a_limit_goes_with_the_job_that_it_was_told_of() -> None:
    """A job whose memory is another is another job."""
    options = ProbeOptions(target=1024)
    first = probe(Line(budget=400), options)
    job = Line(budget=400, per_sample=2)
    report = conduct_probe(job, options, workload="line", known=limited(first.trials, options, 99, budget=400))
    assert report.max_micro_batch_size == 125


@pytest.mark.parametrize(
    ("size", "steps", "target", "expected"),
    [(8, 2, 64, True), (8, 1, 64, True), (8, 2, 8, False), (8, 1, 8, True), (65, 1, 64, False)],
)
def test_a_failure_bears_on_what_trains_the_same_way(size: int, steps: int, target: int, *, expected: bool) -> None:
    """A size that failed while accumulating says nothing of one that does not, nor one beyond the ceiling."""
    assert (
        bears_on(SizeFailure(micro_batch_size=size, micro_batches_per_step=steps), ProbeOptions(target=target))
        is expected
    )


def test_the_trial_to_repeat_is_the_plans_own() -> None:
    """What is to be trained is what is shown to hold; without a plan the largest that fitted, or the smallest that did not."""
    options = ProbeOptions(target=1000)
    first = probe(Line(budget=400), options)
    repeated = trial_to_repeat(first.trials, options)
    assert repeated is not None
    assert (repeated.window, repeated.fits) == ((250, 250), True)
    nothing = probe(Line(budget=120), options)
    repeated = trial_to_repeat(nothing.trials, options)
    assert repeated is not None
    assert (repeated.micro_batch_size, repeated.fits) == (1, False)
    assert trial_to_repeat((), options) is None


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [(1000, 1000, True), (1000, 1010, True), (1000, 1011, False), (10, 18, True), (10, 19, False)],
)
def test_a_repeated_trial_may_differ_by_a_percent_or_8_mib(before: int, now: int, *, same: bool) -> None:
    """Libraries choose and cache at run time; a changed job differs by more."""
    trial = Line(budget=4000).run_trial((5, 5), confirmation=False)
    pair = [dataclasses.replace(trial, peak_allocated_bytes=value * MIB) for value in (before, now)]
    assert is_repeated_by(*pair) is same
    assert is_repeated_by(*reversed(pair)) is same or before == 1000
    failing = dataclasses.replace(trial, outcome=Outcome.OUT_OF_MEMORY)
    assert not is_repeated_by(trial, failing)
    assert not is_repeated_by(failing, trial)
    assert is_repeated_by(failing, dataclasses.replace(failing, peak_allocated_bytes=1))


def test_trusted_trials_that_do_not_reach_are_added_to() -> None:
    """Trusted or not, what the question needs and nobody ran is run; the report says that nothing was confirmed."""
    first = probe(Line(budget=400), ProbeOptions(target=1000))
    job = Line(budget=400)
    report = probe(job, ProbeOptions(target=960), first.trials, confirm=False)
    assert report.plan is not None
    assert report.plan.micro_batch_size == 240
    assert job.ran == [(240, 240)]
    assert report.cached is not None
    assert not report.cached.confirmed
    assert report.measured_at != WHEN
