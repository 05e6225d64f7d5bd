"""What would fit with one thing changed: the same probe again, for each change that is asked for."""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from autobatch.errors import AutobatchError, NothingFitsError, UsageError
from autobatch.gpu.allocator import ALLOCATOR_VARIABLES, allocator_settings
from autobatch.options import ProbeOptions
from autobatch.report import Alternative
from autobatch.workload.judging import first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from autobatch.cache.uses import CacheUse
    from autobatch.probing import ProbeEvent

__all__ = ["Change", "check_changes", "parse_change", "try_alternatives"]

EXPANDABLE_SEGMENTS = "expandable_segments"
# What leaves the question the same, and the card.
_OPTIONS = ("headroom", "memory_limit", "tenant", "multiple_of", "split", "tolerance", "world_size")
_ELSEWHERE = {
    "emulate": "another card is asked for with `autobatch rank --gpu NAME`",
    "device": "another card is probed with --device",
    "target": "another target is another question: probe with --target",
    "objective": "another objective is another question: probe with --objective",
}


@dataclass(frozen=True, kw_only=True)
class Change:
    """One thing that is changed."""

    text: str
    """As it was asked for."""
    allocator_setting: str = ""
    """What is added to the settings of torch's allocator."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `ProbeOptions`."""
    parameter: tuple[str, str] | None = None
    """Name and value of a parameter of the workload."""

    def workload(self, name: str) -> str:
        """A workload's name with the parameter in place, in the stead of an earlier value."""
        if self.parameter is None:
            return name
        key, value = self.parameter
        base, _, query = name.partition("?")
        others = [part for part in query.split("&") if part and part.partition("=")[0] != key]
        return f"{base}?{'&'.join([*others, f'{key}={value}'])}"

    def environment(self, before: Mapping[str, str]) -> dict[str, str]:
        """The environment's variables with the allocator's setting in place."""
        if not self.allocator_setting:
            return dict(before)
        given = allocator_settings(before)
        kept = [one for one in given.split(",") if one and not one.startswith(EXPANDABLE_SEGMENTS)]
        return {**before, **dict.fromkeys(ALLOCATOR_VARIABLES, ",".join([*kept, self.allocator_setting]))}


def parse_change(text: str) -> Change:
    """Read what is to be changed: `expandable_segments`, an option as `headroom=0`, or a workload's parameter.

    Raises:
        UsageError: it is none of these.
    """
    name, equals, value = text.strip().partition("=")
    name = name.replace("-", "_")
    if name == EXPANDABLE_SEGMENTS and not equals:
        return Change(text=text, allocator_setting=f"{EXPANDABLE_SEGMENTS}:True")
    if name in _ELSEWHERE:
        raise UsageError(f"--what-if {text}: {_ELSEWHERE[name]}")
    if not equals or not name.isidentifier() or not value.strip():
        raise UsageError(
            f"--what-if {text!r} is no change: write {EXPANDABLE_SEGMENTS}, an option such as headroom=0 "
            f"({', '.join(_OPTIONS)}), or a parameter of the workload such as checkpointing=true"
        )
    if name in _OPTIONS:
        return Change(text=text, options={name: _option_value(name, value)})
    if name in {one.name for one in fields(ProbeOptions)}:
        raise UsageError(f"--what-if {text}: {name} can stay as it is; what can be changed is {', '.join(_OPTIONS)}")
    return Change(text=text, parameter=(name, value))


def check_changes(
    job: str | Sequence[str], changes: Sequence[Change], options: ProbeOptions, *, edits: Sequence[str] = ()
) -> None:
    """Refuse changes that cannot be probed, before anything is started.

    Raises:
        UsageError, PlanError: as the probe itself would.
    """
    from autobatch.child_probe import check_job

    for change in changes:
        try:
            check_job(_changed(job, change), _changed_options(options, change), edits=edits)
        except AutobatchError as error:
            raise type(error)(f"--what-if {change.text}: {error}") from None


def try_alternatives(
    job: str | Sequence[str],
    changes: Sequence[Change],
    options: ProbeOptions,
    *,
    edits: Sequence[str] = (),
    started: Callable[[Change], None] | None = None,
    progress: Callable[[ProbeEvent], None] | None = None,
    show_output: bool = False,
    cache: CacheUse = "off",
) -> tuple[Alternative, ...]:
    """Probe once for each change, one at a time.

    Args:
        job: a workload's name, or a command.
        changes: what is changed, each by itself.
        options: the question; its deadline is for all changes together.
        edits: as for `probe_command`.
        started: called with each change before its probe.
        progress: called with each event as it comes.
        show_output: whether what the job prints goes to standard error.
        cache: what the cache is for.

    Returns:
        What was found with each; one that could not be probed says why.
    """
    ends_at = None if options.deadline is None else time.monotonic() + options.deadline
    found = []
    for change in changes:
        question = options
        if ends_at is not None:
            left = ends_at - time.monotonic()
            if left <= 0:
                found.append(_without_answer(change, f"the deadline of {options.deadline:g} s passed before it began"))
                continue
            question = dataclasses.replace(options, deadline=left)
        if started is not None:
            started(change)
        found.append(_try_one(job, change, question, edits, progress=progress, show_output=show_output, cache=cache))
    return tuple(found)


def _try_one(
    job: str | Sequence[str], change: Change, options: ProbeOptions, edits: Sequence[str], **asked: Any
) -> Alternative:
    from autobatch.child_probe import probe_command, probe_workload

    question = vars(_changed_options(options, change))
    environment = change.environment(os.environ)
    subject = _changed(job, change)
    try:
        if isinstance(subject, str):
            report = probe_workload(subject, environment=environment, **asked, **question)
        else:
            report = probe_command(subject, edits=edits, environment=environment, **asked, **question)
    except NothingFitsError:  # what is remembered says so, without a trial
        return _without_answer(change, "")
    except AutobatchError as error:
        return _without_answer(change, first_line(error) or type(error).__name__)
    return Alternative(
        change=change.text,
        plan=report.plan,
        max_micro_batch_size=report.max_micro_batch_size,
        smallest_failing=report.smallest_failing,
        certified=report.certified,
    )


def _without_answer(change: Change, problem: str) -> Alternative:
    return Alternative(
        change=change.text,
        plan=None,
        max_micro_batch_size=None,
        smallest_failing=None,
        certified=False,
        problem=problem,
    )


def _changed(job: str | Sequence[str], change: Change) -> str | Sequence[str]:
    if isinstance(job, str):
        return change.workload(job)
    if change.parameter is not None:
        raise UsageError("a command has no parameters of its own: change an option, or the command itself")
    return job


def _changed_options(options: ProbeOptions, change: Change) -> ProbeOptions:
    return ProbeOptions(**{**vars(options), **change.options})


def _option_value(name: str, text: str) -> object:
    """An option's value as `ProbeOptions` takes it: whole numbers are read here, sizes and shares there."""
    kind = next(str(one.type) for one in fields(ProbeOptions) if one.name == name)
    if not kind.startswith("int"):
        return text
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--what-if {name}={text}: {text!r} is not a whole number") from None
