"""What the routes stand on, made once for each process."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool

from autobatch.store import MeasurementStore
from autobatch_server.access import Authenticator
from autobatch_server.admissions import Admissions
from autobatch_server.answers import KnownSeries
from autobatch_server.execution import ChildExecutor
from autobatch_server.freshness import Freshness
from autobatch_server.metrics import Metrics
from autobatch_server.problems import ProblemError
from autobatch_server.queue import Limits, ProbeQueue
from autobatch_server.ray_engine import RayEngine
from autobatch_server.runner import Runner, RunnerBoard, find_slots
from autobatch_server.tokens import TokenStore
from autobatch_server.workloads import WorkloadCatalogue

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from autobatch.store import Database
    from autobatch_server.access import Principal
    from autobatch_server.execution import Executor
    from autobatch_server.settings import Settings

__all__ = ["AnswerCache", "SeriesMemory", "Services", "Streams", "open_services"]

_MOST_ANSWER_BYTES = 16 * 1024**2
# What is longer is not remembered: some thousands of answers are, and anyone may pad a query.
_LONGEST_QUERY, _LONGEST_BODY = 1024, 8192
# Of up to fifty reports each, some ten kilobytes a report.
_MOST_SERIES = 256


class AnswerCache:
    """Answers that were given, by the query's own bytes, for as long as nothing changed."""

    def __init__(self) -> None:
        self._number = -1
        self._num_bytes = 0
        self._answers: OrderedDict[bytes, tuple[bytes, str, str]] = OrderedDict()

    def get(self, number: int, query: bytes) -> tuple[bytes, str, str] | None:
        """Body, ETag and verdict of the answer to a query, where it was given under this number."""
        if number != self._number:
            self._answers.clear()
            self._number, self._num_bytes = number, 0
        return self._answers.get(query)

    def put(self, number: int, query: bytes, body: bytes, tag: str, verdict: str) -> None:
        """Keep an answer that was made from what the database held under a number."""
        is_long = len(query) > _LONGEST_QUERY or len(body) > _LONGEST_BODY
        if number != self._number or is_long or query in self._answers:
            return
        self._answers[query] = (body, tag, verdict)
        self._num_bytes += len(query) + len(body)
        while self._num_bytes > _MOST_ANSWER_BYTES:
            oldest, (old_body, _, _) = self._answers.popitem(last=False)
            self._num_bytes -= len(oldest) + len(old_body)


class SeriesMemory:
    """What is known of a job on a card, for as long as nothing of it changed."""

    def __init__(self) -> None:
        self._series: OrderedDict[tuple[str, str], tuple[int, str, KnownSeries]] = OrderedDict()

    def get(self, number: int, workload: str, gpu: str) -> KnownSeries | None:
        """What was read while the database had this number; None where nothing was."""
        found = self._series.get((workload, gpu))
        return found[2] if found is not None and found[0] == number else None

    def renew(self, number: int, workload: str, gpu: str, mark: str) -> KnownSeries | None:
        """What was read under this mark, which holds under this number too; None where something changed since."""
        found = self._series.get((workload, gpu))
        if found is None or found[1] != mark:
            return None
        self._series[workload, gpu] = (number, mark, found[2])
        return found[2]

    def put(self, number: int, workload: str, gpu: str, mark: str, series: KnownSeries) -> None:
        """Keep what was read after number and mark were."""
        self._series[workload, gpu] = (number, mark, series)
        self._series.move_to_end((workload, gpu))
        if len(self._series) > _MOST_SERIES:
            self._series.popitem(last=False)


class Streams:
    """Counts event streams and waiting polls, for each asker."""

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self._limit, self._metrics = limit, metrics
        self._open: dict[str, int] = {}

    @contextlib.contextmanager
    def hold(self, principal: Principal) -> Iterator[None]:
        """Hold a place for one stream; raises `ProblemError` where too many are held."""
        number = self._open.get(principal.name, 0)
        if number >= self._limit:
            detail = f"{number} streams are open, the limit is {self._limit}: close one, or poll without wait"
            raise ProblemError("too-many-streams", detail)
        self._open[principal.name] = number + 1
        self._metrics.streams.inc()
        try:
            yield
        finally:
            self._metrics.streams.dec()
            left = self._open[principal.name] - 1
            if left:
                self._open[principal.name] = left
            else:
                del self._open[principal.name]


