"""Rankings of cards as tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autobatch.units import format_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType

    from autobatch.placement import Placement, PlacementTable

__all__ = ["cards_text", "placements_view", "plan_words", "verdict_words"]

_VERDICTS = {
    "fits": ("fits", "green"),
    "does_not_fit": ("does not fit", "red"),
    "no_plan": ("no plan", "yellow"),
    "unknown": ("unknown", "yellow"),
}
_MOST_REASONS = 12


def placements_view(table: PlacementTable) -> RenderableType:
    """Show candidates in order: what fits with its plan, and why the others do not."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    priced = any(one.price_per_hour is not None for one in table.placements)
    title = Text.assemble((table.workload, "bold"), f", target {table.target}, by {table.rank_by}, {_bases(table)}")
    grid = Table(box=None, pad_edge=False)
    for name in ("", "cards", "micro-batch", "steps", "peak", "left"):
        grid.add_column(name, justify="left" if name == "cards" else "right", no_wrap=True)
    if priced:
        grid.add_column("per hour", justify="right", no_wrap=True)
    grid.add_column("")
    for one in table.placements:
        words, colour = verdict_words(one)
        row = [str(one.rank), cards_text(one), *_figures(one)]
        if priced:
            row.append("–" if one.price_per_hour is None else f"{one.price_per_hour:.2f}")
        grid.add_row(*row, Text(words, style=colour))
    return Group(title, Text(), grid, *_remarks(table))


def cards_text(one: Placement) -> str:
    """A candidate's cards: `L4`, or `4 × L4`."""
    return one.gpu if one.count == 1 else f"{one.count} × {one.gpu}"


def plan_words(one: Placement) -> str:
    """A candidate's plan in short: `16 × 4`, or what it lacks."""
    if one.plan is None:
        return verdict_words(one)[0]
    return f"{one.plan.micro_batch_size} × {one.plan.accumulation_steps}"


def verdict_words(one: Placement) -> tuple[str, str]:
    """What people read of a verdict, and its colour; the words tell them apart without it."""
    words, colour = _VERDICTS[one.verdict]
    if one.missing_bytes:
        words += f", about {format_bytes(one.missing_bytes)} too large"
    return words, colour


def _figures(one: Placement) -> list[str]:
    """Micro-batch, steps, peak and what is left."""
    if one.plan is None:
        return ["–"] * 4
    peak = "–"
    if one.report is not None:
        memory = one.report.memory
        peak = format_bytes(memory.budget_bytes + memory.headroom_bytes - (one.headroom_bytes or 0))
    return [
        "+".join(map(str, one.plan.sizes)) if len(one.plan.sizes) > 1 else str(one.plan.micro_batch_size),
        str(one.plan.accumulation_steps),
        peak,
        "–" if one.headroom_bytes is None else format_bytes(one.headroom_bytes),
    ]


def _bases(table: PlacementTable) -> str:
    """What the figures are: of real cards, of emulated ones, or of both."""
    bases = sorted({one.basis for one in table.placements if one.basis is not None})
    return " and ".join(bases) or "nothing measured"


def _remarks(table: PlacementTable) -> list[RenderableType]:
    """What is to be said below: why some are unknown or have no plan, what several cards need, how far to trust it."""
    from rich.text import Text

    said: dict[str, list[str]] = {}
    for one in table.placements:
        if one.verdict in {"unknown", "no_plan"} or (
            one.verdict == "fits" and (one.count > 1 or "not certified" in one.reason)
        ):
            said.setdefault(one.reason, []).append(cards_text(one))
    lines: list[RenderableType] = [
        Text(f"{', '.join(cards)}: {reason}", style="yellow") for reason, cards in list(said.items())[:_MOST_REASONS]
    ]
    report = next((one.report for one in table.placements if one.report is not None), None)
    if report is not None and report.expected_error:
        left_out = "; ".join(report.not_modelled)
        lines.append(Text(f"emulated: {report.expected_error}. Not modelled: {left_out}.", style="yellow"))
    return [Text(), *lines] if lines else []
