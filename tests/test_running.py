"""A trial does what training will do, and says truly what came of it, whatever the job does."""

from __future__ import annotations

import contextlib
import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from fakes import MIB, ScriptedMemory, out_of_memory, small_job

from autobatch.errors import BusyError, UsageError, WorkloadError
from autobatch.trial import Outcome, Trial
from autobatch.workload.job import TrainingJob
from autobatch.workload.running import TrialRunner

if TYPE_CHECKING:
    from collections.abc import Callable


class Recorder:
    """Writes down, in order, what a job of two weights is asked to do, and fails where a test says."""

    def __init__(self, memory: ScriptedMemory) -> None:
        self.memory = memory
        self.events: list[str] = []
        self.at: dict[int, Callable[[], object]] = {}
        """What to do in the micro-step of that number, counted over the job's life from 1."""
        self.model = torch.nn.Linear(2, 1, bias=False)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.optimizer.register_step_post_hook(lambda *_: self.events.append("step"))
        self._micro_steps = 0

    def micro_step(self, n: int) -> None:
        self._micro_steps += 1
        self.events.append(f"micro {n}")
        self.memory.use(n * MIB)
        self.at.get(self._micro_steps, lambda: None)()
        self.model(torch.ones(1, 2)).sum().backward()

    def job(self) -> TrainingJob:
        return TrainingJob(micro_step=self.micro_step, optimizer=self.optimizer)


@pytest.fixture
def memory() -> ScriptedMemory:
    return ScriptedMemory()


@pytest.fixture
def recorder(memory: ScriptedMemory) -> Recorder:
    return Recorder(memory)


def runner(recorder: Recorder, **options: Any) -> TrialRunner:
    return TrialRunner(recorder.job, recorder.memory, **options)


def raises(error: BaseException) -> Callable[[], object]:
    def fail() -> None:
        raise error

    return fail


# ---- what is run ------------------------------------------------------------------------------------------------


def test_a_trial_runs_three_windows_with_every_micro_batch_before_each_step(recorder: Recorder) -> None:
    """Three optimizer steps, two micro-batches before each where the window has two, in the window's order."""
    trial = runner(recorder)((3, 5))
    assert recorder.events == ["micro 3", "micro 5", "step"] * 3
    assert (trial.outcome, trial.steps, trial.window) == (Outcome.FITS, 3, (3, 5))
    assert (trial.micro_batch_size, trial.micro_batches_per_step) == (5, 2)


def test_without_accumulation_each_micro_batch_is_followed_by_a_step(recorder: Recorder) -> None:
    """A window of one runs one micro-batch for each step: that is what training at the share does."""
    assert runner(recorder)((4,)).micro_batches_per_step == 1
    assert recorder.events == ["micro 4", "step"] * 3


@pytest.mark.parametrize(("asked", "steps"), [(1, 3), (3, 3), (5, 5)])
def test_windows_are_never_fewer_than_three(recorder: Recorder, asked: int, steps: int) -> None:
    """More windows may be asked for, fewer not: the second can fail where the first passed."""
    assert runner(recorder, min_windows=asked)((1,)).steps == steps


def test_gradients_live_through_the_second_micro_batch_only(memory: ScriptedMemory) -> None:
    """Each window starts without gradients, also the first where the caller left some, and accumulates into them."""
    seen: list[bool] = []
    job = small_job(lambda _: seen.append(weight.grad is not None))
    optimizer = job.optimizers()[0]
    weight = optimizer.param_groups[0]["params"][0]
    weight.grad = torch.ones_like(weight)
    TrialRunner(lambda: job, memory)((1, 1))
    assert seen == [False, True] * 3


