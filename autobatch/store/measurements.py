"""What was measured: reports of probes and of others, and the out-of-memory errors that lower what they promise."""

from __future__ import annotations

import datetime as dt
import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from autobatch.errors import UsageError
from autobatch.evidence import SizeFailure
from autobatch.report import Report
from autobatch.store.database import new_id
from autobatch.store.tables import generation, measurement, oom_report

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from autobatch.store.database import Database

__all__ = ["Measurement", "MeasurementStore", "NewMeasurement", "OomReport", "Origin", "iso_time"]

_LOG = logging.getLogger(__name__)

Source = Literal["probe", "reported"]
# More of one job on one card are of no use to an answer: the newest decide.
_MOST_OF_A_SERIES = 50


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a cache finds a measurement by."""

    job: str
    """Hash of what names the job: its name, parameters, folder, whatever is known before anything is started."""
    series: str
    """Hash of the job with all else that its trials depend on: the card, the versions, the allocator's settings."""
    sources: Mapping[str, str]
    """The files that the job was made of, each with a hash of its content."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A report as it is kept."""

    id: str
    created_at: float
    workload: str
    gpu: str
    source: Source
    probe_id: str | None
    report: Report
    origin: Origin | None = None
    """Where a cache keeps it; None at the service."""


@dataclass(frozen=True, kw_only=True)
class OomReport:
    """An out-of-memory error of a training that was told a size."""

    id: str
    created_at: float
    workload: str
    gpu: str
    failure: SizeFailure
    after_plan: bool
    """Whether the size came from a plan of this service: the promise was broken."""
    measurement_id: str | None


@dataclass(frozen=True, kw_only=True)
class NewMeasurement:
    """A report about to be kept."""

    id: str
    workload: str
    gpu: str
    source: Source
    report: Report
    origin: Origin | None = None

    @classmethod
    def of(
        cls, report: Report, *, workload: str, gpu: str, source: Source, origin: Origin | None = None
    ) -> NewMeasurement:
        """Give a report its id."""
        return cls(id=new_id("mea"), workload=workload, gpu=gpu, source=source, report=report, origin=origin)

    @property
    def summary(self) -> Mapping[str, Any]:
        """What an event says of it."""
        plan = self.report.plan
        return {
            "max_micro_batch_size": self.report.max_micro_batch_size,
            "micro_batch_size": plan.micro_batch_size if plan else None,
            "accumulation_steps": plan.accumulation_steps if plan else None,
            "basis": self.report.basis,
        }

    def insert(self, connection: Connection, database: Database, *, probe_id: str | None, token_id: str | None) -> None:
        """Write it within a transaction."""
        origin = self.origin
        connection.execute(
            insert(measurement).values(
                id=self.id,
                created_at=database.now(),
                workload=self.workload,
                gpu=self.gpu,
                basis=self.report.basis,
                fingerprint=self.report.fingerprint,
                source=self.source,
                probe_id=probe_id,
                token_id=token_id,
                report_json=self.report.to_json(),
                job=None if origin is None else origin.job,
                series=None if origin is None else origin.series,
                sources_json=None if origin is None else json.dumps(dict(origin.sources)),
            )
        )
        database.raise_generation(connection)


