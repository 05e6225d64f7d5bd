"""A probe answers with sizes that ran, says how it knows, and asks for no more trials than it needs."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import pytest
from fakes import MIB, ScriptedMemory, scripted_device

from autobatch.errors import BusyError, PlanError, UsageError, WorkloadError
from autobatch.facts import AnswerRemarks, DeviceFacts
from autobatch.options import ProbeOptions
from autobatch.probing import ProbeEvent, TrialEnded, TrialStarted, conduct_probe, nothing_fits
from autobatch.report import Report
from autobatch.throughput import batch_time, choose_fastest, describe_times, sizes_to_time, windows_per_trial
from autobatch.trial import Outcome, Trial

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Window = tuple[int, ...]


class Trials:
    """A device on which a window fits where a function says so; 1 MiB for each sample, 1 GiB in all.

    `noise` is the part of a step's time by which steps differ, `leaks_bytes` what each trial of a size leaves behind.
    """

    def __init__(
        self,
        fits: Callable[[Window], bool],
        *,
        seconds: Callable[[Window], float | None] = lambda _: 1.0,
        noise: float = 0.0,
        leaks_bytes: Callable[[int], int] = lambda _: 0,
        **facts: Any,
    ) -> None:
        self._noise, self._leaks_bytes, self._left_bytes = noise, leaks_bytes, 50 * MIB
        self._fits = fits
        self._seconds = seconds
        self._emulation = AnswerRemarks(**facts)
        known = scripted_device(ScriptedMemory(budget_bytes=1024 * MIB)).facts
        self.facts = known
        if facts:
            self._seconds = lambda _: None
            self.facts = DeviceFacts(**{**vars(known), "basis": "emulated"})
        self.ran: list[tuple[Window, bool]] = []

    def run_trial(self, window: Sequence[int], *, confirmation: bool) -> Trial:
        shape = tuple(window)
        self.ran.append((shape, confirmation))
        fits = self._fits(shape)
        used = max(shape) * MIB if fits else 0
        seconds = self._seconds(shape) if fits else None
        held_at_start = self._left_bytes
        self._left_bytes += self._leaks_bytes(max(shape))
        return Trial(
            micro_batch_size=max(shape),
            outcome=Outcome.FITS if fits else Outcome.OUT_OF_MEMORY,
            micro_batches_per_step=len(shape),
            window=shape,
            steps=3 if fits else 0,
            peak_allocated_bytes=used,
            peak_reserved_bytes=used,
            footprint_bytes=used,
            alloc_retries=0,
            seconds_per_step=seconds,
            seconds_per_step_deviation=None if seconds is None else seconds * self._noise,
            held_at_start_bytes=held_at_start,
            confirmation=confirmation,
            oom_request_bytes=0 if fits else max(shape) * MIB,
        )

    def remarks(self) -> AnswerRemarks:
        return self._emulation

    @property
    def windows(self) -> list[Window]:
        return [window for window, _ in self.ran]


def up_to(largest: int) -> Callable[[Window], bool]:
    return lambda window: max(window) <= largest


def probe(trials: Trials, **options: Any) -> Report:
    return conduct_probe(trials, ProbeOptions(**options), workload="job")


def trained(report: Report) -> bool:
    """Whether one trial that fitted ran every size of the plan as training will: alone, or after another one."""
    assert report.plan is not None
    if report.plan.accumulation_steps == 1:
        return any(trial.fits and trial.window[-1] == report.plan.micro_batch_size for trial in report.trials)
    return any(
        trial.fits and len(trial.window) == 2 and set(trial.window) == set(report.plan.sizes) for trial in report.trials
    )


# ---- every size of the plan has run -------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["even", "balanced"])
@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("target", [64, 100, 256, 252])
@pytest.mark.parametrize("largest", [1, 2, 7, 37, 97, 300])
def test_every_size_of_the_plan_is_a_trial_that_fitted(target: int, largest: int, split: str, world_size: int) -> None:
    """Whatever fits: the answer is the true maximum, and no size above it or untested is in the plan."""
    report = probe(Trials(up_to(largest)), target=target, split=split, world_size=world_size)
    share = -(-target // world_size)
    assert report.max_micro_batch_size == min(largest, share)
    assert report.plan is not None
    assert report.plan.effective_batch_size == target
    assert max(report.plan.sizes) <= min(largest, share)
    assert trained(report)
    assert report.certified
    assert report.ceiling_reached == (largest >= share)
    assert report.smallest_failing == (None if largest >= share else largest + 1)


def test_a_balanced_plan_is_confirmed_by_one_window_of_both_sizes() -> None:
    """86 + 85 + 85 is no size that the search tries: one window runs both, the larger while gradients are alive."""
    trials = Trials(up_to(97))
    report = probe(trials, target=256, split="balanced")
    assert report.plan is not None
    assert report.plan.micro_batch_sizes == (86, 85, 85)
    assert trials.ran[-1] == ((85, 86), True) or trials.ran[-1] == ((86, 85), True)
    assert trials.ran[-1][0] == report.plan.confirmation_window


def test_confirmations_are_marked_and_not_counted() -> None:
    """The even plan of 97 for 256 is 4 × 64: run once more than the search asks for, under its own mark."""
    trials = Trials(up_to(97))
    report = probe(trials, target=256)
    marked = [trial.micro_batch_size for trial in report.trials if trial.confirmation]
    searched = {trial.micro_batch_size for trial in report.trials if not trial.confirmation}
    assert marked == [64]
    assert 64 not in searched
    assert report.num_sizes_tried == len(searched)
    assert {97, 98} <= searched


def test_a_size_of_the_plan_that_the_search_ran_is_not_run_again() -> None:
    """The share itself, where it fits, is the plan: one trial confirms both."""
    trials = Trials(up_to(10_000))
    report = probe(trials, target=8)
    assert len(set(trials.windows)) == len(trials.windows)
    assert not any(confirmation for _, confirmation in trials.ran)
    assert report.ceiling_reached


def test_the_share_is_tried_without_accumulation_and_smaller_sizes_with_it() -> None:
    """A micro-batch of the whole share never meets gradients; any smaller one does."""
    trials = Trials(up_to(10_000))
    report = probe(trials, target=64)
    assert trials.windows[-1] == (64,)
    assert all(len(window) == 2 for window in trials.windows[:-1])
    assert report.micro_batches_per_step == 1
    assert probe(Trials(up_to(63)), target=64).micro_batches_per_step == 2


def test_the_share_is_that_of_one_rank() -> None:
    """With four ranks 256 is 64 samples for each: the ceiling of the search."""
    trials = Trials(up_to(10_000))
    report = probe(trials, target=256, world_size=4)
    assert max(map(max, trials.windows)) == 64
    assert report.max_micro_batch_size == 64


# ---- a confirmation that fails --------------------------------------------------------------------------------------


def test_a_confirmation_that_fails_lowers_the_answer_and_the_search_goes_on() -> None:
    """Memory is not monotone here: 64 fails though 97 fits, so the answer lies below 64, and it is said."""
    trials = Trials(lambda window: max(window) <= 97 and 64 not in window)
    report = probe(trials, target=256)
    assert ((64, 64), True) in trials.ran
    assert (report.max_micro_batch_size, report.smallest_failing) == (63, 64)
    assert not report.monotone
    assert any("not monotone" in warning for warning in report.warnings)
    assert report.plan is not None
    assert report.plan.micro_batch_size == 32
    assert trained(report)
    assert not any(not trial.fits and trial.micro_batch_size <= 63 for trial in report.trials)


def test_a_mixed_window_that_fails_lowers_the_answer() -> None:
    """Both sizes of a balanced plan may fit alone and not in turn: fragmentation does that."""
    trials = Trials(lambda window: max(window) <= 97 and len(set(window)) == 1)
    report = probe(trials, target=256, split="balanced", max_micro_batch=97)
    assert report.plan is not None
    assert len(report.plan.sizes) == 1
    assert trained(report)
    assert report.plan.effective_batch_size == 256


def test_where_every_plan_fails_in_turn_the_probe_ends() -> None:
    """Each failure lowers the bracket, so that this comes to an end: at the smallest size, which fits."""
    report = probe(Trials(lambda window: max(window) in {1, 97} or max(window) % 2 == 1), target=256)
    assert report.plan is not None
    assert trained(report)


def test_where_only_the_smallest_size_fails_there_is_no_plan_and_no_false_answer() -> None:
    """The only even plan of a prime target is 1 at a time: where 97 fits and 1 does not, that is not "nothing fits"."""
    with pytest.raises(PlanError, match="97 fitted, but 1 did not: memory is not monotone"):
        probe(Trials(lambda window: max(window) <= 97 and max(window) != 1), target=251)


# ---- nothing fits ---------------------------------------------------------------------------------------------------


def test_where_nothing_fits_there_is_no_plan_and_no_number() -> None:
    """Null, never 0 and never an untested 1; the smallest size is among the trials."""
    report = probe(Trials(up_to(0)), target=256)
    assert (report.plan, report.max_micro_batch_size, report.smallest_failing) == (None, None, 1)
    assert not report.ceiling_reached
    assert min(trial.micro_batch_size for trial in report.trials) == 1
    error = nothing_fits(report)
    assert error.trials == report.trials
    assert "micro-batch 1 does not fit into the budget of 1 GiB" in str(error).replace("1.0 GiB", "1 GiB").replace(
        "1.00 GiB", "1 GiB"
    )


def test_the_ways_out_are_those_of_any_face() -> None:
    """No flag of the command line in what the library raises; less headroom only where there is some."""
    trials = Trials(up_to(0))
    without = str(nothing_fits(probe(trials, target=256)))
    assert "--" not in without
    assert "headroom" not in without
    memory = dataclasses.replace(trials.facts.memory, headroom_bytes=20 * MIB)
    trials.facts = dataclasses.replace(trials.facts, memory=memory)
    assert str(nothing_fits(probe(trials, target=256))).endswith(
        "activation checkpointing or less headroom than 20 MiB would help"
    )


def test_the_smallest_size_is_a_multiple() -> None:
    """With multiples of 8 asked for, 8 is what has to fit."""
    trials = Trials(up_to(7))
    report = probe(trials, target=256, multiple_of=8)
    assert report.plan is None
    assert all(size % 8 == 0 for window in trials.windows for size in window)
    assert report.smallest_failing == 8


# ---- limits of the probe --------------------------------------------------------------------------------------------


def test_the_deadline_makes_it_busy() -> None:
    """The error names the deadline and the trials that ran in it."""

    def slow(window: Window) -> bool:
        time.sleep(0.03)
        return max(window) <= 97

    trials = Trials(slow)
    with pytest.raises(BusyError, match=r"deadline of 0\.02 s passed after 1 trial"):
        probe(trials, target=256, deadline=0.02)
    assert len(trials.ran) == 1


def test_a_target_that_cannot_be_hit_is_refused_before_any_trial() -> None:
    """250 over 4 ranks has no even split: said at once, not after minutes of trials."""
    trials = Trials(up_to(97))
    with pytest.raises(PlanError, match="250"):
        probe(trials, target=250, world_size=4)
    assert trials.ran == []


def test_what_a_trial_raises_ends_the_probe() -> None:
    """An error of the job is not a size that does not fit."""

    def fail(_window: Window) -> bool:
        raise WorkloadError("labels missing")

    with pytest.raises(WorkloadError, match="labels missing"):
        probe(Trials(fail), target=256)


def test_nothing_above_the_largest_allowed_size_is_run() -> None:
    """--max-micro-batch is the ceiling, also of the plan."""
    trials = Trials(up_to(10_000))
    report = probe(trials, target=256, max_micro_batch=40, split="balanced")
    assert max(map(max, trials.windows)) <= 40
    assert (report.max_micro_batch_size, report.ceiling_reached) == (40, True)
    assert all(len(window) == 2 for window in trials.windows)


# ---- progress -------------------------------------------------------------------------------------------------------


def test_progress_tells_the_device_and_then_each_trial_before_and_after() -> None:
    """A start and an end for each trial, in order, with the bracket as it then stands."""
    events: list[ProbeEvent] = []
    trials = Trials(up_to(97))
    report = conduct_probe(trials, ProbeOptions(target=256), workload="job", progress=events.append)
    device, *others = events
    assert device == trials.facts
    starts, ends = others[::2], others[1::2]
    assert len(starts) == len(ends) == len(report.trials)
    for start, end, trial in zip(starts, ends, report.trials, strict=True):
        assert isinstance(start, TrialStarted)
        assert isinstance(end, TrialEnded)
        assert (start.window, start.confirmation, start.ceiling) == (trial.window, trial.confirmation, 256)
        assert end.trial is trial
        assert end.seconds >= 0
    first, last = starts[0], ends[-1]
    assert isinstance(first, TrialStarted)
    assert isinstance(last, TrialEnded)
    assert (first.bracket.fits, first.bracket.fails) == (None, None)
    assert (last.bracket.fits, last.bracket.fails) == (97, 98)


# ---- emulated answers ---------------------------------------------------------------------------------------------


def test_shapes_read_from_the_device_are_never_certified() -> None:
    """An emulated card has no values: such an answer under-measures, and says so."""
    trials = Trials(up_to(97), data_dependent=("nonzero",), expected_error="some")
    report = probe(trials, target=256)
    assert not report.certified
    assert report.data_dependent == ("nonzero",)
    assert any("nonzero" in warning and "not certified" in warning for warning in report.warnings)


def test_what_an_emulated_card_leaves_out_is_in_the_report() -> None:
    """The basis, what is not modelled and the error to expect go with the answer."""
    report = probe(Trials(up_to(97), not_modelled=("NCCL buffers",), expected_error="0.4 %"), target=256)
    assert (report.basis, report.not_modelled, report.expected_error) == ("emulated", ("NCCL buffers",), "0.4 %")
    assert report.certified


def test_throughput_is_refused_on_an_emulated_card() -> None:
    """It knows no time, and the largest size is not the fastest: no answer rather than a wrong one."""
    trials = Trials(up_to(97), expected_error="0.4 %")
    with pytest.raises(UsageError, match=r"throughput.*knows no time"):
        probe(trials, target=256, objective="throughput")
    assert trials.ran == []


# ---- objectives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [1, 5, 37, 97, 128, 300])
def test_the_plan_objective_tries_only_sizes_that_change_the_steps(largest: int) -> None:
    """Of the sizes ⌈256/k⌉ the largest that fits, with the next larger one shown not to."""
    trials = Trials(up_to(largest))
    report = probe(trials, target=256, objective="plan", split="balanced")
    sizes = {-(-256 // steps) for steps in range(1, 257)}
    assert report.max_micro_batch_size == max(size for size in sizes if size <= largest)
    assert {trial.micro_batch_size for trial in report.trials if not trial.confirmation} <= sizes
    assert report.plan is not None
    assert report.plan.accumulation_steps == -(-256 // min(largest, 256))
    assert trained(report)


def test_the_fastest_size_is_chosen_by_time_for_the_whole_batch() -> None:
    """97 fits, and 4 × 64 is the even plan; 8 × 32 takes less time here, so it is the plan."""
    seconds: dict[Window, float] = {(64, 64): 2 * 1.0, (32, 32): 2 * 0.4}
    trials = Trials(up_to(97), seconds=lambda window: seconds.get(window, 2 * 10.0))
    report = probe(trials, target=256, objective="throughput")
    assert report.plan is not None
    assert (report.plan.micro_batch_size, report.plan.accumulation_steps) == (32, 8)
    assert report.max_micro_batch_size == 97
    assert trained(report)
    timed = {trial.micro_batch_size for trial in report.trials if trial.confirmation}
    assert {64, 32} <= timed


def test_of_sizes_about_as_fast_the_larger_is_chosen() -> None:
    """Within 2 % times are noise, and fewer steps are better."""
    seconds: dict[Window, float] = {(64, 64): 2 * 1.0, (32, 32): 2 * 0.495}
    report = probe(
        Trials(up_to(97), seconds=lambda window: seconds.get(window, 99.0)), target=256, objective="throughput"
    )
    assert report.plan is not None
    assert report.plan.micro_batch_size == 64


def test_what_was_timed_is_told_with_its_noise_and_the_reason() -> None:
    """One line: every size, its time for the whole batch, how far that may be off, and what was made of it."""
    seconds: dict[Window, float] = {(64, 64): 2 * 1.0, (32, 32): 2 * 0.4}
    trials = Trials(up_to(97), seconds=lambda window: seconds.get(window, 99.0), noise=0.05)
    report = probe(trials, target=256, objective="throughput")
    [told] = report.warnings
    assert told == (
        "time per effective batch by micro-batch size: 4 ± 0.2 s at 64, 3.2 ± 0.16 s at 32, 1584 ± 79.2 s at 8; "
        "32 is the fastest"
    )
    assert "time per effective" not in " ".join(probe(trials, target=256).warnings)


def test_a_difference_within_the_noise_decides_nothing() -> None:
    """32 seems 10 % faster, but the steps of one trial differ by as much: the plan has fewer steps, and it is said."""
    seconds: dict[Window, float] = {(64, 64): 2 * 1.0, (32, 32): 2 * 0.45}

    def timed(noise: float) -> Report:
        trials = Trials(up_to(97), seconds=lambda window: seconds.get(window, 99.0), noise=noise)
        return probe(trials, target=256, objective="throughput")

    noisy, quiet = timed(0.06), timed(0.04)
    assert noisy.plan is not None
    assert noisy.plan.micro_batch_size == 64
    assert "64 and 32 differ within the noise, and 64 takes fewer steps" in noisy.warnings[0]
    assert quiet.plan is not None
    assert quiet.plan.micro_batch_size == 32
    assert trained(noisy)
    assert trained(quiet)


def test_trials_run_more_windows_where_they_are_to_be_timed() -> None:
    """Two timed steps have a median that one slow step moves; more than that is asked for, never less than was."""
    assert windows_per_trial(ProbeOptions(target=8)) == 3
    assert windows_per_trial(ProbeOptions(target=8, objective="throughput")) > 5
    assert windows_per_trial(ProbeOptions(target=8, objective="throughput", min_windows=20)) == 20


def test_a_size_that_fails_while_it_is_timed_lowers_the_answer() -> None:
    """No plan stands above a size that failed, also where that was found out by timing it."""
    trials = Trials(lambda window: max(window) <= 97 and max(window) != 32)
    report = probe(trials, target=256, objective="throughput")
    assert ((32, 32), True) in trials.ran
    assert (report.max_micro_batch_size, report.smallest_failing, report.monotone) == (31, 32, False)
    assert report.plan is not None
    assert report.plan.micro_batch_size <= 31
    assert trained(report)


def trial_of(window: Window, seconds: float | None, **times: float) -> Trial:
    trial = Trials(up_to(10**9), seconds=lambda _: seconds).run_trial(window, confirmation=False)
    return dataclasses.replace(trial, **times)


def seconds_of(trial: Trial, options: ProbeOptions) -> float | None:
    time = batch_time(trial, options)
    return None if time is None else time.seconds


def test_sizes_to_time_are_those_of_plans_down_to_a_quarter() -> None:
    """The largest first, each the micro-batch of a plan, none below a quarter of the largest."""
    assert sizes_to_time(ProbeOptions(target=256), 97) == (64, 32)
    assert sizes_to_time(ProbeOptions(target=256), 256) == (256, 128, 64)
    assert sizes_to_time(ProbeOptions(target=251), 97) == ()
    balanced = sizes_to_time(ProbeOptions(target=256, split="balanced"), 97)
    assert balanced == (86, 64, 52, 43, 37)


def test_time_counts_the_steps_of_the_plan() -> None:
    """Seconds for one micro-batch times the micro-batches of an effective batch; none where there is no such plan."""
    options = ProbeOptions(target=256)
    assert seconds_of(trial_of((64, 64), 2.0), options) == 4.0
    assert seconds_of(trial_of((256,), 3.0), options) == 3.0
    assert seconds_of(trial_of((97, 97), 2.0), options) is None
    assert seconds_of(trial_of((64, 64), None), options) is None


def test_the_end_of_a_step_counts_once_for_each_batch() -> None:
    """Four micro-batches and one optimizer step, not two: what a trial of two micro-batches shows is parted."""
    options = ProbeOptions(target=256)
    trial = trial_of((64, 64), 2.0, seconds_per_step_end=0.5, seconds_per_step_deviation=0.1)
    time = batch_time(trial, options)
    assert time is not None
    assert time.seconds == 2 * 1.5 + 0.5
    assert time.noise_seconds == 0.2
    assert seconds_of(trial_of((256,), 3.0, seconds_per_step_end=0.5), options) == 3.0


def test_a_costly_step_favours_no_size() -> None:
    """Per sample both sizes are as fast; with the optimizer's time in every window the smaller would seem slower."""
    options = ProbeOptions(target=256)
    large = trial_of((128, 128), 2 * 1.28 + 1.0, seconds_per_step_end=1.0)
    small = trial_of((32, 32), 2 * 0.32 + 1.0, seconds_per_step_end=1.0)
    assert seconds_of(large, options) == pytest.approx(seconds_of(small, options))


