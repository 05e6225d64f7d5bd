"""A report as a picture: memory against micro-batch size, with the budget, the trials, the maximum and the plan."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from autobatch.errors import UnavailableError, UsageError
from autobatch.present.curve import Picture
from autobatch.present.curve_words import description_words, trial_words
from autobatch.present.files import check_writable, write_whole
from autobatch.present.svg import fit_for_page
from autobatch.present.themes import THEMES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from matplotlib.backend_bases import FigureCanvasBase
    from matplotlib.figure import Figure

    from autobatch.placement import PlacementTable
    from autobatch.report import Report

__all__ = ["check_plot_path", "draw_placements", "draw_report", "draw_throughput", "report_svg", "throughput_svg"]

_SUFFIXES = (".png", ".svg", ".pdf")

# rcParams belong to the whole process: two pictures at once would give each other's back.
_RC_LOCK = threading.RLock()


def check_plot_path(path: str | Path) -> None:
    """Refuse, before a probe, a file that could not be written after it.

    Raises:
        UsageError: the suffix is none of the three, or the folder is missing, or nothing may be written there.
        UnavailableError: matplotlib is not installed.
    """
    target = Path(path)
    if target.suffix.lower() not in _SUFFIXES:
        found = f"has the suffix {target.suffix!r}" if target.suffix else "has no suffix"
        raise UsageError(f"plot {str(path)!r} {found}: end it in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}")
    check_writable(path, what="plot")
    _require_matplotlib()


def draw_report(report: Report, path: str | Path) -> None:
    """Draw the memory curve into a file, whose suffix says the format.

    The file appears whole or not at all: one that is there already stays as it is until the new one is written.

    Args:
        report: what a probe found; where nothing fits, the picture says so.
        path: ends in `.png`, `.svg` or `.pdf`; in an existing folder.

    Raises:
        UsageError: as `check_plot_path`, or the disk refuses the file.
        UnavailableError: matplotlib is not installed.
    """
    check_plot_path(path)
    form = Path(path).suffix.lower()[1:]
    picture = _rendered_svg(report, "light", opaque=True) if form == "svg" else _rendered(_curve(report, "light"), form)
    write_whole(path, picture, what="plot")


def draw_placements(table: PlacementTable, path: str | Path) -> None:
    """Draw a ranking into a file, whose suffix says the format; whole or not at all, as `draw_report`.

    Args:
        table: what `placements` found.
        path: ends in `.png`, `.svg` or `.pdf`; in an existing folder.

    Raises:
        UsageError, UnavailableError: as `draw_report`.
    """
    from autobatch.present.placements_plot import placements_figure

    check_plot_path(path)
    picture = _rendered(lambda: placements_figure(table, THEMES["light"]), Path(path).suffix.lower()[1:])
    write_whole(path, picture, what="plot")


def report_svg(report: Report, *, theme: Literal["light", "dark"] = "light") -> str:
    """Draw the memory curve as an SVG element to stand in a page.

    It is transparent, takes the width that the page gives it, and keeps its text as text. The same report gives the
    same text. It needs no style sheet and has no `style` attribute, so that a page whose content security policy
    allows neither shows it; its ids begin with the theme and a hash of the report.

    Args:
        report: what a probe found.
        theme: for a light or a dark page.

    Returns:
        One `<svg>` element, without an XML prologue, with a title and a description for screen readers.

    Raises:
        UsageError: there is no such theme.
        UnavailableError: matplotlib is not installed.
    """
    _check_theme(theme)
    return _rendered_svg(report, theme, opaque=False).decode()


def draw_throughput(report: Report, path: str | Path) -> None:
    """Draw samples per second against micro-batch size, with the noise, into a file; whole or not at all, as `draw_report`.

    Args:
        report: of a probe for throughput; on a real GPU, since an emulated one knows no time.
        path: ends in `.png`, `.svg` or `.pdf`; in an existing folder.

    Raises:
        UsageError: as `draw_report`, or nothing was timed.
        UnavailableError: matplotlib is not installed.
    """
    from autobatch.present.throughput_plot import speeds_of, throughput_figure

    check_plot_path(path)
    if not speeds_of(report):
        raise UsageError(
            "no trial was timed, so there is no throughput to draw: a measured probe has times, an emulated one has none"
        )
    form = Path(path).suffix.lower()[1:]
    if form == "svg":
        picture = _throughput_svg(report, "light", opaque=True)
    else:
        picture = _rendered(lambda: throughput_figure(report, THEMES["light"]), form)
    write_whole(path, picture, what="plot")


def throughput_svg(report: Report, *, theme: Literal["light", "dark"] = "light") -> str:
    """Draw samples per second against micro-batch size as an SVG element to stand in a page; as `report_svg`.

    Raises:
        UsageError: there is no such theme.
        UnavailableError: matplotlib is not installed.
    """
    _check_theme(theme)
    return _throughput_svg(report, theme, opaque=False).decode()


def _throughput_svg(report: Report, theme: str, *, opaque: bool) -> bytes:
    from autobatch.present.throughput_plot import speed_words, throughput_figure

    return fit_for_page(
        _rendered(lambda: throughput_figure(report, THEMES[theme]), "svg", opaque=opaque),
        prefix=_prefix("speed-", report, theme),
        title=f"Throughput of {report.workload} on {report.device.name}",
        description=speed_words(report),
        hints={},
        opaque=opaque,
    )


def _check_theme(theme: str) -> None:
    if theme not in THEMES:
        raise UsageError(f"theme {theme!r} is none of {', '.join(THEMES)}")
    _require_matplotlib()


def _require_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise UnavailableError("plots need matplotlib: pip install '.[plot]' in autobatch's own folder")


@contextlib.contextmanager
def _own_settings() -> Iterator[None]:
    """Draw under matplotlib's defaults, whatever the process has set, and put its settings back."""
    from matplotlib import style

    settings = {"svg.fonttype": "none", "svg.hashsalt": "autobatch", "pdf.fonttype": 42, "font.family": "DejaVu Sans"}
    with _RC_LOCK, style.context(["default", settings]):
        yield


