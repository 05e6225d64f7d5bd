"""The memory curve itself: one report as a matplotlib figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autobatch.present.axes import dress_axes, dress_size_axis
from autobatch.present.curve_marks import size_marks
from autobatch.present.curve_parts import GIB, fitted_line, has_height, memory_bands
from autobatch.present.curve_symbols import bar_looks, dress_point, legend_columns, legend_handles
from autobatch.present.curve_words import certificate_words, foot_lines, title_words
from autobatch.present.text_layout import (
    SMALL_POINTS,
    TEXT_POINTS,
    TITLE_POINTS,
    drawable,
    shortened,
    spread,
    text_width,
    wrapped,
)
from autobatch.trial import Outcome
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from autobatch.present.themes import Theme
    from autobatch.report import Report
    from autobatch.trial import Trial

__all__ = ["Picture"]

# All lengths are points, 1/72 inch.
_WIDTH = 576.0
_AXES_HEIGHT = 228.0
_EDGE = 12.0
_LEFT = 46.0
_LABEL_GAP = 9.0
_STRIP = 0.09
"""Share of the axes' height for the strip of trials that ran out of memory."""


class Picture:
    """The figure of one report."""

    def __init__(self, report: Report, theme: Theme) -> None:
        from matplotlib.figure import Figure

        self._report, self._theme = report, theme
        highest = max(
            report.device.total_bytes, *(trial.footprint_bytes for trial in report.trials if has_height(trial)), 1
        )
        ran_out = any(not has_height(trial) for trial in report.trials)
        self._top_gib = highest / GIB / (1 - _STRIP if ran_out else 0.985)
        largest = max((*(trial.micro_batch_size for trial in report.trials), report.smallest_failing or 1))
        self._bands = memory_bands(report, theme)
        words = wrapped(certificate_words(report), TEXT_POINTS, _WIDTH - 2 * _EDGE)
        foot = [shortened(line, SMALL_POINTS, _WIDTH - 2 * _EDGE) for line in foot_lines(report)]
        handles = legend_handles(report, theme)
        columns = legend_columns([str(handle.get_label()) for handle in handles], _WIDTH - 2 * _EDGE)
        rows = -(-len(handles) // columns)
        self._marks = size_marks(report, theme)

        side = max(text_width(text, SMALL_POINTS) for _, text, _ in self._side_labels()) + 14 + _EDGE
        self._axes_width = _WIDTH - _LEFT - side
        self._bottom = _EDGE + len(foot) * 11 + 6 + rows * 14 + 33
        head = _EDGE + 15 + len(words) * 13 + (26 if self._marks else 8)
        self._height = self._bottom + _AXES_HEIGHT + head
        self.figure: Figure = Figure(figsize=(_WIDTH / 72, self._height / 72), dpi=72, facecolor=theme.background)
        self._axes = self._add_axes()
        self._largest_x = dress_size_axis(self._axes, theme, largest)
        self._draw_bands()
        self._draw_fit()
        self._draw_marks()
        for number, trial in enumerate(report.trials, start=1):
            self._draw_trial(trial, f"trial-{number}")
        self._draw_side_labels()
        self._draw_words(words, foot)
        self._draw_legend(handles, columns, _EDGE + len(foot) * 11 + 4)

    def _add_axes(self) -> Axes:
        from matplotlib.ticker import MaxNLocator

        theme = self._theme
        box = (_LEFT / _WIDTH, self._bottom / self._height, self._axes_width / _WIDTH, _AXES_HEIGHT / self._height)
        axes = self.figure.add_axes(box, facecolor="none")
        axes.set_ylim(0, self._top_gib)
        ceiling = self._report.device.total_bytes / GIB
        ticks = MaxNLocator(nbins=7, steps=[1, 2, 4, 5, 8, 10]).tick_values(0, ceiling)
        axes.set_yticks([tick for tick in ticks if 0 <= tick <= ceiling * 1.001])
        axes.set_ylabel("memory (GiB)", color=theme.ink, fontsize=TEXT_POINTS, labelpad=4)
        dress_axes(axes, theme, grid="y", spines=("left", "bottom"))
        return axes

    def _draw_bands(self) -> None:
        theme, report = self._theme, self._report
        for band in self._bands:
            self._axes.axhspan(
                band.low_bytes / GIB, band.high_bytes / GIB, color=band.colour, linewidth=0, zorder=0.6, gid=band.gid
            )
        total, budget = report.device.total_bytes / GIB, report.memory.budget_bytes / GIB
        self._axes.axhline(total, color=theme.ink, linewidth=0.8, zorder=1.4, gid="card")
        self._axes.axhline(budget, color=theme.ink, linewidth=1.4, dashes=(7, 2), zorder=1.5, gid="budget")

    def _draw_fit(self) -> None:
        fit = fitted_line(self._report)
        if fit is not None:
            sizes, heights = fit
            self._axes.plot(
                sizes, heights, color=self._theme.muted, linewidth=1.2, dashes=(3, 2.5), zorder=1.8, gid="fit"
            )

    def _draw_trial(self, trial: Trial, gid: str) -> None:
        x = sum(trial.window) / len(trial.window)
        strip = 1 - _STRIP / 2 + 0.005
        y = trial.footprint_bytes / GIB if has_height(trial) else self._top_gib * strip
        if len(trial.window) == 1:
            self._axes.plot([x], [y], **bar_looks(self._theme.outcomes[trial.outcome]), zorder=2.9, clip_on=False)
        (point,) = self._axes.plot([x], [y], linestyle="none", gid=gid, clip_on=False)
        # A confirmation over the trial that it confirms shows as a halo around it.
        point.set_zorder(3.2 if trial.confirmation else 3)
        dress_point(point, self._theme, trial.outcome, hollow=trial.confirmation, mixed=len(set(trial.window)) > 1)

    def _draw_marks(self) -> None:
        """Draw the lines at sizes, and their labels in a row above: nothing else is drawn there."""
        base = self._bottom + _AXES_HEIGHT
        widths = [text_width(mark.text, TEXT_POINTS, bold=True) + _LABEL_GAP for mark in self._marks]
        wanted = [
            _LEFT + sum(mark.sizes) / len(mark.sizes) / self._largest_x * self._axes_width for mark in self._marks
        ]
        centres = spread(wanted, widths, _EDGE - _LABEL_GAP / 2, _WIDTH - _EDGE + _LABEL_GAP / 2)
        for mark, centre in zip(self._marks, centres, strict=True):
            self._text(centre, base + 14, mark.text, size=TEXT_POINTS, weight="bold", ha="center", gid=mark.gid)
            for size in mark.sizes:
                x = _LEFT + size / self._largest_x * self._axes_width
                # In two parts: what is drawn on the figure lies above all of the axes, the trials included.
                self._axes.axvline(size, color=mark.colour, linewidth=1.1, dashes=mark.dashes, zorder=1.6)
                self._line((x, base), (centre, base + 11), mark.colour)

    def _side_labels(self) -> list[tuple[float, str, str]]:
        """List the labels at the right: height in GiB, text and colour."""
        report, theme = self._report, self._theme
        labels = [
            ((band.low_bytes + band.high_bytes) / 2 / GIB, f"{band.name} {format_bytes(band.size_bytes)}", theme.muted)
            for band in self._bands
        ]
        for name, size in (("card", report.device.total_bytes), ("budget", report.memory.budget_bytes)):
            labels.append((size / GIB, f"{name} {format_bytes(size)}", theme.ink))
        if any(not has_height(trial) for trial in report.trials):
            labels.append((self._top_gib * (1 - _STRIP / 2), "out of memory", theme.outcomes[Outcome.OUT_OF_MEMORY]))
        return sorted(labels)

    def _draw_side_labels(self) -> None:
        labels = self._side_labels()
        wanted = [self._bottom + height / self._top_gib * _AXES_HEIGHT for height, _, _ in labels]
        low, high = self._bottom - 6, self._bottom + _AXES_HEIGHT + 6
        right = _LEFT + self._axes_width
        for y, placed, (_, text, colour) in zip(
            wanted, spread(wanted, [10.5] * len(labels), low, high), labels, strict=True
        ):
            self._line((right + 1, y), (right + 11, placed), colour)
            self._text(right + 14, placed, text, size=SMALL_POINTS, colour=colour, va="center_baseline")

    def _draw_words(self, words: Sequence[str], foot: Sequence[str]) -> None:
        y = self._height - _EDGE - 9
        self._text(
            _EDGE, y, title_words(self._report, _WIDTH - 2 * _EDGE), size=TITLE_POINTS, weight="bold", gid="title"
        )
        for line in words:
            y -= 13 if line is not words[0] else 15
            colour = self._theme.outcomes[Outcome.OUT_OF_MEMORY] if self._report.plan is None else self._theme.ink
            self._text(_EDGE, y, line, size=TEXT_POINTS, colour=colour)
        for number, line in enumerate(reversed(foot)):
            self._text(_EDGE, _EDGE + 11 * number - 2, line, size=SMALL_POINTS, colour=self._theme.muted)

    def _draw_legend(self, handles: Sequence[Line2D], columns: int, y: float) -> None:
        legend = self.figure.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=((_EDGE - 2) / _WIDTH, y / self._height),
            ncols=columns,
            fontsize=SMALL_POINTS,
            frameon=False,
            labelcolor=self._theme.ink,
            borderpad=0,
            borderaxespad=0,
            handlelength=2.2,
            handletextpad=0.5,
            columnspacing=1.6,
            labelspacing=0.55,
        )
        legend.set_gid("legend")

    def _text(self, x: float, y: float, text: str, *, size: float, colour: str = "", **looks: Any) -> None:
        """Write at a place in points; `$` means nothing in it."""
        places = (x / _WIDTH, y / self._height)
        self.figure.text(
            *places, drawable(text), fontsize=size, color=colour or self._theme.ink, parse_math=False, **looks
        )

    def _line(self, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
        """Lead from a label to what it names, both places in points."""
        from matplotlib.lines import Line2D

        xs, ys = (start[0] / _WIDTH, end[0] / _WIDTH), (start[1] / self._height, end[1] / self._height)
        self.figure.add_artist(Line2D(xs, ys, transform=self.figure.transFigure, color=colour, linewidth=0.7))