def test_held_bytes_are_those_before_the_last_micro_batch(memory: ScriptedMemory) -> None:
    """Weights and optimizer state, with gradients under accumulation and without them otherwise."""
    job = small_job(lambda _: None)
    optimizer = job.optimizers()[0]
    weight = optimizer.param_groups[0]["params"][0]

    def held() -> int:
        gradient = 0 if weight.grad is None else 10
        return 100 + gradient + (1000 if optimizer.state else 0)

    memory.held_bytes = held
    assert TrialRunner(lambda: job, memory)((1,)).held_bytes == 1100
    assert TrialRunner(lambda: job, memory)((1, 1)).held_bytes == 1110


def test_held_bytes_are_zero_where_no_window_reached_its_last_micro_batch(recorder: Recorder) -> None:
    """A trial that failed at its first of two micro-batches knows nothing of what accumulation holds."""
    recorder.memory.held_bytes = lambda: 77
    recorder.at[1] = raises(out_of_memory())
    assert runner(recorder)((1, 1)).held_bytes == 0
    assert runner(recorder)((1, 1)).held_bytes == 77


def test_the_figures_are_those_read_after_the_steps(recorder: Recorder) -> None:
    """Peaks, footprint and the largest piece come from the reading, which is taken before anything is let go."""
    trial = runner(recorder)((50,))
    assert trial.peak_allocated_bytes == trial.peak_reserved_bytes == 50 * MIB
    assert trial.footprint_bytes == 150 * MIB
    assert trial.largest_segment_bytes == 5 * MIB
    assert recorder.memory.calls == ["begin", "settle", "read", "end"]


def test_time_is_told_only_where_it_means_something(recorder: Recorder) -> None:
    """A real device is timed, an emulated one not, and neither is a trial that broke off."""
    timed, untimed = runner(recorder)((1,)), runner(recorder, timed=False)((1,))
    assert timed.seconds_per_step is not None
    assert timed.seconds_per_step > 0
    assert not untimed.is_timed
    recorder.at[9] = raises(out_of_memory())
    failed = runner(recorder)((1,))
    assert (failed.steps, failed.is_timed) == (2, False)


class ScriptedClock:
    """A clock that stands still but for what a job says that it takes."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


def timed_trial(micro_batches: list[float], ends: list[float], *, window: tuple[int, ...] = (4, 4)) -> Trial:
    """A trial whose windows take these seconds: for all their micro-batches together, and for their ends."""
    clock, memory = ScriptedClock(), ScriptedMemory()
    each = iter([seconds / len(window) for seconds in micro_batches for _ in window])
    at_end = iter(ends)
    job = small_job(lambda _n: clock.passes(next(each)))
    job.optimizers()[0].register_step_pre_hook(lambda *_: clock.passes(next(at_end)))
    return TrialRunner(lambda: job, memory, min_windows=len(ends), clock=clock)(window)


def test_the_time_of_a_step_is_the_median_of_all_but_the_first_and_its_spread_is_told() -> None:
    """The first window loads kernels, and one slow window among five moves neither the median nor the deviation much."""
    trial = timed_trial([90.0, 2.0, 2.2, 2.4, 9.0, 2.1], [0.5] * 6)
    assert trial.timed_steps == 5
    assert trial.seconds_per_step == pytest.approx(2.7)
    assert trial.seconds_per_step_deviation == pytest.approx(0.2)


def test_the_end_of_a_window_is_timed_apart_from_its_micro_batches() -> None:
    """Clipping and the optimizer come once for each step, however many micro-batches it has."""
    trial = timed_trial([9.0, 2.0, 2.0, 2.0], [7.0, 0.5, 0.6, 0.7])
    assert trial.seconds_per_step == pytest.approx(2.6)
    assert trial.seconds_per_step_end == pytest.approx(0.6)
    alone = timed_trial([9.0, 1.0, 1.0, 1.0], [7.0, 0.5, 0.6, 0.7], window=(4,))
    assert alone.seconds_per_step_end == trial.seconds_per_step_end


def test_a_window_whose_step_was_skipped_is_not_timed(memory: ScriptedMemory) -> None:
    """A scaler that looks for its scale skips steps: their windows are shorter than any of training."""
    clock = ScriptedClock()
    model, finite = torch.nn.Linear(2, 1, bias=False), iter([False, False, True, False, True, True])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

    def micro_step(_n: int) -> None:
        steps = next(finite)
        clock.passes(3.0 if steps else 0.1)
        loss = model(torch.ones(1, 2)).sum()
        scaler.scale(loss if steps else loss * float("inf")).backward()

    job = TrainingJob(micro_step=micro_step, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), scaler=scaler)
    trial = TrialRunner(lambda: job, memory, clock=clock)((1,))
    assert (trial.steps, trial.timed_steps) == (3, 2)
    assert trial.seconds_per_step == pytest.approx(3.0)


def test_what_tensors_hold_when_a_trial_begins_is_told(recorder: Recorder) -> None:
    """Read before the job is made: what earlier trials left behind, and the caller's own."""
    held = iter([5, 40, 40, 40, 7, 50, 50, 50])
    recorder.memory.held_bytes = lambda: next(held)
    run = runner(recorder)
    assert [run((1,)).held_at_start_bytes for _ in range(2)] == [5, 7]


