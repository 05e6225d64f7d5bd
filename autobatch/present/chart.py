"""The memory curve in a terminal: a bar for each size that was tried."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autobatch.present.curve_parts import has_height
from autobatch.present.tables import OUTCOME_WORDS, window_text
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType

    from autobatch.report import Report
    from autobatch.trial import Trial

__all__ = ["chart_view"]

_WIDTH = 44
"""Cells of a bar as long as the card."""


def chart_view(report: Report) -> RenderableType:
    """Draw footprint against micro-batch size, smallest first: each bar is as long as the card is large.

    A bar that ran out of memory is as long as the budget and drawn in dots: it needs more, how much is not known. The last
    row is the budget.
    """
    from rich.bar import Bar
    from rich.table import Table
    from rich.text import Text

    total, budget = report.device.total_bytes, report.memory.budget_bytes
    table = Table(
        title=f"memory against micro-batch size; a whole row is the card, {format_bytes(total)}",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        show_header=False,
    )
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, width=_WIDTH)
    table.add_column(no_wrap=True)
    for trial in _by_size(report):
        words, colour = OUTCOME_WORDS[trial.outcome]
        if has_height(trial):
            # Of more than the card there is only as much as the row is long.
            bar: RenderableType = Bar(total, 0, min(trial.footprint_bytes, total), width=_WIDTH, color=colour)
            size = format_bytes(trial.footprint_bytes)
        else:
            bar, size = Text("·" * max(1, _WIDTH * budget // total), style=colour), ""
        mark = "  ← plan" if report.plan is not None and trial.micro_batch_size in report.plan.sizes else ""
        table.add_row(
            window_text(trial.window), bar, Text.assemble(f"{size:>9} " if size else "", (words, colour), mark)
        )
    limit = max(0, min(_WIDTH - 1, _WIDTH * budget // total))
    table.add_row("budget", Text(" " * (limit - 1) + "▲" if limit else "▲"), f"{format_bytes(budget):>9}")
    return table


def _by_size(report: Report) -> list[Trial]:
    """One trial of each window, the last that ran."""
    found = {trial.window: trial for trial in report.trials}
    return sorted(found.values(), key=lambda trial: (trial.micro_batch_size, len(trial.window)))
