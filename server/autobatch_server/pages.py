"""What the pages for people show, put into words and rows; the templates only lay it out."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from autobatch import Outcome, Plan, Report, Trial, UnavailableError, report_svg
from autobatch_server.queue import ENDED, EventRecord, ProbeRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

    from autobatch.store import Measurement
    from autobatch_server.services import Services

__all__ = [
    "BudgetLine",
    "Curve",
    "EventRow",
    "MeasurementRow",
    "PageMemory",
    "ProbeRow",
    "Progress",
    "budget_lines",
    "certificate",
    "event_rows",
    "outcome_words",
    "plan_words",
    "probe_row",
    "progress_of",
    "window_words",
]

_OUTCOMES = {
    Outcome.FITS: "fits",
    Outcome.OVER_BUDGET: "over budget",
    Outcome.THRASHES: "thrashes",
    Outcome.OUT_OF_MEMORY: "out of memory",
}
_FAILED = {
    Outcome.FITS: "failed",
    Outcome.OVER_BUDGET: "ran over the budget",
    Outcome.THRASHES: "thrashed",
    Outcome.OUT_OF_MEMORY: "ran out of memory",
}
_PER_STEP = {1: "with one micro-batch per optimizer step", 2: "with two micro-batches per optimizer step"}
_MOST_RUNS = 4
_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a running probe has come."""

    doing: str = "starting"
    largest_fitting: int | None = None
    smallest_failing: int | None = None
    num_trials: int = 0


@dataclass(frozen=True, kw_only=True)
class ProbeRow:
    """A probe with what is to be said of it."""

    record: ProbeRecord
    progress: Progress | None
    """Of a running one."""
    outcome: str
    """Of an ended one: its plan in short, or what became of it."""

    @property
    def is_open(self) -> bool:
        """Whether it waits or runs."""
        return self.record.state not in ENDED

    @property
    def state_words(self) -> str:
        """The state as a person reads it."""
        return "cancelling" if self.is_open and self.record.cancel_requested else self.record.state

    @property
    def said(self) -> str:
        """One sentence for who hears the page."""
        doing = self.progress.doing if self.progress else self.outcome
        words = self.state_words if self.state_words == doing or not doing else f"{self.state_words}, {doing}"
        return f"{self.record.order.workload} on {self.record.order.gpu}: {words}"


@dataclass(frozen=True, kw_only=True)
class EventRow:
    """One thing that happened to a probe."""

    number: int
    at: float
    what: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class MeasurementRow:
    """A measurement in one line."""

    id: str
    created_at: float
    workload: str
    gpu: str
    basis: str
    source: str
    largest: int | None
    smallest_failing: int | None
    target: int
    plan: str


@dataclass(frozen=True, kw_only=True)
class BudgetLine:
    """One line of the sum that leads from the card to the budget."""

    name: str
    mebibytes: int
    """Below 0 where it is taken away."""
    note: str
    is_sum: bool = False


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The memory curve as SVG elements; both empty where it cannot be drawn here."""

    light: str
    dark: str


def plan_words(plan: Plan) -> str:
    """Write a plan in short: size × steps, `32 × 8`, joined by `+` where sizes are mixed."""
    ranks = f" on {plan.world_size:,} ranks" if plan.world_size > 1 else ""
    if plan.rank_micro_batch_sizes is not None:
        return f"{' and '.join(f'{size:,}' for size in plan.sizes)}, {plan.accumulation_steps:,} steps{ranks}"
    runs = [f"{size:,} × {len(list(group)):,}" for size, group in itertools.groupby(plan.micro_batch_sizes)]
    shown = runs if len(runs) <= _MOST_RUNS else [*runs[: _MOST_RUNS - 1], "…"]
    return " + ".join(shown) + ranks


def window_words(window: Sequence[int]) -> str:
    """Write the micro-batches of one trial's step: the size, and that it accumulates."""
    if len(set(window)) > 1:
        return " then ".join(f"{size:,}" for size in window)
    return f"{window[0]:,}" + (f", {len(window)} per step" if len(window) > 1 else "")


def _sizes_words(window: Sequence[int]) -> str:
    return " then ".join(f"{size:,}" for size in dict.fromkeys(window))


