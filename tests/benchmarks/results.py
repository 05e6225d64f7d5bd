"""Where benchmarks keep what they found: JSON for machines, Markdown and SVG for people, under `results/`."""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"

INK, MUTED, GRID = "#1b1f24", "#57606a", "#e6e9ed"
GOOD, BAD, OTHER = "#00589b", "#c8500a", "#7b8794"


def markdown_table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(map(str, head))} |", "| --- " * len(head) + "|"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join(lines)


def machine() -> str:
    """What the figures were taken on, in words."""
    import torch

    return (
        f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, torch {torch.__version__}"
    )


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture that belongs to a benchmark."""

    paint: Callable[[Axes], None]
    title: str
    size: tuple[float, float] = (8.0, 4.0)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a benchmark found."""

    name: str
    """Of its files."""
    data: Any
    """For machines."""
    text: str
    """For people, in Markdown, from its title on."""
    pictures: dict[str, Picture] = field(default_factory=dict)
    """By the name of the file."""
    misses: tuple[str, ...] = ()
    """Bars that were missed, in words."""

    def write(self, folder: Path) -> None:
        """Write `NAME.json`, `NAME.md` and the pictures."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.json").write_text(json.dumps(self.data, indent=1, allow_nan=False) + "\n")
        (folder / f"{self.name}.md").write_text(self.text.rstrip() + "\n")
        for name, picture in self.pictures.items():
            _draw(picture, folder / f"{name}.svg")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what every benchmark takes."""
    parser.add_argument("--quick", action="store_true", help="the least that shows that it runs")
    parser.add_argument("--write", action="store_true", help="keep tables and pictures under results/")
    parser.add_argument("--into", type=Path, default=RESULTS, metavar="FOLDER", help="keep them there instead")


def finish(result: Result, asked: argparse.Namespace) -> int:
    """Print a result, keep it where asked; gives the exit status, 1 where a bar was missed."""
    print(result.text)
    for miss in result.misses:
        print(f"missed: {miss}")
    if asked.write:
        result.write(asked.into)
    return 1 if result.misses else 0


def run_benchmark(measure: Callable[..., Result], description: str | None) -> int:
    """The command line of a benchmark that has no options of its own; gives the exit status."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    add_flags(parser)
    asked = parser.parse_args()
    return finish(measure(quick=asked.quick), asked)


def _draw(picture: Picture, file: Path) -> None:
    """Draw one picture: the same data give the same bytes."""
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": "autobatch", "font.family": "DejaVu Sans", "font.size": 8.5}
    with style.context(["default", settings]):
        figure = Figure(figsize=picture.size, dpi=72, facecolor="#ffffff", layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(picture.title, loc="left", fontsize=11, fontweight="bold", color=INK)
        axes.tick_params(colors=MUTED)
        axes.grid(axis="x", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        picture.paint(axes)
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_figure(file, metadata=metadata)
