"""A database of measurements: its transactions, what is said when it is away, and SQLite in a file."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import secrets
import shutil
import sqlite3
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, TextIO
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event, literal_column, update
from sqlalchemy.exc import (
    DBAPIError,
    DisconnectionError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import QueuePool

from autobatch.errors import UsageError
from autobatch.store.schema import STORE_SCHEMA, Schema, is_current, upgrade
from autobatch.store.tables import generation

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sqlalchemy import ColumnElement

__all__ = ["Database", "StoreUnavailableError", "describe_database_error", "new_id", "open_sqlite"]

_LOG = logging.getLogger(__name__)
_BUSY_SECONDS = 5.0
_CHECKED_SECONDS = 1.0
_LEAST_FREE_BYTES = 256 * 1024
_LONGEST_UPGRADE_SECONDS = 30.0


class StoreUnavailableError(Exception):
    """The database cannot be reached, is locked or full: nothing was written, and it may be there again soon."""


def new_id(prefix: str) -> str:
    """Make an id that sorts by time: a prefix, the milliseconds since 1970 and 64 random bits, in hexadecimal."""
    return f"{prefix}_{time.time_ns() // 1_000_000:011x}{secrets.token_hex(8)}"


class Database:
    """Transactions on one database.

    A context manager around the engine's connections; `read` and `write` are the only ways in.
    """

    def __init__(self, engine: Engine, path: Path | None) -> None:
        """Take an engine; `path` is SQLite's file."""
        self._engine = engine
        self._writing = engine.execution_options(autobatch_writes=True)
        self._path = path
        self._file_number = path.stat().st_ino if path else None
        self._checking = threading.Lock()
        self._checked = float("-inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *ending: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    @property
    def path(self) -> Path | None:
        """SQLite's file; None for PostgreSQL."""
        return self._path

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads; raises `StoreUnavailableError`."""
        with self._translated(), self._engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that writes, all of it or nothing.

        Raises:
            StoreUnavailableError: nothing was written.
        """
        with self._translated(), self._writing.begin() as connection:
            yield connection

    def check(self) -> None:
        """See whether it can be written to now; a good answer holds for a second.

        Raises:
            StoreUnavailableError: it cannot.
        """
        with self._checking:
            if time.monotonic() - self._checked < _CHECKED_SECONDS:
                return
            self._check_room()
            with self.write() as connection:
                connection.execute(update(generation).values(number=generation.c.number))
            self._checked = time.monotonic()

    def now(self) -> ColumnElement[float]:
        """Seconds since 1970 by the database's clock, which all runners share."""
        if self._path:
            return literal_column("((julianday('now') - 2440587.5) * 86400.0)")
        return literal_column("extract(epoch from clock_timestamp())::double precision")

    def raise_generation(self, connection: Connection) -> None:
        """Say that answers held in memory, here or in another process, may no longer hold."""
        connection.execute(update(generation).values(number=generation.c.number + 1))

    def _check_room(self) -> None:
        """Notice a full disk: a small write may still find room in what SQLite took before."""
        if self._path is None:
            return
        try:
            free = shutil.disk_usage(self._path.parent).free
        except OSError as error:
            raise StoreUnavailableError from error
        if free < _LEAST_FREE_BYTES:
            _LOG.warning("the database's disk is full: %d bytes are free, %d are needed", free, _LEAST_FREE_BYTES)
            raise StoreUnavailableError

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        self._check_file()
        try:
            yield
        except IntegrityError:
            raise
        except (DBAPIError, DisconnectionError, PoolTimeoutError) as error:
            if isinstance(error, DBAPIError) and not _may_pass(error):
                raise
            _LOG.warning("database unavailable: %s", str(getattr(error, "orig", error)).strip())
            raise StoreUnavailableError from error

    def _check_file(self) -> None:
        """Notice that SQLite's file is gone or another one: its open connections would write into nowhere."""
        if self._path is None:
            return
        try:
            number = self._path.stat().st_ino
        except OSError as error:
            _LOG.warning("database file is away: %s", error)
            self._engine.dispose()
            raise StoreUnavailableError from error
        if number != self._file_number:
            _LOG.warning("database file was replaced; opening it anew")
            self._engine.dispose()
            self._file_number = number


def _may_pass(error: DBAPIError) -> bool:
    """Whether what went wrong is the database's state rather than our statement."""
    if isinstance(error.orig, sqlite3.Error):
        code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
        passing = (
            sqlite3.SQLITE_BUSY,
            sqlite3.SQLITE_LOCKED,
            sqlite3.SQLITE_FULL,
            sqlite3.SQLITE_IOERR,
            sqlite3.SQLITE_CANTOPEN,
            sqlite3.SQLITE_READONLY,
            sqlite3.SQLITE_NOMEM,
            sqlite3.SQLITE_PROTOCOL,
            sqlite3.SQLITE_CORRUPT,
            sqlite3.SQLITE_NOTADB,
        )
        # An empty file in the place of ours, as when a folder is mounted late, has none of the tables.
        return code in passing or "no such table" in str(error.orig)
    state = getattr(error.orig, "sqlstate", None)
    if state is None:  # the connection itself failed; what the driver refuses to send is our mistake
        return isinstance(error, OperationalError | InterfaceError)
    # Classes 08 connection, 40 rollback, 53 resources, 55 locks, 57 operator, 58 system (PostgreSQL's manual, appendix A),
    # 25006 a server that only reads, 42P01 a table that is not there, 3D000 a database that is not there.
    return state[:2] in {"08", "40", "53", "55", "57", "58"} or state in {"25006", "42P01", "3D000"}


def open_sqlite(
    path: Path,
    *,
    schemas: Sequence[Schema] = (STORE_SCHEMA,),
    journal: Literal["WAL", "DELETE"] = "WAL",
    way_out: str = "",
) -> Database:
    """Open a database in a file, made where it is missing, and bring its tables up to date.

    Args:
        path: the file; its folder must be there.
        schemas: whose tables it holds.
        journal: `WAL` lets readers go on beside a writer, on one machine; `DELETE` also works where several machines share the
            file over a network. (Source: https://www.sqlite.org/wal.html, "Disadvantages".)
        way_out: what to add to an error, such as how to name another file.

    Raises:
        UsageError: the file cannot be made or written, or is no such database, or one of a newer version.
    """
    try:
        return _open_sqlite(path, schemas, journal, f"; {way_out}" if way_out else "")
    except (SQLAlchemyError, sqlite3.Error) as error:
        raise UsageError(f"cannot open the database {path}: {describe_database_error(error)}") from error


def describe_database_error(error: Exception) -> str:
    """Say in one line what the driver said."""
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _open_sqlite(path: Path, schemas: Sequence[Schema], journal: str, way_out: str) -> Database:
    try:
        path.touch(mode=0o600)
    except OSError as error:
        raise UsageError(f"cannot make the database {path}: {error.strerror}{way_out}") from None

    def connect() -> sqlite3.Connection:
        # Never created here: a file that went away is an error, not an empty database.
        connection = sqlite3.connect(
            f"file:{quote(str(path))}?mode=rw",
            uri=True,
            timeout=_BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        _set_journal(connection, journal)
        connection.execute("PRAGMA synchronous=FULL")  # what was accepted outlives a power cut
        connection.execute("PRAGMA foreign_keys=ON")
        return connection

    engine = create_engine(
        "sqlite://",
        creator=connect,
        poolclass=QueuePool,
        pool_size=8,
        max_overflow=24,
        pool_timeout=5,
        hide_parameters=True,
    )

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that writes takes the lock at once: taken later, it could fail half-way without waiting.
        writes = connection.get_execution_options().get("autobatch_writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    with _disposed_on_error(engine), engine.connect() as connection:
        if all(is_current(connection, schema) for schema in schemas):
            return Database(engine, path)
        connection.rollback()
        try:
            lock = Path(f"{path}.lock").open("w", encoding="ascii")  # noqa: SIM115 - held and closed below
        except OSError as error:
            raise UsageError(f"cannot write beside the database {path}: {error.strerror}{way_out}") from None
        with lock:
            _wait_for(lock, path)
            for schema in schemas:
                upgrade(connection, schema)
    return Database(engine, path)


def _set_journal(connection: sqlite3.Connection, journal: str) -> None:
    """Set the journal's mode, which the file keeps; waits for others who open the same new file.

    SQLite reads the mode under a shared lock and changes it under an exclusive one. Two that hold the shared lock would wait for
    each other for ever, so one of them is refused at once, whatever time it would wait otherwise. (Source:
    https://www.sqlite.org/c3ref/busy_handler.html, the paragraph on deadlock.)
    """
    until = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute(f"PRAGMA journal_mode={journal}")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                connection.close()
                raise
            time.sleep((1 + secrets.randbelow(20)) / 1000)  # not in step with the others, which may be its forks
        else:
            return


def _wait_for(lock: TextIO, path: Path) -> None:
    """Wait for whoever makes the tables now."""
    until = time.monotonic() + _LONGEST_UPGRADE_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise UsageError(f"{lock.name} is held by another process that makes the tables of {path}") from None
            time.sleep(0.02)
        else:
            return


@contextlib.contextmanager
def _disposed_on_error(engine: Engine) -> Iterator[None]:
    """Close the connections where the database turns out not to be ours."""
    try:
        yield
    except BaseException:
        engine.dispose()
        raise
