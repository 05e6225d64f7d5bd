"""Find the largest micro-batch that really trains on a GPU, and hit an effective batch size exactly.

`probe` measures a training loop in this process; `make_plan` is the arithmetic alone. Importing this package
imports neither torch nor NVML's bindings.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

from autobatch._version import __version__

if TYPE_CHECKING:
    from autobatch.errors import (
        AutobatchError,
        BusyError,
        EmulatorError,
        NoGpuError,
        NothingFitsError,
        PlanError,
        UnavailableError,
        UsageError,
        WorkloadError,
    )
    from autobatch.facts import DeviceFacts
    from autobatch.library import probe
    from autobatch.options import ProbeOptions
    from autobatch.plan import Plan, make_plan
    from autobatch.probing import ProbeEvent, TrialEnded, TrialStarted
    from autobatch.report import Report
    from autobatch.snapshot import Snapshot, state_hash
    from autobatch.trial import Outcome, Trial
    from autobatch.workload.job import TrainingJob

__all__ = [
    "AutobatchError",
    "BusyError",
    "DeviceFacts",
    "EmulatorError",
    "NoGpuError",
    "NothingFitsError",
    "Outcome",
    "Plan",
    "PlanError",
    "ProbeEvent",
    "ProbeOptions",
    "Report",
    "Snapshot",
    "TrainingJob",
    "Trial",
    "TrialEnded",
    "TrialStarted",
    "UnavailableError",
    "UsageError",
    "WorkloadError",
    "__version__",
    "make_plan",
    "probe",
    "state_hash",
]

# Where each public name lives: imported when it is first asked for, so that `autobatch --help` stays fast.
_HOMES = {
    "errors": (
        "AutobatchError",
        "BusyError",
        "EmulatorError",
        "NoGpuError",
        "NothingFitsError",
        "PlanError",
        "UnavailableError",
        "UsageError",
        "WorkloadError",
    ),
    "facts": ("DeviceFacts",),
    "library": ("probe",),
    "options": ("ProbeOptions",),
    "plan": ("Plan", "make_plan"),
    "probing": ("ProbeEvent", "TrialEnded", "TrialStarted"),
    "report": ("Report",),
    "snapshot": ("Snapshot", "state_hash"),
    "trial": ("Outcome", "Trial"),
    "workload.job": ("TrainingJob",),
}

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            value: object = getattr(importlib.import_module(f"autobatch.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
