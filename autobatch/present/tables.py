"""Plans and reports as tables for people."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from autobatch.trial import Outcome
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType
    from rich.table import Table

    from autobatch.plan import Plan
    from autobatch.report import Report
    from autobatch.trial import Trial

__all__ = ["OUTCOME_WORDS", "plan_view", "report_view", "trials_table", "window_text"]

OUTCOME_WORDS = {
    Outcome.FITS: ("fits", "green"),
    Outcome.OVER_BUDGET: ("over budget", "red"),
    Outcome.THRASHES: ("thrashes", "yellow"),
    Outcome.OUT_OF_MEMORY: ("out of memory", "red"),
}
"""What people read for each outcome, and its colour; the words tell them apart without it."""

_MOST_RUNS = 6


def plan_view(plan: Plan) -> RenderableType:
    """Show a plan, a line for each figure, and its notes."""
    from rich.console import Group

    return Group(_plan_table(plan), *_notes(plan.warnings))


def report_view(report: Report) -> RenderableType:
    """Show a report: the plan, what it was found on, and the trials behind it."""
    from rich.console import Group
    from rich.text import Text

    title = Text.assemble((report.workload, "bold"), " on ", (report.device.name, "bold"), f", {report.basis}")
    parts: list[RenderableType] = [title, Text()]
    if report.plan is None:
        parts.append(Text("does not fit: not even the smallest size ran within the budget", style="bold red"))
    else:
        parts.append(_plan_table(report.plan))
    parts += [Text(), _found_table(report), Text(), trials_table(report.trials, report.memory.budget_bytes)]
    notes = _notes(report.warnings)
    if report.basis == "emulated":
        left_out = "; ".join(report.not_modelled)
        notes.append(Text(f"emulated: {report.expected_error}. Not modelled: {left_out}.", style="yellow"))
    return Group(*parts, *([Text(), *notes] if notes else []))


def window_text(window: Sequence[int]) -> str:
    """Write the micro-batches before an optimizer step: `2 × 37`, or `86+85` where they differ."""
    return "+".join(map(str, window)) if len(set(window)) > 1 else f"{len(window)} × {window[0]}"


def trials_table(trials: Sequence[Trial], budget_bytes: int) -> Table:
    """Show the trials in the order in which they ran; the time where it was measured."""
    from rich.table import Table
    from rich.text import Text

    timed = any(trial.seconds_per_step is not None for trial in trials)
    table = Table(title="trials", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in ("micro-batches", "reserved", "footprint", "of budget", *(["s/step"] if timed else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("outcome")
    for trial in trials:
        words, colour = OUTCOME_WORDS[trial.outcome]
        ran_out = trial.outcome is Outcome.OUT_OF_MEMORY
        seconds = "–" if trial.seconds_per_step is None else f"{trial.seconds_per_step:.3g}"
        table.add_row(
            window_text(trial.window),
            format_bytes(trial.peak_reserved_bytes),
            # After an error the caches are given back: what is left then says nothing of the size.
            "–" if ran_out else format_bytes(trial.footprint_bytes),
            "–" if ran_out else f"{trial.footprint_bytes / budget_bytes:.1%}",
            *([seconds] if timed else []),
            Text.assemble((words, colour), " (confirmation)" if trial.confirmation else ""),
        )
    return table


def _plan_table(plan: Plan) -> Table:
    table = _figures("plan")
    unit = "samples per optimizer step" + (f" over {plan.world_size} ranks" if plan.world_size > 1 else "")
    table.add_row("target", f"{plan.target}", unit)
    table.add_row("micro-batch size", f"{plan.micro_batch_size}", "samples in one forward and backward")
    table.add_row("accumulation steps", f"{plan.accumulation_steps}", "micro-batches per optimizer step on each rank")
    table.add_row("effective batch size", f"{plan.effective_batch_size}", _how(plan))
    return table


def _found_table(report: Report) -> Table:
    table = _figures("measurement")
    if report.max_micro_batch_size is not None:
        table.add_row("largest micro-batch", f"{report.max_micro_batch_size}", _certificate(report))
    memory, device = report.memory, report.device
    others = "unknown" if memory.other_tenants_bytes is None else format_bytes(memory.other_tenants_bytes)
    left = f"after headroom {format_bytes(memory.headroom_bytes)}, other tenants {others}"
    limit = report.options.memory_limit_bytes
    table.add_row(
        "budget", format_bytes(memory.budget_bytes), left + ("" if limit is None else f", limit {format_bytes(limit)}")
    )
    table.add_row("card", format_bytes(device.total_bytes), f"compute capability {device.compute_capability}")
    return table


def _certificate(report: Report) -> str:
    if report.data_dependent:
        return "not certified: shapes are read from the device"
    if not report.certified:
        return "not certified"
    if report.smallest_failing is None:
        return "as large as asked for: nothing more was tried"
    return f"ran and fitted; {report.smallest_failing} ran and did not"


def _how(plan: Plan) -> str:
    runs = [f"{len(list(group))} × {size}" for size, group in itertools.groupby(plan.micro_batch_sizes)]
    if len(runs) > _MOST_RUNS:
        runs = [*runs[: _MOST_RUNS - 1], "…"]
    ranks = (
        ""
        if plan.world_size == 1
        else f" × {plan.world_size} ranks"
        if plan.rank_micro_batch_sizes is None
        else " on rank 0"
    )
    return f"{' + '.join(runs)}{ranks}, {'exact' if plan.exact else 'not exact'}"


def _notes(warnings: Sequence[str]) -> list[RenderableType]:
    from rich.text import Text

    return [Text(f"note: {warning}", style="yellow") for warning in warnings]


def _figures(title: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    # As wide as the longest name in either table, so that the figures of both stand in one column.
    table.add_column(style="cyan", no_wrap=True, min_width=20)
    table.add_column(justify="right", style="bold", no_wrap=True, min_width=9)
    table.add_column(style="dim")
    return table
