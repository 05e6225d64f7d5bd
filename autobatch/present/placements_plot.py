"""A ranking as a picture: for each candidate what its plan takes of a card, and what is left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autobatch.gpu.catalogue import find_card
from autobatch.present.axes import dress_axes
from autobatch.present.curve_parts import GIB
from autobatch.present.placements import cards_text, plan_words
from autobatch.present.text_layout import SMALL_POINTS, TEXT_POINTS, TITLE_POINTS, drawable, shortened, text_width
from autobatch.trial import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from autobatch.placement import Placement, PlacementTable
    from autobatch.present.themes import Theme

__all__ = ["placements_figure"]

# All lengths are points, 1/72 inch.
_WIDTH = 576.0
_ROW = 17.0
_EDGE = 12.0
_HEAD = 46.0
_FOOT = 64.0


def placements_figure(table: PlacementTable, theme: Theme) -> Figure:
    """Draw a ranking: a bar for each candidate as long as its card's memory, filled as far as its plan takes it."""
    from matplotlib.figure import Figure

    rows = table.placements
    names = [f"{one.rank}  {cards_text(one)}" for one in rows]
    priced = any(one.price_per_hour is not None for one in rows)
    words = [_words(one, priced=priced) for one in rows]
    left = max(text_width(name, TEXT_POINTS) for name in names) + _EDGE + 8
    right = max(text_width(text, SMALL_POINTS) for text in words) + _EDGE + 8
    height = _HEAD + _ROW * len(rows) + _FOOT
    figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=72, facecolor=theme.background)
    box = (left / _WIDTH, _FOOT / height, (_WIDTH - left - right) / _WIDTH, _ROW * len(rows) / height)
    axes = figure.add_axes(box, facecolor="none")
    _dress(axes, names, theme)
    totals = [find_card(one.gpu).nvml_total_bytes / GIB for one in rows]
    axes.set_xlim(0, 1.02 * max(totals))
    for row, (one, total, text) in enumerate(zip(rows, totals, words, strict=True)):
        _draw_bar(axes, row, one, total, theme)
        axes.annotate(
            text,
            (1.0, row),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL_POINTS,
            color=theme.ink if one.verdict == "fits" else theme.muted,
        )
    title = shortened(drawable(f"{table.workload}, target {table.target}"), TITLE_POINTS, _WIDTH - 2 * _EDGE)
    figure.text(_EDGE / _WIDTH, 1 - (_EDGE + 10) / height, title, fontsize=TITLE_POINTS, color=theme.ink, weight="bold")
    figure.text(
        _EDGE / _WIDTH,
        1 - (_EDGE + 25) / height,
        f"micro-batch × accumulation steps of each plan, by {table.rank_by}; emulated",
        fontsize=SMALL_POINTS,
        color=theme.muted,
    )
    for line, text in enumerate(_legend(table)):
        figure.text(_EDGE / _WIDTH, (_EDGE + 11 * (1 - line)) / height, text, fontsize=SMALL_POINTS, color=theme.muted)
    return figure


def _dress(axes: Axes, names: list[str], theme: Theme) -> None:
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names, fontsize=TEXT_POINTS, color=theme.ink)
    dress_axes(axes, theme, grid="x", spines=("bottom",))
    axes.tick_params(axis="y", length=0, labelcolor=theme.ink)
    axes.set_xlabel("memory of one card (GiB)", color=theme.ink, fontsize=TEXT_POINTS, labelpad=3)


def _draw_bar(axes: Axes, row: int, one: Placement, total_gib: float, theme: Theme) -> None:
    axes.barh(row, total_gib, height=0.62, color=theme.beyond if one.verdict != "fits" else theme.context)
    if one.report is None:
        return
    if one.verdict == "fits":
        memory = one.report.memory
        peak = (memory.budget_bytes + memory.headroom_bytes - (one.headroom_bytes or 0)) / GIB
        axes.barh(row, peak, height=0.62, color=theme.outcomes[Outcome.FITS])
    elif one.verdict == "does_not_fit":
        axes.barh(
            row, total_gib, height=0.62, fill=False, edgecolor=theme.outcomes[Outcome.OUT_OF_MEMORY], hatch="////"
        )


def _words(one: Placement, *, priced: bool) -> str:
    price = f"  {one.price_per_hour:.2f}/h" if one.price_per_hour is not None else "  no price" if priced else ""
    return plan_words(one) + price


def _legend(table: PlacementTable) -> list[str]:
    """What the bars mean, and how far to trust them."""
    hatched = any(one.verdict == "does_not_fit" for one in table.placements)
    lines = [
        "bar: the card's memory; filled: what the plan takes of it"
        + ("; hatched: not even the smallest size fits" if hatched else "")
    ]
    report = next((one.report for one in table.placements if one.report is not None), None)
    if report is not None and report.expected_error:
        lines.append(shortened(f"emulated: {report.expected_error}", SMALL_POINTS, _WIDTH - 2 * _EDGE))
    return lines