def test_a_window_that_mixes_sizes_times_neither() -> None:
    """The confirmation of a balanced plan comes after its sizes were compared, and must not change the reason given."""
    options = ProbeOptions(target=256, split="balanced")
    assert seconds_of(trial_of((85, 86), 2.0), options) is None
    trials = [trial_of((86, 86), 2.0), trial_of((64, 64), 1.0), trial_of((85, 86), 99.0)]
    assert choose_fastest(trials, options, 97) == 64
    assert describe_times(trials, options, 64).endswith("64 is the fastest")
    assert describe_times(trials[:1], options, 86) == ""


def test_a_size_whose_plan_cannot_be_listed_has_no_time() -> None:
    """A thousand million samples one at a time is no plan, and no reason to break off."""
    options = ProbeOptions(target=10**9)
    assert seconds_of(trial_of((1, 1), 1.0), options) is None


def test_without_times_the_largest_is_chosen() -> None:
    """Nothing is known to be faster."""
    assert choose_fastest([trial_of((64, 64), None)], ProbeOptions(target=256), 97) == 97


# ---- leaks ----------------------------------------------------------------------------------------------------------


def test_memory_that_grows_from_trial_to_trial_is_told() -> None:
    """Both figures and what usually does it, once, in one line."""
    trials = Trials(up_to(97), leaks_bytes=lambda _: 2 * MIB)
    report = probe(trials, target=256)
    later = len(report.trials) - 1
    [told] = report.warnings
    assert told.startswith("the job leaks memory: tensors held 50 MiB when the first trial began")
    assert f"{50 + 2 * later} MiB when the last of {later + 1} did" in told
    assert "\n" not in told


