"""Whether what is held in memory still holds, told in microseconds."""

from __future__ import annotations

import os
import sqlite3
import threading
from typing import TYPE_CHECKING
from urllib.parse import quote

from sqlalchemy import select
from starlette.concurrency import run_in_threadpool

from autobatch.store import StoreUnavailableError, generation

if TYPE_CHECKING:
    from pathlib import Path

    from autobatch.store import Database

__all__ = ["Freshness"]


class Freshness:
    """The number that the database raises whenever an answer may have changed.

    SQLite tells by `PRAGMA data_version`, in some microseconds and without a lock, whether anyone else wrote at all
    (https://sqlite.org/pragma.html#pragma_data_version); only then is the number read. PostgreSQL is asked each time.
    """

    def __init__(self, database: Database) -> None:
        """Take the database; `close` ends the connection."""
        self._database = database
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._file_number = 0
        self._seen: tuple[int, int] | None = None

    async def number(self) -> int:
        """The number now; raises `StoreUnavailableError`."""
        if self._database.path is None:
            return await run_in_threadpool(self._ask)
        return self._glance(self._database.path)

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _ask(self) -> int:
        with self._database.read() as connection:
            return int(connection.execute(select(generation.c.number)).scalar_one())

    def _glance(self, path: Path) -> int:
        try:
            with self._lock:
                return self._glance_locked(path)
        except (OSError, sqlite3.Error) as error:
            self.close()
            raise StoreUnavailableError from error

    def _glance_locked(self, path: Path) -> int:
        number = os.stat(path).st_ino  # noqa: PTH116 - at every request: pathlib takes twice the time
        if self._connection is None or number != self._file_number:
            if self._connection is not None:
                self._connection.close()
            # Not `mode=ro`: that cannot open a file in WAL mode that nobody else has open.
            self._connection = sqlite3.connect(
                f"file:{quote(str(path))}?mode=rw", uri=True, timeout=1.0, isolation_level=None, check_same_thread=False
            )
            self._connection.execute("PRAGMA query_only=ON")
            self._file_number, self._seen = number, None
        version = int(self._connection.execute("PRAGMA data_version").fetchone()[0])
        if self._seen is None or self._seen[0] != version:
            found = int(self._connection.execute("SELECT number FROM generation").fetchone()[0])
            self._seen = (version, found)
        return self._seen[1]
