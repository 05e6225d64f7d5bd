"""The pages for people: what runs and what was measured, one probe, one measurement."""

from __future__ import annotations

import hashlib
import json
import re
import time
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import RedirectResponse
from starlette.routing import Match

from autobatch import load_catalogue
from autobatch_server.documents import STATIC, PageRoute, read_form, render, static_file
from autobatch_server.pages import PageMemory, budget_lines, certificate, event_rows, probe_row
from autobatch_server.problems import ProblemError
from autobatch_server.queue import ENDED, ProbeRecord
from autobatch_server.routes import signin
from autobatch_server.routes.parts import Prober, Reader, Served
from autobatch_server.routes.probes import cancel_probe, post_probe
from autobatch_server.searches import Fields, Finding, search
from autobatch_server.services import Services

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Scope

__all__ = ["router"]

router = APIRouter(include_in_schema=False, route_class=PageRoute)

_MOST_RUNNING, _MOST_QUEUED, _MOST_ENDED, _MOST_MEASUREMENTS = 64, 20, 10, 20
_MOST_EVENTS = 500
_Before = Annotated[str | None, Query(pattern=r"^mea_[0-9a-f]{27}$", description="measurements older than this id")]
_Form = Annotated[dict[str, str], Depends(read_form)]


def _memory_of(request: Request) -> PageMemory:
    """What this process's pages were made from."""
    state = request.app.state
    if not hasattr(state, "page_memory"):
        state.page_memory = PageMemory()
    memory: PageMemory = state.page_memory
    return memory


_Kept = Annotated[PageMemory, Depends(_memory_of)]


@router.get("/")
def overview(request: Request, services: Served, principal: Reader, memory: _Kept, before: _Before = None) -> Response:
    """What runs, waits and ended, the measurements, and a search over them."""
    fields = Fields.of(request.query_params)
    finding = Finding(fields=fields) if fields.is_empty else search(services, fields)
    _, show = _overview_parts(services, memory, principal, before)
    return render(
        "overview.html",
        status=finding.status,
        finding=finding,
        workloads=services.catalogue.names,
        gpus=[card.name for card in load_catalogue()],
        **show(),
        **_visitor(request, principal),
    )


@router.get("/fragments/probes")
def overview_fragment(
    request: Request, services: Served, principal: Reader, memory: _Kept, before: _Before = None
) -> Response:
    """The part of the first page that changes by itself."""
    tag, show = _overview_parts(services, memory, principal, before)
    return _fragment(request, "overview_live.html", tag, show)


def _overview_parts(
    services: Services, memory: PageMemory, principal: Reader, before: str | None
) -> tuple[str, Callable[[], dict[str, Any]]]:
    """The tag of what changes, told by few queries, and a function that makes what the template shows."""
    queue = services.queue
    running = queue.list_probes(states=("running",), limit=_MOST_RUNNING)
    queued = queue.list_probes(states=("queued",), limit=_MOST_QUEUED)
    ended = queue.list_probes(states=("succeeded", "failed", "cancelled"), limit=_MOST_ENDED)
    num_queued = queue.count()["queued"] if len(queued) == _MOST_QUEUED else len(queued)
    slots = sorted((slot.basis, slot.gpu or "") for slot in services.board.slots())
    generation = services.measurements.generation()
    may_probe = principal.allows("probe:write")
    last_events = [queue.last_event(record.id) for record in running]
    tag = _tag(running, queued, ended, num_queued, slots, generation, may_probe, last_events, before)

    def show() -> dict[str, Any]:
        measurements = memory.measurement_rows(services, generation=generation, before=before, limit=_MOST_MEASUREMENTS)
        rows = {
            name: [probe_row(services, memory, record) for record in records]
            for name, records in (("running", running), ("queued", queued), ("ended", ended))
        }
        return {
            **rows,
            "num_more_queued": num_queued - len(queued),
            "num_emulated_slots": sum(basis == "emulated" for basis, _ in slots),
            "real_cards": [gpu for basis, gpu in slots if basis == "measured"],
            "measurements": measurements,
            "before": before,
            "next_page": measurements[-1].id if len(measurements) == _MOST_MEASUREMENTS else None,
            "busy": bool(running or queued),
            **_now(tag, may_probe),
        }

    return tag, show


@router.get("/probes/{probe_id}")
def probe_page(request: Request, services: Served, principal: Reader, memory: _Kept, probe_id: str) -> Response:
    """One probe: its events as they come, and what it found."""
    _, show = _probe_parts(services, memory, principal, probe_id)
    return render("probe.html", **show(), **_visitor(request, principal))


@router.get("/fragments/probes/{probe_id}")
def probe_fragment(request: Request, services: Served, principal: Reader, memory: _Kept, probe_id: str) -> Response:
    """The part of a probe's page that changes by itself."""
    tag, show = _probe_parts(services, memory, principal, probe_id)
    return _fragment(request, "probe_live.html", tag, show)


