"""A report as one page that needs nothing but itself: for a browser, a colleague, an archive."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autobatch.errors import UnavailableError, UsageError
from autobatch.options import ProbeOptions
from autobatch.present.budget import budget_lines
from autobatch.present.curve_words import certificate_words, foot_lines
from autobatch.present.formats import plan_as_arguments
from autobatch.present.plot import report_svg, throughput_svg
from autobatch.present.tables import OUTCOME_WORDS, alternative_words, breakdown_rows, plan_words, window_text
from autobatch.present.throughput_plot import speeds_of
from autobatch.present.ways import describe_missing, next_goal, ways_to
from autobatch.throughput import describe_times
from autobatch.trial import Outcome
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch.report import Report
    from autobatch.trial import Trial

__all__ = ["check_page_path", "render_page", "write_page"]

_SUFFIXES = (".html", ".htm")


@dataclass(frozen=True, kw_only=True)
class _Segment:
    """A part of the card's memory, as wide in the bar as it is large."""

    name: str
    css: str
    size: str
    percent: float
    """Of the card."""
    note: str


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A trial in the table."""

    window: str
    reserved: str
    footprint: str
    share: str
    seconds: str
    outcome: str
    css: str
    note: str


def check_page_path(path: str | Path) -> None:
    """Refuse, before a probe, a file that could not be written after it.

    Raises:
        UsageError: the suffix is not `.html`, or the folder is missing, or nothing may be written there.
        UnavailableError: jinja2 or matplotlib is not installed.
    """
    from importlib.util import find_spec

    from autobatch.present.files import check_writable

    if Path(path).suffix.lower() not in _SUFFIXES:
        raise UsageError(f"report {str(path)!r} does not end in .html: the report is a page, name it so")
    check_writable(path, what="report")
    for package in ("jinja2", "matplotlib"):
        if find_spec(package) is None:
            raise UnavailableError(f"the page needs {package}: pip install '.[plot]' in autobatch's own folder")


def write_page(report: Report, path: str | Path) -> None:
    """Write a report as a page; the file appears whole or not at all.

    Args:
        report: what a probe found.
        path: ends in `.html`; in an existing folder.

    Raises:
        UsageError: as `check_page_path`, or the disk refuses the file.
        UnavailableError: jinja2 or matplotlib is not installed.
    """
    from autobatch.present.files import write_whole

    check_page_path(path)
    write_whole(path, render_page(report).encode("utf-8", "replace"), what="report")


def render_page(report: Report) -> str:
    """Make a report into one HTML page without scripts, fonts or pictures from elsewhere.

    It follows the reader's light or dark setting, can be printed, and carries the report's JSON in an element with the id
    `report`, from which `Report.from_json` makes the report again.

    Raises:
        UnavailableError: jinja2 or matplotlib is not installed.
    """
    import jinja2

    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    goal = next_goal(report)
    timed = any(trial.seconds_per_step is not None for trial in report.trials)
    has_speeds = bool(speeds_of(report))
    return environment.from_string(template).render(
        report=report,
        answer=plan_words(report.plan) if report.plan else "does not fit",
        arguments=_arguments(report),
        certificate=certificate_words(report),
        curves={theme: report_svg(report, theme=theme) for theme in ("light", "dark")},
        speeds={theme: throughput_svg(report, theme=theme) for theme in ("light", "dark")} if has_speeds else {},
        times=describe_times(report.trials, report.options, report.plan.micro_batch_size) if report.plan else "",
        segments=_segments(report),
        breakdown=report.breakdown,
        rows=[_row(trial, report.memory.budget_bytes) for trial in report.trials],
        timed=timed,
        alternatives=[(one.change, *alternative_words(one)) for one in report.alternatives or ()],
        missing=describe_missing(goal) if goal else "",
        ways=ways_to(report, goal) if goal else (),
        goal=goal,
        budget=budget_lines(report),
        asked=_asked(report.options),
        found_with=foot_lines(report),
        format_bytes=format_bytes,
        # In an element's text a "</" would end it, wherever it came from.
        embedded=json.dumps(report.to_dict(), ensure_ascii=True).replace("<", "\\u003c"),
    )


def _arguments(report: Report) -> str:
    from autobatch.errors import PlanError

    try:
        return plan_as_arguments(report.plan, "args") if report.plan else ""
    except PlanError:  # sizes that differ have no words
        return ""


def _segments(report: Report) -> Sequence[_Segment]:
    """Share out the card where the plan's size has been taken apart: the job, what is left of the budget, and the rest."""
    split, memory, total = report.breakdown, report.memory, report.device.total_bytes
    if split is None:
        return ()
    parts = [(name, css, size, note) for css, name, size, note in breakdown_rows(split)]
    free = memory.budget_bytes - split.footprint_bytes
    others = memory.other_tenants_bytes or 0
    parts += [
        ("free within the budget", "free", free, "what the plan leaves"),
        ("headroom", "headroom", memory.headroom_bytes, "left free on purpose"),
        ("other tenants", "tenants", others, "other processes"),
        (
            "kept by the driver",
            "driver",
            total - memory.budget_bytes - memory.headroom_bytes - others,
            "or beyond the limit",
        ),
    ]
    return [
        _Segment(name=name, css=css, size=format_bytes(size), percent=100 * size / total, note=note)
        for name, css, size, note in parts
        if size > 0
    ]


def _row(trial: Trial, budget_bytes: int) -> _Row:
    ran_out = trial.outcome is Outcome.OUT_OF_MEMORY
    note = "" if ran_out and "OutOfMemoryError" in trial.note else trial.note
    if ran_out and trial.oom_request_bytes:
        note = f"asked for {format_bytes(trial.oom_request_bytes)} more" + (f"; {note}" if note else "")
    return _Row(
        window=window_text(trial.window),
        reserved=format_bytes(trial.peak_reserved_bytes),
        footprint="–" if ran_out else format_bytes(trial.footprint_bytes),
        share="–" if ran_out else f"{trial.footprint_bytes / budget_bytes:.1%}",
        seconds="–" if trial.seconds_per_step is None else f"{trial.seconds_per_step:.3g}",
        outcome=OUTCOME_WORDS[trial.outcome][0] + (" (confirmation)" if trial.confirmation else ""),
        css="fits" if trial.fits else "fails",
        note=note,
    )


def _asked(options: ProbeOptions) -> Sequence[tuple[str, str]]:
    """The options that are not as they are by themselves, and the target."""
    return [
        (one.name.replace("_", " "), str(getattr(options, one.name)))
        for one in dataclasses.fields(ProbeOptions)
        if one.name == "target" or getattr(options, one.name) not in (one.default, None, 0.0)
    ]
