"""What the cache has to do with one probe: it is asked before, and told after. What goes wrong with it is noted, not raised."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, TypeVar

from autobatch.cache.outlook import look_at_device
from autobatch.errors import AutobatchError
from autobatch.facts import AnswerRemarks, DeviceFacts
from autobatch.probing import Noted, conduct_probe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from autobatch.cache.identity import JobIdentity
    from autobatch.cache.remembered import MeasurementCache, Unseen
    from autobatch.cache.uses import CacheUse
    from autobatch.known import KnownTrials
    from autobatch.options import ProbeOptions
    from autobatch.probing import ProbeEvent
    from autobatch.report import Report
    from autobatch.trial import Trial

__all__ = ["Consultation", "remember_out_of_memory"]


_Answer = TypeVar("_Answer")


class Consultation:
    """The cache, for one probe of one job."""

    def __init__(
        self,
        job: JobIdentity,
        options: ProbeOptions,
        use: CacheUse,
        progress: Callable[[ProbeEvent], None] | None,
    ) -> None:
        """Prepare to ask.

        Args:
            job: what is probed.
            options: what the probe is asked.
            use: what the cache is for.
            progress: told what is found, and what goes wrong with the cache.
        """
        self._job, self._options, self._use = job, options, use
        self._progress = progress or (lambda _: None)
        self._usable = use != "off"
        self._known: KnownTrials | None = None

    # ---- before -----------------------------------------------------------------------------------------------------

    def trusted_report(self, environment: Mapping[str, str]) -> Report | None:
        """The answer without any trial, where the cache is to be trusted and knows all of it."""
        if self._use != "trust":
            return None
        unseen = self._ask(lambda cache: self._recall_unseen(cache, environment))
        if unseen is None:
            return None
        events: list[ProbeEvent] = []
        try:
            report = conduct_probe(
                _Recalled(unseen),
                self._options,
                workload=self._job.name,
                known=unseen.known,
                confirm=False,
                progress=events.append,
            )
        except _NotRecalledError:
            return None
        for event in events:
            self._progress(event)
        return report

    def first_size(self, environment: Mapping[str, str]) -> int | None:
        """The size to begin with, where something is remembered of the job on such a card."""
        return self._ask(
            lambda cache: cache.guess(self._job, self._options, look_at_device(self._options, environment))
        )

    def recall(self, facts: DeviceFacts) -> KnownTrials | None:
        """What is remembered that holds on a device."""
        self._known = self._ask(lambda cache: cache.recall(self._job, self._options, facts))
        return self._known

    @property
    def confirms(self) -> bool:
        """Whether a trial has to show that what was recalled still holds."""
        known = self._known
        return self._use != "trust" or known is None or not (known.unchanged and known.certified)

    # ---- after ------------------------------------------------------------------------------------------------------

    def keep(self, report: Report, facts: DeviceFacts, files: Callable[[], Iterable[str]]) -> None:
        """Keep what was measured, unless it says nothing new."""
        self._ask(lambda cache: self._keep(cache, report, facts, list(files())))

    def _keep(self, cache: MeasurementCache, report: Report, facts: DeviceFacts, files: list[str]) -> None:
        cached, known = report.cached, self._known
        if cached is not None and cached.confirmed and known is not None and not known.unchanged:
            cache.confirm(self._job, known, files)
        if cached is not None and len(report.trials) <= cached.num_trials + cached.confirmed:
            return
        # Trials that were recalled and are not in the report: the one that ran again showed that they do not hold.
        contradicted = known is not None and bool(known.trials) and cached is None
        notes = known.notes if known is not None else ()
        cache.keep(
            self._job,
            dataclasses.replace(report, warnings=tuple(one for one in report.warnings if one not in notes)),
            facts,
            files,
            replaces=known.measurements if known is not None and contradicted else (),
        )

    def _recall_unseen(self, cache: MeasurementCache, environment: Mapping[str, str]) -> Unseen | None:
        outlook = look_at_device(self._options, environment)
        return None if outlook is None else cache.recall_unseen(self._job, self._options, outlook)

    def _ask(self, action: Callable[[MeasurementCache], _Answer]) -> _Answer | None:
        """Do something with the cache; None where it cannot be used: nothing of it fails the probe."""
        if not self._usable:
            return None
        from autobatch.cache.remembered import opened_cache

        try:
            with opened_cache() as cache:
                return action(cache)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with what is kept, a probe needs none of it
            self._usable = False
            words = str(error).splitlines()[:1] if isinstance(error, AutobatchError) else [repr(error)]
            self._progress(Noted(text=f"the cache is not used: {''.join(words)}"))
            return None


def remember_out_of_memory(report: Report) -> bool:
    """Remember that a training by a report's plan ran out of memory, so that the next plan takes less.

    Args:
        report: what a probe gave for that training.

    Returns:
        True where the cache knows the report, and the size of its plan counts as too large from now on.

    Raises:
        UnavailableError: the cache cannot be opened or written.
    """
    from autobatch.cache.remembered import opened_cache

    with opened_cache() as cache:
        return cache.lower(report)


class _NotRecalledError(Exception):
    """A trial is needed that is not remembered."""


class _Recalled:
    """A source of trials that has none: every trial is remembered or missing."""

    def __init__(self, unseen: Unseen) -> None:
        self._unseen = unseen

    @property
    def facts(self) -> DeviceFacts:
        return self._unseen.facts

    def run_trial(self, window: Sequence[int], *, confirmation: bool) -> Trial:
        raise _NotRecalledError((tuple(window), confirmation))

    def remarks(self) -> AnswerRemarks:
        """What was said of the earlier answer, but for what its own plan brought."""
        report = self._unseen.report
        of_plan = report.plan.warnings if report.plan else ()
        return AnswerRemarks(
            not_modelled=report.not_modelled,
            expected_error=report.expected_error,
            warnings=tuple(warning for warning in report.warnings if warning not in of_plan),
        )