def test_a_confirmation_is_marked(recorder: Recorder) -> None:
    """The mark is what keeps a confirmation out of the number of sizes tried."""
    assert runner(recorder)((1,), confirmation=True).confirmation
    assert not runner(recorder)((1,)).confirmation


# ---- out of memory ----------------------------------------------------------------------------------------------


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *_grads: torch.Tensor) -> torch.Tensor:
        raise out_of_memory()


@pytest.mark.parametrize(
    ("micro_step", "steps"), [(1, 0), (2, 0), (3, 1), (6, 2)], ids=["first", "second", "second window", "last"]
)
def test_out_of_memory_in_any_micro_step_is_an_outcome(recorder: Recorder, micro_step: int, steps: int) -> None:
    """Whichever micro-batch it hits, it is no exception; the steps that ran and the bytes asked for are kept."""
    recorder.at[micro_step] = raises(out_of_memory("2.50 GiB"))
    trial = runner(recorder)((1, 1))
    assert (trial.outcome, trial.steps) == (Outcome.OUT_OF_MEMORY, steps)
    assert trial.oom_request_bytes == 2560 * MIB
    assert "OutOfMemoryError" in trial.note


def test_out_of_memory_in_backward_is_an_outcome(memory: ScriptedMemory) -> None:
    """The error crosses torch's autograd engine and is still seen for what it is."""
    weight = torch.nn.Parameter(torch.ones(2))

    def micro_step(_n: int) -> None:
        FailsBackward.apply(weight).sum().backward()

    job = TrainingJob(micro_step=micro_step, optimizer=torch.optim.SGD([weight], lr=0.1))
    trial = TrialRunner(lambda: job, memory)((1,))
    assert (trial.outcome, trial.steps, trial.oom_request_bytes) == (Outcome.OUT_OF_MEMORY, 0, 2048 * MIB)


@pytest.mark.parametrize("failing", [1, 2])
def test_out_of_memory_in_a_step_is_an_outcome(memory: ScriptedMemory, failing: int) -> None:
    """The first step makes the optimizer's state, and a later one can fail too: that step does not count."""
    job = small_job(lambda _: None)
    optimizer = job.optimizers()[0]
    ran = []

    def fail_at_step(*_: object) -> None:
        ran.append(1)
        if len(ran) == failing:
            raise out_of_memory()

    optimizer.register_step_pre_hook(fail_at_step)
    trial = TrialRunner(lambda: job, memory)((1,))
    assert (trial.outcome, trial.steps) == (Outcome.OUT_OF_MEMORY, failing - 1)


def test_out_of_memory_while_the_job_is_made_is_an_outcome(memory: ScriptedMemory) -> None:
    """A model that does not fit at all is a size that does not fit, not a failure of the job."""

    def make() -> TrainingJob:
        raise out_of_memory("40.00 GiB")

    trial = TrialRunner(make, memory)((1,))
    assert (trial.outcome, trial.steps, trial.oom_request_bytes) == (Outcome.OUT_OF_MEMORY, 0, 40 << 30)


