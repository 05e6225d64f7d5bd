"""The memory curve in a terminal: a bar for each size that was tried."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autobatch.present.curve_parts import has_height
from autobatch.present.tables import OUTCOME_WORDS, window_text
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console, ConsoleOptions, RenderableType

    from autobatch.report import Report
    from autobatch.trial import Trial

__all__ = ["chart_view"]

# Cells of a bar as long as the card: as many as the terminal leaves beside the words, within these.
_LONGEST, _SHORTEST = 44, 8
_WORDS = 40


def chart_view(report: Report) -> RenderableType:
    """Draw footprint against micro-batch size, smallest first: a whole row is as long as the card is large.

    A bar that ran out of memory is drawn in dots as far as the budget: it needs more, how much is not known. The last row is the
    budget.
    """
    return _Chart(report)


class _Chart:
    """Drawn as wide as there is room for."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.table import Table
        from rich.text import Text

        report = self._report
        total, budget = report.device.total_bytes, report.memory.budget_bytes
        width = max(_SHORTEST, min(_LONGEST, options.max_width - _WORDS))
        limit = max(1, min(width, width * budget // total))
        yield Text(f"memory against micro-batch size; a whole row is the card, {format_bytes(total)}", style="bold")
        table = Table.grid(padding=(0, 1))
        table.add_column(justify="right", no_wrap=True)
        table.add_column(no_wrap=True, width=width)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(no_wrap=True)
        for trial in _by_size(report):
            words, colour = OUTCOME_WORDS[trial.outcome]
            is_planned = report.plan is not None and trial.micro_batch_size in report.plan.sizes
            outcome = Text.assemble((words, colour), "  ← plan" if is_planned else "")
            size = format_bytes(trial.footprint_bytes) if has_height(trial) else ""
            table.add_row(window_text(trial.window), _bar(trial, total, width, limit), size, outcome)
        table.add_row("budget", Text(" " * (limit - 1) + "▲"), format_bytes(budget))
        yield table


def _bar(trial: Trial, total: int, width: int, limit: int) -> RenderableType:
    from rich.bar import Bar
    from rich.text import Text

    colour = OUTCOME_WORDS[trial.outcome][1]
    if not has_height(trial):
        return Text("·" * limit, style=colour)
    # Of more than the card there is only as much as the row is long.
    return Bar(total, 0, min(trial.footprint_bytes, total), width=width, color=colour)


def _by_size(report: Report) -> list[Trial]:
    """One trial of each window, the last that ran."""
    found = {trial.window: trial for trial in report.trials}
    return sorted(found.values(), key=lambda trial: (trial.micro_batch_size, len(trial.window)))
