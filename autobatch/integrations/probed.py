"""What the frameworks share: options that a framework decides, progress, and what a report says besides."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from typing import TYPE_CHECKING, Any

from autobatch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from autobatch.integrations.largest import LargestSamples
    from autobatch.probing import ProbeEvent
    from autobatch.report import Report

__all__ = ["check_undecided", "only_size", "unchanged_attributes", "with_warnings", "writing_progress"]

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


@contextlib.contextmanager
def unchanged_attributes(*objects: Any) -> Iterator[None]:
    """Put each object's own attributes back at the end, and what their lists, dicts and sets hold.

    What a step keeps by itself, such as the losses that it collects for the end of an epoch, is so forgotten. What those hold in
    turn is not looked into.
    """
    kept = [(vars(each), dict(vars(each)), _contents(vars(each))) for each in objects]
    try:
        yield
    finally:
        for live, before, contents in kept:
            live.clear()
            live.update(before)
            for container, content in contents:
                _refill(container, content)


def _contents(attributes: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    return [(value, copy.copy(value)) for value in attributes.values() if type(value) in {list, dict, set}]


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


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
