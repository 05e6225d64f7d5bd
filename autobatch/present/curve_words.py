"""What the memory curve says in words: title, certificate, foot, and the description for who cannot see it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autobatch.present.curve_parts import has_height, memory_bands
from autobatch.present.tables import OUTCOME_WORDS, plan_words, window_text
from autobatch.present.text_layout import TITLE_POINTS, text_width
from autobatch.present.themes import THEMES
from autobatch.trial import Outcome
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from autobatch.report import Report
    from autobatch.trial import Trial

__all__ = [
    "FAILED_WORDS",
    "PER_STEP",
    "certificate_words",
    "description_words",
    "failing_trial",
    "foot_lines",
    "title_words",
    "trial_words",
]

FAILED_WORDS = {
    Outcome.FITS: "ran and fitted",
    Outcome.OVER_BUDGET: "ran over the budget",
    Outcome.THRASHES: "thrashed",
    Outcome.OUT_OF_MEMORY: "ran out of memory",
}
PER_STEP = {1: "one micro-batch per optimizer step", 2: "two micro-batches per optimizer step"}


def title_words(report: Report, room: float) -> str:
    """Name the workload, the card and the basis; of a long workload the end is kept, which tells it from others."""
    name, rest = report.workload, f" on {report.device.name}, {report.basis}"
    shown = name
    while name and text_width(shown + rest, TITLE_POINTS, bold=True) > room:
        name = name[max(1, len(name) // 40) :]
        shown = f"…{name}"
    return shown + rest


def certificate_words(report: Report) -> str:
    """Say in words what was shown."""
    per_step, largest, failing = (
        PER_STEP[report.micro_batches_per_step],
        report.max_micro_batch_size,
        report.smallest_failing,
    )
    trial = failing_trial(report)
    failed = ""
    if trial is not None:
        sizes = window_text(trial.window) + " in one step" if len(set(trial.window)) > 1 else f"{failing:,}"
        failed = f"{sizes} {FAILED_WORDS[trial.outcome]}"
    if largest is None:
        text = f"Nothing fits: even {failed or 'the smallest size did not'}, {per_step}."
    elif report.ceiling_reached:
        text = f"{largest:,} ran and fitted, {per_step}; it is the largest size asked for, so nothing larger was tried."
    else:
        text = ", ".join(filter(None, (f"{largest:,} ran and fitted", failed, per_step))) + "."
    if report.data_dependent:
        text += " Not certified: shapes are read from the device."
    elif not report.certified:
        text += " Not certified."
    if not report.monotone:
        text += " A size fitted above one that did not."
    return text


def foot_lines(report: Report) -> list[str]:
    """List what the figures were found with."""
    versions = report.versions
    parts = [f"{report.basis} {report.measured_at}", f"autobatch {versions.autobatch}"]
    parts += [f"{name} {value}" for name, value in (("torch", versions.torch), ("CUDA", versions.cuda)) if value]
    if report.basis == "measured" and report.device.driver:
        parts.append(f"driver {report.device.driver}")
    if report.memory.other_tenants_bytes is None:
        parts.append("other tenants unknown")
    expected = [f"error to expect: {report.expected_error}"] if report.expected_error else []
    return [" · ".join(parts), *expected]


def description_words(report: Report) -> str:
    """Say in words what the picture shows, for who cannot see it."""
    memory = report.memory
    total = format_bytes(report.device.total_bytes)
    lines = [
        "Memory in GiB against micro-batch size in samples.",
        certificate_words(report),
        f"The budget is {format_bytes(memory.budget_bytes)} of the card's {total}.",
        *(
            f"{band.name[0].upper()}{band.name[1:]}: {format_bytes(band.size_bytes)}."
            for band in memory_bands(report, THEMES["light"])
        ),
        *([f"The plan for {report.plan.target:,}: {plan_words(report.plan)}."] if report.plan else []),
        "Trials:",
        "; ".join(trial_words(trial) for trial in report.trials) + ".",
        f"All of it is {report.basis}.",
    ]
    return " ".join(lines)


def trial_words(trial: Trial) -> str:
    """Say what one trial ran and how it ended."""
    words = f"{window_text(trial.window)} {OUTCOME_WORDS[trial.outcome][0]}"
    if has_height(trial):
        words += f", {format_bytes(trial.footprint_bytes)}"
    elif trial.oom_request_bytes:
        words += f", asked for {format_bytes(trial.oom_request_bytes)} more"
    return words + (" (confirmation)" if trial.confirmation else "")


def failing_trial(report: Report) -> Trial | None:
    """Find the trial that made the smallest failing size fail; the last, since a confirmation may overrule."""
    failed = [t for t in report.trials if not t.fits and t.micro_batch_size == report.smallest_failing]
    return failed[-1] if failed else None
