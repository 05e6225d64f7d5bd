"""Everything that can go wrong over HTTP: one table of codes, one form (RFC 9457), nothing of the inside in it."""

from __future__ import annotations

import contextvars
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.routing import Match

from autobatch.store import StoreUnavailableError
from autobatch_server.bodies import is_json
from autobatch_server.gpus import GpuProblem
from autobatch_server.queue import QueueFullError, ReusedKeyError
from autobatch_server.workloads import WorkloadProblem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from fastapi import FastAPI, Request
    from starlette.responses import Response

__all__ = [
    "CODES",
    "ProblemDocument",
    "ProblemError",
    "install_problem_handlers",
    "problem_response",
    "problem_responses",
    "request_id",
]

MEDIA_TYPE = "application/problem+json"

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
"""The id of the request that is being served, found in every log line and problem document of it."""


@dataclass(frozen=True, kw_only=True)
class _Code:
    status: int
    title: str


CODES: Mapping[str, _Code] = {
    "invalid-request": _Code(status=422, title="The request is not as it should be"),
    "malformed-json": _Code(status=400, title="The body is not JSON"),
    "bad-parameter": _Code(status=422, title="A parameter of the workload is not as declared"),
    "no-plan": _Code(status=422, title="The target cannot be hit under this split"),
    "invalid-report": _Code(status=422, title="The report is not one of autobatch's"),
    "unknown-workload": _Code(status=404, title="There is no such workload"),
    "unknown-gpu": _Code(status=404, title="There is no such card"),
    "ambiguous-gpu": _Code(status=422, title="Several cards go by that name"),
    "not-found": _Code(status=404, title="There is nothing here"),
    "method-not-allowed": _Code(status=405, title="This method is not for this address"),
    "unauthenticated": _Code(status=401, title="A token is needed"),
    "forbidden": _Code(status=403, title="The token does not allow this"),
    "origin-refused": _Code(status=403, title="The request comes from another site"),
    "host-refused": _Code(status=421, title="The service does not go by this name"),
    "already-ended": _Code(status=409, title="The probe has ended"),
    "key-reused": _Code(status=422, title="The idempotency key came before with another request"),
    "bad-key": _Code(status=400, title="The idempotency key is malformed"),
    "body-too-large": _Code(status=413, title="The body is too large"),
    "body-too-slow": _Code(status=408, title="The body comes too slowly"),
    "body-too-deep": _Code(status=400, title="The body is nested too deeply"),
    "unsupported-media-type": _Code(status=415, title="The body's type is not taken"),
    "bad-http": _Code(status=400, title="The request is malformed"),
    "queue-full": _Code(status=429, title="Too many probes are waiting"),
    "too-many-streams": _Code(status=429, title="Too many streams are open"),
    "no-matching-runner": _Code(status=503, title="No runner can probe this card"),
    "store-unavailable": _Code(status=503, title="The database is not available"),
    "shutting-down": _Code(status=503, title="The service is shutting down"),
    "internal-error": _Code(status=500, title="The service failed"),
}
"""Each code with its status and title; a code never changes its meaning."""


class ProblemDocument(BaseModel):
    """What every error looks like (RFC 9457)."""

    model_config = ConfigDict(
        json_schema_extra={"required": ["type", "title", "status", "detail", "code", "request_id"]}
    )

    type: str = Field(description="a URI for the code, stable", examples=["urn:autobatch:problem:unknown-workload"])
    title: str = Field(description="what the code means")
    status: int = Field(description="the HTTP status", examples=[404])
    detail: str = Field(description="what is wrong with this request, and the way out")
    code: str = Field(description="stable, for programs", examples=["unknown-workload"])
    request_id: str = Field(description="found in the service's log")
    errors: list[dict[str, str]] | None = Field(
        None, description="for invalid-request: each place and what is wrong there"
    )


class ProblemError(Exception):
    """A problem to be answered with."""

    def __init__(
        self,
        code: str,
        detail: str,
        headers: Mapping[str, str] | None = None,
        errors: Sequence[Mapping[str, str]] = (),
    ) -> None:
        """Take the code, what is wrong and the way out, headers to send, and for `invalid-request` each place."""
        super().__init__(code)
        self.code, self.detail, self.headers, self.errors = code, detail, dict(headers or {}), errors


def problem_response(problem: ProblemError) -> JSONResponse:
    """Write a problem document."""
    code = CODES[problem.code]
    content: dict[str, Any] = {
        "type": f"urn:autobatch:problem:{problem.code}",
        "title": code.title,
        "status": code.status,
        "detail": problem.detail,
        "code": problem.code,
        "request_id": request_id.get(),
    }
    if problem.errors:
        content["errors"] = [dict(error) for error in problem.errors]
    headers = dict(problem.headers)
    if code.status in {429, 503}:
        headers.setdefault("Retry-After", "5")
    if code.status == 401:
        headers.setdefault("WWW-Authenticate", "Bearer")
    return JSONResponse(content, status_code=code.status, headers=headers, media_type=MEDIA_TYPE)