class MeasurementStore:
    """The measurements of one database."""

    def __init__(self, database: Database) -> None:
        """Take the database."""
        self._database = database

    def add(self, new: NewMeasurement, *, token_id: str | None) -> Measurement:
        """Keep a report that was sent here."""
        with self._database.write() as connection:
            new.insert(connection, self._database, probe_id=None, token_id=token_id)
            row = connection.execute(select(measurement).where(measurement.c.id == new.id)).one()
        return _measurement(row)

    def add_oom(
        self,
        failure: SizeFailure,
        *,
        workload: str,
        gpu: str,
        measurement_id: str | None,
        after_plan: bool,
        token_id: str | None,
    ) -> OomReport:
        """Keep an out-of-memory error."""
        oom_id = new_id("oom")
        with self._database.write() as connection:
            connection.execute(
                insert(oom_report).values(
                    id=oom_id,
                    created_at=self._database.now(),
                    workload=workload,
                    gpu=gpu,
                    micro_batch_size=failure.micro_batch_size,
                    micro_batches_per_step=failure.micro_batches_per_step,
                    after_plan=after_plan,
                    measurement_id=measurement_id,
                    token_id=token_id,
                )
            )
            self._database.raise_generation(connection)
            row = connection.execute(select(oom_report).where(oom_report.c.id == oom_id)).one()
        return _oom(row)

    def get(self, measurement_id: str) -> Measurement | None:
        """One measurement; None where there is none of that id."""
        with self._database.read() as connection:
            row = connection.execute(select(measurement).where(measurement.c.id == measurement_id)).one_or_none()
        return None if row is None else _measurement(row)

    def list_newest(
        self, *, workload: str | None = None, gpu: str | None = None, before: str | None = None, limit: int = 50
    ) -> list[Measurement]:
        """Measurements, the newest first, older than the id `before`; `workload` also names all parameters of a job."""
        query = select(measurement).order_by(measurement.c.id.desc()).limit(limit)
        if workload is not None:
            same_job = measurement.c.workload.startswith(f"{workload}?", autoescape=True)
            query = query.where((measurement.c.workload == workload) | same_job)
        if gpu is not None:
            query = query.where(measurement.c.gpu == gpu)
        if before is not None:
            query = query.where(measurement.c.id < before)
        with self._database.read() as connection:
            return _readable(connection.execute(query).all())

    def series(self, workload: str, gpu: str) -> tuple[Sequence[Measurement], Sequence[OomReport]]:
        """What is known of one job on one card, the newest first."""
        found = select(measurement).where(measurement.c.workload == workload, measurement.c.gpu == gpu)
        failed = select(oom_report).where(oom_report.c.workload == workload, oom_report.c.gpu == gpu)
        with self._database.read() as connection:
            rows = connection.execute(found.order_by(measurement.c.id.desc()).limit(_MOST_OF_A_SERIES)).all()
            ooms = connection.execute(failed).all()
        return [_measurement(row) for row in rows], [_oom(row) for row in ooms]

    def marks(self, workload: str) -> dict[str, str]:
        """What tells, for each card, whether what is known of a job on it changed: numbers and newest ids, read from the index.

        Ids grow with time, so that nothing that comes or goes leaves all of it as it was.
        """
        found: dict[str, list[str]] = {}
        with self._database.read() as connection:
            for table in (measurement, oom_report):
                rows = connection.execute(
                    select(table.c.gpu, func.count(), func.max(table.c.id))
                    .where(table.c.workload == workload)
                    .group_by(table.c.gpu)
                ).all()
                for gpu, number, newest in rows:
                    found.setdefault(gpu, []).append(f"{table.name} {number} {newest}")
        return {gpu: ", ".join(parts) for gpu, parts in found.items()}

    def of_job(self, job: str) -> tuple[Sequence[Measurement], Sequence[OomReport]]:
        """What a cache knows of one job on any card, the newest first, and the errors that its measurements led to."""
        found = select(measurement).where(measurement.c.job == job).order_by(measurement.c.id.desc())
        with self._database.read() as connection:
            rows = connection.execute(found.limit(_MOST_OF_A_SERIES)).all()
            ids = [row.id for row in rows]
            ooms = connection.execute(select(oom_report).where(oom_report.c.measurement_id.in_(ids))).all()
        return _readable(rows), [_oom(row) for row in ooms]

    def of_fingerprint(self, fingerprint: str) -> list[Measurement]:
        """Measurements whose report has a fingerprint, the newest first."""
        found = select(measurement).where(measurement.c.fingerprint == fingerprint).order_by(measurement.c.id.desc())
        with self._database.read() as connection:
            return _readable(connection.execute(found.limit(_MOST_OF_A_SERIES)).all())

    def restamp(self, ids: Collection[str], sources: Mapping[str, str]) -> None:
        """Say of measurements in a cache that they hold for other files."""
        with self._database.write() as connection:
            changed = update(measurement).where(measurement.c.id.in_(ids))
            connection.execute(changed.values(sources_json=json.dumps(dict(sources))))

    def delete(self, record_id: str) -> bool:
        """Forget a measurement or a reported error; False where there is none of that id."""
        with self._database.write() as connection:
            gone = connection.execute(delete(measurement).where(measurement.c.id == record_id)).rowcount
            gone += connection.execute(delete(oom_report).where(oom_report.c.id == record_id)).rowcount
            if gone:
                self._database.raise_generation(connection)
        return bool(gone)

    def forget(self, ids: Collection[str]) -> int:
        """Forget measurements with the errors that they led to; the number of measurements that were there."""
        with self._database.write() as connection:
            gone = connection.execute(delete(measurement).where(measurement.c.id.in_(ids))).rowcount
            connection.execute(delete(oom_report).where(oom_report.c.measurement_id.in_(ids)))
            if gone:
                self._database.raise_generation(connection)
        return gone

    def keep_newest(self, number: int) -> int:
        """Forget all measurements but the newest; the number that went."""
        newest = select(measurement.c.id).order_by(measurement.c.id.desc()).offset(number).limit(1)
        with self._database.read() as connection:
            first_gone = connection.execute(newest).scalar_one_or_none()
            if first_gone is None:
                return 0
            old = connection.execute(select(measurement.c.id).where(measurement.c.id <= first_gone)).scalars().all()
        return self.forget(old)

    def count(self) -> dict[str, int]:
        """How many measurements there are by basis, and how many reported errors, and those that broke a plan."""
        with self._database.read() as connection:
            by_basis = connection.execute(select(measurement.c.basis, func.count()).group_by(measurement.c.basis)).all()
            reported = connection.execute(
                select(oom_report.c.after_plan, func.count()).group_by(oom_report.c.after_plan)
            ).all()
        counted = {str(basis): int(number) for basis, number in by_basis}
        ooms = {bool(after): int(number) for after, number in reported}
        return {**counted, "ooms": sum(ooms.values()), "ooms_after_plan": ooms.get(True, 0)}

    def generation(self) -> int:
        """The number that is raised whenever an answer may have changed."""
        with self._database.read() as connection:
            return int(connection.execute(select(generation.c.number)).scalar_one())