def outcome_words(trial: Trial) -> str:
    """Say what came of a trial."""
    return _OUTCOMES[trial.outcome] + (" (confirmation)" if trial.confirmation else "")


def certificate(report: Report) -> str:
    """Say in words what the trials of a report show."""
    per_step, largest, failing = _PER_STEP[report.micro_batches_per_step], report.max_micro_batch_size, ""
    failed = [t for t in report.trials if not t.fits and t.micro_batch_size == report.smallest_failing]
    if report.smallest_failing is not None:
        failing = f"{report.smallest_failing:,} {_FAILED[failed[-1].outcome] if failed else 'failed'}"
    if largest is None:
        text = f"Nothing fits: even {failing or 'the smallest size failed'}, {per_step}."
    elif report.ceiling_reached:
        text = f"{largest:,} ran and fitted, {per_step}. It is the largest size asked for; nothing larger was tried."
    else:
        text = f"{largest:,} ran and fitted, {failing or 'nothing larger failed'}, {per_step}."
    if report.data_dependent:
        text += " Not certified: shapes are read from the device."
    elif not report.certified:
        text += " Not certified."
    return text if report.monotone else f"{text} A size fitted above one that did not."


def budget_lines(report: Report) -> tuple[BudgetLine, ...]:
    """Break the card's memory down to the budget, in lines that add up as they are written, in whole MiB."""
    memory, limit_bytes = report.memory, report.options.memory_limit
    total, headroom, budget, tenants = (
        round(size / 2**20)
        for size in (
            report.device.total_bytes,
            memory.headroom_bytes,
            memory.budget_bytes,
            memory.other_tenants_bytes or 0,
        )
    )
    if limit_bytes == memory.budget_bytes + memory.headroom_bytes:
        parts = [BudgetLine(name="beyond the memory limit", mebibytes=budget + headroom - total, note="")]
    else:
        rest = total - tenants - headroom - budget
        unknown = "unknown, counted as nothing" if memory.other_tenants_bytes is None else ""
        parts = [
            BudgetLine(name="kept by the driver", mebibytes=-rest, note="in NVML's total, but for no program"),
            BudgetLine(name="other tenants", mebibytes=-tenants, note=unknown),
        ]
    return (
        BudgetLine(name="card", mebibytes=total, note="as NVML reports it"),
        *parts,
        BudgetLine(name="headroom", mebibytes=-headroom, note="left free on purpose"),
        BudgetLine(name="budget", mebibytes=budget, note="what a trial may use", is_sum=True),
    )


def progress_of(events: Iterable[EventRecord]) -> Progress:
    """Tell from its events how far a running probe has come; an attempt begins anew."""
    progress = Progress()
    for event in events:
        data = event.data
        if event.kind in {"started", "requeued"}:
            progress = Progress()
        elif event.kind == "trial_started":
            doing = "confirming" if data.get("confirmation") else "trying"
            progress = _moved(progress, data, doing=f"{doing} {_sizes_words(data['window'])}")
        elif event.kind == "trial_ended":
            words = f"{_sizes_words(_window(data['trial']))} {_OUTCOMES[Outcome(data['trial']['outcome'])]}"
            progress = _moved(progress, data, doing=words, num_trials=progress.num_trials + 1)
    return progress


def _moved(progress: Progress, data: Any, *, doing: str, num_trials: int | None = None) -> Progress:
    return Progress(
        doing=doing,
        largest_fitting=data.get("largest_fitting", progress.largest_fitting),
        smallest_failing=data.get("smallest_failing", progress.smallest_failing),
        num_trials=progress.num_trials if num_trials is None else num_trials,
    )


def _window(trial: Any) -> Sequence[int]:
    window: Sequence[int] = trial.get("window") or [trial["micro_batch_size"]]
    return window


def event_rows(events: Iterable[EventRecord]) -> list[EventRow]:
    """Put the events of a probe into words."""
    return [
        EventRow(number=event.number, at=event.at, what=what, detail=detail)
        for event in events
        for what, detail in [_event_words(event)]
    ]