def problem_responses(*codes: str) -> dict[int | str, dict[str, Any]]:
    """Describe, for OpenAPI, the problems that a route answers with."""
    described: dict[int | str, dict[str, Any]] = {}
    for name in dict.fromkeys(codes):
        code = CODES[name]
        entry = described.setdefault(
            code.status, {"description": "", "content": {MEDIA_TYPE: {"schema": _SCHEMA, "examples": {}}}}
        )
        entry["description"] += f"{'; ' if entry['description'] else ''}`{name}`: {code.title}"
        entry["content"][MEDIA_TYPE]["examples"][name] = {"value": _example(name)}
        if code.status in {429, 503}:
            entry["headers"] = {"Retry-After": _RETRY_AFTER}
        if code.status == 401:
            entry["headers"] = {"WWW-Authenticate": _WWW_AUTHENTICATE}
    return described


def _example(name: str) -> dict[str, Any]:
    example = {
        "type": f"urn:autobatch:problem:{name}",
        "title": CODES[name].title,
        "status": CODES[name].status,
        "detail": "what is wrong here, and the way out",
        "code": name,
        "request_id": "req_019aa3f0c1b2a3d4e5f60718",
    }
    if name == "invalid-request":
        found = {"place": "query.target", "problem": "Input should be greater than or equal to 1"}
        return {**example, "detail": f"{found['place']}: {found['problem']}", "errors": [found]}
    return example


_RETRY_AFTER = {"description": "seconds to wait", "required": True, "schema": {"type": "integer", "minimum": 0}}
_WWW_AUTHENTICATE = {"description": "`Bearer`", "required": True, "schema": {"type": "string", "const": "Bearer"}}
_SCHEMA = {"$ref": "#/components/schemas/ProblemDocument"}


def install_problem_handlers(app: FastAPI) -> None:
    """Answer every exception with a problem document."""

    async def on_problem(request: Request, error: Exception) -> Response:
        return problem_response(_as_problem(error, request))

    for kind in (
        ProblemError,
        WorkloadProblem,
        GpuProblem,
        QueueFullError,
        ReusedKeyError,
        StoreUnavailableError,
        RequestValidationError,
        HTTPException,
    ):
        app.add_exception_handler(kind, on_problem)


def _as_problem(error: Exception, request: Request) -> ProblemError:
    """Translate, at this one place; what is not known goes on to the guard, which logs it and says nothing of it."""
    if isinstance(error, ProblemError):
        return error
    if isinstance(error, WorkloadProblem | GpuProblem):
        return ProblemError(error.code, error.detail)
    if isinstance(error, QueueFullError | ReusedKeyError):
        return _of_queue(error)
    if isinstance(error, StoreUnavailableError):
        return ProblemError("store-unavailable", "nothing was changed; try again in some seconds", {"Retry-After": "2"})
    if isinstance(error, RequestValidationError):
        return _invalid(error, request.headers.get("content-type", ""))
    if isinstance(error, HTTPException):
        return _of_framework(error, request)
    raise error


def _of_queue(error: QueueFullError | ReusedKeyError) -> ProblemError:
    if isinstance(error, ReusedKeyError):
        return ProblemError("key-reused", "this Idempotency-Key was sent with another body before: take a new key")
    whose = "of this token " if error.of_token else ""
    detail = f"{error.waiting} probes {whose}are waiting, the limit is {error.limit}: try again later"
    return ProblemError("queue-full", detail, {"Retry-After": "30"})


def _invalid(error: RequestValidationError, content_type: str) -> ProblemError:
    findings = [
        {"place": ".".join(map(str, entry["loc"]))[:300], "problem": str(entry["msg"])[:300]}
        for entry in error.errors()
    ]
    if any(entry["type"] == "json_invalid" for entry in error.errors()):
        return ProblemError("malformed-json", "the body is not JSON: send an object, as /docs shows")
    whole_body = any(tuple(entry["loc"]) == ("body",) and entry["type"] != "missing" for entry in error.errors())
    if whole_body and not is_json(content_type):  # FastAPI hands it on unread: another site's form could have sent it
        return ProblemError("unsupported-media-type", "send JSON, with Content-Type: application/json")
    first = findings[0] if findings else {"place": "request", "problem": "is not as it should be"}
    return ProblemError("invalid-request", f"{first['place']}: {first['problem']}", errors=findings[:20])


def _of_framework(error: HTTPException, request: Request) -> ProblemError:
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return ProblemError("not-found", "there is no such address: /docs lists them", headers)
    if error.status_code == 405:
        allowed = {**headers, "Allow": ", ".join(_methods_taken(request))}
        return ProblemError("method-not-allowed", "see the Allow header for what is taken here", allowed)
    if error.status_code == 415:
        return ProblemError("unsupported-media-type", "send JSON, with Content-Type: application/json", headers)
    if 400 <= error.status_code < 500:
        return ProblemError("bad-http", "the request could not be read", headers)
    return ProblemError("internal-error", "the service's log says more under the request's id", headers)


def _methods_taken(request: Request) -> Iterator[str]:
    """The methods of every route at an address; the framework names those of the first alone."""
    for method in ("DELETE", "GET", "PATCH", "POST", "PUT"):
        scope = {**request.scope, "method": method}
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.router.routes):
            yield method
