"""The database: SQLite in a file, or PostgreSQL by a URL; its transactions, and what is said when it is away."""

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
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

import platformdirs
from sqlalchemy import Connection, Engine, create_engine, event, literal_column, make_url, text, update
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    DisconnectionError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import QueuePool

from autobatch import UsageError
from autobatch_server.tables import generation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from alembic.config import Config
    from sqlalchemy import URL, ColumnElement

__all__ = ["Database", "StoreUnavailableError", "new_id", "open_database"]

_LOG = logging.getLogger(__name__)
_BUSY_SECONDS = 5.0
_CHECKED_SECONDS = 1.0
_LEAST_FREE_BYTES = 256 * 1024
_LOCK_KEY = 0x6175746F  # of PostgreSQL's advisory lock under which the tables are made; "auto" in ASCII
_MIGRATIONS = "autobatch_server:migrations"


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


def open_database(url: str) -> Database:
    """Open the database and bring its tables up to date.

    Args:
        url: `sqlite:///PATH` or `postgresql://USER:PASSWORD@HOST:PORT/NAME`.

    Raises:
        UsageError: the URL is of no known kind, or the database is not there or not ours.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise UsageError("database_url is no URL: write sqlite:///PATH or postgresql://USER@HOST/NAME") from None
    kind = parsed.get_backend_name()
    if kind not in {"sqlite", "postgresql"}:
        raise UsageError(f"database_url is of kind {kind!r}: write sqlite:///PATH or postgresql://USER@HOST/NAME")
    try:
        return _open_sqlite(parsed) if kind == "sqlite" else _open_postgresql(parsed)
    except (SQLAlchemyError, sqlite3.Error) as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise UsageError(f"cannot open the database {parsed.render_as_string(hide_password=True)}: {reason}") from error


def _open_sqlite(url: URL) -> Database:
    if not url.database or url.database == ":memory:":
        raise UsageError("database_url names no file: write sqlite:///PATH")
    path = Path(url.database).expanduser().absolute()
    try:
        # Made only where it is the usual one: a mistyped path must not look like an empty database.
        if path.parent == platformdirs.user_data_path("autobatch"):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
    except OSError as error:
        raise UsageError(f"cannot make the database {path}: {error.strerror}; --database-url names another") from None

    def connect() -> sqlite3.Connection:
        # Never created here: a file that went away is an error, not an empty database.
        connection = sqlite3.connect(
            f"file:{quote(str(path))}?mode=rw",
            uri=True,
            timeout=_BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")  # an accepted probe outlives a power cut
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

    try:
        lock = Path(f"{path}.lock").open("w", encoding="ascii")  # noqa: SIM115 - held and closed below
    except OSError as error:
        raise UsageError(
            f"cannot write beside the database {path}: {error.strerror}; --database-url names another"
        ) from None
    with lock, _disposed_on_error(engine):
        fcntl.flock(lock, fcntl.LOCK_EX)
        with engine.connect() as connection:
            _upgrade(connection)
    return Database(engine, path)


def _open_postgresql(url: URL) -> Database:
    engine = create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_pre_ping=True,
        hide_parameters=True,
        pool_size=8,
        max_overflow=24,
        pool_timeout=5,
        connect_args={"connect_timeout": 5, "options": "-c statement_timeout=15000 -c lock_timeout=10000"},
    )
    with _disposed_on_error(engine), engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _LOCK_KEY})
        connection.commit()
        try:
            _upgrade(connection)
        finally:
            connection.rollback()
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": _LOCK_KEY})
            connection.commit()
    return Database(engine, None)


@contextlib.contextmanager
def _disposed_on_error(engine: Engine) -> Iterator[None]:
    """Close the connections where the database turns out not to be ours."""
    try:
        yield
    except BaseException:
        engine.dispose()
        raise


def _upgrade(connection: Connection) -> None:
    """Run the migrations that are missing."""
    from alembic import command
    from alembic.util import CommandError

    try:
        command.upgrade(_migrations(connection), "head")
    except CommandError as error:  # its version is none of those that there are here
        raise UsageError(
            f"the database was made by a newer autobatch ({error}): upgrade this one, or name another with --database-url"
        ) from None
    connection.commit()


def _migrations(connection: Connection) -> Config:
    """Alembic's configuration, for the migrations of this package over a connection."""
    from alembic.config import Config

    configuration = Config()
    configuration.set_main_option("script_location", _MIGRATIONS)
    attributes: dict[str, Any] = configuration.attributes
    attributes["connection"] = connection
    return configuration
