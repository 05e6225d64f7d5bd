"""The user's own measurements on disk: found for a question, kept after a probe, lowered by a training that ran out of memory."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self
from urllib.parse import quote

import platformdirs
from sqlalchemy.exc import SQLAlchemyError

from autobatch.cache.sources import CurrentFiles, hash_files
from autobatch.errors import UnavailableError, UsageError
from autobatch.evidence import SizeFailure
from autobatch.facts import DeviceFacts
from autobatch.known import KnownTrials, bears_on, still_holding, trial_to_repeat
from autobatch.store import (
    STORE_SCHEMA,
    Database,
    Measurement,
    MeasurementStore,
    NewMeasurement,
    OomReport,
    Origin,
    StoreUnavailableError,
    open_sqlite,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import TracebackType

    from autobatch.cache.identity import JobIdentity
    from autobatch.cache.outlook import Outlook
    from autobatch.options import ProbeOptions
    from autobatch.report import Report
    from autobatch.trial import Trial

__all__ = ["MeasurementCache", "Unseen", "cache_path", "clear_all", "opened_cache"]

# About 5 kB each.
_MOST_MEASUREMENTS = 2000
# Other processes' contexts grow by a few MiB as their kernels load; that is no new tenant.
_TENANT_SLACK_BYTES = 64 << 20


def cache_path() -> Path:
    """The file that holds the cache: in the user's cache folder, or where `AUTOBATCH_CACHE` says."""
    named = os.environ.get("AUTOBATCH_CACHE")
    return Path(os.path.expanduser(named)).absolute() if named else _usual_path()  # noqa: PTH111 - Path's raises


def _usual_path() -> Path:
    return Path(platformdirs.user_cache_path("autobatch")) / "measurements.sqlite3"


@dataclass(frozen=True, kw_only=True)
class Unseen:
    """What answers a question without anything being started."""

    known: KnownTrials
    facts: DeviceFacts
    """The device as trials would find it."""
    report: Report
    """The newest of those behind it."""


@contextlib.contextmanager
def opened_cache() -> Iterator[MeasurementCache]:
    """The cache, for as long as the context lasts.

    Raises:
        UnavailableError: it cannot be made, read or written, from whatever reason.
    """
    try:
        with MeasurementCache.open() as cache:
            yield cache
    except (StoreUnavailableError, SQLAlchemyError) as error:
        raise UnavailableError(f"the cache {cache_path()} is locked, full or broken") from error


def clear_all() -> Path:
    """Forget everything, also what a newer version made; the path of the cache.

    Raises:
        UsageError: the file cannot be removed, or `AUTOBATCH_CACHE` names something else.
    """
    path = cache_path()
    if path != _usual_path() and not _is_ours(path):
        raise UsageError(f"{path} is no cache of autobatch, and AUTOBATCH_CACHE names it: it is left as it is")
    for name in (path, Path(f"{path}-journal"), Path(f"{path}.lock")):
        try:
            name.unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(f"cannot remove {name}: {error.strerror}") from None
    return path


def _check_is_ours(path: Path) -> None:
    if not _is_ours(path):
        way_out = (
            "`autobatch cache clear` removes it" if path == _usual_path() else "AUTOBATCH_CACHE names another file"
        )
        raise UsageError(f"{path} is no cache of autobatch, or broken: {way_out}")


def _is_ours(path: Path) -> bool:
    """Whether a file is a cache, or nothing yet."""
    try:
        if not path.exists() or (path.is_file() and path.stat().st_size == 0):
            return True
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=0)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.OperationalError:
        return True  # locked, or another's for the moment: whoever opens it says so
    except (OSError, sqlite3.DatabaseError):
        return False
    return not tables or STORE_SCHEMA.version_table in tables


