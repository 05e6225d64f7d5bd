"""Answers to plan queries that came before, given again without asking the routes: schedulers ask the same thing all day."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from autobatch.store import StoreUnavailableError
from autobatch_server.problems import ProblemError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from autobatch_server.services import Services

__all__ = ["PLAN_PATH", "RememberedAnswers", "tagged"]

PLAN_PATH = "/v1/plan"
# The guard counts and logs by the route, which is never asked for a remembered answer.
_ROUTE = SimpleNamespace(path=PLAN_PATH)


class RememberedAnswers:
    """ASGI middleware: answers a query that came before, by whoever may ask it, while nothing in the database changed.

    Whatever is in doubt (a token that does not hold, a database that is away) goes on to the route, which says so.
    """

    def __init__(self, app: ASGIApp, *, services: Services) -> None:
        """Wrap an application; its route for plans puts its answers into `services.answers`."""
        self._app, self._services = app, services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and scope["path"] == PLAN_PATH and scope["method"] == "GET":
            response = await self._recall(Request(scope))
            if response is not None:
                scope["route"] = _ROUTE
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _recall(self, request: Request) -> Response | None:
        services = self._services
        try:
            number = await services.freshness.number()
            known = services.answers.get(number, request.scope["query_string"])
            if known is None:
                return None
            await services.authenticator.authenticate(request, "plan:read", number=number)
        except (ProblemError, StoreUnavailableError):
            return None
        body, tag, verdict = known
        services.metrics.count_answer(verdict)
        return tagged(request.headers.get("if-none-match"), body, tag)


def tagged(known_tags: str | None, body: bytes, tag: str) -> Response:
    """Answer with a body and its tag, or with 304 where the asker has it."""
    headers = {"ETag": tag, "Cache-Control": "no-cache"}
    if known_tags is not None and (known_tags.strip() == "*" or tag in known_tags):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)
