"""Settings come from the file, variables and flags, the last winning; what is wrong is one line that says where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from autobatch import UsageError
from autobatch_server.settings import ENVIRONMENT_PREFIX, Settings, load_settings

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variables of ours, and homes in which nothing lies."""
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "server.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(tmp_path: Path, text: str, **flags: Any) -> str:
    """What is said of a file; always one line."""
    with pytest.raises(UsageError) as caught:
        load_settings(write(tmp_path, text), flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_anything_the_defaults_hold(tmp_path: Path) -> None:
    """Loopback, port 8000, SQLite in the user's data folder, emulated cards; the file need not be there."""
    settings = load_settings()
    assert (settings.host, settings.port, settings.is_loopback) == ("127.0.0.1", 8000, True)
    assert settings.database_url == f"sqlite:///{tmp_path / 'XDG_DATA_HOME' / 'autobatch' / 'server.sqlite3'}"
    assert settings.emulated_slots == 1
    assert settings.workloads == {}


def test_flags_win_over_variables_and_those_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each source alone, and all of them at once."""
    path = write(tmp_path, 'port = 1\nlease = 20\nlog_level = "ERROR"\nallowed_hosts = ["a.example", "b.example"]\n')
    settings = load_settings(path)
    assert (settings.port, settings.lease, settings.log_level) == (1, 20.0, "ERROR")
    assert settings.allowed_hosts == ("a.example", "b.example")
    monkeypatch.setenv("AUTOBATCH_SERVER_PORT", "2")
    monkeypatch.setenv("AUTOBATCH_SERVER_LOG_LEVEL", "DEBUG")
    monkeypatch.setenv("AUTOBATCH_SERVER_ALLOWED_HOSTS", "c.example, d.example,")
    settings = load_settings(path, {"port": 3})
    assert (settings.port, settings.lease, settings.log_level) == (3, 20.0, "DEBUG")
    assert settings.allowed_hosts == ("c.example", "d.example")


def test_the_usual_file_is_read_without_being_named(tmp_path: Path) -> None:
    """It lies in the user's configuration folder; one that is named must be there."""
    path = tmp_path / "XDG_CONFIG_HOME" / "autobatch" / "server.toml"
    path.parent.mkdir(parents=True)
    path.write_text("port = 8123\n", encoding="utf-8")
    assert load_settings().port == 8123
    with pytest.raises(UsageError, match=r"there is no file .*nowhere\.toml"):
        load_settings(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 1", "prot, in {path}: there is no such setting: did you mean port?"),
        ("zzz = 1", "zzz, in {path}: there is no such setting: `autobatch serve --help`"),
        ('port = "many"', "port, in {path}: Input should be a valid integer"),
        ("port = 70000", "port, in {path}: Input should be less than or equal to 65535"),
        ("lease = 0", "lease, in {path}: "),
        ("lease = nan", "lease, in {path}: "),
        ("probe_deadline = inf", "probe_deadline, in {path}: "),
        ('log_level = "LOUD"', "log_level, in {path}: "),
        ("workloads = 3", "workloads, in {path}: "),
        ("port = ", "cannot read {path}: Invalid value"),
        ("[workloads.mine]\n", "workloads.mine.factory, in {path}: Field required"),
        ('[workloads."no/name"]\nfactory = "a:b"', "workloads, in {path}: workload name 'no/name'"),
    ],
)
def test_what_is_wrong_in_the_file_is_said_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    """One line: the setting, the file, what is wrong."""
    message = refusal(tmp_path, text)
    assert said.format(path=tmp_path / "server.toml") in message


def test_a_workload_that_is_a_command_is_told_so(tmp_path: Path) -> None:
    """With and without a factory beside it."""
    for text in ('command = ["python", "train.py"]', 'factory = "a:b"\ncommand = "python train.py"'):
        message = refusal(tmp_path, f"[workloads.mine]\n{text}")
        assert "workloads.mine.command" in message
        assert "commands are not taken yet" in message


def test_a_bad_variable_or_flag_is_named_and_not_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The place is where the value came from that was taken."""
    assert "port, of the command line: " in refusal(tmp_path, "port = 1", port=-1)
    monkeypatch.setenv("AUTOBATCH_SERVER_PORT", "many")
    assert "port, of AUTOBATCH_SERVER_PORT: " in refusal(tmp_path, "port = 1")
    monkeypatch.setenv("AUTOBATCH_SERVER_PORT", "1")
    monkeypatch.setenv("AUTOBATCH_SERVER_WORKLOADS", "{oops")
    assert "AUTOBATCH_SERVER_WORKLOADS is not JSON" in refusal(tmp_path, "port = 1")


def test_a_variable_that_sets_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slip in a variable's name would otherwise leave the default in force, such as an open address."""
    monkeypatch.setenv("AUTOBATCH_SERVER_ALOWED_HOSTS", "a.example")
    assert "AUTOBATCH_SERVER_ALOWED_HOSTS sets nothing: did you mean allowed_hosts?" in refusal(tmp_path, "")


def test_no_value_is_repeated_in_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value may be a password."""
    monkeypatch.setenv(f"{ENVIRONMENT_PREFIX}PORT", "hunter2")
    assert "hunter2" not in refusal(tmp_path, "")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("localhost", True), ("::1", True), ("[::1]", True),
     ("0.0.0.0", False), ("::", False), ("", False), ("10.0.0.1", False), ("localhost.example", False)],  # noqa: S104 - asked about, not bound
)  # fmt: skip
def test_only_a_loopback_address_counts_as_one(host: str, loopback: bool) -> None:
    """Names that merely look like one do not."""
    assert Settings(host=host).is_loopback is loopback
