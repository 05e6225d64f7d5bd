"""What the stored measurements say to a question; nothing here touches a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from autobatch import Evidence, Plan, ProbeOptions, StoredAnswer, Trial
from autobatch_server.questions import LONGEST_PLAN

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from autobatch import Bound, Verdict
    from autobatch.store import Measurement, OomReport

__all__ = ["Answer", "KnownSeries", "SeriesSource", "answer_question"]


class SeriesSource(Protocol):
    """Where stored measurements are looked up."""

    def series(self, workload: str, gpu: str) -> tuple[Sequence[Measurement], Sequence[OomReport]]:
        """What is known of one job on one card, the newest first."""


@dataclass(frozen=True, kw_only=True)
class KnownSeries:
    """What was read of one job on one card: a source that reads nothing more."""

    measurements: tuple[Measurement, ...]
    ooms: tuple[OomReport, ...]

    def series(self, workload: str, gpu: str) -> tuple[Sequence[Measurement], Sequence[OomReport]]:
        """What was read, whichever job and card it was read of."""
        del workload, gpu
        return self.measurements, self.ooms


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is known of one job on one card for one target."""

    verdict: Verdict
    reason: str
    plan: Plan | None = None
    measurement: Measurement | None = None
    """The newest of the series that decided; None where nothing was ever measured."""
    bound: Bound | None = None
    missing_bytes: int | None = None
    """By how many bytes at least the smallest size is too large, for `does_not_fit`; None where no trial says."""
    trials: tuple[Trial, ...] = ()
    """Those that were asked."""
    num_oom_reports: int = 0
    """Out-of-memory errors that were reported for the job on the card, each of which lowers the bounds."""

    @property
    def footprint_bytes(self) -> int | None:
        """The largest footprint that a trial of the plan's sizes showed, or of the smallest size above them that fitted."""
        plan = self.plan
        if plan is None:
            return None
        micro_batches = min(2, plan.accumulation_steps)
        above = [
            trial
            for trial in self.trials
            if trial.fits
            and trial.micro_batch_size >= plan.micro_batch_size
            and trial.micro_batches_per_step >= micro_batches
        ]
        nearest = min((trial.micro_batch_size for trial in above), default=None)
        return max((trial.footprint_bytes for trial in above if trial.micro_batch_size == nearest), default=None)

    @property
    def seconds_per_batch(self) -> float | None:
        """Seconds for one effective batch, where a real card ran the plan's own size alone.

        What ends a step (the optimizer) comes once for each batch, whatever the number of its micro-batches.
        """
        if self.plan is None:
            return None
        for trial in self.trials:
            if trial.fits and set(trial.window) == {self.plan.micro_batch_size} and trial.seconds_per_step is not None:
                end = trial.seconds_per_step_end or 0.0
                return (trial.seconds_per_step - end) / len(trial.window) * self.plan.accumulation_steps + end
        return None


def answer_question(
    store: SeriesSource, *, workload: str, gpu: str, options: ProbeOptions, basis: str | None = None
) -> Answer:
    """Answer from what is stored.

    Of the series (same job, card, versions and limits) the newest measured one is asked first, then older ones, then the
    emulated ones; the first that reaches decides.

    Args:
        store: where measurements are.
        workload: the job, as `str(Workload)` has it.
        gpu: the card's one name.
        options: target, world size and split.
        basis: `measured` or `emulated`, to be answered from nothing else.

    Raises:
        PlanError: the target cannot be hit under the split, whatever fits.
        StoreUnavailableError: the database is away.
    """
    options.make_plan(options.ceiling, most_listed=LONGEST_PLAN)
    measurements, ooms = store.series(workload, gpu)
    unknown: Answer | None = None
    for series in _series_in_order(measurements, basis):
        answer = _answer_from(series, ooms, options)
        if answer.verdict != "unknown":
            return answer
        unknown = unknown or answer
    return unknown or _answer_without(measurements, ooms, options)


def _answer_without(measurements: Sequence[Measurement], ooms: Sequence[OomReport], options: ProbeOptions) -> Answer:
    """Answer where no measurement may: a training that ran out of memory at the smallest size says something still."""
    found = Evidence((), budget_bytes=0, failures=[oom.failure for oom in ooms]).answer(
        options, most_listed=LONGEST_PLAN
    )
    if found.verdict == "does_not_fit":
        reason = found.reason + _described_ooms(ooms)
        return Answer(verdict=found.verdict, reason=reason, bound=found.bound, num_oom_reports=len(ooms))
    reason = "nothing has been measured for this job on this card"
    if measurements:
        reason += " that answers this: emulated shapes that depend on data under-measure, and a basis may be asked for"
    return Answer(verdict="unknown", reason=reason, num_oom_reports=len(ooms))


def _described_ooms(ooms: Sequence[OomReport]) -> str:
    if not ooms:
        return ""
    least = min(oom.failure.micro_batch_size for oom in ooms)
    return f"; {len(ooms)} out-of-memory error{'s' if len(ooms) > 1 else ''} reported in training, the least at {least}"


def _series_in_order(measurements: Sequence[Measurement], basis: str | None) -> Iterator[Sequence[Measurement]]:
    """Measurements by fingerprint, in the order in which they are asked; each series the newest first."""
    series: dict[str, list[Measurement]] = {}
    for measurement in measurements:
        if basis in {None, measurement.report.basis} and not measurement.report.data_dependent:
            series.setdefault(measurement.report.fingerprint, []).append(measurement)
    return iter(sorted(series.values(), key=lambda group: group[0].report.basis != "measured"))


def _answer_from(series: Sequence[Measurement], ooms: Sequence[OomReport], options: ProbeOptions) -> Answer:
    newest = series[0]
    budget_bytes = newest.report.memory.budget_bytes
    trials = tuple(_trials_under(series, budget_bytes))
    evidence = Evidence(trials, budget_bytes=budget_bytes, failures=[oom.failure for oom in ooms])
    found: StoredAnswer = evidence.answer(options, most_listed=LONGEST_PLAN)
    reason = found.reason
    if newest.report.memory.other_tenants_bytes:
        reason += f"; others held {newest.report.memory.other_tenants_bytes} bytes of the card when it was measured"
    reason += _described_ooms(ooms)
    return Answer(
        verdict=found.verdict,
        reason=reason,
        plan=found.plan,
        measurement=newest,
        bound=found.bound,
        missing_bytes=found.missing_bytes,
        trials=trials,
        num_oom_reports=len(ooms),
    )


def _trials_under(series: Sequence[Measurement], budget_bytes: int) -> Iterator[Trial]:
    """Trials that say something under a budget: others' memory may have left another one to each probe."""
    for measurement in series:
        own_budget_bytes = measurement.report.memory.budget_bytes
        for trial in measurement.report.trials:
            if trial.fits and (own_budget_bytes <= budget_bytes or trial.footprint_bytes <= budget_bytes):
                yield trial
            if not trial.fits and own_budget_bytes >= budget_bytes:
                yield trial