def test_a_swallowed_out_of_memory_error_counts(recorder: Recorder) -> None:
    """A job that catches the error and goes on has not fitted: the allocator's own count says so."""

    def swallow() -> None:
        with pytest.raises(torch.OutOfMemoryError):
            recorder.memory.use(5000 * MIB)

    recorder.at[3] = swallow
    trial = runner(recorder)((1,))
    assert (trial.outcome, trial.steps) == (Outcome.OUT_OF_MEMORY, 3)
    assert "caught an out-of-memory error" in trial.note


def test_a_job_that_skips_the_batch_that_ran_out_is_out_of_memory(memory: ScriptedMemory) -> None:
    """Such a job makes no gradient, which for a job that has memory enough is an error: here it is the memory."""
    weight = torch.nn.Parameter(torch.ones(2))

    def micro_step(n: int) -> None:
        try:
            memory.use(n * MIB)
        except torch.OutOfMemoryError:
            return
        weight.sum().backward()

    job = TrainingJob(micro_step=micro_step, optimizer=torch.optim.SGD([weight], lr=0.1))
    assert TrialRunner(lambda: job, memory)((10, 10)).fits
    assert TrialRunner(lambda: job, memory)((901, 901)).outcome is Outcome.OUT_OF_MEMORY


def test_a_job_that_resets_the_allocators_counts_has_not_run_out(recorder: Recorder) -> None:
    """They then stand below what they were when the trial began, as after an earlier trial that did run out."""
    recorder.at[2] = lambda: setattr(recorder.memory, "ooms", -1)
    assert runner(recorder)((1,)).fits


def test_an_error_after_a_swallowed_out_of_memory_error_is_out_of_memory(recorder: Recorder) -> None:
    """A handler that itself fails hides the error's type, not the allocator's count; the note tells both."""

    def garble() -> None:
        recorder.memory.ooms += 1
        raise KeyError("batch")

    recorder.at[1] = garble
    trial = runner(recorder)((1,))
    assert trial.outcome is Outcome.OUT_OF_MEMORY
    assert "KeyError" in trial.note


def test_peers_defect_3_tensors_of_failed_frames_are_dead_when_memory_is_read(memory: ScriptedMemory) -> None:
    """Memory is freed outside the handler: at the first reading nothing that the failed frames held is alive."""
    held: list[weakref.ref[torch.Tensor]] = []
    alive: dict[str, list[bool]] = {}
    weight = torch.nn.Parameter(torch.ones(3))

    def layer(x: torch.Tensor) -> torch.Tensor:
        activation = x * 2
        held.append(weakref.ref(activation))
        return deeper(activation)

    def deeper(x: torch.Tensor) -> torch.Tensor:
        workspace = torch.zeros(3)
        held.append(weakref.ref(workspace))
        try:
            raise out_of_memory()
        except torch.OutOfMemoryError as error:
            raise RuntimeError("layer failed") from error

    def micro_step(_n: int) -> None:
        batch = torch.ones(3)
        held.append(weakref.ref(batch))
        layer(batch * weight).sum().backward()

    def look(call: str) -> None:
        if call != "begin":
            alive.setdefault(call, [reference() is not None for reference in held])

    memory.on_call = look
    job = TrainingJob(micro_step=micro_step, optimizer=torch.optim.SGD([weight], lr=0.1))
    gc.disable()  # so that only the end of the handler can have freed them
    try:
        trial = TrialRunner(lambda: job, memory)((1,))
    finally:
        gc.enable()
    assert trial.outcome is Outcome.OUT_OF_MEMORY
    assert alive == {"read": [False] * 3, "end": [False] * 3}


