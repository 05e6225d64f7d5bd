"""The cards of a machine, what a probe needs of it, and what is remembered of earlier ones, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autobatch.report import describe_age
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType
    from rich.table import Table

    from autobatch.doctor import Finding
    from autobatch.gpu.catalogue import Card
    from autobatch.gpu.presence import Presence, PresentCard
    from autobatch.store import Measurement

__all__ = ["cards_view", "findings_view", "measurements_view"]

_LONGEST_NAME = 300


def cards_view(presence: Presence, cards: Sequence[Card]) -> RenderableType:
    """Show the cards that are here, and those that can be emulated."""
    from rich.console import Group
    from rich.text import Text

    here = [f"  {index}: {_card_text(card)}" for index, card in enumerate(presence.cards)]
    if presence.problem:
        here.append(f"  {presence.problem}" if here else f"  none: {presence.problem}")
    return Group(Text("here", style="bold"), *map(Text, here), Text(), _catalogue_table(cards))


def measurements_view(entries: Sequence[Measurement]) -> RenderableType:
    """Show the measurements of a cache."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("id", no_wrap=True)
    table.add_column("measured", no_wrap=True)
    table.add_column("GPU", no_wrap=True)
    for name in ("largest", "trials"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("job", overflow="fold")
    for entry in entries:
        report = entry.report
        largest = "–" if report.max_micro_batch_size is None else str(report.max_micro_batch_size)
        gpu = entry.gpu.removeprefix("NVIDIA ") + (", emulated" if report.basis == "emulated" else "")
        age = describe_age(report.measured_at)
        table.add_row(entry.id, age, gpu, largest, str(len(report.trials)), escape(_one_line(entry.workload)))
    return table


def _one_line(text: str) -> str:
    """A name as a terminal takes it: no newline, nothing that moves or colours."""
    shown = "".join(character if character.isprintable() else "�" for character in text)
    return shown if len(shown) <= _LONGEST_NAME else f"{shown[:_LONGEST_NAME]}…"


def _card_text(card: PresentCard) -> str:
    name = f"{card.name}, emulated" if card.is_emulated else card.name
    return f"{name}, {format_bytes(card.free_bytes)} free of {format_bytes(card.total_bytes)}, {card.uuid}"


def _catalogue_table(cards: Sequence[Card]) -> Table:
    from rich.table import Table
    from rich.text import Text

    from autobatch.gpu.catalogue import working_aliases

    table = Table(
        title="can be emulated (--emulate NAME)", title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    table.add_column("name", no_wrap=True)
    for name in ("NVML memory", "CUDA memory", "capability", "SMs"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("also called", style="dim")
    for card in cards:
        table.add_row(
            Text(card.name),
            format_bytes(card.nvml_total_bytes),
            format_bytes(card.cuda_total_bytes),
            "{}.{}".format(*card.compute_capability),
            str(card.sm_count),
            Text(", ".join(working_aliases(card))),
        )
    return table


def findings_view(findings: Sequence[Finding], *, can_probe: bool) -> RenderableType:
    """Show what was looked at, each with its mend, and whether a probe can run."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for finding in findings:
        mark = Text("ok", style="green") if finding.ok else Text("missing", style="yellow")
        table.add_row(mark, finding.what, Text(finding.found))
        if finding.mend:
            table.add_row("", "", Text(f"→ {finding.mend}", style="dim" if finding.ok else ""))
    verdict = "a probe can run here" if can_probe else "no probe can run here yet"
    return Group(table, Text(), Text(verdict, style="bold green" if can_probe else "bold red"))
