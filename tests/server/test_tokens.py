"""Tokens are shown once and kept as hashes; what is expired, revoked or somebody else's opens nothing."""

from __future__ import annotations

import contextlib
import hmac
import sqlite3
import time
from typing import TYPE_CHECKING

import pytest
from service_fakes import FakeExecutor, make_settings, running_service, succeeding

from autobatch_server import tokens as tokens_module
from autobatch_server.database import open_database
from autobatch_server.tokens import SCOPES, TokenRecord, TokenStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from service_fakes import RunningService

    from autobatch.store import Database


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with open_database(f"sqlite:///{tmp_path / 's.sqlite3'}") as opened:
        yield opened


@pytest.fixture
def store(database: Database) -> TokenStore:
    return TokenStore(database)


def move_clock(path: Path, token_id: str, seconds: float) -> None:
    """Let a token be older by so many seconds."""
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE token SET expires_at = expires_at - ? WHERE id = ?", (seconds, token_id))
        connection.execute("UPDATE session SET expires_at = expires_at - ?", (seconds,))
    connection.close()


def test_a_token_is_known_by_its_text_alone(store: TokenStore) -> None:
    """The text verifies; one sign more, less or other does not, nor does another's secret under its id."""
    record, text = store.create("scheduler", ["plan:read"], seconds=None)
    _, other = store.create("other", ["admin"], seconds=None)
    assert store.verify(text) == record
    mixed = text[: text.rindex("_", 0, 21) + 1] + other[21:]
    last = "A" if text[-1] != "A" else "B"
    for wrong in (mixed, text[:-1], text + "A", text[:-1] + last, text.upper(), "", "abt_", f" {text}", record.id):
        assert store.verify(wrong) is None, wrong


def test_nothing_of_the_secret_is_kept(store: TokenStore, tmp_path: Path) -> None:
    """Neither token nor session id, whole or in part, stands in any file of the database; their hashes do."""
    record, text = store.create("scheduler", ["plan:read"], seconds=60)
    session, _ = store.open_session(record)
    assert store.verify_session(session) == record
    secret = text[21:]
    assert len(secret) == 43
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert record.id.encode() in kept
    for hidden in (text, secret, secret[:16], secret[-16:], session, session[:16]):
        assert hidden.encode() not in kept


def test_secrets_are_compared_in_constant_time(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `hmac.compare_digest`, once for each text, also where there is no such token."""
    compared: list[int] = []
    constant_time = hmac.compare_digest

    def compare(first: str, second: str) -> bool:
        compared.append(len(first))
        return constant_time(first, second)

    _, text = store.create("scheduler", ["plan:read"], seconds=None)
    monkeypatch.setattr(tokens_module.hmac, "compare_digest", compare)
    for given in (text, text[:-1] + "_", "abt_0000000000000000_" + text[21:], "nonsense"):
        store.verify(given)
    assert compared == [64] * 4


def test_a_token_ends_when_its_time_is_over(store: TokenStore, tmp_path: Path) -> None:
    """One second before it holds, one after it does not, nor does a session opened with it."""
    record, text = store.create("short", ["plan:read"], seconds=600)
    session, seconds = store.open_session(record)
    assert seconds >= 3600
    assert record.expires_at is not None
    assert abs(record.expires_at - time.time() - 600) < 5
    move_clock(tmp_path / "s.sqlite3", record.id, 590)
    assert store.verify(text) is not None
    assert store.verify_session(session) is not None
    move_clock(tmp_path / "s.sqlite3", record.id, 11)
    assert store.verify(text) is None
    assert store.verify_session(session) is None


def test_a_revoked_token_ends_with_its_sessions_and_no_other(store: TokenStore, tmp_path: Path) -> None:
    """At once, and for good; the record stays to be listed."""
    record, text = store.create("one", ["plan:read"], seconds=None)
    _, other = store.create("two", ["plan:read"], seconds=None)
    session, _ = store.open_session(record)
    revoked = store.revoke(record.id)
    assert revoked is not None
    assert revoked.revoked_at is not None
    assert store.verify(text) is None
    assert store.verify_session(session) is None
    assert store.verify(other) is not None
    with contextlib.closing(sqlite3.connect(tmp_path / "s.sqlite3")) as connection:
        assert connection.execute("SELECT count(*) FROM session").fetchone() == (0,)
    again = store.revoke(record.id)
    assert again is not None
    assert again.revoked_at == revoked.revoked_at
    assert store.revoke("0000000000000000") is None
    assert [one.name for one in store.list_all()] == ["one", "two"]


def test_a_session_is_closed_alone(store: TokenStore) -> None:
    """Its token and the others' sessions go on."""
    record, text = store.create("one", ["plan:read"], seconds=None)
    first, _ = store.open_session(record)
    second, _ = store.open_session(record)
    store.close_session(first)
    assert store.verify_session(first) is None
    assert store.verify_session(second) == record
    assert store.verify(text) == record
    assert store.verify_session("") is None


@pytest.mark.parametrize(
    ("held", "allowed"),
    [("plan:read", {"plan:read"}), ("probe:write", {"plan:read", "probe:write"}), ("admin", set(SCOPES))],
)
def test_each_scope_holds_those_before_it(held: str, allowed: set[str]) -> None:
    """And none after it; a token without any allows nothing."""
    record = TokenRecord(id="", name="", scopes=(held,), created_at=0, expires_at=None, revoked_at=None)  # type: ignore[arg-type]
    assert {scope for scope in SCOPES if record.allows(scope)} == allowed
    nothing = TokenRecord(id="", name="", scopes=(), created_at=0, expires_at=None, revoked_at=None)
    assert not any(nothing.allows(scope) for scope in SCOPES)


def test_from_the_first_token_on_everything_is_closed_for_good(tmp_path: Path) -> None:
    """Made by another process while the service runs; also after the last is revoked; the health routes stay open."""
    settings = make_settings(tmp_path)
    with (
        running_service(settings, executor=FakeExecutor(succeeding)) as service,
        open_database(settings.database_url) as elsewhere,
    ):
        tokens = TokenStore(elsewhere)
        assert statuses(service) == {200}
        record, text = tokens.create("scheduler", ["plan:read"], seconds=None)
        assert statuses(service) == {401}
        bearer = {"Authorization": f"Bearer {text}"}
        assert statuses(service, bearer) == {200}
        assert service.client.post("/v1/probes", json={}, headers=bearer).status_code in {403, 422}
        tokens.revoke(record.id)
        assert statuses(service, bearer) == {401}
        assert statuses(service) == {401}
        assert {service.client.get(path).status_code for path in ("/livez", "/readyz")} == {200}


def statuses(service: RunningService, headers: dict[str, str] | None = None) -> set[int]:
    query = "/v1/plan?workload=gpt2&gpu=L4&target=8"
    paths = (query, "/v1/measurements", "/v1/workloads", "/v1/gpus", "/v1/probes", "/metrics")
    return {service.client.get(path, headers=headers).status_code for path in paths}


def test_a_token_that_was_remembered_ends_with_its_time(tmp_path: Path) -> None:
    """A service that has seen it before lets it in no longer, although nothing in the database changed."""
    with running_service(make_settings(tmp_path), executor=FakeExecutor(succeeding)) as service:
        _, text = service.services.tokens.create("short", ["plan:read"], seconds=1.0)
        bearer = {"Authorization": f"Bearer {text}"}
        assert service.client.get("/v1/gpus", headers=bearer).status_code == 200
        time.sleep(1.1)
        assert service.client.get("/v1/gpus", headers=bearer).status_code == 401