def test_peers_defect_3_a_failed_backward_leaves_no_graph(memory: ScriptedMemory) -> None:
    """What autograd saved for a backward pass that failed is dead too when memory is read."""
    saved: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []
    weight = torch.nn.Parameter(torch.ones(3))

    def micro_step(_n: int) -> None:
        activation = weight * 2
        saved.append(weakref.ref(activation))
        loss = FailsBackward.apply(activation).sum()
        loss.backward()

    def look(call: str) -> None:
        if call == "read":
            alive.extend(reference() is not None for reference in saved)

    memory.on_call = look
    job = TrainingJob(micro_step=micro_step, optimizer=torch.optim.SGD([weight], lr=0.1))
    assert TrialRunner(lambda: job, memory)((1,)).outcome is Outcome.OUT_OF_MEMORY
    assert alive == [False]


def test_the_job_made_for_a_trial_is_gone_before_the_next_is_made(memory: ScriptedMemory) -> None:
    """Two models at once would make the second trial smaller than training."""
    models: list[weakref.ref[TrainingJob]] = []

    def make() -> TrainingJob:
        assert not any(reference() is not None for reference in models)
        job = small_job(lambda n: memory.use(n * MIB))
        models.append(weakref.ref(job))
        return job

    run = TrialRunner(make, memory)
    assert [run((size,)).fits for size in (1, 5000, 2)] == [True, False, True]


# ---- other outcomes ---------------------------------------------------------------------------------------------


def test_flushes_after_the_second_window_are_thrash(recorder: Recorder) -> None:
    """A size that runs only because the allocator flushes its cache in steady state does not fit."""
    recorder.at[3] = recorder.memory.flush
    trial = runner(recorder)((1,))
    assert (trial.outcome, trial.alloc_retries, trial.steps) == (Outcome.THRASHES, 1, 3)


@pytest.mark.parametrize("micro_step", [1, 2])
def test_flushes_in_the_first_two_windows_are_not_thrash(recorder: Recorder, micro_step: int) -> None:
    """The cache is still forming while the optimizer's state is new."""
    recorder.at[micro_step] = recorder.memory.flush
    trial = runner(recorder)((1,))
    assert (trial.outcome, trial.alloc_retries) == (Outcome.FITS, 0)


def test_a_spill_that_raises_nothing_is_over_the_budget(recorder: Recorder) -> None:
    """Where the driver spills into system memory no error comes: the footprint alone tells."""
    recorder.memory.hidden_bytes = 801 * MIB
    trial = runner(recorder)((100,))
    assert (trial.outcome, trial.footprint_bytes) == (Outcome.OVER_BUDGET, 1001 * MIB)
    recorder.memory.hidden_bytes = 800 * MIB
    assert runner(recorder)((100,)).fits


def test_another_error_is_the_jobs_own(recorder: Recorder) -> None:
    """It names size and error on one line, and keeps the job's own traceback."""
    recorder.at[2] = raises(ValueError("labels of two lengths\nand more"))
    with pytest.raises(WorkloadError) as caught:
        runner(recorder)((7, 7))
    assert str(caught.value) == (
        "the training job failed at micro-batch 7, and not for want of memory: ValueError: labels of two lengths"
    )
    assert "in micro_step" in caught.value.traceback_text
    assert "and more" in caught.value.traceback_text
    assert recorder.memory.calls[-1] == "end"


def test_an_error_that_says_nothing_is_named_by_its_type(recorder: Recorder) -> None:
    """A bare `assert` has no message, and none is pretended."""
    recorder.at[1] = raises(AssertionError())
    with pytest.raises(WorkloadError, match=r"not for want of memory: AssertionError$"):
        runner(recorder)((7, 7))


