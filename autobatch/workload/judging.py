"""What came of a trial: the outcome, from how far it came, what it held and what it raised."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from autobatch.errors import BusyError, WorkloadError
from autobatch.gpu.oom import FailureKind, Verdict, classify, requested_bytes
from autobatch.trial import Outcome, Trial
from autobatch.units import format_bytes
from autobatch.workload.timing import StepTimes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autobatch.gpu.memory import MemoryReading

__all__ = ["Failure", "Progress", "explain_failure", "first_line", "judge", "try_beside_tenants"]

# Pauses before each attempt while another process takes memory: it may be one that only starts.
_PAUSES_SECONDS = (0.0, 1.0, 3.0)


@dataclass
class Progress:
    """How far a trial came: read after the frames of a failed one are gone."""

    steps: int = 0
    windows: int = 0
    held_at_start_bytes: int = 0
    held_bytes: int = 0
    gradient_bytes: int = 0
    retries_at_second: int = 0
    times: StepTimes = field(default_factory=StepTimes)


@dataclass(frozen=True)
class Failure:
    """What is kept of an exception once its frames, which hold the tensors, are let go."""

    message: str
    """What to say of it where it is not for want of memory."""
    traceback_text: str
    reason: str
    is_memory: bool = False
    is_final: bool = False
    """Whether the CUDA context is lost, so that nothing more can be run or read."""
    requested_bytes: int = 0


def explain_failure(error: BaseException, size: int, *, nearly_full: bool, smaller_ran: bool) -> Failure:
    """Decide what an exception of a trial means.

    Args:
        error: what was raised.
        size: samples of the micro-batch.
        nearly_full: whether next to nothing was free on the device.
        smaller_ran: whether a smaller size ran before.
    """
    verdict = classify(error, device_nearly_full=nearly_full, smaller_size_ran=smaller_ran)
    text = f"{type(error).__name__}: {first_line(error)}".removesuffix(": ")  # a bare `assert` says nothing
    return Failure(
        message=_describe(size, verdict, text),
        traceback_text="".join(traceback.format_exception(error)),
        reason=verdict.reason if verdict.kind is FailureKind.MEMORY else text,
        is_memory=verdict.kind is FailureKind.MEMORY,
        is_final=verdict.context_lost,
        requested_bytes=requested_bytes(error),
    )


def judge(
    window: Sequence[int],
    progress: Progress,
    reading: MemoryReading,
    failure: Failure | None,
    *,
    budget_bytes: int,
    timed: bool,
    confirmation: bool,
) -> Trial:
    """Put a trial together.

    Args:
        window: the sizes of the micro-batches before each optimizer step.
        progress: how far it came.
        reading: what it used.
        failure: what it raised, where it did.
        budget_bytes: the footprint that it may have.
        timed: whether its seconds mean anything.
        confirmation: whether it confirms a size of the plan.

    Raises:
        WorkloadError: it failed, but not for want of device memory.
    """
    ran_out = reading.num_ooms > 0  # below 0 where the job reset the allocator's own counts
    if failure is not None and not failure.is_memory and not ran_out:
        raise WorkloadError(failure.message, traceback_text=failure.traceback_text)
    retries = max(0, reading.alloc_retries - progress.retries_at_second)
    note = ""
    if failure is not None or ran_out:
        outcome = Outcome.OUT_OF_MEMORY
        note = _describe_shortage(failure)
    elif reading.footprint_bytes > budget_bytes:
        outcome = Outcome.OVER_BUDGET
    elif retries:
        outcome = Outcome.THRASHES
    else:
        outcome = Outcome.FITS
    times = progress.times if timed and outcome is not Outcome.OUT_OF_MEMORY else StepTimes()
    return Trial(
        micro_batch_size=max(window),
        outcome=outcome,
        micro_batches_per_step=len(window),
        window=tuple(window),
        steps=progress.steps,
        peak_allocated_bytes=reading.peak_allocated_bytes,
        peak_reserved_bytes=reading.peak_reserved_bytes,
        footprint_bytes=reading.footprint_bytes,
        alloc_retries=retries,
        seconds_per_step=times.median_seconds,
        seconds_per_step_deviation=times.deviation_seconds,
        seconds_per_step_end=times.end_seconds,
        timed_steps=times.num_steady,
        confirmation=confirmation,
        held_at_start_bytes=progress.held_at_start_bytes,
        held_bytes=progress.held_bytes,
        gradient_bytes=progress.gradient_bytes,
        largest_segment_bytes=reading.largest_segment_bytes,
        oom_request_bytes=failure.requested_bytes if failure else 0,
        note=note,
    )


def try_beside_tenants(attempt: Callable[[], tuple[Trial, int]]) -> Trial:
    """Try a size again while what failed may have been another process's doing.

    Args:
        attempt: runs a trial; gives it, and the bytes by which other processes grew meanwhile.

    Raises:
        BusyError: another process kept taking the device's memory.
    """
    for pause_seconds in _PAUSES_SECONDS:
        time.sleep(pause_seconds)
        trial, growth = attempt()
        if trial.fits or growth == 0:
            return trial
    raise BusyError(
        f"another process took {format_bytes(growth)} of the GPU while micro-batch {trial.micro_batch_size} was tried, "
        f"{len(_PAUSES_SECONDS)} times: free the GPU, or try again later"
    )


def _describe(size: int, verdict: Verdict, text: str) -> str:
    """Say what a failure means where it is not for want of memory."""
    if verdict.kind is FailureKind.NOT_VRAM:
        way_out = f"; a --max-micro-batch below {size} keeps clear of it" if size > 1 else ""
        return f"micro-batch {size} hit a limit that is not GPU memory, {verdict.limit}: {text}{way_out}"
    lost = "; the CUDA context is lost, and this process cannot go on using the GPU" if verdict.context_lost else ""
    return f"the training job failed at micro-batch {size}, and not for want of memory: {text}{lost}"


def _describe_shortage(failure: Failure | None) -> str:
    if failure is None:
        return "the job caught an out-of-memory error and went on"
    if failure.is_memory:
        return failure.reason
    return f"the job caught an out-of-memory error, and then: {failure.reason}"


def first_line(error: BaseException) -> str:
    """The first line of what an error says; empty where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""