class MeasurementCache:
    """The measurements of this user, in a file that several processes and machines may share.

    A context manager; `opened_cache` puts what its methods raise into one error.
    """

    def __init__(self, database: Database) -> None:
        """Take an open database."""
        self._database = database
        self._store = MeasurementStore(database)

    @classmethod
    def open(cls) -> Self:
        """Open the cache, made where it is missing.

        Raises:
            UnavailableError: it cannot be made, or is no cache, or one of a newer version.
        """
        path = cache_path()
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _check_is_ours(path)
            # Homes are often on a network: no memory is shared between machines, as a write-ahead log would need.
            return cls(open_sqlite(path, journal="DELETE", way_out="AUTOBATCH_CACHE names another file"))
        except OSError as error:
            raise UnavailableError(f"cannot make the cache {path}: {error.strerror}") from None
        except UsageError as error:
            raise UnavailableError(str(error)) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._database.close()

    # ---- for a question ---------------------------------------------------------------------------------------------

    def recall(self, job: JobIdentity, options: ProbeOptions, facts: DeviceFacts) -> KnownTrials | None:
        """What holds for a question on a device that is open; None where nothing does."""
        series = job.series(facts, options)
        measured, ooms = self._store.of_job(job.job)
        rows = [row for row in measured if row.origin is not None and row.origin.series == series]
        return _known(rows, ooms, options, lambda _: facts.memory.budget_bytes)

    def guess(self, job: JobIdentity, options: ProbeOptions, outlook: Outlook | None) -> int | None:
        """The size to begin with: of the newest measurement on such a card, whatever else has changed since."""
        measured, ooms = self._store.of_job(job.job)
        rows = [row for row in measured if outlook is None or row.report.device.name == outlook.name]
        known = _known(rows[:1], ooms, options, lambda row: row.report.memory.budget_bytes)
        repeated = None if known is None else trial_to_repeat(known.trials, options)
        if repeated is not None:
            return repeated.micro_batch_size
        return next((row.report.max_micro_batch_size for row in rows), None)

    def recall_unseen(self, job: JobIdentity, options: ProbeOptions, outlook: Outlook) -> Unseen | None:
        """What holds for a question as far as can be told without starting the job.

        None where a file of the job has changed, where the card, the versions or what others hold of it cannot be told to be
        the same, or where the report behind it certified nothing.
        """
        measured, ooms = self._store.of_job(job.job)
        seen: dict[str, DeviceFacts] = {}
        files = CurrentFiles()
        for row in measured:
            if not row.report.certified or _changed(row, files) or not _has_same_torch(job, row.report):
                continue
            facts = _facts_now(row.report, options, outlook)
            if facts is not None and row.origin is not None and job.series(facts, options) == row.origin.series:
                seen[row.id] = facts
        rows = [row for row in measured if row.id in seen]
        known = _known(rows, ooms, options, lambda row: seen[row.id].memory.budget_bytes)
        return None if known is None else Unseen(known=known, facts=seen[rows[0].id], report=rows[0].report)

    # ---- after a probe ----------------------------------------------------------------------------------------------

    def keep(
        self,
        job: JobIdentity,
        report: Report,
        facts: DeviceFacts,
        files: Iterable[str],
        *,
        replaces: Sequence[str] = (),
    ) -> None:
        """Keep what a probe measured; of what it showed to hold no longer, nothing stays.

        Args:
            job: the job that was probed.
            report: what was found.
            facts: the device that the trials ran on.
            files: the files that the job was made of.
            replaces: ids of measurements that were shown not to hold any more: nothing of them stays.
        """
        self._store.forget(replaces)
        origin = Origin(job=job.job, series=job.series(facts, report.options), sources=hash_files([*job.files, *files]))
        new = NewMeasurement.of(report, workload=job.name, gpu=report.device.name, source="probe", origin=origin)
        self._store.add(new, token_id=None)
        self._store.keep_newest(_MOST_MEASUREMENTS)

    def confirm(self, job: JobIdentity, known: KnownTrials, files: Iterable[str]) -> None:
        """A trial showed that measurements hold for the files as they are now, though some had changed."""
        self._store.restamp(known.measurements, hash_files([*job.files, *files]))

    def lower(self, report: Report) -> bool:
        """Remember that training by a report's plan ran out of memory; False where the cache does not know the report."""
        plan = report.plan
        found = None if report.cached is None else self._store.get(report.cached.measurement)
        found = found or self._find(report)
        if plan is None or found is None:
            return False
        failure = SizeFailure(
            micro_batch_size=plan.micro_batch_size, micro_batches_per_step=min(2, plan.accumulation_steps)
        )
        self._store.add_oom(
            failure,
            workload=found.workload,
            gpu=found.gpu,
            measurement_id=found.id,
            after_plan=True,
            token_id=None,
        )
        return True

    def _find(self, report: Report) -> Measurement | None:
        """The measurement of a report: the same trials at the same time, since the job's folder is not in a report."""
        alike = self._store.of_fingerprint(report.fingerprint)
        return next(
            (
                row
                for row in alike
                if row.report.trials == report.trials and row.report.measured_at == report.measured_at
            ),
            None,
        )

    # ---- for people -------------------------------------------------------------------------------------------------

    @property
    def path(self) -> Path | None:
        """The file."""
        return self._database.path

    def entries(self) -> list[Measurement]:
        """Every measurement, the newest first."""
        return self._store.list_newest(limit=_MOST_MEASUREMENTS)

    def forget(self, ids: Sequence[str]) -> int:
        """Forget measurements; how many of them there were."""
        return self._store.forget(ids)


