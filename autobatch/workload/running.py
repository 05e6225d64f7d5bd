"""Run one trial of a training job: windows of micro-batches with their optimizer steps, and what came of them."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from autobatch.errors import AutobatchError, WorkloadError
from autobatch.workload.judging import Failure, Progress, explain_failure, judge, try_beside_tenants

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from autobatch.breakdown import MemoryBreakdown
    from autobatch.gpu.memory import DeviceMemory
    from autobatch.trial import Trial
    from autobatch.workload.itemizing import WindowRecorder
    from autobatch.workload.job import TrainingJob

__all__ = ["TrialRunner"]

# A GradScaler starts high and skips steps until its scale fits; a window whose step was skipped does not count.
_MOST_WINDOWS = 30


class TrialRunner:
    """Runs trials of one job in this process.

    Each call runs at least `min_windows` windows that end in an optimizer step, so that the optimizer's state exists
    while later windows run, and reads the footprint while the allocator still holds what it reserved. A size fits where
    no window ran out of memory, the footprint kept to the budget, and the allocator flushed no cache after the second
    window (where a GradScaler skips steps, after the second that stepped: only then is there nothing new to hold).

    A trial begins without gradients, as training does, so that gradients left from elsewhere neither take memory in its
    first window nor pass for its own.
    """

    def __init__(
        self,
        make_job: Callable[[], TrainingJob],
        memory: DeviceMemory,
        *,
        min_windows: int = 3,
        timed: bool = True,
        after_trial: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Prepare to run trials.

        Args:
            make_job: makes the job afresh for each trial, or gives the caller's own.
            memory: the device's memory.
            min_windows: windows of each trial, at least 3.
            timed: whether seconds mean anything here; they do not on an emulated card.
            after_trial: puts the caller's state back, where the job is the caller's own.
            clock: gives seconds since some moment.
        """
        self._make_job = make_job
        self._memory = memory
        self._min_windows = max(3, min_windows)
        self._timed = timed
        self._after_trial = after_trial
        self._clock = clock
        self._smallest_run: int | None = None

    def __call__(self, window: Sequence[int], *, confirmation: bool = False) -> Trial:
        """Run one trial.

        Args:
            window: the sizes of the micro-batches before each optimizer step.
            confirmation: whether the trial confirms a size of the plan.

        Raises:
            WorkloadError: the job failed, but not for want of device memory; or it ran no optimizer step.
            BusyError: another process kept taking the device's memory meanwhile.
        """
        return try_beside_tenants(lambda: self.attempt(tuple(window), confirmation=confirmation))

    def itemize(self, window: Sequence[int]) -> MemoryBreakdown | None:
        """Run one trial more and take its last window apart.

        Args:
            window: the sizes of the micro-batches before each optimizer step.

        Returns:
            What the memory is made of where the most is in use; None where the trial did not fit this time.

        Raises:
            WorkloadError: as a call does.
        """
        from autobatch.gpu.opening import parse_ordinal
        from autobatch.workload.itemizing import WindowRecorder

        recorder = WindowRecorder(parse_ordinal(self._memory.device_name or "cuda:0"))
        trial, _ = self.attempt(tuple(window), confirmation=True, recorder=recorder)
        return recorder.breakdown(trial) if trial.fits else None

    def attempt(
        self, window: tuple[int, ...], *, confirmation: bool, recorder: WindowRecorder | None = None
    ) -> tuple[Trial, int]:
        """Run one trial once, whoever else takes memory; raises `WorkloadError` as a call does.

        Args:
            window: the sizes of the micro-batches before each optimizer step.
            confirmation: whether the trial confirms a size of the plan.
            recorder: records the last window, where the trial is run for that.

        Returns:
            The trial, and the bytes by which other processes' memory grew meanwhile.
        """
        progress = Progress()
        with contextlib.ExitStack() as afterwards:
            # Last in, first out: the memory is let go before the caller's state is put back, which may need some.
            if self._after_trial is not None:
                afterwards.callback(self._after_trial)
            afterwards.callback(self._memory.end)
            self._memory.begin()
            progress.held_at_start_bytes = self._memory.allocated_bytes()
            failure = self._run_guarded(window, progress, recorder)
            # Outside the handler: the exception, and with it the frames that hold the tensors, is gone.
            if failure is not None and failure.is_final:
                # Whatever touched the device now would fail, and hide why: nothing is put back, nothing freed.
                self._memory.abandon()
                afterwards.pop_all()
                raise WorkloadError(failure.message, traceback_text=failure.traceback_text, context_lost=True)
            reading = self._memory.read()
            trial = judge(
                window,
                progress,
                reading,
                failure,
                budget_bytes=self._memory.budget_bytes,
                timed=self._timed,
                confirmation=confirmation,
            )
            if trial.fits:
                self._smallest_run = min(trial.micro_batch_size, self._smallest_run or trial.micro_batch_size)
        return trial, reading.tenant_growth_bytes

    def _run_guarded(
        self, window: tuple[int, ...], progress: Progress, recorder: WindowRecorder | None
    ) -> Failure | None:
        try:
            self._run_windows(window, progress, recorder)
        except WorkloadError as error:
            # A job that swallowed an out-of-memory error looks like one that never trains: the reading decides.
            return Failure(message=str(error), traceback_text=error.traceback_text, reason=str(error))
        except AutobatchError:
            raise
        except Exception as error:  # noqa: BLE001 - the job may raise anything; what it means is decided in one place
            size = max(window)
            smaller_ran = self._smallest_run is not None and self._smallest_run < size
            return explain_failure(error, size, nearly_full=self._memory.is_nearly_full(), smaller_ran=smaller_ran)
        return None

    def _run_windows(self, window: tuple[int, ...], progress: Progress, recorder: WindowRecorder | None) -> None:
        job = self._make_job()
        _check_devices(job, self._memory.device_name)
        for optimizer in job.optimizers():
            optimizer.zero_grad(set_to_none=True)
        counter = _StepCounter(job)
        counted = 0
        with counter:
            while progress.steps < self._min_windows:
                if progress.windows == _MOST_WINDOWS:
                    raise WorkloadError(
                        f"{progress.steps} of {progress.windows} windows ended in an optimizer step, {self._min_windows} are "
                        "needed: is the loss finite, and does end_window step the optimizer?"
                    )
                is_last = progress.steps == self._min_windows - 1
                with recorder if recorder is not None and is_last else contextlib.nullcontext():
                    seconds = self._run_window(job, window, progress, counter)
                # A window is one step, however often an optimizer steps at its end.
                stepped, counted = counter.steps > counted, counter.steps
                first_step = stepped and progress.steps == 0
                progress.steps += stepped
                if counter.steps == 0 and job.scaler is None:
                    raise WorkloadError(
                        "the window ended without an optimizer step: end_window must call optimizer.step(); where a "
                        "GradScaler skips it, pass the scaler"
                    )
                if stepped:
                    progress.times.add(*seconds)
                self._note_window(progress, first_step=first_step)

    def _run_window(
        self, job: TrainingJob, window: tuple[int, ...], progress: Progress, counter: _StepCounter
    ) -> tuple[float, float]:
        """Run one window to its end; the seconds of its micro-batches, and those of its end."""
        steps_before = counter.steps
        began = self._clock()
        for position, size in enumerate(window):
            if position == len(window) - 1:
                progress.held_bytes = max(progress.held_bytes, self._memory.allocated_bytes())
            job.micro_step(size)
        _wait_for_device()
        micro_batches_seconds = self._clock() - began
        if counter.steps > steps_before:
            raise WorkloadError(
                "micro_step stepped the optimizer: it runs forward and backward only, since the gradients of several "
                "micro-batches accumulate before a step; what belongs to the step goes into end_window"
            )
        _check_gradients(job, progress)
        end_began = self._clock()
        _end_window(job)
        _wait_for_device()
        progress.windows += 1
        return micro_batches_seconds, self._clock() - end_began

    def _note_window(self, progress: Progress, *, first_step: bool) -> None:
        if progress.windows == 1 or first_step:  # both load kernels, which take memory outside the allocator
            self._memory.settle()
        if progress.steps <= 2:
            progress.retries_at_second = self._memory.alloc_retries()


