"""`/livez`, `/readyz` and `/metrics`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool

from autobatch_server.problems import ProblemError, problem_responses
from autobatch_server.routes.parts import COMMON_PROBLEMS, Reader, Served

__all__ = ["router"]

router = APIRouter(tags=["operation"])

_METRICS_EXAMPLE = """\
# HELP autobatch_oom_after_plan_total Out-of-memory errors reported of trainings that took a size from a plan of this service.
# TYPE autobatch_oom_after_plan_total counter
autobatch_oom_after_plan_total 0.0
"""


_OK = {
    "description": "it does",
    "content": {"text/plain": {"schema": {"type": "string", "const": "ok"}, "example": "ok"}},
}


@router.get(
    "/livez",
    response_class=PlainTextResponse,
    responses={200: _OK, **problem_responses("bad-http", "host-refused", "internal-error")},
    openapi_extra={"security": []},
    summary="Whether the process lives",
)
async def live() -> str:
    """Answer `ok` as long as the process can answer at all."""
    return "ok"


@router.get(
    "/readyz",
    response_class=PlainTextResponse,
    responses={
        200: _OK,
        **problem_responses("bad-http", "host-refused", "internal-error", "store-unavailable", "shutting-down"),
    },
    openapi_extra={"security": []},
    summary="Whether requests can be served",
)
async def ready(services: Served, http: Request) -> str:
    """Answer `ok` where the database answers and takes writes, and the service is not on its way down."""
    if http.app.state.closing.is_set():
        raise ProblemError("shutting-down", "ask another process, or this one's successor")
    await services.freshness.number()
    await run_in_threadpool(services.database.check)
    return "ok"


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses={
        200: {
            "description": "counters and gauges, in Prometheus' text form",
            "content": {"text/plain": {"schema": {"type": "string"}, "example": _METRICS_EXAMPLE}},
        },
        **problem_responses(*COMMON_PROBLEMS),
    },
    summary="Metrics for Prometheus",
)
def metrics(services: Served, principal: Reader) -> Response:
    """Counters and gauges in Prometheus' text form; `autobatch_oom_after_plan_total` counts broken promises."""
    del principal
    return Response(services.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