def _known(
    rows: Sequence[Measurement],
    ooms: Sequence[OomReport],
    options: ProbeOptions,
    budget_now: Callable[[Measurement], int],
) -> KnownTrials | None:
    """Put together what rows of one series, the newest first, say for a question."""
    if not rows:
        return None
    files = CurrentFiles()
    rows = _of_one_state(rows, files)
    changed = sorted({Path(path).name for path in _changed(rows[0], files)})
    ids, notes, limit = {row.id for row in rows}, [], None
    told = [oom for oom in ooms if oom.measurement_id in ids and bears_on(oom.failure, options)]
    lowest = min(told, key=lambda oom: oom.failure.micro_batch_size, default=None)
    # Where nothing is left to try, a job that has changed since has perhaps been mended.
    if lowest is not None and (not changed or lowest.failure.micro_batch_size > options.multiple_of):
        limit = lowest.failure.micro_batch_size - 1
        notes.append(
            f"micro-batch {limit + 1} counts as too large: a training ran out of memory with it on "
            f"{dt.datetime.fromtimestamp(lowest.created_at, tz=dt.UTC):%Y-%m-%d} (`autobatch cache clear` forgets that)"
        )
    by_window: dict[tuple[tuple[int, ...], bool], Trial] = {}
    for row in rows:
        report = row.report
        held = still_holding(
            report.trials,
            options,
            budget_then=report.memory.budget_bytes,
            budget_now=budget_now(row),
            limit=limit,
        )
        for trial in held:
            by_window.setdefault((trial.window, trial.fits), trial)
    if not by_window and limit is None:
        return None
    if changed:
        notes.append(f"changed since the earlier trials: {', '.join(changed[:5])}{' …' if len(changed) > 5 else ''}")
    return KnownTrials(
        trials=tuple(by_window.values()),
        limit=limit,
        measured_at=rows[0].report.measured_at,
        measurements=tuple(row.id for row in rows),
        unchanged=not changed,
        certified=all(row.report.certified for row in rows),
        notes=tuple(notes),
    )


def _of_one_state(rows: Sequence[Measurement], files: CurrentFiles) -> list[Measurement]:
    """Those whose job was made of the same files: of files as they are now, where there are such, else of the newest's."""
    unchanged = [row for row in rows if not _changed(row, files)]
    if unchanged:
        return unchanged
    newest = rows[0].origin
    return [row for row in rows if newest and row.origin and row.origin.sources == newest.sources]


def _changed(row: Measurement, files: CurrentFiles) -> list[str]:
    """Files of a measurement's job that are no longer as they were."""
    return files.changed_since(row.origin.sources) if row.origin else []


def _has_same_torch(job: JobIdentity, report: Report) -> bool:
    """Whether the job would run on the torch of a report; of a command, whose environment is its own, that is taken as given."""
    from autobatch.emulator.torchbuild import find_torch

    torch = find_torch()
    return not job.torch_is_ours or (torch is not None and torch.version == report.versions.torch)


def _facts_now(report: Report, options: ProbeOptions, outlook: Outlook) -> DeviceFacts | None:
    """The device as trials would find it now, by a report on such a one; None where its budget cannot be told."""
    memory = report.memory
    growth = outlook.tenants_bytes - (memory.other_tenants_bytes or 0)
    if abs(growth) <= _TENANT_SLACK_BYTES and outlook.basis == "measured":
        growth = 0
    limit = options.memory_limit_bytes
    if report.options.memory_limit_bytes != limit or (limit is not None and growth):
        return None
    headroom = options.headroom_bytes(outlook.total_bytes)
    budget = memory.budget_bytes + memory.headroom_bytes - headroom - growth
    if budget <= 0:
        return None
    device = dataclasses.replace(
        report.device, name=outlook.name, total_bytes=outlook.total_bytes, driver=outlook.driver
    )
    return DeviceFacts(
        basis=outlook.basis,
        device=device,
        memory=dataclasses.replace(
            memory, budget_bytes=budget, headroom_bytes=headroom, other_tenants_bytes=outlook.tenants_bytes
        ),
        torch_version=report.versions.torch,
        cuda_version=report.versions.cuda,
        allocator_settings=outlook.allocator_settings,
    )
