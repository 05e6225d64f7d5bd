"""Inside a training command: count its windows, read its memory, and end it once a trial has what it needs.

The hook calls `watch` when the command has imported torch. Nothing is asked of the script: windows are seen by torch's hooks on
optimizer steps, micro-batches at `torch.autograd.backward`, and errors at the allocator itself, before any handler of the
script's runs.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing import util
from typing import TYPE_CHECKING, Any

from autobatch.cache.sources import loaded_files
from autobatch.command.counting import StepCounts
from autobatch.errors import AutobatchError, WorkloadError
from autobatch.gpu.opening import open_device
from autobatch.jsonform import from_json_form, to_json_form
from autobatch.options import ProbeOptions
from autobatch.workload.inspection import OperatorWatch
from autobatch.workload.itemizing import WindowRecorder
from autobatch.workload.judging import Failure, Progress, explain_failure, judge

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from autobatch.gpu.memory import MemoryReading
    from autobatch.gpu.opening import OpenDevice
    from autobatch.trial import Trial

__all__ = ["watch"]

# Steps that a compilation or a GradScaler spoils are made up for, but not for ever.
_MOST_WINDOWS = 30
# An optimizer that has not stepped after so many windows more than needed is one that is not used, or thaws later.
_PATIENCE = 10
_LONGEST_TEXT = 60_000


@dataclass(frozen=True, kw_only=True)
class _Setup:
    """What the probe asks of this run."""

    options: ProbeOptions
    window: tuple[int, ...]
    confirmation: bool
    windows: int
    """Windows that the trial needs."""
    inspect: bool
    """Whether one window more is run to look at every operator."""
    smaller_ran: bool
    """Whether a smaller size ran before."""
    itemize: bool
    """Whether the last window's memory is taken apart."""


def watch(setup: Mapping[str, Any], send: Callable[..., None]) -> None:
    """Watch this process, which has just imported torch.

    Args:
        setup: what the probe asks, as `CommandTrials` wrote it.
        send: tells the probe something.
    """
    options = from_json_form(ProbeOptions, setup["options"], where="options")
    asked = _Setup(
        options=options,
        window=tuple(setup["window"]),
        confirmation=setup["confirmation"],
        windows=setup["windows"],
        inspect=setup["inspect"],
        smaller_ran=setup["smaller_ran"],
        itemize=setup["itemize"],
    )
    _Watcher(asked, send).install()