class _StepCounter:
    """Counts optimizer steps that really ran, of the optimizer that steps most often."""

    def __init__(self, job: TrainingJob) -> None:
        self._counts = [0] * len(job.optimizers())
        self._job = job
        self._handles: list[object] = []

    def __enter__(self) -> None:
        for index, optimizer in enumerate(self._job.optimizers()):
            self._handles.append(optimizer.register_step_post_hook(self._hook(index)))

    def __exit__(self, *exc_info: object) -> None:
        for handle in self._handles:
            handle.remove()  # type: ignore[attr-defined]  # torch's RemovableHandle

    def _hook(self, index: int) -> Callable[..., None]:
        def count(*_: object) -> None:
            self._counts[index] += 1

        return count

    @property
    def steps(self) -> int:
        return max(self._counts)


def _end_window(job: TrainingJob) -> None:
    if job.end_window is not None:
        job.end_window()
        return
    for optimizer in job.optimizers():
        if job.scaler is None:
            optimizer.step()
        else:
            job.scaler.step(optimizer)
    if job.scaler is not None:
        job.scaler.update()
    for optimizer in job.optimizers():
        optimizer.zero_grad(set_to_none=True)


def _check_gradients(job: TrainingJob, progress: Progress) -> None:
    """In the first window: size up the gradients; a job without any would pass every trial without having trained."""
    if progress.windows:
        return
    groups = (group for optimizer in job.optimizers() for group in optimizer.param_groups)
    gradients = [grad for group in groups for parameter in group["params"] if (grad := parameter.grad) is not None]
    progress.gradient_bytes = sum(_local_bytes(grad) for grad in gradients)
    if not gradients:
        raise WorkloadError(
            "after micro_step no parameter of the optimizer has a gradient: micro_step(n) must call loss.backward(), and "
            "the optimizer must hold the model's own parameters"
        )


def _local_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor in this process: of a `DTensor`, those of its part."""
    local: torch.Tensor = getattr(tensor, "to_local", lambda: tensor)()
    return local.numel() * local.element_size()


def _check_devices(job: TrainingJob, expected: str | None) -> None:
    """Refuse a job that trains elsewhere than on the device that is measured: its trials would all fit."""
    groups = (group for optimizer in job.optimizers() for group in optimizer.param_groups)
    found = {str(parameter.device) for group in groups for parameter in group["params"]}
    if expected is None or (expected in found and not any(name.startswith("cuda") for name in found - {expected})):
        return
    others = ", ".join(sorted(found - {expected})) or "no device"
    raise WorkloadError(
        f"the optimizer's parameters are on {others}, and the probe measures {expected}: move the whole model there, or "
        "give --device (device= in the library) the one that it trains on"
    )


def _wait_for_device() -> None:
    """Kernels run behind the host: without waiting the clock times their launches, and their errors come too late."""
    import torch

    is_initialized: Callable[[], bool] = torch.cuda.is_initialized
    if is_initialized():
        torch.cuda.synchronize()