def iso_time(seconds: float | None) -> str | None:
    """A time as ISO 8601 in UTC, to the millisecond."""
    if seconds is None:
        return None
    moment = dt.datetime.fromtimestamp(seconds, tz=dt.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _readable(rows: Sequence[Row[Any]]) -> list[Measurement]:
    """Those that this version can read: one that is broken, or of another version, is no reason to do without the others."""
    found = []
    for row in rows:
        try:
            found.append(_measurement(row))
        except (UsageError, ValueError) as error:
            _LOG.warning("measurement %s cannot be read: %s", row.id, error)
    return found


def _measurement(row: Row[Any]) -> Measurement:
    return Measurement(
        id=row.id,
        created_at=row.created_at,
        workload=row.workload,
        gpu=row.gpu,
        source=row.source,
        probe_id=row.probe_id,
        report=Report.from_dict(json.loads(row.report_json)),
        origin=None
        if row.job is None
        else Origin(job=row.job, series=row.series, sources=json.loads(row.sources_json)),
    )


def _oom(row: Row[Any]) -> OomReport:
    return OomReport(
        id=row.id,
        created_at=row.created_at,
        workload=row.workload,
        gpu=row.gpu,
        failure=SizeFailure(micro_batch_size=row.micro_batch_size, micro_batches_per_step=row.micro_batches_per_step),
        after_plan=row.after_plan,
        measurement_id=row.measurement_id,
    )
