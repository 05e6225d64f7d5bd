"""What the frameworks share: options that a framework decides, progress, and what a report says besides."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import TYPE_CHECKING, Any

from autobatch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from autobatch.integrations.largest import LargestSamples
    from autobatch.probing import ProbeEvent
    from autobatch.report import Report

__all__ = ["check_undecided", "only_size", "with_warnings", "writing_progress"]

# What `probe` takes beside the fields of ProbeOptions and is no question for a framework: its trainer decides it, or nothing
# can tell one run of it from another.
_NEVER = ("cache", "end_window", "micro_step", "optimizer", "rank_sizes", "restore", "scaler", "workload")


def check_undecided(options: Mapping[str, Any], decided: Collection[str], *, who: str) -> None:
    """Refuse options that the framework's own objects decide.

    Raises:
        UsageError: one is given.
    """
    if given := sorted(set(options) & {*_NEVER, *decided}):
        raise UsageError(f"{', '.join(given)} cannot be given here: {who} decides it")


@contextlib.contextmanager
def writing_progress(
    progress: Callable[[ProbeEvent], None] | None, *, starting: str, wanted: bool
) -> Iterator[Callable[[ProbeEvent], None] | None]:
    """Give where events go: to the caller's function, else to standard error on rank 0 where that is wanted."""
    if progress is not None or not wanted or os.environ.get("RANK", "0") != "0":
        yield progress
        return
    from autobatch.cli.output import error_console
    from autobatch.present.progress import ProgressLines

    with ProgressLines(error_console(), starting=starting) as lines:
        yield lines


def with_warnings(report: Report, samples: LargestSamples) -> Report:
    """Add what is to be known of the samples that the batches were made of."""
    if samples.warning is None:
        return report
    return dataclasses.replace(report, warnings=(*report.warnings, samples.warning))


def only_size(report: Report) -> tuple[int, int]:
    """The micro-batch size and the accumulation steps of a plan that has one size, as every even plan does."""
    if report.plan is None:
        raise ValueError("the report has no plan")
    return report.plan.micro_batch_size, report.plan.accumulation_steps