def test_a_leak_that_leaves_no_room_for_any_size_is_the_jobs_failure() -> None:
    """What fitted at first no longer does: that is not a card whose memory is not monotone."""
    trials = Trials(lambda window: 1 < max(window) <= 97, leaks_bytes=lambda _: 30 * MIB)
    with pytest.raises(WorkloadError, match=r"97 fitted, but 1 did not: the job leaks memory: tensors held 50 MiB"):
        probe(trials, target=251)


@pytest.mark.parametrize(
    ("leaks_bytes", "left_bytes"),
    [(lambda _size: 100, 1200), (lambda size: 300 * MIB if size == 8 else 0, 300 * MIB)],
    ids=["next to nothing", "a cache made in the first trial"],
)
def test_a_cache_is_no_leak(leaks_bytes: Callable[[int], int], left_bytes: int) -> None:
    """What is made once and stays is what training has too, and so is what is too little to matter."""
    report = probe(Trials(up_to(97), leaks_bytes=leaks_bytes), target=256)
    assert report.trials[-1].held_at_start_bytes - report.trials[0].held_at_start_bytes == left_bytes
    assert report.warnings == ()


def test_a_trial_that_ran_out_need_not_have_left_anything() -> None:
    """It may have ended before its first loss was kept: the others tell."""
    trials = Trials(up_to(97), leaks_bytes=lambda size: 2 * MIB if size <= 97 else 0)
    assert "leaks memory" in probe(trials, target=256).warnings[0]