def _event_words(event: EventRecord) -> tuple[str, str]:
    """What happened, and to what."""
    data = event.data
    if event.kind in {"trial_started", "trial_ended"}:
        return _trial_words(event.kind, data)
    details = {
        "started": lambda: f"attempt {data.get('attempt', 1)} on {data.get('slot', 'a runner')}",
        "requeued": lambda: str(data.get("reason", "")),
        "device": lambda: str(data.get("device", {}).get("name", "")),
        "succeeded": lambda: _found_words(data),
        "failed": lambda: str(data.get("detail", "")),
    }
    names = {"requeued": "put back into the queue", "device": "card found"}
    return names.get(event.kind, event.kind.replace("_", " ")), details.get(event.kind, str)()


def _trial_words(kind: str, data: Mapping[str, Any]) -> tuple[str, str]:
    if kind == "trial_started":
        return ("confirming" if data.get("confirmation") else "trying"), window_words(data["window"])
    seconds = data.get("seconds")
    took = "" if seconds is None else f", after {seconds:.1f} s"
    return _OUTCOMES[Outcome(data["trial"]["outcome"])], window_words(_window(data["trial"])) + took


def _found_words(data: Mapping[str, Any]) -> str:
    size, steps = data.get("micro_batch_size"), data.get("accumulation_steps")
    return "does not fit" if size is None or steps is None else f"{size:,} × {steps:,}"


class _Kept(Generic[_Value]):
    """The newest values by their keys, up to a number of them; safe between threads."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[Hashable, _Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], _Value]) -> _Value:
        """The value of a key, made now where it is not there; two that ask at once may both make it."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            self._values[key] = value
            if len(self._values) > self._most:
                self._values.popitem(last=False)
        return value


class PageMemory:
    """What pages were made from, kept as long as it holds: reports are read and curves drawn once."""

    def __init__(self) -> None:
        """Begin with nothing kept."""
        self._outcomes: _Kept[str] = _Kept(1000)
        self._lists: _Kept[tuple[MeasurementRow, ...]] = _Kept(20)
        self._curves: _Kept[Curve] = _Kept(50)

    def outcome(self, services: Services, record: ProbeRecord) -> str:
        """What became of an ended probe: its plan in short where it has one; empty for an open one."""
        if record.state == "failed":
            return (record.problem or {}).get("detail", "")
        if record.measurement_id is None:
            return "" if record.state not in ENDED else record.state
        measurement_id = record.measurement_id

        def find() -> str:
            measurement = services.measurements.get(measurement_id)
            return _outcome_of(measurement.report) if measurement else "the measurement was deleted"

        return self._outcomes.get(measurement_id, find)

    def measurement_rows(
        self, services: Services, *, generation: int, before: str | None, limit: int
    ) -> tuple[MeasurementRow, ...]:
        """A page of measurements, as they were under a generation of the database."""

        def find() -> tuple[MeasurementRow, ...]:
            return tuple(map(_measurement_row, services.measurements.list_newest(before=before, limit=limit)))

        return self._lists.get((generation, before, limit), find)

    def curve(self, measurement: Measurement) -> Curve:
        """The memory curve of a measurement in both themes."""
        return self._curves.get(measurement.id, lambda: _draw(measurement.report))


def _outcome_of(report: Report) -> str:
    if report.max_micro_batch_size is None:
        return "does not fit"
    return plan_words(report.plan) if report.plan else f"{report.max_micro_batch_size:,} fits"


def _measurement_row(measurement: Measurement) -> MeasurementRow:
    report = measurement.report
    return MeasurementRow(
        id=measurement.id,
        created_at=measurement.created_at,
        workload=measurement.workload,
        gpu=measurement.gpu,
        basis=report.basis,
        source=measurement.source,
        largest=report.max_micro_batch_size,
        smallest_failing=report.smallest_failing,
        target=report.options.target,
        plan=_outcome_of(report),
    )


def _draw(report: Report) -> Curve:
    try:
        return Curve(light=report_svg(report, theme="light"), dark=report_svg(report, theme="dark"))
    except UnavailableError:  # matplotlib is not installed: the page says so, and has the trials as a table
        return Curve(light="", dark="")


def probe_row(services: Services, memory: PageMemory, record: ProbeRecord) -> ProbeRow:
    """Say of a probe what is to be said of it now."""
    running = record.state == "running"
    progress = progress_of(services.queue.events_after(record.id, 0)) if running else None
    return ProbeRow(record=record, progress=progress, outcome=memory.outcome(services, record))
