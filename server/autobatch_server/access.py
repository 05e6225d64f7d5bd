"""Who asks, and what they may: bearer tokens for programs, a session cookie for the page."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from fastapi import Request, Security
from fastapi.security import APIKeyCookie, HTTPBearer
from fastapi.security.http import HTTPAuthorizationCredentials
from starlette.concurrency import run_in_threadpool

from autobatch_server.problems import ProblemError
from autobatch_server.tokens import SCOPES, Scope, TokenRecord

if TYPE_CHECKING:
    from autobatch_server.freshness import Freshness
    from autobatch_server.tokens import TokenStore

__all__ = ["COOKIE", "Authenticator", "Principal", "require"]

COOKIE = "autobatch_session"
_MOST_REMEMBERED = 1000
# A credential is some 80 characters; what is longer is no token of ours and is not looked at.
_LONGEST_CREDENTIAL = 256
_BEARER = HTTPBearer(
    auto_error=False,
    scheme_name="token",
    description="A token from `autobatch token create`. On a loopback address where none was ever made, everything is open.",
)
_SESSION = APIKeyCookie(
    name=COOKIE,
    auto_error=False,
    scheme_name="session",
    description="The page's session, opened with a token: an HttpOnly, SameSite=Strict cookie, for browsers.",
)


@dataclass(frozen=True, kw_only=True)
class Principal:
    """Who asks."""

    token: TokenRecord | None
    """None where no token was ever made, and everything is open."""

    @property
    def name(self) -> str:
        """Tells askers apart."""
        return self.token.id if self.token else "anyone"

    def allows(self, scope: Scope) -> bool:
        """Whether something of a scope is allowed."""
        return self.token is None or self.token.allows(scope)


class Authenticator:
    """Tells who asks; what it found out is remembered for as long as the database did not change."""

    def __init__(self, tokens: TokenStore, freshness: Freshness) -> None:
        """Take the tokens."""
        self._tokens, self._freshness = tokens, freshness
        self._number = -1
        self._known: dict[bytes, TokenRecord] = {}
        self._closed = True

    async def authenticate(self, request: Request, scope: Scope, *, number: int | None = None) -> Principal:
        """Say who asks.

        Args:
            request: whose headers tell.
            scope: what it needs.
            number: the database's number, where it was just read.

        Raises:
            ProblemError: nobody that is known, or somebody who may not.
            StoreUnavailableError: the database is away.
        """
        if number is None:
            number = await self._freshness.number()
        if number != self._number:
            self._known, self._closed = {}, await run_in_threadpool(self._tokens.exist)
            self._number = number
        if not self._closed:
            return Principal(token=None)
        record = await self._find(request)
        if record is None:
            raise ProblemError("unauthenticated", "send a token that holds: Authorization: Bearer abt_…")
        if not record.allows(scope):
            held = ", ".join(record.scopes) or "nothing"
            raise ProblemError("forbidden", f"this needs the scope {scope}, the token has {held}")
        return Principal(token=record)

    async def _find(self, request: Request) -> TokenRecord | None:
        headers = request.headers.getlist("authorization")
        if not headers:
            session_id = request.cookies.get(COOKIE)
            if not session_id or len(session_id) > _LONGEST_CREDENTIAL:
                return None
            return await run_in_threadpool(self._tokens.verify_session, session_id)
        kind, _, text = headers[0].partition(" ")
        # Of two headers a proxy might have checked the other one.
        if len(headers) > 1 or kind.lower() != "bearer" or len(text) > _LONGEST_CREDENTIAL:
            return None
        # Known by their hashes, so that no secret lies about in memory and no comparison tells where two texts part.
        digest = hashlib.sha256(text.strip().encode()).digest()
        number = self._number
        record = self._known.get(digest)
        if record is None:
            record = await run_in_threadpool(self._tokens.verify, text.strip())
            # A token that was revoked while it was looked up must not be remembered beyond that.
            if record is not None and number == self._number and len(self._known) < _MOST_REMEMBERED:
                self._known[digest] = record
        if record is not None and record.expires_at is not None and record.expires_at <= time.time():
            return None
        return record


def require(scope: Scope) -> Callable[..., Awaitable[Principal]]:
    """Make the dependency of a route that needs a scope."""
    if scope not in SCOPES:
        raise ValueError(f"scope {scope!r} is none of {', '.join(SCOPES)}")

    async def check(
        request: Request,
        credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)],
        session: Annotated[str | None, Security(_SESSION)],
    ) -> Principal:
        del credentials, session  # described for OpenAPI by being asked for
        authenticator: Authenticator = request.app.state.services.authenticator
        return await authenticator.authenticate(request, scope)

    check.required_scope = scope  # type: ignore[attr-defined] # so that a test finds the routes that ask for none
    return check
