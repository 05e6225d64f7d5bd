"""Throughput against micro-batch size, with the noise of what was timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from autobatch.present.axes import dress_axes, dress_size_axis
from autobatch.present.curve_words import title_words
from autobatch.present.text_layout import SMALL_POINTS, TEXT_POINTS, TITLE_POINTS, drawable, wrapped
from autobatch.throughput import batch_time, describe_times
from autobatch.trial import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from autobatch.present.themes import Theme
    from autobatch.report import Report

__all__ = ["Speed", "speed_words", "speeds_of", "throughput_figure"]

# All lengths are points, 1/72 inch.
_WIDTH = 576.0
_EDGE = 12.0
_LEFT = 56.0
_AXES_HEIGHT = 190.0
_BOTTOM = 62.0


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What one size gets through."""

    micro_batch_size: int
    samples_per_second: float
    low: float
    """Samples per second where the noise slows it down."""
    high: float
    """Samples per second where the noise speeds it up."""
    is_of_plan: bool
    """Whether a whole effective batch was reckoned, its one optimizer step included; else the trial's own window."""


def speeds_of(report: Report) -> Sequence[Speed]:
    """List what was timed, smallest size first; of a size's trials the last."""
    found = {}
    for trial in report.trials:
        seconds = trial.seconds_per_step
        if not trial.fits or not seconds or len(set(trial.window)) > 1:
            continue
        whole = batch_time(trial, report.options)
        if whole is None:
            samples, noise = sum(trial.window), trial.seconds_per_step_deviation or 0.0
        else:
            plan = report.options.make_plan(trial.micro_batch_size)
            samples, seconds, noise = plan.effective_batch_size // plan.world_size, whole.seconds, whole.noise_seconds
        found[trial.micro_batch_size] = Speed(
            micro_batch_size=trial.micro_batch_size,
            samples_per_second=samples / seconds,
            low=samples / (seconds + noise),
            high=samples / max(seconds - noise, seconds / 10),
            is_of_plan=whole is not None,
        )
    return [found[size] for size in sorted(found)]


def speed_words(report: Report) -> str:
    """Say in words what the picture shows."""
    lines = [
        f"{one.micro_batch_size}: {one.samples_per_second:.4g} samples per second (from {one.low:.4g} to {one.high:.4g})"
        for one in speeds_of(report)
    ]
    return f"Samples per second against micro-batch size. {'; '.join(lines)}."


def throughput_figure(report: Report, theme: Theme) -> Figure:
    """Draw samples per second on one rank against micro-batch size."""
    from matplotlib.figure import Figure

    speeds = speeds_of(report)
    chosen = report.plan.micro_batch_size if report.plan else None
    words = describe_times(report.trials, report.options, chosen) if chosen else ""
    lines = wrapped(words or "samples per second of each size that was timed", TEXT_POINTS, _WIDTH - 2 * _EDGE)
    head = _EDGE + 18 + 13 * len(lines) + 12
    height = _BOTTOM + _AXES_HEIGHT + head
    figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=72, facecolor=theme.background)
    box = (_LEFT / _WIDTH, _BOTTOM / height, (_WIDTH - _LEFT - _EDGE) / _WIDTH, _AXES_HEIGHT / height)
    axes = figure.add_axes(box, facecolor="none")
    _dress(axes, speeds, theme)
    _draw(axes, speeds, theme)
    if chosen is not None:
        axes.axvline(chosen, color=theme.outcomes[Outcome.FITS], linewidth=1.1, dashes=(4, 2), zorder=1.6, gid="plan")
        axes.annotate(
            f"plan {chosen:,}",
            (chosen, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=TEXT_POINTS,
            weight="bold",
            color=theme.ink,
        )
    top = 1 - (_EDGE + 10) / height
    title = drawable(title_words(report, _WIDTH - 2 * _EDGE))
    figure.text(_EDGE / _WIDTH, top, title, fontsize=TITLE_POINTS, color=theme.ink, weight="bold")
    for number, line in enumerate(lines, start=1):
        figure.text(_EDGE / _WIDTH, top - (4 + 13 * number) / height, line, fontsize=TEXT_POINTS, color=theme.muted)
    legend = (
        "bars: spread of the steps timed (median absolute deviation); filled: a whole effective batch with its one optimizer "
        "step; hollow: the trial's own window"
    )
    for number, line in enumerate(wrapped(legend, SMALL_POINTS, _WIDTH - 2 * _EDGE)):
        y = (_EDGE + 11 - 11 * number) / height
        figure.text(_EDGE / _WIDTH, y, line, fontsize=SMALL_POINTS, color=theme.muted)
    return figure


def _dress(axes: Axes, speeds: Sequence[Speed], theme: Theme) -> None:
    from matplotlib.ticker import FuncFormatter

    dress_size_axis(axes, theme, max((one.micro_batch_size for one in speeds), default=1))
    axes.set_ylim(0, 1.08 * max((one.high for one in speeds), default=1.0))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:,.4g}"))
    axes.set_ylabel("samples per second, one rank", color=theme.ink, fontsize=TEXT_POINTS, labelpad=4)
    dress_axes(axes, theme, grid="y", spines=("left", "bottom"))


def _draw(axes: Axes, speeds: Sequence[Speed], theme: Theme) -> None:
    colour = theme.outcomes[Outcome.FITS]
    for number, one in enumerate(speeds, start=1):
        reach = [[one.samples_per_second - one.low], [one.high - one.samples_per_second]]
        axes.errorbar(
            [one.micro_batch_size],
            [one.samples_per_second],
            yerr=reach,
            fmt="o",
            markersize=7,
            color=colour,
            markerfacecolor=colour if one.is_of_plan else theme.background,
            capsize=4,
            elinewidth=1.3,
            gid=f"speed-{number}",
            clip_on=False,
        )
