"""The database: how it is opened, migrated and refused, and what is said while it is away."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from service_fakes import FakeExecutor, RunningService, hanging, make_settings, running_service, succeeding
from sqlalchemy import create_engine, inspect, select, text, update
from sqlalchemy.exc import DBAPIError

from autobatch import UsageError
from autobatch.store import generation, migrations, new_id
from autobatch_server.database import open_database
from autobatch_server.tables import SCHEMAS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from service_databases import PostgresServer

    from autobatch.store import Schema

QUESTION = {"workload": "gpt2", "target": 256, "gpu": "A100-40GB"}
ROOT = Path(__file__).resolve().parents[2]


# ---- opening --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def plain_engine(url: str) -> Iterator[Any]:
    """An engine without this project's own ways."""
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    try:
        yield engine
    finally:
        engine.dispose()


def test_two_processes_that_start_at_once_make_the_tables_once(database_url: str) -> None:
    """Several processes open an empty database at one moment: all of them come up, on one set of tables."""
    script = (
        "import sys; from autobatch_server.database import open_database; "
        "sys.stdin.readline(); open_database(sys.argv[1]).close()"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, database_url],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'server'}"},
        )
        for _ in range(3)
    ]
    said = []
    with ThreadPoolExecutor(len(processes)) as pool:
        said = [error for _, error in pool.map(lambda process: process.communicate(b"go\n", timeout=60), processes)]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    with open_database(database_url) as database, database.read() as connection:
        assert connection.execute(select(generation.c.number)).all() == [(0,)]


def test_a_file_that_another_process_makes_just_now_is_waited_for(tmp_path: Path) -> None:
    """SQLite refuses at once, without its usual wait, to set a file's journal mode beside one who writes to it."""
    path = tmp_path / "new.sqlite3"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        ending = threading.Timer(0.3, other.execute, ["COMMIT"])
        ending.start()
        try:
            with open_database(f"sqlite:///{path}") as database, database.read() as connection:
                assert connection.execute(select(generation.c.number)).all() == [(0,)]
                assert connection.execute(text("PRAGMA journal_mode")).scalar_one() == "wal"
        finally:
            ending.join()


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.version_table)
def test_the_tables_are_what_the_migrations_make(schema: Schema, database_url: str) -> None:
    """Alembic finds no difference between the migrated database and the tables in code, and no newer migration."""
    open_database(database_url).close()
    own = set(schema.metadata.tables)
    opts = {
        "compare_type": True,
        "compare_server_default": True,
        "include_object": lambda _object, name, kind, *_: kind != "table" or name in own,
    }
    with plain_engine(database_url) as engine, engine.connect() as connection:
        context = MigrationContext.configure(connection, opts=opts)
        assert compare_metadata(context, schema.metadata) == []
        assert ScriptDirectory.from_config(migrations(connection, schema)).get_heads() == [schema.head]


def test_a_database_of_the_service_alone_gets_the_columns_of_a_cache(database_url: str) -> None:
    """Its measurements were made before they had migrations of their own: they stay, and are brought up to date."""
    open_database(database_url).close()
    with plain_engine(database_url) as engine, engine.begin() as connection:
        command.downgrade(migrations(connection, SCHEMAS[0]), "0001")
        connection.execute(text("DROP TABLE store_version"))
        connection.execute(
            text(
                "INSERT INTO measurement (id, created_at, workload, gpu, basis, fingerprint, source, report_json) "
                "VALUES ('mea_1', 1, 'gpt2', 'L4', 'emulated', 'f', 'probe', '{}')"
            )
        )
    with open_database(database_url) as database, database.read() as connection:
        assert connection.execute(text("SELECT id, job, series FROM measurement")).all() == [("mea_1", None, None)]


def test_the_migrations_go_down_to_nothing_and_up_again(database_url: str) -> None:
    """After a downgrade to the base no table is left but Alembic's own, and an upgrade makes all of them again."""
    open_database(database_url).close()
    with plain_engine(database_url) as engine:
        with engine.begin() as connection:
            for schema in SCHEMAS:
                command.downgrade(migrations(connection, schema), "base")
        assert sorted(inspect(engine).get_table_names()) == ["alembic_version", "store_version"]
    with open_database(database_url) as database, database.read() as connection:
        assert connection.execute(select(generation.c.number)).all() == [(0,)]


