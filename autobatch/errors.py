"""The exceptions of autobatch, one hierarchy.

    AutobatchError
    ├── UsageError            bad argument or option                      exit 2
    ├── NothingFitsError      even the smallest micro-batch does not fit  exit 3
    ├── WorkloadError         the training job failed, not for memory     exit 4
    ├── PlanError             the target cannot be hit under the split    exit 5
    ├── UnavailableError      no GPU, no driver, no service               exit 69
    │   ├── NoGpuError        this process sees no usable GPU
    │   └── EmulatorError     the emulated GPU cannot be built or started
    └── BusyError             GPU in use by others, or the deadline passed exit 75

An out-of-memory error of the training job is not among them: it is the outcome of a trial
(`autobatch.Outcome`), not a failure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch.trial import Trial

__all__ = [
    "AutobatchError",
    "BusyError",
    "EmulatorError",
    "NoGpuError",
    "NothingFitsError",
    "PlanError",
    "UnavailableError",
    "UsageError",
    "WorkloadError",
]


class AutobatchError(Exception):
    """Base of every error that autobatch raises on purpose.

    The message is one line that names what was found and the way out.
    """

    exit_code: ClassVar[int] = 1
    """Exit status of the command line when this error ends it."""
    code: ClassVar[str] = "error"
    """Stable name of the error, the `code` of the service's problem details."""


class UsageError(AutobatchError, ValueError):
    """An argument or option has no meaning, or contradicts another."""

    exit_code = 2
    code = "bad-request"


class NothingFitsError(AutobatchError):
    """No micro-batch size fits the budget, not even the smallest.

    Attributes:
        trials: the trials that showed it, in the order in which they ran.
    """

    exit_code = 3
    code = "nothing-fits"

    def __init__(self, message: str, *, trials: Sequence[Trial] = ()) -> None:
        super().__init__(message)
        self.trials = tuple(trials)


class WorkloadError(AutobatchError):
    """The training job failed for a reason other than device memory.

    Attributes:
        traceback_text: the job's own traceback, empty where there is none.
        context_lost: whether the CUDA context went with it, so that this process can no longer use the device.
    """

    exit_code = 4
    code = "workload-failed"

    def __init__(self, message: str, *, traceback_text: str = "", context_lost: bool = False) -> None:
        super().__init__(message)
        self.traceback_text = traceback_text
        self.context_lost = context_lost


class PlanError(AutobatchError):
    """The target cannot be hit under the split and tolerance asked for."""

    exit_code = 5
    code = "no-plan"


class UnavailableError(AutobatchError):
    """Something outside this process that is needed is not there."""

    exit_code = 69
    code = "unavailable"


class NoGpuError(UnavailableError):
    """This process sees no GPU that can be measured."""

    code = "no-gpu"


class EmulatorError(UnavailableError):
    """The emulated GPU cannot be built, started, or does not know a call."""

    code = "emulator"


class BusyError(AutobatchError):
    """The GPU is held by others, or the whole probe's deadline passed: try again later."""

    exit_code = 75
    code = "busy"