@pytest.mark.parametrize(
    ("error", "limit"),
    [
        (MemoryError(), "host memory"),
        (RuntimeError("CUDA error: invalid configuration argument"), "CUDA launch limit"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "shared memory"),
        (RuntimeError("integer out of range"), "32-bit index limit"),
    ],
)
def test_a_limit_other_than_gpu_memory_is_named(recorder: Recorder, error: Exception, limit: str) -> None:
    """The error says which limit, at what size, and which option keeps below it."""
    recorder.at[1] = raises(error)
    with pytest.raises(WorkloadError, match=f"micro-batch 7 .* not GPU memory, {limit}: .*--max-micro-batch below 7"):
        runner(recorder)((7,))


def test_no_size_is_offered_below_the_smallest(recorder: Recorder) -> None:
    """At size 1 there is nothing below to go to."""
    recorder.at[1] = raises(MemoryError())
    with pytest.raises(WorkloadError) as caught:
        runner(recorder)((1,))
    assert "--max-micro-batch" not in str(caught.value)


def test_an_ambiguous_error_is_memory_where_a_smaller_size_ran(recorder: Recorder) -> None:
    """A full device and a defect make cuDNN say the same: what ran before decides."""
    message = "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"
    run = runner(recorder)
    recorder.at[1] = raises(RuntimeError(message))
    with pytest.raises(WorkloadError, match="CUDNN_STATUS_NOT_SUPPORTED"):
        run((8,))
    assert run((4,)).fits
    recorder.at[recorder._micro_steps + 1] = raises(RuntimeError(message))
    trial = run((8,))
    assert trial.outcome is Outcome.OUT_OF_MEMORY
    assert "a smaller size ran" in trial.note


def test_a_lost_context_ends_the_probe_and_nothing_more_is_read(recorder: Recorder) -> None:
    """After an illegal access every reading is void, and nothing is freed or put back: each call would fail anew."""

    def lose() -> None:
        recorder.memory.ooms += 1
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    recorder.at[1] = lose
    with pytest.raises(WorkloadError, match="context is lost"):
        runner(recorder)((1,))
    assert recorder.memory.calls == ["begin", "abandon"]


def test_errors_of_this_package_pass_as_they_are(memory: ScriptedMemory) -> None:
    """A factory that refuses its parameters says it better than a trial could."""

    def make() -> TrainingJob:
        raise UsageError("width 7 is not divisible by heads 2")

    with pytest.raises(UsageError, match="width 7"):
        TrialRunner(make, memory)((1,))
    assert memory.calls == ["begin", "end"]


# ---- trials that train nothing ------------------------------------------------------------------------------------


def test_a_job_without_gradients_is_an_error(memory: ScriptedMemory) -> None:
    """No backward pass, no trial, also where gradients of the caller's own were there before."""
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    job = TrainingJob(micro_step=lambda _: None, optimizer=torch.optim.SGD([weight], lr=0.1))
    with pytest.raises(WorkloadError, match=r"no parameter of the optimizer has a gradient.*loss\.backward\(\)"):
        TrialRunner(lambda: job, memory)((1,))
    assert memory.ended == 1


def test_peers_defect_9_a_trial_that_runs_no_step_is_an_error(memory: ScriptedMemory) -> None:
    """Without an optimizer step nothing was tested: an error after the first window, never a fit."""
    seen: list[int] = []
    job = small_job(seen.append, end_window=lambda: None)
    with pytest.raises(WorkloadError, match=r"end_window must call optimizer\.step\(\)"):
        TrialRunner(lambda: job, memory)((1,))
    assert (seen, memory.ended) == ([1], 1)


@pytest.mark.parametrize("window", [(1,), (1, 1)])
def test_a_micro_step_that_steps_the_optimizer_is_an_error(memory: ScriptedMemory, window: tuple[int, ...]) -> None:
    """Its gradients never accumulate: a trial of it says nothing of training that does."""
    job = small_job(lambda _: optimizer.step())
    [optimizer] = job.optimizers()
    with pytest.raises(WorkloadError, match=r"micro_step stepped the optimizer: .*end_window"):
        TrialRunner(lambda: job, memory)(window)


