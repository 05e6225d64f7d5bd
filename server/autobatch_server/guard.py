"""What stands before every route: the request's id, host and origin, the body's size and depth, headers, the log."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

from autobatch_server.bodies import BodyError, depth_exceeds, is_json, read_strictly
from autobatch_server.problems import ProblemError, problem_response, request_id

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from autobatch_server.metrics import Metrics

__all__ = ["Guard"]

_LOG = logging.getLogger("autobatch_server.access")
_SAFE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
_DEEPEST = 32
_LONGEST_READ_SECONDS = 30.0
_LONGEST_LOGGED = 256
# RFC 9110, 7.2: a name or an address, and perhaps a port; nothing else that a proxy or a browser might read as another host.
_HOST = re.compile(r"([a-z0-9_.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?", re.ASCII)
_ORIGIN = re.compile(r"(https?)://(.+)", re.ASCII)
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
_INSIDE = "the service's log says more under the request's id"
_POLICY = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


class _GoneError(Exception):
    """The client went away before its request was there."""


class Guard:
    """ASGI middleware: refuses what no route should see, and adds what every answer has."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Collection[str],
        body_limit_bytes: int,
        metrics: Metrics,
        body_seconds: float = _LONGEST_READ_SECONDS,
    ) -> None:
        """Wrap an application.

        Args:
            app: what is guarded.
            hosts: names under which the service is reached, besides loopback ones.
            body_limit_bytes: the largest body.
            metrics: where requests are counted.
            body_seconds: the longest time that a body may take to come.
        """
        self._app = app
        self._hosts = _LOOPBACK_NAMES | {host.lower() for host in hosts}
        self._limit = body_limit_bytes
        self._body_seconds = body_seconds
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "websocket":  # there are none, and one would pass by every check here
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        own_id = f"req_{secrets.token_hex(12)}"
        token = request_id.set(own_id)
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _add_headers(message, own_id)
            await send(message)

        try:
            try:
                receive = await self._check(scope, receive)
            except ProblemError as problem:
                await problem_response(problem)(scope, receive, answer)
                return
            except _GoneError:
                return
            await self._app(scope, receive, answer)
        except Exception:  # noqa: BLE001 - the last boundary: what nobody translated is logged, and nothing of it is told
            _LOG.exception("request failed")
            if not status:
                await problem_response(ProblemError("internal-error", _INSIDE))(scope, receive, answer)
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "(none)")
            self._metrics.count_request(scope["method"], route, status, seconds)
            if _LOG.isEnabledFor(logging.INFO):
                extra = {
                    "method": scope["method"],
                    "path": scope["path"][:_LONGEST_LOGGED],
                    "status": status,
                    "seconds": round(seconds, 6),
                    "probe_id": (scope.get("path_params") or {}).get("probe_id"),
                }
                _LOG.info("request", extra=extra)
            request_id.reset(token)

    async def _check(self, scope: Scope, receive: Receive) -> Receive:
        headers = Headers(scope=scope)
        self._check_host(headers)
        if scope["method"] in _SAFE:
            # Nothing is asked for by a body here. What comes all the same is read within the limits, and dropped.
            if _announces_body(headers):
                await self._read(headers, receive)
                return _replay(b"", receive)
            return receive
        _check_origin(headers)
        body = await self._read(headers, receive)
        if depth_exceeds(body, _DEEPEST):
            raise ProblemError("body-too-deep", f"the body is nested more than {_DEEPEST} levels deep: send it flatter")
        if body and is_json(headers.get("content-type", "")):
            try:
                read_strictly(body)
            except BodyError as error:
                raise ProblemError("malformed-json", f"{error}: send an object, as /docs shows") from None
        return _replay(body, receive)

    def _check_host(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        match = _HOST.fullmatch(hosts[0].lower()) if len(hosts) == 1 else None
        if match is None or match[1] not in self._hosts:
            detail = "send one Host header, with a name that the service's setting allowed_hosts lists"
            raise ProblemError("host-refused", detail, _CLOSE if _announces_body(headers) else {})

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        """Read the body, counting as it comes; what is said of its length is believed only where it is too much."""
        said = headers.get("content-length", "")
        if said.isdecimal() and (len(said) > 20 or int(said) > self._limit):
            raise self._too_large(said)
        try:
            async with asyncio.timeout(self._body_seconds):
                return await self._collect(receive)
        except TimeoutError:
            detail = f"the body did not come within {self._body_seconds:g} s: send it faster"
            raise ProblemError("body-too-slow", detail, _CLOSE) from None

    async def _collect(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _GoneError
            body += message.get("body", b"")
            if len(body) > self._limit:
                raise self._too_large(f"more than {self._limit}")
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self, said: str) -> ProblemError:
        detail = f"the body has {said[:20]} bytes, the limit is {self._limit}"
        return ProblemError("body-too-large", detail, _CLOSE)


# Where an answer goes out before the body was read, so that what still comes is not read on without end.
_CLOSE = {"Connection": "close"}


def _announces_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0").strip("0") != ""


def _check_origin(headers: Headers) -> None:
    """Refuse what another site's page sends: browsers say so on every unsafe request."""
    detail = "requests of other sites' pages are not taken: use this service's own page"
    refused = ProblemError("origin-refused", detail, _CLOSE if _announces_body(headers) else {})
    if headers.get("sec-fetch-site", "none") not in {"none", "same-origin"}:
        raise refused
    origins = headers.getlist("origin")
    if not origins:
        return
    match = _ORIGIN.fullmatch(origins[0].lower()) if len(origins) == 1 else None
    if match is None or match[2] != headers.get("host", "").lower():
        raise refused


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _add_headers(message: Message, own_id: str) -> None:
    headers = MutableHeaders(scope=message)
    headers["X-Request-Id"] = own_id
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Referrer-Policy"] = "no-referrer"
    headers.setdefault("Content-Security-Policy", _POLICY)
    headers.setdefault("Cache-Control", "no-store")
