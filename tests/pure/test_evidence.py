"""Stored trials answer another question with what a probe of its own would answer, or say that they cannot."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from curves import MIB, Curve, synthetic_curve
from hypothesis import example, given, settings
from hypothesis import strategies as st
from recorded_jobs import JOBS, Job, question, without_warnings

from autobatch.errors import PlanError
from autobatch.evidence import Bound, Evidence, SizeFailure, StoredAnswer
from autobatch.options import ProbeOptions
from autobatch.probing import conduct_probe
from autobatch.trial import Outcome, Trial

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch.report import Report


def ask(report: Report, options: ProbeOptions, failures: Sequence[SizeFailure] = ()) -> StoredAnswer:
    evidence = Evidence(report.trials, budget_bytes=report.memory.budget_bytes, failures=failures)
    return evidence.answer(options)


def check(job: Job, asked: ProbeOptions, answer: StoredAnswer) -> None:
    """What is answered is what brute force says."""
    right = job.right_answers(asked)
    if answer.verdict == "does_not_fit":
        assert None in right, (job.name, asked, answer)
    if answer.verdict != "fits":
        assert answer.plan is None
        return
    assert answer.plan is not None
    assert without_warnings(answer.plan) in right, (job.name, asked, answer)
    assert answer.bound.largest_fitting is not None
    assert max(answer.plan.sizes) <= answer.bound.largest_fitting
    if answer.plan.accumulation_steps > 1:
        assert answer.bound.micro_batches_per_step == 2


@pytest.mark.parametrize("name", JOBS)
def test_an_answer_is_what_a_probe_of_its_own_would_find(name: str) -> None:
    """Over every recorded job, after any one probe: each plan, each refusal and each target not hit is brute force's."""
    job, draw = JOBS[name], random.Random(name)
    near = max(size or 1 for size in job.right_sizes(ProbeOptions(target=100_000)))
    for _ in range(10):
        probed = question(draw, near)
        try:
            report = conduct_probe(job, probed, workload="job")
        except PlanError:
            continue
        verdicts(job, report, [question(draw, near) for _ in range(20)])


def test_after_a_probe_of_a_usual_target_few_questions_stay_open() -> None:
    """Of questions over all recorded jobs, less than one in twenty is unknown where the target had passed the maximum."""
    counted: Counter[str] = Counter()
    for job in JOBS.values():
        draw = random.Random(job.name)
        near = max(size or 1 for size in job.right_sizes(ProbeOptions(target=100_000)))
        report = conduct_probe(job, ProbeOptions(target=512), workload="job")
        counted += verdicts(job, report, [question(draw, near) for _ in range(60)])
    assert counted["unknown"] < 0.05 * counted.total()
    assert counted["does_not_fit"] > 0


def verdicts(job: Job, report: Report, questions: Sequence[ProbeOptions]) -> Counter[str]:
    """Ask, and hold every answer against brute force."""
    counted: Counter[str] = Counter()
    for asked in questions:
        try:
            answer = ask(report, asked)
        except PlanError:
            assert not any(job.right_answers(asked)), (job.name, asked)
            continue
        check(job, asked, answer)
        counted[answer.verdict] += 1
    return counted


@pytest.mark.parametrize("name", JOBS)
def test_a_probe_answers_its_own_question(name: str) -> None:
    """The stored answer for the target that was probed is the report's own plan."""
    job, draw = JOBS[name], random.Random(name)
    for _ in range(60):
        probed = question(draw, 60)
        try:
            report = conduct_probe(job, probed, workload="job")
        except PlanError:
            continue
        answer = ask(report, probed)
        assert answer.plan == report.plan, (probed, answer, report.trials)
        assert answer.verdict == ("does_not_fit" if report.plan is None else "fits")


@settings(max_examples=60, deadline=None)
@example(per_sample_mib=1249, held_mib=3456, gradients=0.5, step=1, seed=752)  # confirmed by 4 + 3
@given(
    per_sample_mib=st.integers(20, 3000),
    held_mib=st.integers(100, 9000),
    gradients=st.floats(0.05, 0.5),
    step=st.sampled_from([1, 1, 2, 8]),
    seed=st.integers(0, 999),
)
def test_bounds_of_made_up_jobs_never_promise_too_much(
    per_sample_mib: int, held_mib: int, gradients: float, step: int, seed: int
) -> None:
    """Whatever the weights, the gradients and the padding: no plan and no refusal that brute force contradicts."""
    job = made_up_job(per_sample_mib, held_mib, gradients, step)
    draw = random.Random(seed)
    for _ in range(4):
        probed = question(draw, 30)
        try:
            report = conduct_probe(job, probed, workload="job")
        except PlanError:
            continue
        assert ask(report, probed).plan == report.plan
        verdicts(job, report, [question(draw, 30) for _ in range(8)])


def made_up_job(per_sample_mib: int, held_mib: int, gradients: float, step: int) -> Job:
    """A job whose gradients are that part of what it holds under accumulation."""
    gradient_mib = int(held_mib * gradients)
    kinds = [
        synthetic_curve(base_mib=base, per_sample_mib=per_sample_mib, step=step)
        for base in (held_mib - gradient_mib, held_mib)
    ]
    curves = [
        dataclasses.replace(
            curve,
            largest_recorded=20_000 // per_sample_mib + 2 * step,
            trial_at=functools.partial(trial_with, curve, micro_batches, gradient_mib * MIB),
        )
        for micro_batches, curve in enumerate(kinds, start=1)
    ]
    return Job(*curves)


def trial_with(curve: Curve, micro_batches: int, gradient_bytes: int, size: int) -> Trial:
    trial = curve.trial_at(size)
    return dataclasses.replace(
        trial, micro_batches_per_step=micro_batches, window=(size,) * micro_batches, gradient_bytes=gradient_bytes
    )


# ---- bounds -------------------------------------------------------------------------------------------------------


def trial(size: int, *, fits: bool, steps: int = 2, **figures: int) -> Trial:
    """A trial of a job that holds 1,000 MiB, half of it gradients, and 100 MiB a sample, in a budget of 5,000 MiB."""
    used = {"peak_allocated_bytes": min(5000, 1000 + 100 * size) * MIB, "held_bytes": 1000 * MIB}
    used |= {
        "peak_reserved_bytes": min(5000, 1000 + 100 * size) * MIB,
        "footprint_bytes": min(5000, 1000 + 100 * size) * MIB,
    }
    return Trial(
        micro_batch_size=size,
        outcome=Outcome.FITS if fits else Outcome.OUT_OF_MEMORY,
        micro_batches_per_step=steps,
        steps=3 if fits else 0,
        alloc_retries=0,
        seconds_per_step=None,
        gradient_bytes=500 * MIB,
        **(used | figures),
    )


def evidence_of(*trials: Trial, failures: Sequence[SizeFailure] = ()) -> Evidence:
    return Evidence(trials, budget_bytes=5000 * MIB, failures=failures)


def bound(micro_batches: int, fits: int | None, fails: int | None) -> Bound:
    return Bound(micro_batches_per_step=micro_batches, largest_fitting=fits, smallest_failing=fails)


def test_accumulation_adds_memory_and_never_takes_any() -> None:
    """What fitted with it fits without, what failed without it fails with it; the other two ways nothing follows."""
    evidence = evidence_of(trial(40, fits=True), trial(44, fits=False, steps=1))
    assert (evidence.whole, evidence.accumulating) == (bound(1, 40, 44), bound(2, 40, 44))
    evidence = evidence_of(trial(40, fits=True, steps=1), trial(30, fits=False))
    assert (evidence.whole, evidence.accumulating) == (bound(1, 40, None), bound(2, None, 30))
    assert evidence.answer(ProbeOptions(target=36)).plan == ProbeOptions(target=36).make_plan(36)
    assert evidence.answer(ProbeOptions(target=48)).verdict == "unknown"


def test_what_opens_a_window_was_not_tried_under_accumulation() -> None:
    """A window of 40 and 20 proves 20 with gradients and 40 without."""
    mixed = dataclasses.replace(trial(40, fits=True), window=(40, 20))
    assert evidence_of(mixed).accumulating == bound(2, 20, None)
    assert evidence_of(mixed).whole == bound(1, 40, None)


def test_a_first_micro_batch_that_failed_fails_without_accumulation_too() -> None:
    """Nothing was held when it failed, so that no gradients can have been too much."""
    first = trial(44, fits=False, held_bytes=0)
    assert evidence_of(first).whole == bound(1, None, 44)
    assert evidence_of(trial(44, fits=False)).whole == bound(1, None, None)
    assert evidence_of(dataclasses.replace(first, window=(30, 44))).whole == bound(1, None, None)
    assert evidence_of(dataclasses.replace(first, outcome=Outcome.OVER_BUDGET)).whole == bound(1, None, None)


def test_a_size_that_fails_now_and_then_is_no_answer() -> None:
    """Of one size that both fitted and failed, the failure counts; what fitted above it proves nothing."""
    trials = (trial(8, fits=True), trial(30, fits=True), trial(30, fits=False), trial(33, fits=True))
    assert evidence_of(*trials).accumulating == bound(2, 8, 30)
    assert evidence_of(*trials).answer(ProbeOptions(target=256)).verdict == "unknown"


def test_a_reported_failure_lowers_the_bound_to_just_below_it() -> None:
    """The sizes below fitted in the probe and were not reported: the plan is made of them."""
    trials = (trial(37, fits=True), trial(38, fits=False))
    assert evidence_of(*trials).answer(ProbeOptions(target=256)).plan == ProbeOptions(target=256).make_plan(37)
    lowered = evidence_of(*trials, failures=[SizeFailure(micro_batch_size=32, micro_batches_per_step=2)])
    assert lowered.accumulating == bound(2, 31, 32)
    assert lowered.whole == bound(1, 37, None)
    assert lowered.answer(ProbeOptions(target=256)).plan == ProbeOptions(target=256).make_plan(16)
    without = evidence_of(*trials, failures=[SizeFailure(micro_batch_size=32, micro_batches_per_step=1)])
    assert (without.whole, without.accumulating) == (bound(1, 31, 32), bound(2, 31, 32))


def test_a_reported_failure_raises_nothing_and_reaches_no_further_than_trials() -> None:
    """Above the bound it changes nothing but its end; with no trial that fitted it proves no fit."""
    above = evidence_of(trial(20, fits=True), failures=[SizeFailure(micro_batch_size=90, micro_batches_per_step=2)])
    assert above.accumulating == bound(2, 20, 90)
    assert above.answer(ProbeOptions(target=512)).verdict == "unknown"
    at_one = evidence_of(trial(20, fits=True), failures=[SizeFailure(micro_batch_size=1, micro_batches_per_step=1)])
    assert at_one.accumulating == bound(2, None, 1)
    refused = at_one.answer(ProbeOptions(target=1))
    assert (refused.verdict, refused.missing_bytes) == ("does_not_fit", None)


def test_without_trials_nothing_is_known() -> None:
    """No evidence is no answer."""
    assert evidence_of().answer(ProbeOptions(target=1)).verdict == "unknown"


def test_sizes_that_could_give_a_better_plan_must_have_been_tried() -> None:
    """Between 12 that fitted and 38 that did not, 32 would be better for 256; for 60 over 5 ranks 12 is the share."""
    evidence = evidence_of(trial(12, fits=True), trial(38, fits=False))
    answer = evidence.answer(ProbeOptions(target=256))
    assert (answer.verdict, answer.plan) == ("unknown", None)
    assert "above 12 and below 38" in answer.reason
    assert evidence.answer(ProbeOptions(target=60, world_size=5)).verdict == "fits"
    # 74 = 2 × 37: whatever lies between 2 and 37 gives the same plan.
    assert evidence_of(trial(2, fits=True), trial(37, fits=False)).answer(ProbeOptions(target=74)).plan is not None


def test_a_plan_that_only_untested_sizes_give_is_unknown_and_one_that_none_gives_an_error() -> None:
    """7 over 4 ranks needs two samples in one micro-batch: a rank has but one, which makes no two steps."""
    options = ProbeOptions(target=7, world_size=4, split="balanced")
    assert evidence_of(trial(1, fits=True)).answer(options).verdict == "unknown"
    with pytest.raises(PlanError, match="leaves a rank"):
        evidence_of(trial(1, fits=True), trial(2, fits=False, steps=1)).answer(options)


def test_a_multiple_is_answered_from_sizes_that_are_none() -> None:
    """37 that fitted and 38 that did not say that 32 is the largest multiple of 8, and that no multiple of 40 fits."""
    evidence = evidence_of(trial(37, fits=True), trial(38, fits=False))
    answer = evidence.answer(ProbeOptions(target=1024, multiple_of=8))
    assert answer.plan == ProbeOptions(target=1024, multiple_of=8).make_plan(32)
    assert evidence.answer(ProbeOptions(target=1200, multiple_of=40)).verdict == "does_not_fit"


def test_what_was_missing_is_told_and_never_more_than_that() -> None:
    """Held, asked for and outside beyond the budget; what the allocator kept in reserve may have been of use."""
    options = ProbeOptions(target=1)
    lacking = trial(
        1, fits=False, steps=1, peak_allocated_bytes=4000 * MIB, peak_reserved_bytes=4500 * MIB,
        footprint_bytes=4900 * MIB, oom_request_bytes=900 * MIB,
    )  # fmt: skip
    assert evidence_of(lacking).answer(options).missing_bytes == 300 * MIB
    hidden = dataclasses.replace(lacking, oom_request_bytes=100 * MIB)
    assert evidence_of(hidden).answer(options).missing_bytes is None
    over = dataclasses.replace(lacking, outcome=Outcome.OVER_BUDGET, footprint_bytes=5001 * MIB, steps=3)
    assert evidence_of(over).answer(options).missing_bytes == MIB
    assert evidence_of(hidden, over).answer(options).missing_bytes == MIB
    assert evidence_of(trial(1, fits=True, steps=1)).answer(options).missing_bytes is None


def test_a_failure_names_sizes_that_there_are() -> None:
    """A size and a number of micro-batches that a trial could have."""
    with pytest.raises(ValueError, match="below 1"):
        SizeFailure(micro_batch_size=0, micro_batches_per_step=1)
    with pytest.raises(ValueError, match="neither 1 nor 2"):
        SizeFailure(micro_batch_size=1, micro_batches_per_step=3)