# ---- the report -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [0, 37, 300])
def test_the_report_comes_back_from_json_as_it_was(largest: int) -> None:
    """Trials, plan, options and certificate, with and without an answer."""
    report = probe(Trials(up_to(largest)), target=256, split="balanced", headroom="1GiB", deadline=600)
    assert Report.from_json(report.to_json()) == report


def test_the_context_in_the_report_is_what_the_trials_showed() -> None:
    """What lies outside the allocator grows as kernels load: the device's first reading is too low."""
    report = probe(Trials(up_to(97)), target=256)
    assert report.memory.context_bytes == 0  # these trials' footprint is their reserve
    assert probe(Trials(up_to(0)), target=256).memory.context_bytes == 100 * MIB


def test_the_fingerprint_tells_jobs_and_devices_apart() -> None:
    """Same job, same device: the same; another name or basis: another."""
    first, again = probe(Trials(up_to(5)), target=8), probe(Trials(up_to(7)), target=8)
    assert first.fingerprint == again.fingerprint
    other = conduct_probe(Trials(up_to(5)), ProbeOptions(target=8), workload="other")
    emulated = probe(Trials(up_to(5), expected_error="0.4 %"), target=8)
    assert len({first.fingerprint, other.fingerprint, emulated.fingerprint}) == 3


def test_a_plan_over_ranks_of_two_sizes_runs_both():
    """255 over two ranks without accumulation is 128 and 127: each is a trial of its own."""
    options = ProbeOptions(target=255, world_size=2, split="balanced")
    plan = options.make_plan(128)
    assert plan.confirmation_windows == ((128,), (127,))


def test_a_plan_under_a_tolerance_may_take_any_size():
    """With a tolerance the fewest steps may come at any size: 84 × 3 is within 5 % of 256, and 64 × 4 is not the answer."""
    options = ProbeOptions(target=256, objective="plan", tolerance="5%")
    assert 84 in options.candidates()
    assert options.make_plan(84).accumulation_steps == 3
