"""The colours of the memory curve, for light and for dark ground."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from autobatch.trial import Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["THEMES", "Theme"]


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours, each told from the others by its lightness too, for readers of a grey print."""

    background: str
    """What the picture is drawn on, and what its colours are chosen against where it is transparent."""
    ink: str
    muted: str
    grid: str
    context: str
    headroom: str
    tenants: str
    beyond: str
    outcomes: Mapping[Outcome, str]


THEMES = {
    "light": Theme(
        background="#ffffff",
        ink="#1b1f24",
        muted="#57606a",
        grid="#e6e9ed",
        context="#d5dae0",
        headroom="#f3e3bd",
        tenants="#c3c9d1",
        beyond="#e4e7eb",
        outcomes={
            Outcome.FITS: "#00589b",
            Outcome.OVER_BUDGET: "#c8500a",
            Outcome.THRASHES: "#b08a00",
            Outcome.OUT_OF_MEMORY: "#6a0d3c",
        },
    ),
    "dark": Theme(
        background="#12161b",
        ink="#e8ecf1",
        muted="#a3adb8",
        grid="#262d35",
        context="#333c46",
        headroom="#4d4224",
        tenants="#4b5561",
        beyond="#2a313a",
        outcomes={
            Outcome.FITS: "#62b8f0",
            Outcome.OVER_BUDGET: "#e2702c",
            Outcome.THRASHES: "#8f7412",
            Outcome.OUT_OF_MEMORY: "#ffc9de",
        },
    ),
}