def test_a_database_newer_than_the_code_is_refused_in_one_line(database_url: str) -> None:
    """The version found is named, and nothing is changed."""
    open_database(database_url).close()
    with plain_engine(database_url) as engine:
        with engine.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        with pytest.raises(UsageError, match=r"newer autobatch.*'9999'.*upgrade") as refused:
            open_database(database_url)
        assert "\n" not in str(refused.value)
        with engine.connect() as connection:
            assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one() == "9999"


def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    """One line names the file; the file keeps its content."""
    path = tmp_path / "notes.txt"
    path.write_text("these are my notes\n" * 100)
    with pytest.raises(UsageError, match=r"notes\.txt.*not a database") as refused:
        open_database(f"sqlite:///{path}")
    assert "\n" not in str(refused.value)
    assert path.read_text() == "these are my notes\n" * 100


def test_a_place_where_nothing_can_be_written_is_named(tmp_path: Path) -> None:
    """A folder that cannot be made, a file that cannot be: one line with the path and the way out."""
    (tmp_path / "file").touch()
    (tmp_path / "folder.sqlite3.lock").mkdir()
    for path in (
        tmp_path / "file" / "s.sqlite3",
        Path("/proc/autobatch/s.sqlite3"),
        tmp_path,
        tmp_path / "folder.sqlite3",
    ):
        with pytest.raises(UsageError, match=str(path)) as refused:
            open_database(f"sqlite:///{path}")
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["mysql://u:opensesame@h/d", "not a url", "sqlite://", "sqlite:///:memory:", "postgresql://"]
)
def test_other_urls_are_refused_without_repeating_a_password(url: str) -> None:
    """What is no SQLite file and no PostgreSQL is a usage error."""
    with pytest.raises(UsageError) as refused:
        open_database(url)
    assert "opensesame" not in str(refused.value)


def test_a_wrong_password_is_named_as_such_and_not_shown(postgresql: PostgresServer) -> None:
    """The message says why, and holds neither the password nor more than a line; nor does the service's own output."""
    with postgresql.new_database() as url:
        wrong = url.replace(postgresql.password, "not-the-one")
        with pytest.raises(UsageError, match="password authentication failed") as refused:
            open_database(wrong)
        assert "not-the-one" not in str(refused.value)
        assert "\n" not in str(refused.value)
        served = subprocess.run(
            [sys.executable, "-m", "autobatch", "serve", "--port", "0", "--database-url", wrong],
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'server'}"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert served.returncode == 2
    assert "password authentication failed" in served.stderr
    assert "not-the-one" not in served.stdout + served.stderr
    assert "Traceback" not in served.stderr


def test_ids_sort_by_the_time_they_were_made() -> None:
    """So that the newest stand first without a column for it."""
    ids = []
    for _ in range(5):
        ids.append(new_id("prb"))
        time.sleep(0.002)
    assert ids == sorted(ids)
    assert len({new_id("prb") for _ in range(1000)}) == 1000


# ---- away and back --------------------------------------------------------------------------------------------------


def test_a_failed_transaction_writes_nothing(database_url: str) -> None:
    """All of it or nothing, whatever is raised within."""
    with open_database(database_url) as database:
        with contextlib.suppress(ZeroDivisionError), database.write() as connection:
            connection.execute(update(generation).values(number=77))
            raise ZeroDivisionError
        with database.read() as connection:
            assert connection.execute(select(generation.c.number)).scalar_one() == 0


def test_a_statement_of_ours_that_is_wrong_is_no_outage(database_url: str) -> None:
    """A mistake in code must not be answered with 'try again'."""
    wrong = text("SELECT nothing_such FROM generation")
    with open_database(database_url) as database:
        with pytest.raises(DBAPIError, match="nothing_such"), database.read() as connection:
            connection.execute(wrong)
        with pytest.raises(DBAPIError, match=r"NUL|nothing_such"), database.read() as connection:
            connection.execute(text("SELECT nothing_such WHERE :text = ''"), {"text": "\0"})


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another program holds SQLite's one lock."""
    other = sqlite3.connect(path, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        yield
    finally:
        other.close()


@contextlib.contextmanager
def moved(path: Path) -> Iterator[None]:
    """The file is away for a while."""
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    try:
        yield
    finally:
        elsewhere.rename(path)


@contextlib.contextmanager
def emptied(path: Path) -> Iterator[None]:
    """Another folder with an empty file stands in the place of ours, as when a file system is mounted late."""
    folder = path.parent
    with moved(folder):
        folder.mkdir()
        path.touch()
        try:
            yield
        finally:
            shutil.rmtree(folder)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path_factory.mktemp("tiny")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a file system can be mounted by root alone")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def filled(path: Path) -> Iterator[None]:
    """The disk is full to the last byte."""
    filler = path.with_name("filler")
    with filler.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 65536)
        with contextlib.suppress(OSError):
            while True:
                file.write(b"x")
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def stopped(server: PostgresServer) -> Iterator[None]:
    """The database server is down."""
    server.stop()
    try:
        yield
    finally:
        server.start()


