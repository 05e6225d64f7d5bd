"""The service's database: SQLite in a file, or PostgreSQL, by a URL."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from autobatch import UsageError
from autobatch.store import Database, describe_database_error, open_sqlite, upgrade
from autobatch_server.tables import SCHEMAS

if TYPE_CHECKING:
    from sqlalchemy import URL

__all__ = ["open_database"]

_LOCK_KEY = 0x6175746F  # of PostgreSQL's advisory lock under which the tables are made; "auto" in ASCII
_WAY_OUT = "--database-url names another"


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
    if kind == "sqlite":
        return _open_file(parsed)
    try:
        return _open_postgresql(parsed)
    except SQLAlchemyError as error:
        shown = parsed.render_as_string(hide_password=True)
        raise UsageError(f"cannot open the database {shown}: {describe_database_error(error)}") from error


def _open_file(url: URL) -> Database:
    if not url.database or url.database == ":memory:":
        raise UsageError("database_url names no file: write sqlite:///PATH")
    path = Path(url.database).expanduser().absolute()
    # Made only where it is the usual one: a mistyped path must not look like an empty database.
    if path.parent == platformdirs.user_data_path("autobatch"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise UsageError(f"cannot make the database {path}: {error.strerror}; {_WAY_OUT}") from None
    return open_sqlite(path, schemas=SCHEMAS, way_out=_WAY_OUT)


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
    database = Database(engine, None)
    try:
        with engine.connect() as connection:
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _LOCK_KEY})
            connection.commit()
            try:
                for schema in SCHEMAS:
                    upgrade(connection, schema)
            finally:
                connection.rollback()
                connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": _LOCK_KEY})
                connection.commit()
    except BaseException:
        database.close()
        raise
    return database