def test_peers_defect_9_steps_are_counted_and_not_assumed(memory: ScriptedMemory) -> None:
    """An end_window that steps every other time gets as many windows as three steps take."""
    calls: list[int] = []

    def end_window() -> None:
        calls.append(1)
        if len(calls) % 2:
            job.optimizers()[0].step()
        job.optimizers()[0].zero_grad()

    job = small_job(lambda _: None, end_window=end_window)
    trial = TrialRunner(lambda: job, memory)((1,))
    assert (trial.steps, len(calls)) == (3, 5)


class Scaled:
    """A job under a GradScaler whose first losses overflow, as they do until the scale has come down."""

    def __init__(self, overflows: int) -> None:
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.optimizer = torch.optim.Adam([self.weight], lr=0.1)
        self.scaler = torch.amp.GradScaler("cpu")
        self.overflows = overflows
        self.windows = 0
        self.at: dict[int, Callable[[], object]] = {}

    def micro_step(self, _n: int) -> None:
        self.windows += 1
        self.at.get(self.windows, lambda: None)()
        factor = float("inf") if self.windows <= self.overflows else 1.0
        self.scaler.scale(self.weight.sum() * factor).backward()

    def job(self) -> TrainingJob:
        return TrainingJob(micro_step=self.micro_step, optimizer=self.optimizer, scaler=self.scaler)


def test_steps_that_a_scaler_skips_do_not_count(memory: ScriptedMemory) -> None:
    """Three real steps are run after the skipped ones, since only they make the optimizer's state."""
    scaled = Scaled(overflows=4)
    trial = TrialRunner(scaled.job, memory)((1,))
    assert (trial.outcome, trial.steps, scaled.windows) == (Outcome.FITS, 3, 7)
    assert memory.calls.count("settle") == 2  # after the first window, and after the first that stepped


@pytest.mark.parametrize(("window", "outcome"), [(5, Outcome.FITS), (6, Outcome.FITS), (7, Outcome.THRASHES)])
def test_steady_state_begins_after_the_second_real_step(memory: ScriptedMemory, window: int, outcome: Outcome) -> None:
    """A flush when the state is first made, late as that is under a scaler, is no thrash."""
    scaled = Scaled(overflows=4)
    scaled.at[window] = memory.flush
    assert TrialRunner(scaled.job, memory)((1,)).outcome is outcome


def test_a_scaler_that_skips_every_step_ends_after_thirty_windows(memory: ScriptedMemory) -> None:
    """A loss that is never finite would otherwise run for ever."""
    scaled = Scaled(overflows=1000)
    with pytest.raises(WorkloadError, match=r"0 of 30 windows .* 3 are needed: is the loss finite"):
        TrialRunner(scaled.job, memory)((1,))
    assert scaled.windows == 30


def test_every_optimizer_is_stepped_and_zeroed(memory: ScriptedMemory) -> None:
    """Several optimizers step in their order at the end of each window."""
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizers = [torch.optim.SGD([weight], lr=0.1) for weight in weights]

    def micro_step(_n: int) -> None:
        (weights[0].sum() + weights[1].sum()).backward()

    job = TrainingJob(micro_step=micro_step, optimizer=optimizers)
    assert TrialRunner(lambda: job, memory)((1, 1)).steps == 3
    for weight in weights:
        torch.testing.assert_close(weight.detach(), torch.full((2,), 1 - 3 * 0.2))
        assert weight.grad is None


# ---- others on the device -----------------------------------------------------------------------------------------


def test_a_failure_while_a_tenant_grew_is_measured_again(recorder: Recorder) -> None:
    """What another process took meanwhile says nothing of this job: the trial is repeated, and only once if it goes."""
    recorder.memory.tenant_growth_bytes = 500 * MIB

    def squeezed() -> None:
        raise out_of_memory()

    def calm() -> None:
        recorder.memory.tenant_growth_bytes = 0

    recorder.at = {1: squeezed, 2: calm}
    trial = runner(recorder)((5,))
    assert trial.fits
    assert (recorder.memory.begun, recorder.memory.ended) == (2, 2)


