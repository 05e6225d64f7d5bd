"""What Prometheus reads: counted here, or read from the database when it asks."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from autobatch import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prometheus_client.core import Metric

    from autobatch.store import MeasurementStore
    from autobatch_server.queue import ProbeQueue

__all__ = ["Metrics"]

_REQUEST_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PROBE_SECONDS = (1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600, 1800, 3600)


class Metrics:
    """The metrics of one process, and of the database that it shares with others."""

    def __init__(self, queue: ProbeQueue, measurements: MeasurementStore) -> None:
        """Take what is read when Prometheus asks."""
        self._queue, self._measurements = queue, measurements
        self._registry = CollectorRegistry()
        self._requests = Histogram(
            "autobatch_http_request_duration_seconds",
            "Time from a request's arrival to the end of its answer.",
            ("method", "route", "status"),
            buckets=_REQUEST_SECONDS,
            registry=self._registry,
        )
        self._verdicts = Counter(
            "autobatch_plan_answers_total", "Answers to plan queries.", ("verdict",), registry=self._registry
        )
        self._probes = Histogram(
            "autobatch_probe_duration_seconds",
            "Time that probes ran in this process.",
            ("state", "basis"),
            buckets=_PROBE_SECONDS,
            registry=self._registry,
        )
        self.streams = Gauge(
            "autobatch_event_streams", "Event streams and waiting polls that are open.", registry=self._registry
        )
        info = Gauge("autobatch_build_info", "The version that runs.", ("version",), registry=self._registry)
        info.labels(version=__version__).set(1)
        self._registry.register(_Stored(queue, measurements))

    def count_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        known = method if method in {"GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH"} else "other"
        self._requests.labels(known, route, str(status)).observe(seconds)

    def count_answer(self, verdict: str) -> None:
        """Count an answer to a plan query."""
        self._verdicts.labels(verdict).inc()

    def count_probe(self, state: str, basis: str, seconds: float) -> None:
        """Count a probe that ended here."""
        self._probes.labels(state, basis).observe(seconds)

    def exposition(self) -> bytes:
        """Everything in Prometheus' text form; raises `StoreUnavailableError`."""
        return generate_latest(self._registry)


class _Stored:
    """What the database knows, the same from whichever process it is asked."""

    def __init__(self, queue: ProbeQueue, measurements: MeasurementStore) -> None:
        self._queue, self._measurements = queue, measurements
        self._lock = threading.Lock()
        self._last: dict[str, int] = {}
        self._forgotten: dict[str, int] = {}

    def describe(self) -> list[Metric]:
        """Nothing is read when the collector is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Read the database."""
        probes = GaugeMetricFamily("autobatch_probes", "Probes by state.", labels=("state",))
        for state, number in self._queue.count().items():
            probes.add_metric((state,), number)
        yield probes
        counted = self._measurements.count()
        kept = GaugeMetricFamily("autobatch_measurements", "Measurements kept.", labels=("basis",))
        for basis in ("measured", "emulated"):
            kept.add_metric((basis,), counted.get(basis, 0))
        yield kept
        yield CounterMetricFamily(
            "autobatch_oom_reports",
            "Out-of-memory errors reported of trainings; every process of a database shows the same number.",
            value=self._never_less("ooms", counted),
        )
        yield CounterMetricFamily(
            "autobatch_oom_after_plan",
            "Out-of-memory errors reported of trainings that took a size from a plan of this service; the same in every process.",
            value=self._never_less("ooms_after_plan", counted),
        )

    def _never_less(self, name: str, counted: Mapping[str, int]) -> int:
        """A count that goes on where records were deleted: Prometheus would take a smaller number for a new beginning."""
        with self._lock:
            lost = max(0, self._last.get(name, 0) - counted[name])
            self._last[name] = counted[name]
            self._forgotten[name] = self._forgotten.get(name, 0) + lost
            return counted[name] + self._forgotten[name]