@pytest.mark.parametrize(
    "outage", [pytest.param("locked", marks=pytest.mark.slow), "moved", "emptied", "full", "stopped"]
)
def test_the_service_outlives_its_database(outage: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """While it takes no writes: 503 with Retry-After, not ready, alive. A running probe goes on; all recovers by itself."""
    folder = request.getfixturevalue("tiny_folder") if outage == "full" else tmp_path / "data"
    folder.mkdir(exist_ok=True)
    path = folder / "server.sqlite3"
    url = f"sqlite:///{path}"
    ways: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
        "locked": lambda: locked(path),
        "moved": lambda: moved(path),
        "emptied": lambda: emptied(path),
        "full": lambda: filled(path),
    }
    with contextlib.ExitStack() as stack:
        if outage == "stopped":
            server: PostgresServer = request.getfixturevalue("postgresql")
            url = stack.enter_context(server.new_database())
            ways["stopped"] = lambda: stopped(server)
        go_on = threading.Event()
        executor = FakeExecutor(lambda task: hanging(task) if not go_on.is_set() else succeeding(task))
        service = stack.enter_context(
            running_service(make_settings(folder, database_url=url, lease=2.5, max_attempts=1), executor=executor)
        )
        client = service.client
        running = client.post("/v1/probes", json=QUESTION).json()["id"]
        service.wait_for(running, "running")
        waiting = client.post("/v1/probes", json=QUESTION | {"gpu": "L4"}, headers={"Idempotency-Key": "a"}).json()[
            "id"
        ]
        time.sleep(1.1)  # a good answer about readiness holds for a second
        with ways[outage]():
            check_unavailable(service)
            time.sleep(2.6)  # longer than the lease: it cannot be renewed
            assert client.get("/livez").text == "ok"
            assert not executor.started[0].ended.is_set(), "the running probe was ended for an outage of the database"
        go_on.set()
        until = time.monotonic() + 10
        while client.get("/readyz").status_code != 200:
            assert time.monotonic() < until, "not ready again"
            time.sleep(0.1)
        executor.started[0].messages.extend(succeeding(executor.tasks[0]))
        assert service.wait_for(running, "succeeded")["attempts"] == 1
        assert service.wait_for(waiting, "succeeded")["attempts"] == 1
        assert len(executor.tasks) == 2
        replayed = client.post("/v1/probes", json=QUESTION | {"gpu": "L4"}, headers={"Idempotency-Key": "a"})
        assert replayed.json()["id"] == waiting


def check_unavailable(service: RunningService) -> None:
    """New work is refused by name, for as long as the outage lasts."""
    refused = service.client.post("/v1/probes", json=QUESTION | {"force": True, "target": 64})
    assert refused.status_code == 503, refused.text
    assert refused.json()["code"] == "store-unavailable"
    assert int(refused.headers["retry-after"]) > 0
    ready = service.client.get("/readyz")
    assert ready.status_code == 503
    assert ready.json()["code"] == "store-unavailable"
    assert service.client.get("/livez").text == "ok"


def test_the_file_is_read_again_where_nobody_else_has_it_open(tmp_path: Path) -> None:
    """A process without a runner, whose connections were all closed meanwhile, answers again when the file is back."""
    settings = make_settings(tmp_path, run_probes=False)
    with running_service(settings) as service:
        query = "/v1/plan?workload=gpt2&gpu=A100-40GB&target=256"
        assert service.client.get(query).status_code == 200
        with moved(tmp_path / "server.sqlite3"):
            assert service.client.get(query).status_code == 503
        assert service.client.get(query).status_code == 200