@dataclass(frozen=True, kw_only=True)
class Services:
    """The parts of one process's service."""

    settings: Settings
    database: Database
    catalogue: WorkloadCatalogue
    queue: ProbeQueue
    board: RunnerBoard
    measurements: MeasurementStore
    tokens: TokenStore
    freshness: Freshness
    authenticator: Authenticator
    metrics: Metrics
    streams: Streams
    answers: AnswerCache
    series: SeriesMemory
    admissions: Admissions

    @property
    def limits(self) -> Limits:
        """Bounds of the queue."""
        return Limits(queued=self.settings.queue_limit, per_token=self.settings.queue_limit_per_token)

    async def known_series(self, number: int, workload: str, gpu: str) -> KnownSeries:
        """What is known of a job on a card: from memory, where nothing of it changed since it was read.

        Args:
            number: the database's number, read before.
            workload: the job by its one name.
            gpu: the card by its one name.

        Raises:
            StoreUnavailableError: the database is away.
        """
        return (await self.known_on_cards(number, workload, [gpu]))[gpu]

    async def known_on_cards(self, number: int, workload: str, gpus: Sequence[str]) -> dict[str, KnownSeries]:
        """What is known of a job on several cards, in their order; as `known_series`, by one look at what changed."""
        marks: dict[str, str] | None = None
        found = {}
        for gpu in gpus:
            known = self.series.get(number, workload, gpu)
            if known is None:
                if marks is None:
                    marks = await run_in_threadpool(self.measurements.marks, workload)
                known = await self._known_under(number, workload, gpu, marks.get(gpu, ""))
            found[gpu] = known
        return found

    async def _known_under(self, number: int, workload: str, gpu: str, mark: str) -> KnownSeries:
        known = self.series.renew(number, workload, gpu, mark)
        if known is None:
            measurements, ooms = await run_in_threadpool(self.measurements.series, workload, gpu) if mark else ((), ())
            known = KnownSeries(measurements=tuple(measurements), ooms=tuple(ooms))
            self.series.put(number, workload, gpu, mark, known)
        return known

    @contextlib.contextmanager
    def running(self, executor: Executor | None = None) -> Iterator[Runner]:
        """Run probes as long as the context lasts: on a Ray cluster where one is set, else here.

        Args:
            executor: what starts a run here, in place of a child process.

        Raises:
            UnavailableError: the Ray cluster is not there.
        """
        settings = self.settings
        limits: dict[str, Any] = {
            "memory_limit_bytes": settings.child_memory_bytes,
            "environment_names": settings.child_environment,
        }
        with contextlib.ExitStack() as stack:
            runs: Executor
            if settings.ray_address is not None:
                engine = RayEngine(settings.ray_address, emulate=settings.ray_emulate, **limits)
                runs = cluster = stack.enter_context(engine)
                slots = cluster.slots
            else:
                here = find_slots(settings)
                runs, slots = executor or ChildExecutor(**limits), lambda: here
            yield stack.enter_context(
                Runner(self.queue, self.board, self.catalogue, runs, slots, settings, on_end=self.metrics.count_probe)
            )


@contextlib.contextmanager
def open_services(settings: Settings, database: Database) -> Iterator[Services]:
    """Make the services on a database, for as long as the context lasts."""
    queue = ProbeQueue(database, lease_seconds=settings.lease, max_attempts=settings.max_attempts)
    measurements, tokens = MeasurementStore(database), TokenStore(database)
    metrics = Metrics(queue, measurements)
    with contextlib.closing(Freshness(database)) as freshness:
        yield Services(
            settings=settings,
            database=database,
            catalogue=WorkloadCatalogue(settings.workloads),
            queue=queue,
            board=RunnerBoard(database, stale_seconds=2 * settings.lease),
            measurements=measurements,
            tokens=tokens,
            freshness=freshness,
            authenticator=Authenticator(tokens, freshness),
            metrics=metrics,
            streams=Streams(settings.streams_per_token, metrics),
            answers=AnswerCache(),
            series=SeriesMemory(),
            admissions=Admissions(),
        )
