"""What would have to change for the next larger micro-batch that a plan can use: the memory that is missing, and where it is."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from statistics import linear_regression
from typing import TYPE_CHECKING

from autobatch.errors import PlanError
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch.report import Report

__all__ = ["Goal", "Way", "describe_missing", "next_goal", "ways_to"]


_EXPANDABLE = (
    "joins memory that lies in pieces: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True (newer torch: PYTORCH_ALLOC_CONF too); "
    "--what-if expandable_segments tries it"
)


@dataclass(frozen=True, kw_only=True)
class Goal:
    """The next larger size with which a plan takes fewer steps, and what it would need."""

    micro_batch_size: int
    accumulation_steps: int
    needed_bytes: int
    """An estimate of its footprint: the straight line through what was measured, drawn on."""
    missing_bytes: int
    """How far that is beyond the budget."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One thing that can be changed."""

    name: str
    how: str
    """What to do, with the words to write where there are any."""
    frees_bytes: int
    is_bound: bool
    """Whether it frees that much at most, rather than just that much."""
    suffices: bool
    """Whether that is enough for the goal, all by itself."""


def next_goal(report: Report) -> Goal | None:
    """Find the smallest size that needs fewer accumulation steps than the plan.

    Returns:
        The goal; None where the plan takes one step already, nothing fits, or too little was measured to say what a
        larger size needs.
    """
    plan, options = report.plan, report.options
    line = _line(report)
    if plan is None or plan.accumulation_steps == 1 or line is None or report.max_micro_batch_size is None:
        return None
    sizes = range(report.max_micro_batch_size + 1, options.share + 1)
    if report.ceiling_reached and options.max_micro_batch is not None:
        return None  # what stands in the way is not memory
    position = bisect_left(sizes, x=True, key=lambda size: _steps(report, size) < plan.accumulation_steps)
    if position == len(sizes):
        return None
    slope, intercept = line
    goal = options.make_plan(sizes[position])
    needed = round(intercept + slope * goal.micro_batch_size)
    missing = needed - report.memory.budget_bytes
    if missing <= 0:
        return None  # the line is no guide here: the size was tried, or one below it, and did not fit
    return Goal(
        micro_batch_size=goal.micro_batch_size,
        accumulation_steps=goal.accumulation_steps,
        needed_bytes=needed,
        missing_bytes=missing,
    )


def ways_to(report: Report, goal: Goal) -> Sequence[Way]:
    """List what could be changed, most memory first; what frees nothing is left out.

    Args:
        report: a probe's.
        goal: what it is to reach.
    """
    ways = [*_own_ways(report, goal), *_around(report)]
    made = [
        Way(name=name, how=how, frees_bytes=frees, is_bound=bound, suffices=frees >= goal.missing_bytes)
        for name, how, frees, bound in ways
        if frees > 0
    ]
    return sorted(made, key=lambda way: -way.frees_bytes)


def _own_ways(report: Report, goal: Goal) -> list[tuple[str, str, int, bool]]:
    """What lies in the job's own memory: name, how, bytes, and whether they are a bound."""
    split = report.breakdown
    if split is None:
        return []
    per_sample = split.activations_bytes / max(split.window)
    named = report.workload.partition(":")[0] in {"hf", "timm"}
    checkpointing = "--what-if checkpointing=true tries it" if named else "torch.utils.checkpoint around each block"
    state = split.optimizer_state_bytes
    fixed = split.parameters_bytes + split.gradients_bytes + state
    is_checkpointed = "checkpointing=true" in report.workload.lower()
    ways = [
        (
            "activation checkpointing",
            f"one forward more for each backward; {checkpointing}",
            0 if is_checkpointed else round(per_sample * goal.micro_batch_size),
            True,
        ),
        (
            "expandable segments",
            _EXPANDABLE,
            split.unused_bytes,
            True,
        ),
        ("8-bit optimizer", "keeps a quarter of what 32-bit state takes", state * 3 // 4, True),
    ]
    if report.options.world_size > 1:
        freed = fixed - fixed // report.options.world_size
        ways.append(
            ("FSDP2 or ZeRO", "shares out parameters, gradients and optimizer state over the ranks", freed, True)
        )
    if report.workload.startswith("hf:") and "weights=bf16" not in report.workload:
        ways.append(
            ("weights in bf16", "changes the arithmetic too; --what-if weights=bf16 tries it", fixed // 2, True)
        )
    return ways


def _around(report: Report) -> list[tuple[str, str, int, bool]]:
    """What lies around the job's memory."""
    memory = report.memory
    return [
        ("no headroom", "--headroom 0; whatever then comes beside it ends the training", memory.headroom_bytes, False),
        ("no other tenants", "what other processes hold", memory.other_tenants_bytes or 0, False),
    ]


def describe_missing(goal: Goal) -> str:
    """Say in a sentence what the goal needs."""
    return (
        f"Micro-batch {goal.micro_batch_size} would take {goal.accumulation_steps} "
        f"step{'s' if goal.accumulation_steps > 1 else ''}, and about {format_bytes(goal.needed_bytes)}: "
        f"{format_bytes(goal.missing_bytes)} more than the budget."
    )


def _steps(report: Report, size: int) -> int:
    try:
        return report.options.make_plan(size).accumulation_steps
    except PlanError:
        return 1 << 62


def _line(report: Report) -> tuple[float, float] | None:
    """Bytes for each sample more, and those of none: through the trials, or by the breakdown where only one size fitted."""
    count = report.micro_batches_per_step
    fitted = [t for t in report.trials if t.fits and t.window == (t.micro_batch_size,) * count]
    if len({trial.micro_batch_size for trial in fitted}) > 1:
        slope, intercept = linear_regression(
            [trial.micro_batch_size for trial in fitted], [trial.footprint_bytes for trial in fitted]
        )
        return (slope, intercept) if slope > 0 else None
    split = report.breakdown
    if split is None or not split.grows_bytes:
        return None
    slope = split.grows_bytes / max(split.window)
    return slope, split.footprint_bytes - slope * max(split.window)
