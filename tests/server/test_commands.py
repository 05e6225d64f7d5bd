"""The service's commands as a shell sees them: what is data, what is talk, and how they end."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from service_fakes import FakeExecutor, make_settings, running_service, succeeding
from sqlalchemy import update

import autobatch
from autobatch import UnavailableError, UsageError
from autobatch_server.commands import main
from autobatch_server.database import open_database
from autobatch_server.services import open_services
from autobatch_server.settings import ENVIRONMENT_PREFIX, Settings
from autobatch_server.tables import runner
from autobatch_server.tokens import TokenStore

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(autobatch.__file__).parent.parent
TOKEN = re.compile(r"abt_[0-9a-f]{16}_[A-Za-z0-9_-]{43}\n")


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


def run(folder: Path, words: Sequence[str], *, module: str = "autobatch", **variables: str) -> Ran:
    """Run a command in a process of its own, with a home in that folder."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ENVIRONMENT_PREFIX)}
    environment |= {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "server")))}
    environment |= {"XDG_DATA_HOME": str(folder / "data"), "XDG_CONFIG_HOME": str(folder / "config"), **variables}
    ended = subprocess.run(
        [sys.executable, *(["-m", module] if module else []), *words],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return Ran(ended.returncode, ended.stdout, ended.stderr)


def in_process(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> Ran:
    code = main(words)
    captured = capsys.readouterr()
    return Ran(code, captured.out, captured.err)


def test_a_token_is_made_listed_used_and_revoked_through_the_shell(tmp_path: Path) -> None:
    """Standard output holds the token and nothing else; each database has its own; the list never shows a secret."""
    other = ["--database-url", f"sqlite:///{tmp_path / 'other.sqlite3'}"]
    created = run(tmp_path, ["token", "create", "slurm", "--scope", "probe:write", "--expires", "30d"])
    assert created.code == 0
    assert TOKEN.fullmatch(created.out)
    assert created.err.count("\n") == 1
    assert created.out.strip() not in created.err
    token_id = created.out[4:20]
    listed = run(tmp_path, ["token", "list"])
    assert (listed.code, listed.out.count("\n")) == (0, 1)
    for shown in (token_id, "probe:write", "slurm", "expires 20"):
        assert shown in listed.out
    assert created.out.strip()[21:] not in listed.out + listed.err
    elsewhere = run(tmp_path, ["token", "revoke", token_id, *other])
    assert (elsewhere.code, elsewhere.out) == (2, "")
    assert "there is no token" in elsewhere.err
    with open_database(f"sqlite:///{tmp_path / 'data' / 'autobatch' / 'server.sqlite3'}") as database:
        tokens = TokenStore(database)
        assert tokens.verify(created.out.strip()) is not None
        assert (run(tmp_path, ["token", "revoke", token_id]).code, tokens.verify(created.out.strip())) == (0, None)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1m", 60), ("90m", 5400), ("12h", 43200), ("30d", 2592000), ("52w", 31449600), ("3650d", 315360000)],
)
def test_times_are_written_in_one_unit(
    text: str, seconds: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Minutes, hours, days and weeks, up to ten years."""
    url = f"sqlite:///{tmp_path / 's.sqlite3'}"
    assert TOKEN.fullmatch(in_process(["token", "create", "x", "--expires", text, "--database-url", url], capsys).out)
    with open_database(url) as database:
        (record,) = TokenStore(database).list_all()
    assert record.expires_at is not None
    assert record.expires_at - record.created_at == pytest.approx(seconds, abs=1)
    assert record.scopes == ("plan:read",)


@pytest.mark.parametrize(
    "text", ["", "d", "30", "0d", "-1d", "1.5h", "30 d", "11y", "3651d", "1s", "٣d", "9" * 5000 + "d"]
)
def test_other_times_are_refused_and_make_no_token(text: str, tmp_path: Path) -> None:
    """In one line that shows how they are written."""
    url = f"sqlite:///{tmp_path / 's.sqlite3'}"
    with pytest.raises(UsageError, match="as in 30d"):
        main(["token", "create", "x", f"--expires={text}", "--database-url", url])
    assert not (tmp_path / "s.sqlite3").exists()


@pytest.mark.parametrize("name", ["", "  ", "x" * 129, "a\nb", "a\x1b[0m"])
def test_a_name_is_something_that_can_be_listed(name: str, tmp_path: Path) -> None:
    """No empty, endless or unprintable ones: they would forge lines of the list."""
    with pytest.raises(UsageError, match="token name"):
        main(["token", "create", name, "--database-url", f"sqlite:///{tmp_path / 's.sqlite3'}"])


def test_an_empty_list_is_empty_and_ended_tokens_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Talk goes to standard error; a token whose time is over is not said to hold."""
    url = f"sqlite:///{tmp_path / 's.sqlite3'}"
    empty = in_process(["token", "list", "--database-url", url], capsys)
    assert (empty.out, "no tokens" in empty.err) == ("", True)
    with open_database(url) as database:
        tokens = TokenStore(database)
        tokens.create("old", ["plan:read"], seconds=0.0)
        tokens.revoke(tokens.create("gone", ["admin"], seconds=None)[0].id)
        tokens.create("new", ["plan:read"], seconds=None)
    lines = in_process(["token", "list", "--database-url", url], capsys).out.splitlines()
    assert [word for line, word in zip(lines, ("expired", "revoked", "holds"), strict=True) if word in line] == [
        "expired", "revoked", "holds",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["token"], "create|list|revoke"),
        (["token", "create"], "name"),
        (["token", "create", "x", "--scope", "root"], "invalid choice"),
        (["token", "revoke"], "id"),
        (["serve", "--prot", "1"], "--prot"),
        (["serve", "--port", "x"], "--port"),
    ],
)
def test_what_is_no_command_is_said_in_one_line(
    words: Sequence[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 2, with where help is."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    captured = capsys.readouterr()
    assert (ended.value.code, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert said in captured.err
    assert "--help" in captured.err


def test_help_lists_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    """Each field of the settings in a line of its own."""
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    listed = text[text.index("settings (") :].splitlines()[1:]
    assert [line.split()[0] for line in listed] == list(Settings.model_fields)
    for line, field in zip(listed, Settings.model_fields.values(), strict=True):
        assert str(field.description) in line
    assert "(default 8000)" in text
    assert "(default true)" in text


def test_both_ways_to_start_it_show_the_same_help(tmp_path: Path) -> None:
    """`autobatch serve` and `python -m autobatch_server`."""
    first = run(tmp_path, ["serve", "--help"])
    second = run(tmp_path, ["--help"], module="autobatch_server")
    assert (first.code, second.code) == (0, 0)
    assert first.out == second.out
    assert "--config" in first.out


def test_what_cannot_be_served_is_said_in_one_line_with_its_exit_code(tmp_path: Path) -> None:
    """An open address without tokens is usage; a database or a port that is not to be had is not."""
    (tmp_path / "folder").mkdir()
    cases = {
        ("serve", "--host", "192.0.2.1"): (2, "no token exists"),
        ("serve", "--database-url", "mysql://x"): (2, "kind 'mysql'"),
        ("serve", "--config", "nowhere.toml"): (2, "there is no file"),
        ("token", "list", "--database-url", f"sqlite:///{tmp_path / 'folder'}"): (2, "cannot"),
    }
    for words, (code, said) in cases.items():
        ended = run(tmp_path, words)
        assert (ended.code, ended.out) == (code, ""), ended
        assert said in ended.err
        assert "Traceback" not in ended.err
        assert len(ended.err.splitlines()) == 1


_WITHOUT = """\
import json, sys
from autobatch.cli import main
codes = {}
for name in ("pydantic_settings", "fastapi", "uvicorn", "sqlalchemy", "alembic", "autobatch_server"):
    kept = dict(sys.modules)
    for loaded in [one for one in sys.modules if one.partition(".")[0] in (name, "autobatch_server")]:
        del sys.modules[loaded]
    sys.modules[name] = None
    sys.stderr.write(f"== {name}\\n")
    codes[name] = [main(["serve", "--database-url", "sqlite:///x.sqlite3", "--host", "192.0.2.1"]), main(["token", "list"])]
    del sys.modules[name]
    sys.modules.update(kept)
print(json.dumps(codes))
"""


def test_without_its_packages_the_service_says_how_to_get_them(tmp_path: Path) -> None:
    """Exit 69 and the pip line, whichever package is missing; no traceback."""
    ended = run(tmp_path, ["-c", _WITHOUT], module="")
    codes = json.loads(ended.out)
    assert {name for name, found in codes.items() if 69 not in found} == set()
    parts = ended.err.split("== ")[1:]
    for part in parts:
        name = part.partition("\n")[0]
        assert (
            f"the service needs {name}, which is not installed: pip install '.[server]' in autobatch's own folder"
            in part
        )
    assert "Traceback" not in ended.err


@pytest.mark.slow
def test_a_connection_may_idle_for_longer_than_clients_keep_it(tmp_path: Path) -> None:
    """Clients such as httpx drop an idle connection after 5 s: a server that did too would now and then close one in use."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "server")))}
    words = ["serve", "--port", "0", "--database-url", f"sqlite:///{tmp_path / 's.sqlite3'}"]
    with subprocess.Popen(
        [sys.executable, "-m", "autobatch", *words], env=environment, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stderr is not None
            address = next(found for line in server.stderr if (found := re.search(r"http://([\d.]+):(\d+)", line)))
            connection = http.client.HTTPConnection(address[1], int(address[2]), timeout=30)
            for wait in (0, 6):
                time.sleep(wait)
                connection.request("GET", "/healthz")
                assert connection.getresponse().read()
            connection.close()
        finally:
            server.terminate()


def test_a_health_check_tells_whether_the_service_is_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one that answers HTTP by asking it, the address for all included; where nothing listens it fails."""
    with running_service(make_settings(tmp_path), executor=FakeExecutor(succeeding)) as running:
        port = running.url.rpartition(":")[2]
        words = ["serve", "--check", "--port", port, "--database-url", running.services.settings.database_url]
        for host in ("127.0.0.1", "0.0.0.0", "localhost"):  # noqa: S104 - asked about, not listened on
            assert in_process([*words, "--host", host], capsys) == Ran(
                0, f"ready: http://{_reached(host)}:{port}/readyz\n", ""
            )
    with pytest.raises(UnavailableError, match="is not up: Connection refused"):
        main(words)
    with pytest.raises(UsageError, match="name its port"):
        main(["serve", "--check", "--port", "0"])


def _reached(host: str) -> str:
    return "127.0.0.1" if host[0] == "0" else host


def test_a_health_check_tells_whether_a_runner_alone_is_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its last sign of life in the database: never given, given, and gone."""
    settings = make_settings(tmp_path)
    words = ["serve", "--check", "--no-http", "--database-url", settings.database_url]
    with pytest.raises(UnavailableError, match="was seen never"):
        main(words)
    with open_database(settings.database_url) as database, open_services(settings, database) as services:
        with services.running(FakeExecutor(succeeding)):
            until = time.monotonic() + 20
            while services.board.seconds_since_seen(socket.gethostname()) is None and time.monotonic() < until:
                time.sleep(0.01)
            assert in_process(words, capsys).out.startswith("running: seen ")
        with pytest.raises(UnavailableError, match="was seen never"):
            main(words)
        services.board.announce("other", [])
        with database.write() as connection:
            connection.execute(update(runner).values(seen_at=database.now() - 100))
        with pytest.raises(UnavailableError, match=r"was seen 100 s ago, which is above 30 s"):
            main(words)
