"""The sizes that the memory curve marks: the plan, the maximum and the smallest that failed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from autobatch.present.curve_words import FAILED_WORDS, failing_trial
from autobatch.present.tables import plan_words, window_text
from autobatch.trial import Outcome

if TYPE_CHECKING:
    from autobatch.present.themes import Theme
    from autobatch.report import Report

__all__ = ["Mark", "size_marks"]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Sizes with a line through the picture and one label."""

    text: str
    gid: str
    sizes: tuple[int, ...]
    colour: str
    dashes: tuple[float, ...] | tuple[None, None]


def size_marks(report: Report, theme: Theme) -> list[Mark]:
    """List the plan, the maximum and the smallest failing size, from left to right."""
    marks = []
    plan, largest, failing = report.plan, report.max_micro_batch_size, report.smallest_failing
    plan_text = "" if plan is None else f"plan {plan_words(plan)}"
    if largest is not None:
        same = plan is not None and plan.sizes == (largest,)
        text = f"max {largest:,}" + (f", {plan_text}" if same else "")
        marks.append(Mark(text=text, gid="max", sizes=(largest,), colour=theme.ink, dashes=(None, None)))
        if plan is not None and not same:
            marks.append(Mark(text=plan_text, gid="plan", sizes=plan.sizes, colour=theme.ink, dashes=(6, 2, 1, 2)))
    if failing is not None:
        trial = failing_trial(report)
        outcome = Outcome.OUT_OF_MEMORY if trial is None else trial.outcome
        what = f"{failing:,}" if trial is None or len(set(trial.window)) == 1 else window_text(trial.window)
        text = f"{what} {FAILED_WORDS[outcome] if trial else 'failed'}"
        marks.append(Mark(text=text, gid="failing", sizes=(failing,), colour=theme.outcomes[outcome], dashes=(1, 1.5)))
    return sorted(marks, key=lambda mark: sum(mark.sizes) / len(mark.sizes))
