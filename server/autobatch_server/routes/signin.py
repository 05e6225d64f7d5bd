"""Signing in to the pages with a token, and out again."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections import OrderedDict
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import RedirectResponse
from starlette.concurrency import run_in_threadpool

from autobatch_server.access import COOKIE
from autobatch_server.documents import PageRoute, read_form, sign_in_page
from autobatch_server.routes.parts import Served

__all__ = ["AttemptLimit", "router", "safe_path"]

router = APIRouter(include_in_schema=False, route_class=PageRoute)

_WRONG = "This token does not hold: it is mistyped, expired or revoked."
# One slash and not two; browsers read a backslash as a slash, and leave out tabs and line ends.
_OWN_PATH = re.compile(r"/(?![/\\])[^\\\x00-\x20\x7f]*")
_DELAY_SECONDS = 0.3
_LONGEST_PATH = 2048


def safe_path(path: str) -> str:
    """A path of this service to go to, as a form names it; the first page where it could lead elsewhere."""
    return path if len(path) <= _LONGEST_PATH and _OWN_PATH.fullmatch(path) else "/"


class AttemptLimit:
    """How many wrong tokens may be tried: some at once, then one in a while, for each address and for all together."""

    def __init__(
        self, *, burst: int = 10, per_second: float = 0.5, burst_of_all: int = 100, per_second_of_all: float = 10.0
    ) -> None:
        """Set the bounds."""
        self._own, self._all = (float(burst), per_second), (float(burst_of_all), per_second_of_all)
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def wait_seconds(self, address: str) -> float:
        """Seconds until another attempt of an address is taken; 0 where it is taken now."""
        with self._lock:
            return max(self._wait(address, self._own), self._wait("", self._all))

    def count(self, address: str) -> None:
        """Count a wrong token."""
        with self._lock:
            for key, bounds in ((address, self._own), ("", self._all)):
                self._left[key] = (self._filled(key, bounds) - 1.0, time.monotonic())
                self._left.move_to_end(key)
            while len(self._left) > 1024:
                self._left.popitem(last=False)

    def _wait(self, key: str, bounds: tuple[float, float]) -> float:
        return max(0.0, (1.0 - self._filled(key, bounds)) / bounds[1])

    def _filled(self, key: str, bounds: tuple[float, float]) -> float:
        burst, per_second = bounds
        left, at = self._left.get(key, (burst, 0.0))
        return min(burst, left + (time.monotonic() - at) * per_second)


def _limit_of(request: Request) -> AttemptLimit:
    """The limit of this process, made when it is first asked for."""
    state = request.app.state
    if not hasattr(state, "sign_in_attempts"):
        state.sign_in_attempts = AttemptLimit()
    limit: AttemptLimit = state.sign_in_attempts
    return limit


@router.get("/login")
def show_form() -> Response:
    """Go to the first page, which has the form where there is no session."""
    return RedirectResponse("/", status_code=303)


@router.post("/login")
async def sign_in(
    request: Request,
    services: Served,
    form: Annotated[dict[str, str], Depends(read_form)],
    limit: Annotated[AttemptLimit, Depends(_limit_of)],
) -> Response:
    """Open a session for who has a token, and go on to where they wanted to."""
    after = safe_path(form.get("next", "/"))
    address = request.client.host if request.client else "unknown"
    wait = limit.wait_seconds(address)
    if wait:
        seconds = str(int(wait) + 1)
        wrong = f"Too many wrong tokens came from your address: try again in {seconds} s."
        return sign_in_page(request, status=429, wrong=wrong, after=after, headers={"Retry-After": seconds})
    record = await run_in_threadpool(services.tokens.verify, form.get("token", "").strip())
    if record is None:
        limit.count(address)
        await asyncio.sleep(_DELAY_SECONDS)
        return sign_in_page(request, wrong=_WRONG, after=after)
    session_id, seconds_left = await run_in_threadpool(services.tokens.open_session, record)
    response = RedirectResponse(after, status_code=303)
    response.set_cookie(
        COOKIE,
        session_id,
        max_age=int(seconds_left),
        path="/",
        httponly=True,
        samesite="strict",
        secure=_came_encrypted(request),
    )
    return response


def _came_encrypted(request: Request) -> bool:
    """Whether the browser speaks https, to us or to a proxy before us: its Origin says so."""
    return request.url.scheme == "https" or request.headers.get("origin", "").startswith("https://")


@router.post("/logout")
def sign_out(request: Request, services: Served) -> Response:
    """End the session."""
    session_id = request.cookies.get(COOKIE)
    if session_id:
        services.tokens.close_session(session_id)
    response = RedirectResponse("/", status_code=303)
    response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict", secure=_came_encrypted(request))
    return response
