"""HTML documents: the templates, their content security policy, and every problem as a page that a person can read."""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
import importlib.resources
import json
import secrets
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from fastapi.routing import APIRoute
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.exceptions import HTTPException as FrameworkHTTPException

from autobatch.store import StoreUnavailableError
from autobatch_server.gpus import GpuProblem
from autobatch_server.pages import outcome_words, plan_words, window_words
from autobatch_server.problems import ProblemError
from autobatch_server.queue import QueueFullError, ReusedKeyError
from autobatch_server.workloads import WorkloadProblem

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ["STATIC", "PageRoute", "read_form", "render", "sign_in_page", "static_file"]

STATIC = {"page.css": "text/css", "page.js": "text/javascript"}
"""The files that pages refer to, with their media types."""

_KNOWN = (
    ProblemError,
    WorkloadProblem,
    GpuProblem,
    QueueFullError,
    ReusedKeyError,
    StoreUnavailableError,
    RequestValidationError,
    HTTPException,
    FrameworkHTTPException,
)
_MOST_FIELDS = 32


def render(
    template: str, *, status: int = 200, bare: bool = False, headers: dict[str, str] | None = None, **values: Any
) -> HTMLResponse:
    """Make a page.

    Args:
        template: its file in `templates/`.
        status: the HTTP status.
        bare: whether it carries its style sheet within itself, allowed by a nonce: for who may fetch no file, and for
            when the service cannot serve one.
        headers: further headers.
        values: what the template shows; escaped by it.
    """
    nonce = secrets.token_urlsafe(16) if bare else ""
    text = _environment().get_template(template).render(nonce=nonce, **values)
    style = f"'nonce-{nonce}'" if bare else "'self'"
    policy = (
        f"default-src 'none'; script-src 'self'; style-src {style}; img-src 'self' data:; connect-src 'self'; "
        "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    )
    return HTMLResponse(text, status_code=status, headers={"Content-Security-Policy": policy, **(headers or {})})


def sign_in_page(
    request: Request,
    *,
    status: int = 401,
    wrong: str = "",
    after: str | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """Make the form that takes a token.

    Args:
        request: what was asked for; a page is gone back to after signing in.
        status: the HTTP status.
        wrong: what was wrong with the token that was given.
        after: the path to go to after signing in, in place of the one that was asked for.
        headers: further headers.
    """
    query = f"?{request.url.query}" if request.url.query else ""
    asked = f"{request.url.path}{query}" if request.method == "GET" else "/"
    with_scheme = {"WWW-Authenticate": "Bearer", **(headers or {})}
    return render("sign_in.html", status=status, bare=True, headers=with_scheme, wrong=wrong, after=after or asked)


class PageRoute(APIRoute):
    """A route for people: a problem is a page, and without a session the page is the form that takes a token."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the route's own handler."""
        serve = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await serve(request)
            except _KNOWN as error:
                return await _problem_page(request, error)

        return handle


async def _problem_of(request: Request, error: Exception) -> tuple[dict[str, Any], dict[str, str]]:
    """The problem document that a program would get for an error, and the headers that people's pages take over."""
    handlers = request.app.exception_handlers
    handler = next(handlers[kind] for kind in type(error).__mro__ if kind in handlers)
    document = await handler(request, error)
    headers = {name: document.headers[name] for name in ("retry-after", "allow") if name in document.headers}
    return json.loads(document.body), headers


async def _problem_page(request: Request, error: Exception) -> Response:
    problem, headers = await _problem_of(request, error)
    if problem["code"] == "unauthenticated":
        return sign_in_page(request)
    tries_again = problem["status"] == 503 and request.method == "GET"
    return render(
        "problem.html", status=problem["status"], bare=True, headers=headers, problem=problem, tries_again=tries_again
    )


async def read_form(request: Request) -> dict[str, str]:
    """Read the fields of a form that a page sent; raises `ProblemError` where the body is none."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise ProblemError(
            "unsupported-media-type", "send a form, with Content-Type: application/x-www-form-urlencoded"
        )
    try:
        pairs = parse_qsl((await request.body()).decode(), keep_blank_values=True, max_num_fields=_MOST_FIELDS)
    except ValueError:
        raise ProblemError("bad-http", "the form could not be read") from None
    return dict(pairs)


@functools.cache
def static_file(name: str) -> tuple[bytes, str]:
    """The content of a file that pages refer to, and the version that stands in its address."""
    content = (importlib.resources.files("autobatch_server") / "static" / name).read_bytes()
    return content, hashlib.sha256(content).hexdigest()[:16]


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("autobatch_server"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "gib": _gib,
        "mib": _mib,
        "mebibytes": _mebibytes,
        "moment": _moment,
        "iso": _iso,
        "lasting": _lasting,
        "plan_words": plan_words,
        "window_words": window_words,
        "outcome_words": outcome_words,
        "number": lambda value: f"{value:,}",
    }
    environment.globals["version_of"] = lambda name: static_file(name)[1]
    environment.globals["content_of"] = lambda name: static_file(name)[0].decode()
    return environment


def _gib(size_bytes: int) -> str:
    sign = "−" if size_bytes < 0 else ""
    return f"{sign}{abs(size_bytes) / 2**30:,.2f} GiB"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"


def _mebibytes(count: int) -> str:
    return f"{'−' if count < 0 else ''}{abs(count):,} MiB"


def _iso(seconds: float) -> str:
    return dt.datetime.fromtimestamp(seconds, tz=dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _moment(seconds: float) -> str:
    return dt.datetime.fromtimestamp(seconds, tz=dt.UTC).strftime("%Y-%m-%d %H:%M:%S")


def _lasting(seconds: float) -> str:
    """Write a duration as the page's script does: `0:07`, `1:02:03`."""
    whole = max(0, int(seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
