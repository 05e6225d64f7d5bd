"""Bearer tokens and the page's sessions: made, listed, revoked, and told apart from everything else.

A token is `abt_<id>_<secret>`. The secret has 256 random bits, so that its plain SHA-256 may be kept; it is compared in
constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from sqlalchemy import Row, delete, func, insert, select, update

from autobatch_server.tables import session, token

if TYPE_CHECKING:
    from collections.abc import Iterable

    from autobatch.store import Database

__all__ = ["SCOPES", "Scope", "TokenRecord", "TokenStore"]

Scope = Literal["plan:read", "probe:write", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
"""What a token may allow: to ask; to probe and report; to delete measurements. Each later one holds those before it."""
_TOKEN = re.compile(r"abt_([0-9a-f]{16})_([A-Za-z0-9_-]{43})", re.ASCII)
_SESSION_SECONDS = 12 * 3600.0


@dataclass(frozen=True, kw_only=True)
class TokenRecord:
    """A token without its secret."""

    id: str
    name: str
    scopes: tuple[Scope, ...]
    created_at: float
    expires_at: float | None
    revoked_at: float | None

    def allows(self, scope: Scope) -> bool:
        """Whether the token may be used for something of a scope."""
        return any(SCOPES.index(own) >= SCOPES.index(scope) for own in self.scopes)


class TokenStore:
    """The tokens of one database."""

    def __init__(self, database: Database) -> None:
        """Take the database."""
        self._database = database

    def create(self, name: str, scopes: Iterable[Scope], *, seconds: float | None) -> tuple[TokenRecord, str]:
        """Make a token; its text is returned here once and kept nowhere.

        Args:
            name: what it is for.
            scopes: what it allows.
            seconds: for how long; None for ever.
        """
        token_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
        with self._database.write() as connection:
            now = self._database.now()
            connection.execute(
                insert(token).values(
                    id=token_id,
                    name=name,
                    secret_hash=_hash(secret),
                    scopes=" ".join(scopes),
                    created_at=now,
                    expires_at=None if seconds is None else now + seconds,
                )
            )
            self._database.raise_generation(connection)
            row = connection.execute(select(token).where(token.c.id == token_id)).one()
        return _record(row), f"abt_{token_id}_{secret}"

    def list_all(self) -> list[TokenRecord]:
        """Every token there ever was, the oldest first."""
        with self._database.read() as connection:
            return [_record(row) for row in connection.execute(select(token).order_by(token.c.created_at))]

    def revoke(self, token_id: str) -> TokenRecord | None:
        """End a token and the sessions opened with it; None where there is none of that id."""
        with self._database.write() as connection:
            connection.execute(
                update(token)
                .where(token.c.id == token_id, token.c.revoked_at.is_(None))
                .values(revoked_at=self._database.now())
            )
            connection.execute(delete(session).where(session.c.token_id == token_id))
            self._database.raise_generation(connection)
            row = connection.execute(select(token).where(token.c.id == token_id)).one_or_none()
        return None if row is None else _record(row)

    def exist(self) -> bool:
        """Whether any token was ever made: from then on nothing is open, also after the last is revoked."""
        with self._database.read() as connection:
            return bool(connection.execute(select(func.count()).select_from(token)).scalar_one())

    def verify(self, text: str) -> TokenRecord | None:
        """The token that a text is, where it is one that holds now."""
        match = _TOKEN.fullmatch(text)
        with self._database.read() as connection:
            row = connection.execute(
                select(token).where(token.c.id == (match[1] if match else ""), *self._holding())
            ).one_or_none()
        # The same work is done for a token that there is not: time tells nothing.
        expected = row.secret_hash if row is not None else _hash("")
        matches = hmac.compare_digest(expected, _hash(match[2] if match else ""))
        return _record(row) if row is not None and matches and match else None

    def open_session(self, record: TokenRecord) -> tuple[str, float]:
        """Open a session of the page; returns its id, kept nowhere, and the seconds that it lasts."""
        session_id = secrets.token_urlsafe(32)
        with self._database.write() as connection:
            now = self._database.now()
            connection.execute(delete(session).where(session.c.expires_at < now))
            connection.execute(
                insert(session).values(
                    id_hash=_hash(session_id), token_id=record.id, created_at=now, expires_at=now + _SESSION_SECONDS
                )
            )
        return session_id, _SESSION_SECONDS

    def verify_session(self, session_id: str) -> TokenRecord | None:
        """The token behind a session, where both hold now."""
        query = (
            select(token)
            .join(session, session.c.token_id == token.c.id)
            .where(
                session.c.id_hash == _hash(session_id), session.c.expires_at > self._database.now(), *self._holding()
            )
        )
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _record(row)

    def close_session(self, session_id: str) -> None:
        """End a session."""
        with self._database.write() as connection:
            connection.execute(delete(session).where(session.c.id_hash == _hash(session_id)))

    def _holding(self) -> tuple[Any, ...]:
        return (
            token.c.revoked_at.is_(None),
            token.c.expires_at.is_(None) | (token.c.expires_at > self._database.now()),
        )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _record(row: Row[Any]) -> TokenRecord:
    return TokenRecord(
        id=row.id,
        name=row.name,
        scopes=tuple(scope for scope in SCOPES if scope in row.scopes.split()),
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )
