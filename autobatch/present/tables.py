"""Plans and reports as tables for people."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from autobatch.present.budget import budget_lines
from autobatch.report import describe_age
from autobatch.trial import Outcome
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import RenderableType
    from rich.table import Table

    from autobatch.breakdown import MemoryBreakdown
    from autobatch.lengths import LengthTable
    from autobatch.plan import Plan
    from autobatch.report import Alternative, Report
    from autobatch.trial import Trial

__all__ = [
    "OUTCOME_WORDS",
    "alternative_words",
    "breakdown_rows",
    "lengths_view",
    "plan_view",
    "plan_words",
    "report_view",
    "trials_table",
    "window_text",
]

OUTCOME_WORDS = {
    Outcome.FITS: ("fits", "green"),
    Outcome.OVER_BUDGET: ("over budget", "red"),
    Outcome.THRASHES: ("thrashes", "yellow"),
    Outcome.OUT_OF_MEMORY: ("out of memory", "red"),
}
"""What people read for each outcome, and its colour; the words tell them apart without it."""

_PHASES = {"forward": "forward", "backward": "backward", "step": "optimizer step"}
_MOST_RUNS = 6
_MOST_RANK_LINES = 8


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
    if report.max_micro_batch_size is not None:
        parts += [Text(), _found_table(report.max_micro_batch_size, report)]
    parts += [Text(), _memory_table(report)]
    if report.breakdown is not None:
        parts += [Text(), _breakdown_table(report.breakdown, report.memory.budget_bytes)]
    parts += [Text(), trials_table(report.trials, report.memory.budget_bytes)]
    if report.alternatives is not None:
        parts += [Text(), _alternatives_table(report)]
    notes = _notes(report.warnings)
    if report.basis == "emulated" and report.expected_error:
        left_out = "; ".join(report.not_modelled)
        notes.append(Text(f"emulated: {report.expected_error}. Not modelled: {left_out}.", style="yellow"))
    return Group(*parts, *([Text(), *notes] if notes else []))


def lengths_view(table: LengthTable) -> RenderableType:
    """Show a table of lengths: the plan for each, and what it rests on."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    first = table.entries[0].report
    title = Text.assemble((first.device.name, "bold"), f", {first.basis}, target {first.options.target}")
    grid = Table(box=None, pad_edge=False)
    for name in ("length", "micro-batch", "steps", "effective", "largest", "trials"):
        grid.add_column(name, justify="right", no_wrap=True)
    notes: dict[str, None] = {}
    for entry in table.entries:
        report, plan = entry.report, entry.report.plan
        found = "–" if report.max_micro_batch_size is None else str(report.max_micro_batch_size)
        row = ["does not fit", "–", "–"]
        if plan is not None:
            row = [str(plan.micro_batch_size), str(plan.accumulation_steps), str(plan.effective_batch_size)]
        grid.add_row(
            str(entry.seq_len), *row, found if report.certified else f"{found} not certified", str(len(report.trials))
        )
        notes.update(dict.fromkeys(f"length {entry.seq_len}: {warning}" for warning in report.warnings))
    shown: list[RenderableType] = _notes(tuple(notes))
    if first.basis == "emulated":
        shown.append(
            Text(f"emulated: {first.expected_error}. Not modelled: {'; '.join(first.not_modelled)}.", style="yellow")
        )
    return Group(title, Text(), grid, *([Text(), *shown] if shown else []))


def plan_words(plan: Plan) -> str:
    """Write the plan as size × steps; both sizes where it mixes two."""
    ranks = f" on {plan.world_size} ranks" if plan.world_size > 1 else ""
    if plan.rank_micro_batch_sizes is not None:
        return f"{' and '.join(f'{size:,}' for size in plan.sizes)}, {plan.accumulation_steps} steps{ranks}"
    runs = [(size, len(list(group))) for size, group in itertools.groupby(plan.micro_batch_sizes)]
    return " + ".join(f"{size:,} × {count:,}" for size, count in runs) + ranks


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


def breakdown_rows(split: MemoryBreakdown) -> list[tuple[str, str, int, str]]:
    """List a footprint's parts from the bottom up: the part's field, its name for people, bytes, and what it is."""
    sizes = split.parts()
    grows = f"{format_bytes(round(sizes['activations'] / max(split.window)))} for each sample"
    return [
        (key, name, sizes[key], note)
        for key, name, note in (
            ("context", "CUDA context", "with modules and libraries, beside torch's allocator"),
            ("other_held", "other tensors held", "buffers, data, averages of weights"),
            ("parameters", "parameters", "frozen ones included"),
            ("gradients", "gradients", "of parameters"),
            ("optimizer_state", "optimizer state", "what the optimizers keep"),
            ("activations", "activations", f"made in the forward, {grows}"),
            ("temporary", "temporaries", "made in the backward or the optimizer step"),
            ("workspaces", "workspaces", "scratch memory of cuBLAS and cuDNN"),
            ("unused", "held but unused", "fragmentation and rounding: reserved, asked for by no tensor"),
        )
    ]