def test_a_tenant_that_keeps_growing_makes_the_device_busy(recorder: Recorder) -> None:
    """After three attempts the error says how much was taken, and that the GPU is not this probe's alone."""
    recorder.memory.tenant_growth_bytes = 512 * MIB
    with pytest.raises(BusyError, match=r"512(\.0)? MiB .* micro-batch 5000 .* 3 times"):
        runner(recorder)((5000,))
    assert (recorder.memory.begun, recorder.memory.ended) == (3, 3)


def test_a_fit_beside_a_grown_tenant_is_a_fit(recorder: Recorder) -> None:
    """It fitted with less than the budget, so it fits."""
    recorder.memory.tenant_growth_bytes = 512 * MIB
    assert runner(recorder)((5,)).fits
    assert recorder.memory.begun == 1


# ---- what is left behind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, out_of_memory(), ValueError("x"), KeyboardInterrupt(), SystemExit(1)])
def test_memory_is_ended_and_state_put_back_after_every_trial(recorder: Recorder, error: BaseException | None) -> None:
    """Whatever ends a trial: the cap is lifted first, then the caller's state is put back."""
    order: list[str] = []
    recorder.memory.on_call = order.append
    run = runner(recorder, after_trial=lambda: order.append("put back"))
    if error is not None:
        recorder.at[2] = raises(error)
    if error is None or isinstance(error, torch.OutOfMemoryError):
        run((1,))
    else:
        with pytest.raises((WorkloadError, KeyboardInterrupt, SystemExit)):
            run((1,))
    assert order[-2:] == ["end", "put back"]
    assert order.count("end") == order.count("put back") == 1


def test_state_is_put_back_where_the_end_fails(recorder: Recorder) -> None:
    """An interrupt while caches are freed does not cost the caller the training state."""
    put_back: list[bool] = []

    def interrupt(call: str) -> None:
        if call == "end":
            raise KeyboardInterrupt

    recorder.memory.on_call = interrupt
    with pytest.raises(KeyboardInterrupt):
        runner(recorder, after_trial=lambda: put_back.append(True))((1,))
    assert put_back == [True]


@pytest.mark.parametrize("error", [None, out_of_memory(), KeyboardInterrupt()])
def test_the_hooks_that_count_steps_are_removed(recorder: Recorder, error: BaseException | None) -> None:
    """The optimizer has the hooks that it had before, however the trial ended."""
    hooks = recorder.optimizer._optimizer_step_post_hooks
    before = dict(hooks)
    if error is not None:
        recorder.at[2] = raises(error)
    with contextlib.suppress(KeyboardInterrupt):
        runner(recorder)((1,))
    assert dict(hooks) == before


def test_an_end_of_window_that_steps_twice_is_one_step(recorder: Recorder) -> None:
    """Three windows run also where each ends in two steps of the optimizer."""

    def end_window() -> None:
        recorder.optimizer.step()
        recorder.optimizer.step()
        recorder.optimizer.zero_grad()

    def job() -> TrainingJob:
        return TrainingJob(micro_step=recorder.micro_step, optimizer=recorder.optimizer, end_window=end_window)

    trial = TrialRunner(job, recorder.memory)((1,))
    assert trial.steps == 3
    assert recorder.events.count("micro 1") == 3


class OtherDevice(ScriptedMemory):
    """A device that the job's tensors are not on."""

    @property
    def device_name(self) -> str:  # type: ignore[override]  # the fake's own takes any device
        return "cuda:0"


def test_a_job_on_another_device_is_refused(recorder: Recorder) -> None:
    """Trials of a job on the CPU would all fit the GPU: both devices are named."""
    recorder.memory = OtherDevice()
    with pytest.raises(WorkloadError, match="parameters are on cpu, and the probe measures cuda:0"):
        runner(recorder)((1,))