class _Watcher:
    """What is known of this process so far."""

    def __init__(self, setup: _Setup, send: Callable[..., None]) -> None:
        self._setup = setup
        self._tell = send
        self._reads: set[str] = set()
        self._start_anew()

    def _start_anew(self) -> None:
        """Know nothing: in a new process, and in a copy that it forked."""
        self._pid = os.getpid()
        self._stack = contextlib.ExitStack()
        self._device: OpenDevice | None = None
        self._starting = False
        self._progress = Progress()
        self._counts = StepCounts()
        self._trains_on_cpu = False
        self._highest: MemoryReading | None = None
        self._trial: dict[str, Any] | None = None
        self._operators: OperatorWatch | None = None
        self._recorder: WindowRecorder | None = None
        self._window_began = time.perf_counter()
        self._step_began = 0.0
        self._compiled = 0

    # ---- what is hooked ---------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Put the hooks in place."""
        import torch
        from torch.optim import optimizer

        start_cuda = torch.cuda._lazy_init  # noqa: SLF001 - what every first call on CUDA goes through, from C++ too

        def lazy_init() -> None:
            if self._is_first_start():
                self._open_device()
            start_cuda()  # type: ignore[no-untyped-call]

        torch.cuda._lazy_init = lazy_init  # noqa: SLF001
        backward = torch.autograd.backward

        def counted_backward(*args: Any, **kwargs: Any) -> Any:
            if not self._counts.enter_backward():
                return backward(*args, **kwargs)
            try:
                self._check_memory()
                return backward(*args, **kwargs)
            finally:
                self._counts.leave_backward()
                self._after_backward()

        torch.autograd.backward = counted_backward
        grad = torch.autograd.grad

        def counted_grad(*args: Any, **kwargs: Any) -> Any:
            self._counts.note_grad()
            return grad(*args, **kwargs)

        torch.autograd.grad = counted_grad
        optimizer.register_optimizer_step_pre_hook(self._before_step)
        optimizer.register_optimizer_step_post_hook(self._after_step)
        self._watch_variables()
        atexit.register(self._at_exit)
        # A forked copy trains by itself where this process has not started CUDA, and ends without `atexit`.
        os.register_at_fork(after_in_child=self._after_fork)
        util.register_after_fork(self, _Watcher._register_end)

    def _after_fork(self) -> None:
        if self._device is None and not self._starting:
            self._start_anew()

    def _register_end(self) -> None:
        util.Finalize(None, self._at_exit, exitpriority=-1)

    def _watch_variables(self) -> None:
        """Note which of the values the script reads from the environment."""
        reads = self._reads

        class Watched(type(os.environ)):  # type: ignore[misc]
            def __getitem__(self, key: str) -> str:
                if key.startswith("AUTOBATCH_"):
                    reads.add(key)
                return super().__getitem__(key)  # type: ignore[no-any-return]

        os.environ.__class__ = Watched

    # ---- the device -------------------------------------------------------------------------------------------------

    def _is_first_start(self) -> bool:
        return self._device is None and not self._starting and os.getpid() == self._pid

    def _open_device(self) -> None:
        """Open the device just before CUDA starts: what is in use on it belongs to others."""
        import torch

        self._starting = True
        options = self._setup.options
        rank = os.environ.get("LOCAL_RANK", "")
        if rank.isdecimal() and int(rank) < torch.cuda.device_count():
            options = dataclasses.replace(options, device=f"cuda:{rank}")
        try:
            self._device = self._stack.enter_context(open_device(options))
            self._device.memory.begin()
            self._keep_peaks()
            observe = getattr(torch._C, "_cuda_attach_out_of_memory_observer", None)  # noqa: SLF001 - has no public name
            if observe is not None:
                observe(self._out_of_memory)
        except Exception as error:  # noqa: BLE001 - whatever hinders the measurement is told to the probe
            self._fail(error)

    def _keep_peaks(self) -> None:
        """Read the peaks before the script resets them, as one that logs its memory does at each step."""
        import torch

        reset = torch._C._cuda_resetPeakMemoryStats  # noqa: SLF001 - what every way to reset them ends in

        def kept(device: int) -> None:
            if self._device is not None:
                self._highest = _higher(self._highest, self._device.memory.read())
            reset(device)

        torch._C._cuda_resetPeakMemoryStats = kept  # noqa: SLF001

    def _reading(self) -> MemoryReading:
        device = self._device
        if device is None:
            raise RuntimeError("no device was opened")
        return _higher(self._highest, device.memory.read())

    def _out_of_memory(self, _device: int, requested: int, *_: int) -> None:
        """Called by the allocator before it raises: the script's handlers never run."""
        if os.getpid() == self._pid and self._trial is None:
            reason = "the device's allocator: OutOfMemoryError"
            self._report(
                Failure(message="", traceback_text="", reason=reason, is_memory=True, requested_bytes=requested)
            )

    def _check_memory(self) -> None:
        """See whether the script swallowed an out-of-memory error, where torch does not say so at once."""
        if self._device is not None and self._trial is None and self._device.memory.num_ooms() > 0:
            self._report(None)

    # ---- windows ----------------------------------------------------------------------------------------------------

    def _after_backward(self) -> None:
        if self._device is not None and self._counts.in_window < len(self._setup.window):
            self._progress.held_bytes = max(self._progress.held_bytes, self._device.memory.allocated_bytes())

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self._recorder is not None and os.getpid() == self._pid:
            self._recorder.before_step()
        if os.getpid() != self._pid or not self._counts.enter_step(optimizer):
            return
        self._check_memory()
        if self._trial is not None:
            return
        if self._device is not None and self._progress.steps == 0:
            self._size_gradients(optimizer)
        self._wait()
        self._step_began = time.perf_counter()

    def _size_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [value.grad for value in _values(optimizer) if value.grad is not None]
        held = sum(value.numel() * value.element_size() for value in gradients)
        self._progress.gradient_bytes = max(self._progress.gradient_bytes, held)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self._recorder is not None and os.getpid() == self._pid:
            self._recorder.after_step()
        if os.getpid() != self._pid or not self._counts.leave_step(optimizer):
            return
        if self._trial is not None:
            self._end_inspection()
            return
        if not self._trains_on_device(optimizer):
            return
        if self._counts.step(optimizer):
            self._end_window()
        if self._progress.steps >= self._setup.windows and not self._waits_for_others():
            self._report(None)

    def _trains_on_device(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the step is one of training on the device that is measured; a small model on the CPU is passed over.

        A script that trains on another GPU is refused: its trials would all fit.
        """
        found = {str(value.device) for value in _values(optimizer)}
        expected = None if self._device is None else self._device.memory.device_name
        others = {name for name in found - {expected} if name.startswith("cuda")}
        if others:
            self._fail(
                WorkloadError(
                    f"the command's optimizer has parameters on {', '.join(sorted(others))}, and the probe measures {expected}: "
                    "give --device the one that it trains on; ranks need LOCAL_RANK, which torchrun sets"
                )
            )
        if expected not in found and not self._trains_on_cpu:
            self._trains_on_cpu = True
            self._tell(kind="cpu")
        return expected in found

    def _end_window(self) -> None:
        device = self._device
        if device is None:  # _trains_on_device has passed it over
            return
        self._wait()
        now = time.perf_counter()
        compiled = _count_compilations()
        is_warm = compiled == self._compiled
        self._compiled = compiled
        progress = self._progress
        progress.windows += 1
        self._tell(kind="window", windows=progress.windows)
        if self._recorder is not None:
            self._recorder.__exit__(None)
        if is_warm or progress.windows > _MOST_WINDOWS:
            progress.steps += 1
            progress.times.add(self._step_began - self._window_began, now - self._step_began)
        if progress.windows == 1 or progress.steps == 1:  # both load kernels, which take memory outside the allocator
            device.memory.settle()
        if progress.steps <= 2:
            progress.retries_at_second = device.memory.alloc_retries()
        if self._setup.itemize and self._recorder is None and progress.steps >= self._setup.windows - 1:
            self._record(device)
        self._window_began = time.perf_counter()

    def _record(self, device: OpenDevice) -> None:
        """Record the window that begins."""
        # It begins within a hook on steps, where no other can be put in place.
        self._recorder = WindowRecorder(device.ordinal, sees_steps=False)
        try:
            self._recorder.__enter__()
        except AutobatchError as error:  # told to the probe, and not to the script
            self._fail(error)

    def _waits_for_others(self) -> bool:
        """Whether an optimizer that this process made has not stepped often enough yet, and may still."""
        if self._progress.steps >= self._setup.windows + _PATIENCE:
            return False
        return bool(self._idle_optimizers())

    def _idle_optimizers(self) -> list[str]:
        """The kinds of optimizers that train on a GPU and made fewer windows than needed."""
        stepped = {
            id(value) for one, count in self._counts.windows() if count >= self._setup.windows for value in _values(one)
        }
        idle = []
        for one in _optimizers_alive():
            values = _values(one)
            if any(value.is_cuda for value in values) and not any(id(value) in stepped for value in values):
                idle.append(type(one).__name__)
        return idle

    # ---- the end ----------------------------------------------------------------------------------------------------

    def _report(self, failure: Failure | None) -> None:
        """Keep the trial's result and, unless one window more is to be looked at, tell it and end."""
        device = self._device
        if device is None:
            return
        reading = self._reading()
        trial = self._judged(device, reading, failure)
        self._trial = {
            "trial": to_json_form(trial),
            "tenant_growth_bytes": reading.tenant_growth_bytes,
            "facts": to_json_form(device.facts),
            "ranks": _ranks(),
            "local_ranks": _local_ranks(),
            "reads": sorted(self._reads),
            "idle_optimizers": self._idle_optimizers() if trial.fits else [],
            "frozen_bytes": self._frozen_bytes(),
            "files": loaded_files(),
            "breakdown": self._breakdown(trial),
        }
        if trial.fits and self._setup.inspect:
            self._operators = OperatorWatch()
            self._operators.start()
        else:
            self._end()

    def _breakdown(self, trial: Trial) -> dict[str, Any] | None:
        found = self._recorder.breakdown(trial) if self._recorder is not None and trial.fits else None
        return None if found is None else dict(vars(found))

    def _judged(self, device: OpenDevice, reading: MemoryReading, failure: Failure | None) -> Trial:
        return judge(
            self._seen_window(),
            self._progress,
            reading,
            failure,
            budget_bytes=device.memory.budget_bytes,
            timed=device.facts.basis != "emulated",
            confirmation=self._setup.confirmation,
        )

    def _seen_window(self) -> tuple[int, ...]:
        """The window that really ran: a script that takes no number of accumulation steps makes one micro-batch a step."""
        seen = self._counts.fewest_in_window
        asked = self._setup.window
        return asked if seen is None or seen >= len(asked) else asked[: max(1, seen)]

    def _frozen_bytes(self) -> int:
        """Gradients that parameters of the optimizers would have, had they not been left out so far."""
        values = {id(value): value for one, _ in self._counts.windows() for value in _values(one)}
        idle = [value for value in values.values() if value.is_cuda and not value.requires_grad]
        return sum(value.numel() * value.element_size() for value in idle)

    def _end_inspection(self) -> None:
        if self._operators is not None:
            self._operators.stop()
            self._end()

    def _end(self) -> None:
        """Tell the trial, and end without another line of the script: no checkpoint is saved, nothing uploaded."""
        inspection = None if self._operators is None else to_json_form(self._operators.inspection())
        self._tell(kind="trial", inspection=inspection, **(self._trial or {}))
        self._leave(0)

    def _fail(self, error: BaseException) -> None:
        kind = type(error).__name__ if isinstance(error, AutobatchError) else "WorkloadError"
        text = str(error) if isinstance(error, AutobatchError) else f"{type(error).__name__}: {error}"
        details = "".join(traceback.format_exception(error))[-_LONGEST_TEXT:]
        self._tell(kind="failed", error={"kind": kind, "message": text, "traceback": details})
        self._leave(4)

    def _leave(self, status: int) -> None:
        if _local_ranks() > 1:
            # A launcher that sees one rank end tears the others down before they have reported: the probe ends them all.
            os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(status)

    def _at_exit(self) -> None:
        """The script came to its own end before the trial had its windows."""
        if os.getpid() != self._pid:
            return
        if self._trial is not None:  # the trial was done, its inspection not
            self._end()
        error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
        if error is None and not self._counts.passes and self._device is None:
            return  # a launcher, a tool
        failure, as_memory = None, None
        if error is not None:
            nearly_full = self._device is not None and self._device.memory.is_nearly_full()
            size = max(self._setup.window)
            failure = explain_failure(error, size, nearly_full=nearly_full, smaller_ran=self._setup.smaller_ran)
            if failure.is_memory or self._has_run_out():
                self._report(failure)
        if self._device is not None and not (failure and failure.is_final):
            as_memory = self._described_as_memory()
        self._tell(
            kind="ended",
            windows=self._progress.windows,
            backwards=self._counts.passes,
            message=failure.message if failure else "",
            traceback=failure.traceback_text[-_LONGEST_TEXT:] if failure else "",
            as_memory=as_memory,
            reads=sorted(self._reads),
        )

    def _has_run_out(self) -> bool:
        return self._device is not None and self._device.memory.num_ooms() > 0

    def _described_as_memory(self) -> dict[str, Any] | None:
        """The trial as it is if the last words of the process turn out to be those of an out-of-memory error."""
        if self._device is None:
            return None
        said = Failure(message="", traceback_text="", reason="the last words of the command", is_memory=True)
        trial = self._judged(self._device, self._reading(), said)
        return {"trial": to_json_form(trial), "facts": to_json_form(self._device.facts)}

    def _wait(self) -> None:
        """Kernels run behind the host: where time means something, what is timed is waited for."""
        if self._device is not None and self._device.facts.basis != "emulated":
            import torch

            torch.cuda.synchronize()


def _higher(before: MemoryReading | None, now: MemoryReading) -> MemoryReading:
    """A reading with the higher peaks of two."""
    if before is None:
        return now
    reserved = max(before.peak_reserved_bytes, now.peak_reserved_bytes)
    return dataclasses.replace(
        now,
        peak_allocated_bytes=max(before.peak_allocated_bytes, now.peak_allocated_bytes),
        peak_reserved_bytes=reserved,
        footprint_bytes=now.footprint_bytes - now.peak_reserved_bytes + reserved,
    )


def _ranks() -> int:
    """Ranks that train together: as torch knows them, or else their launcher."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return _number_in("WORLD_SIZE", 1)


def _local_ranks() -> int:
    """Those of them on this machine; all where nobody says."""
    return _number_in("LOCAL_WORLD_SIZE", _ranks())


def _number_in(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def _values(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for group in optimizer.param_groups for value in group["params"]]


def _optimizers_alive() -> list[torch.optim.Optimizer]:
    """Every optimizer that is there, also before its first step: found as the garbage collector knows it."""
    import torch

    return [
        one for one in gc.get_objects() if issubclass(type(one), torch.optim.Optimizer) and hasattr(one, "param_groups")
    ]


def _count_compilations() -> int:
    """Graphs that torch.compile has made: a window in which one was made is its warm-up, not a window of training."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])
