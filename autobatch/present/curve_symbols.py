"""The symbols of the memory curve: how a trial's point looks, and the legend that explains it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autobatch.present.curve_parts import fitted_line
from autobatch.present.curve_words import PER_STEP
from autobatch.present.tables import OUTCOME_WORDS
from autobatch.present.text_layout import SMALL_POINTS, text_width
from autobatch.trial import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.lines import Line2D

    from autobatch.present.themes import Theme
    from autobatch.report import Report

__all__ = ["bar_looks", "dress_point", "legend_columns", "legend_handles"]

_MARKERS = {Outcome.FITS: "o", Outcome.OVER_BUDGET: "D", Outcome.THRASHES: "s", Outcome.OUT_OF_MEMORY: "X"}
_SIZES = {Outcome.FITS: 7.5, Outcome.OVER_BUDGET: 6.5, Outcome.THRASHES: 7.0, Outcome.OUT_OF_MEMORY: 8.5}
_EXPLAINED = {
    Outcome.FITS: "",
    Outcome.OVER_BUDGET: "",
    Outcome.THRASHES: ": runs, but flushes the allocator's cache again and again",
    Outcome.OUT_OF_MEMORY: ": needs more than the budget, how much is not known",
}


def dress_point(
    point: Line2D, theme: Theme, outcome: Outcome | None, *, hollow: bool = False, mixed: bool = False
) -> Line2D:
    """Give a point its outcome's shape and colour; the first shape, in grey, for a key that is about none."""
    colour = theme.muted if outcome is None else theme.outcomes[outcome]
    shape = outcome or Outcome.FITS
    point.set_marker(_MARKERS[shape])
    outlined = hollow or mixed
    point.set_markersize(_SIZES[shape] + (1.5 if outlined else 0))
    point.set_markeredgecolor(colour if outlined else theme.background)
    point.set_markeredgewidth(1.3 if outlined else 0.7)
    point.set_markerfacecolor("none" if hollow and not mixed else colour)
    if mixed:
        point.set_fillstyle("left")
        point.set_markerfacecoloralt("none")
    return point


def bar_looks(colour: str) -> dict[str, Any]:
    """The bar through a point that tells a trial with one micro-batch in a step."""
    return {"color": colour, "linestyle": "none", "marker": "_", "markersize": 17, "markeredgewidth": 1.6}


def legend_handles(report: Report, theme: Theme) -> list[Line2D]:
    """List the legend's entries, of what occurs in the report only."""
    from matplotlib.lines import Line2D

    trials = report.trials
    handles = []
    for outcome in Outcome:
        if any(trial.outcome is outcome for trial in trials):
            handle = Line2D([], [], linestyle="none", label=OUTCOME_WORDS[outcome][0] + _EXPLAINED[outcome])
            handles.append(dress_point(handle, theme, outcome))
    for label, shown, mixed in (
        ("hollow: confirms a size of the plan", any(t.confirmation for t in trials), False),
        ("half filled: two sizes in one step, at their mean", any(len(set(t.window)) > 1 for t in trials), True),
    ):
        if shown:
            handle = Line2D([], [], linestyle="none", label=label)
            handles.append(dress_point(handle, theme, None, hollow=not mixed, mixed=mixed))
    if any(len(trial.window) == 1 for trial in trials):
        handles.append(Line2D([], [], **bar_looks(theme.muted), label=f"bar: {PER_STEP[1]}"))
    if fitted_line(report) is not None:
        handles.append(
            Line2D(
                [],
                [],
                color=theme.muted,
                linewidth=1.2,
                dashes=(3, 2.5),
                label="straight line fitted, a guide only",
            )
        )
    return handles


def legend_columns(labels: Sequence[str], room: float) -> int:
    """Find the most columns in which the legend fits its room, in points."""
    widths = [text_width(label, SMALL_POINTS) + 36 for label in labels]
    for columns in range(len(labels), 1, -1):
        rows = -(-len(labels) // columns)
        # matplotlib fills a column before the next; the last columns may be one shorter.
        full = len(labels) - columns * (rows - 1)
        heights = [rows if index < full else rows - 1 for index in range(columns)]
        starts = [sum(heights[:index]) for index in range(columns)]
        parts = zip(starts, heights, strict=True)
        if sum(max(widths[start : start + height], default=0) for start, height in parts) <= room:
            return columns
    return 1