def _curve(report: Report, theme: str) -> Callable[[], Figure]:
    return lambda: Picture(report, THEMES[theme]).figure


def _rendered(make_figure: Callable[[], Figure], form: str, *, opaque: bool = True) -> bytes:
    """Draw in one of matplotlib's forms; no date goes in, so that the same report gives the same bytes."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    # A canvas of its own rather than pyplot, which keeps every figure and chooses a backend for the whole process.
    canvases: dict[str, tuple[type[FigureCanvasBase], dict[str, str | None]]] = {
        "png": (FigureCanvasAgg, {"Software": None}),
        "pdf": (FigureCanvasPdf, {"Creator": "autobatch", "CreationDate": None}),
        "svg": (FigureCanvasSVG, dict.fromkeys(("Creator", "Date", "Format", "Type"))),
    }
    canvas, metadata = canvases[form]
    with _own_settings(), io.BytesIO() as buffer:
        figure = make_figure()
        figure.patch.set_alpha(1.0 if opaque else 0.0)
        canvas(figure).print_figure(buffer, format=form, dpi=200, facecolor="auto", metadata=metadata)
        return buffer.getvalue()


def _rendered_svg(report: Report, theme: str, *, opaque: bool) -> bytes:
    """Draw the memory curve as one SVG element."""
    return fit_for_page(
        _rendered(_curve(report, theme), "svg", opaque=opaque),
        prefix=_prefix("", report, theme),
        title=f"Memory curve of {report.workload} on {report.device.name}, {report.basis}",
        description=description_words(report),
        hints={f"trial-{number}": trial_words(trial) for number, trial in enumerate(report.trials, start=1)},
        opaque=opaque,
    )


def _prefix(kind: str, report: Report, theme: str) -> str:
    """What a picture's ids begin with, so that several stand in one page."""
    import hashlib

    return f"autobatch-{kind}{theme}-{hashlib.sha256(report.to_json().encode('utf-8', 'replace')).hexdigest()[:12]}-"