def _probe_parts(
    services: Services, memory: PageMemory, principal: Reader, probe_id: str
) -> tuple[str, Callable[[], dict[str, Any]]]:
    record = _find_probe(services, probe_id)
    may_probe = principal.allows("probe:write")
    tag = _tag(record, services.queue.last_event(probe_id), may_probe)

    def show() -> dict[str, Any]:
        events = services.queue.events_after(probe_id, 0, limit=_MOST_EVENTS)
        return {
            "row": probe_row(services, memory, record),
            "events": event_rows(events),
            "busy": record.state not in ENDED,
            **_now(tag, may_probe),
        }

    return tag, show


def _find_probe(services: Services, probe_id: str) -> ProbeRecord:
    record = services.queue.get(probe_id) if re.fullmatch(r"prb_[0-9a-f]{27}", probe_id) else None
    if record is None:
        raise ProblemError("not-found", "there is no probe of that id: the first page lists the newest")
    return record


@router.post("/probes")
def run_probe(request: Request, services: Served, principal: Prober, form: _Form) -> Response:
    """Run a probe as `POST /v1/probes` does, and go to its page; to the measurement where a fresh one answers."""
    answer = post_probe(Fields.of(form).request(), services, principal, request, None)
    found = json.loads(bytes(answer.body))
    where = f"/measurements/{found['measurement']}" if found["id"] is None else f"/probes/{found['id']}"
    return RedirectResponse(where, status_code=303)


@router.post("/probes/{probe_id}/cancel")
def end_probe(request: Request, services: Served, principal: Prober, probe_id: str) -> Response:
    """End a probe as `POST /v1/probes/{id}/cancel` does, and go to its page."""
    _find_probe(services, probe_id)
    cancel_probe(services, principal, request, probe_id)
    return RedirectResponse(f"/probes/{probe_id}", status_code=303)


@router.get("/measurements/{measurement_id}")
def measurement_page(
    request: Request, services: Served, principal: Reader, memory: _Kept, measurement_id: str
) -> Response:
    """One measurement: its curve, its facts, and the plan for a target that one types."""
    known = re.fullmatch(r"mea_[0-9a-f]{27}", measurement_id)
    measurement = services.measurements.get(measurement_id) if known else None
    if measurement is None:
        raise ProblemError("not-found", "there is no measurement of that id: the first page lists the newest")
    report = measurement.report
    given = Fields.of(request.query_params)
    asked = bool(given.target)
    fields = Fields(
        workload=measurement.workload,
        gpu=measurement.gpu,
        target=given.target or str(report.options.target),
        world_size=given.world_size if asked else str(report.options.world_size),
        split=given.split if asked else report.options.split,
    )
    finding = search(services, fields) if asked else Finding(fields=fields)
    return render(
        "measurement.html",
        status=finding.status,
        measurement=measurement,
        report=report,
        certificate=certificate(report),
        budget_lines=budget_lines(report),
        curve=memory.curve(measurement),
        finding=finding,
        may_probe=principal.allows("probe:write"),
        **_visitor(request, principal),
    )


def _visitor(request: Request, principal: Reader) -> dict[str, Any]:
    """Who looks, for the page's head."""
    signed_in = principal.token is not None and "authorization" not in request.headers
    return {"visitor": principal.token.name if signed_in and principal.token else None}


def _now(tag: str, may_probe: bool) -> dict[str, Any]:
    return {"tag": tag, "may_probe": may_probe, "now": time.time()}


def _tag(*parts: object) -> str:
    return f'"{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}"'


def _fragment(request: Request, template: str, tag: str, show: Callable[[], dict[str, Any]]) -> Response:
    headers = {"ETag": tag, "Cache-Control": "no-cache"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return render(template, headers=headers, **show())


files = APIRouter(include_in_schema=False)


@files.get("/static/{name}")
def page_file(name: str, principal: Reader) -> Response:
    """A file that pages refer to; its address names its version."""
    del principal
    if name not in STATIC:
        raise ProblemError("not-found", "there is no such file")
    headers = {"Cache-Control": "private, max-age=86400"}
    return Response(static_file(name)[0], media_type=STATIC[name], headers=headers)


class _ElsewhereRoute(PageRoute):
    """Addresses that there are not, asked for by a browser; programs get the problem document."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Match what no other route does, where a page is wanted."""
        accepted = b"".join(value for name, value in scope.get("headers", ()) if name == b"accept")
        if scope.get("method") != "GET" or b"text/html" not in accepted or scope["path"].startswith("/v1/"):
            return Match.NONE, {}
        return super().matches(scope)


elsewhere = APIRouter(include_in_schema=False, route_class=_ElsewhereRoute)


@elsewhere.get("/{path:path}")
def nothing_here(path: str, principal: Reader) -> Response:
    """Say that there is no such page."""
    del path, principal
    raise ProblemError("not-found", "there is no page at this address")


for part in (signin.router, files, elsewhere):
    router.include_router(part)