def alternative_words(one: Alternative) -> tuple[str, str, str]:
    """Say what was found with one thing changed: the largest size, the plan, and what is to be said of it."""
    if one.problem:
        return "–", "–", one.problem
    if one.plan is None or one.max_micro_batch_size is None:
        return "–", "does not fit", ""
    note = "" if one.certified else "not certified"
    return str(one.max_micro_batch_size), plan_words(one.plan), note


def _breakdown_table(split: MemoryBreakdown, budget_bytes: int) -> Table:
    table = _figures(f"what micro-batch {max(split.window)} is made of, in the {_PHASES[split.phase]}")
    for _, name, size, note in breakdown_rows(split):
        if size:
            table.add_row(name, format_bytes(size), f"{size / split.footprint_bytes:5.1%}  {note}")
    footprint = split.footprint_bytes
    table.add_row("footprint", format_bytes(footprint), f"{footprint / budget_bytes:.1%} of the budget")
    return table


def _alternatives_table(report: Report) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="what if", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("change", no_wrap=True)
    table.add_column("largest", justify="right", no_wrap=True)
    table.add_column("plan", no_wrap=True)
    table.add_column("", style="dim")
    largest = report.max_micro_batch_size
    table.add_row(
        "as it is",
        "–" if largest is None else str(largest),
        plan_words(report.plan) if report.plan else "does not fit",
        "",
    )
    for one in report.alternatives or ():
        # What a user wrote, and what a job said: rich would read brackets in it as markup.
        table.add_row(*(Text(words) for words in (one.change, *alternative_words(one))))
    return table


def _plan_table(plan: Plan) -> Table:
    table = _figures("plan")
    unit = "samples per optimizer step" + (f" over {plan.world_size} ranks" if plan.world_size > 1 else "")
    table.add_row("target", f"{plan.target}", unit)
    plural = "s" if len(plan.sizes) > 1 else ""
    # Not the largest alone: times the steps it would be more than the plan takes.
    sizes = ", ".join(map(str, plan.sizes))
    table.add_row(f"micro-batch size{plural}", sizes, "samples in one forward and backward")
    table.add_row("accumulation steps", f"{plan.accumulation_steps}", "micro-batches per optimizer step on each rank")
    table.add_row("effective batch size", f"{plan.effective_batch_size}", _how(plan))
    for name, sizes_of_ranks in _rank_lines(plan):
        table.add_row(name, "", sizes_of_ranks)
    return table


def _found_table(largest: int, report: Report) -> Table:
    table = _figures("measurement")
    table.add_row("largest micro-batch", f"{largest}", _certificate(report))
    if report.cached is not None:
        age = describe_age(report.cached.measured_at)
        how = "one ran again and came out the same" if report.cached.confirmed else "trusted as they stand"
        of = f"of {len(report.trials)} trials"
        table.add_row("cached", f"{report.cached.num_trials}", f"{of} below, measured {age}; {how}")
    return table


def _memory_table(report: Report) -> Table:
    table = _figures("memory")
    for line in budget_lines(report):
        sign = "−" if line.mebibytes < 0 else ""
        table.add_row(line.name, f"{sign}{abs(line.mebibytes):,} MiB", line.note)
    context = report.memory.context_bytes
    if context is not None:
        table.add_row("CUDA context", f"{round(context / (1 << 20)):,} MiB", "of the budget, beside torch's allocator")
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
    exact = "exact" if plan.exact else "not exact"
    if plan.rank_micro_batch_sizes is not None:
        return f"over {plan.world_size} ranks that differ, {exact}"
    runs = _runs_text(plan.micro_batch_sizes)
    if plan.world_size > 1:
        runs = f"({runs})" if "+" in runs else runs
        runs += f" × {plan.world_size} ranks"
    return f"{runs}, {exact}"


def _runs_text(sizes: Sequence[int]) -> str:
    runs = [f"{len(list(group))} × {size}" for size, group in itertools.groupby(sizes)]
    return " + ".join(runs if len(runs) <= _MOST_RUNS else [*runs[: _MOST_RUNS - 1], "…"])


def _rank_lines(plan: Plan) -> Iterator[tuple[str, str]]:
    """Name the ranks that take the same sizes, and those sizes; nothing where all ranks do."""
    first = 0
    for number, (sizes, group) in enumerate(itertools.groupby(plan.rank_micro_batch_sizes or ())):
        if number == _MOST_RANK_LINES:
            yield "…", "--format json lists every rank"
            return
        after = first + len(list(group))
        name = f"rank {first}" if after == first + 1 else f"ranks {first} to {after - 1}"
        yield f"  {name}", f"{_runs_text(sizes)} = {sum(sizes)}{' each' if after > first + 1 else ''}"
        first = after


def _notes(warnings: Sequence[str]) -> list[RenderableType]:
    from rich.text import Text

    return [Text(f"note: {warning}", style="yellow") for warning in warnings]


def _figures(title: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    # As wide as the longest name in either table, so that the figures of both stand in one column.
    table.add_column(style="cyan", no_wrap=True, min_width=20)
    table.add_column(justify="right", style="bold", no_wrap=True, min_width=10)
    table.add_column(style="dim")
    return table
