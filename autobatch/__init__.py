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
    from autobatch.breakdown import MemoryBreakdown
    from autobatch.cache.consultation import remember_out_of_memory
    from autobatch.child_probe import probe_command, probe_lengths, probe_workload
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
    from autobatch.evidence import Bound, Evidence, SizeFailure, StoredAnswer, Verdict
    from autobatch.facts import DeviceFacts
    from autobatch.gpu.catalogue import Card, find_card, load_catalogue
    from autobatch.gpu.presence import Presence, PresentCard, find_presence
    from autobatch.handover import plan_from_env
    from autobatch.jsonform import from_json_form, to_json_form
    from autobatch.lengths import LengthEntry, LengthTable
    from autobatch.library import probe
    from autobatch.options import ProbeOptions
    from autobatch.placement import Candidate, Placement, PlacementTable, placement_key
    from autobatch.plan import Plan, make_plan
    from autobatch.present.page import render_page, write_page
    from autobatch.present.plot import (
        check_plot_path,
        draw_placements,
        draw_report,
        draw_throughput,
        report_svg,
        throughput_svg,
    )
    from autobatch.probing import Noted, ProbeEvent, TrialEnded, TrialStarted
    from autobatch.ranking import placements
    from autobatch.rankplan import make_rank_plan
    from autobatch.report import Alternative, Report
    from autobatch.snapshot import Snapshot, state_hash
    from autobatch.training.accumulator import Accumulator, MemoryEvent, WindowResult
    from autobatch.training.equivalence import Cause, EquivalenceReport, check_equivalence
    from autobatch.training.sampler import PlanBatchSampler
    from autobatch.trial import Outcome, Trial
    from autobatch.variables import plan_variables
    from autobatch.workload.described import BuiltinWorkload, builtin_workloads
    from autobatch.workload.job import TrainingJob
    from autobatch.workload.loader import WorkloadName

__all__ = [
    "Accumulator",
    "Alternative",
    "AutobatchError",
    "Bound",
    "BuiltinWorkload",
    "BusyError",
    "Candidate",
    "Card",
    "Cause",
    "DeviceFacts",
    "EmulatorError",
    "EquivalenceReport",
    "Evidence",
    "LengthEntry",
    "LengthTable",
    "MemoryBreakdown",
    "MemoryEvent",
    "NoGpuError",
    "Noted",
    "NothingFitsError",
    "Outcome",
    "Placement",
    "PlacementTable",
    "Plan",
    "PlanBatchSampler",
    "PlanError",
    "Presence",
    "PresentCard",
    "ProbeEvent",
    "ProbeOptions",
    "Report",
    "SizeFailure",
    "Snapshot",
    "StoredAnswer",
    "TrainingJob",
    "Trial",
    "TrialEnded",
    "TrialStarted",
    "UnavailableError",
    "UsageError",
    "Verdict",
    "WindowResult",
    "WorkloadError",
    "WorkloadName",
    "__version__",
    "builtin_workloads",
    "check_equivalence",
    "check_plot_path",
    "draw_placements",
    "draw_report",
    "draw_throughput",
    "find_card",
    "find_presence",
    "from_json_form",
    "load_catalogue",
    "make_plan",
    "make_rank_plan",
    "placement_key",
    "placements",
    "plan_from_env",
    "plan_variables",
    "probe",
    "probe_command",
    "probe_lengths",
    "probe_workload",
    "remember_out_of_memory",
    "render_page",
    "report_svg",
    "state_hash",
    "throughput_svg",
    "to_json_form",
    "write_page",
]

# Where each public name lives: imported when it is first asked for, so that `autobatch --help` stays fast.
_HOMES = {
    "cache.consultation": ("remember_out_of_memory",),
    "training.accumulator": (
        "Accumulator",
        "MemoryEvent",
        "WindowResult",
    ),
    "training.equivalence": (
        "Cause",
        "EquivalenceReport",
        "check_equivalence",
    ),
    "training.sampler": ("PlanBatchSampler",),
    "child_probe": (
        "probe_command",
        "probe_lengths",
        "probe_workload",
    ),
    "handover": ("plan_from_env",),
    "lengths": (
        "LengthEntry",
        "LengthTable",
    ),
    "evidence": (
        "Bound",
        "Evidence",
        "SizeFailure",
        "StoredAnswer",
        "Verdict",
    ),
    "gpu.catalogue": (
        "Card",
        "find_card",
        "load_catalogue",
    ),
    "gpu.presence": (
        "Presence",
        "PresentCard",
        "find_presence",
    ),
    "jsonform": (
        "from_json_form",
        "to_json_form",
    ),
    "breakdown": ("MemoryBreakdown",),
    "present.page": ("render_page", "write_page"),
    "present.plot": (
        "check_plot_path",
        "draw_placements",
        "draw_report",
        "draw_throughput",
        "report_svg",
        "throughput_svg",
    ),
    "workload.described": (
        "BuiltinWorkload",
        "builtin_workloads",
    ),
    "workload.loader": ("WorkloadName",),
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
    "placement": ("Candidate", "Placement", "PlacementTable", "placement_key"),
    "plan": ("Plan", "make_plan"),
    "ranking": ("placements",),
    "rankplan": ("make_rank_plan",),
    "probing": ("Noted", "ProbeEvent", "TrialEnded", "TrialStarted"),
    "report": ("Alternative", "Report"),
    "snapshot": ("Snapshot", "state_hash"),
    "trial": ("Outcome", "Trial"),
    "variables": ("plan_variables",),
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
