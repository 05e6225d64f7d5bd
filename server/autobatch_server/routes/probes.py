"""The operation plane: probes are asked for, followed and cancelled."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from autobatch import PlanError, ProbeOptions
from autobatch.store import Measurement, iso_time
from autobatch_server.answers import answer_question
from autobatch_server.gpus import canonical_gpu
from autobatch_server.problems import ProblemError, problem_responses
from autobatch_server.questions import make_options, refuse_plan
from autobatch_server.queue import ENDED, Order, ProbeRecord, State, Submission
from autobatch_server.routes.parts import BODY_PROBLEMS, COMMON_PROBLEMS, JSON_PROBLEMS, Prober, Reader, Served
from autobatch_server.schemas import BasisName, Event, KnownForm, ProbeForm, ProbeList, ProbeRequest, ProblemSummary
from autobatch_server.services import Services

__all__ = ["router"]

router = APIRouter(prefix="/v1/probes", tags=["operation plane"])

_STREAM = """\
event: queued
data: {"number":1,"at":"2026-11-20T11:00:00.000Z","kind":"queued","data":{}}
id: 1
"""
# Between looks at the database by streams and waiting polls.
_LOOK_SECONDS = 0.2
_LONGEST_WAIT = 60.0
_KEY = re.compile(r'"?([\x21\x23-\x7e]{1,255})"?')
_KEY_FORM = '^"?[\\x21\\x23-\\x7e]{1,255}"?$'
_EXAMPLE = "prb_019aa3f0c1aa3d4e5f607182930"
_ProbeId = Annotated[str, Path(pattern=r"^prb_[0-9a-f]{27}$", description="id of a probe", examples=[_EXAMPLE])]
_LINKS = {
    name: {"operationId": operation, "parameters": {"probe_id": "$response.body#/id"}}
    for name, operation in (("probe", "get_probe"), ("events", "stream_events"), ("cancel", "cancel_probe"))
}


@router.post(
    "",
    status_code=202,
    response_model=ProbeForm,
    responses={
        200: {"model": KnownForm, "description": "a fresh measurement answers; nothing is run"},
        202: {
            "description": "the probe is queued; its address is in Location",
            "headers": {
                "Location": {
                    "description": "the probe's address",
                    "required": True,
                    "schema": {"type": "string", "pattern": "^/v1/probes/prb_[0-9a-f]{27}$"},
                }
            },
            "links": _LINKS,
        },
        **problem_responses(
            *COMMON_PROBLEMS,
            *JSON_PROBLEMS,
            "bad-key",
            "key-reused",
            "unknown-workload",
            "bad-parameter",
            "unknown-gpu",
            "ambiguous-gpu",
            "no-plan",
            "queue-full",
            "no-matching-runner",
            "not-found",
        ),
    },
    summary="Run a probe",
)
def post_probe(
    request: ProbeRequest,
    services: Served,
    principal: Prober,
    http: Request,
    idempotency_key: Annotated[
        str | None,
        Header(
            description="the same key with the same body is answered with the same probe, for a day",
            max_length=257,
            json_schema_extra={"pattern": _KEY_FORM},
            examples=['"8e03978e-40d5-43e8-bc93-6894a57f9324"'],
        ),
    ] = None,
) -> Response:
    """Queue a probe, unless a fresh measurement already answers (`force` runs it all the same)."""
    key = _read_key(idempotency_key)
    body = json.dumps(request.model_dump(mode="json"), sort_keys=True).encode()
    who = principal.name
    if key is not None and (known := services.queue.find_replay(principal=who, key=key, request=body)):
        return _submitted(services, known)
    job = services.catalogue.find(request.workload, request.parameters)
    options = make_options(
        target=request.target,
        world_size=request.world_size,
        split=request.split,
        multiple_of=request.multiple_of,
        tolerance=request.tolerance,
    )
    try:
        options.make_plan(options.ceiling)
    except PlanError as error:
        raise refuse_plan(options, error) from None
    gpu, basis = _choose_card(services, request)
    if not request.force and (fresh := _fresh(services, str(job), gpu, basis, options)):
        return _submitted(
            services, services.queue.answer_with(fresh.id, principal=who, key=key, request=body), request=request
        )
    order = Order(
        workload=str(job),
        gpu=gpu,
        basis=basis,
        options=_options_of(services, request, str(job), gpu),
    )
    submission = services.queue.submit(
        order,
        principal=who,
        token_id=principal.token.id if principal.token else None,
        limits=services.limits,
        key=key,
        request=body,
    )
    http.app.state.notify()
    return _submitted(services, submission)


def _read_key(header: str | None) -> str | None:
    """The idempotency key: a structured field's string, or the bare characters, as both are sent in practice."""
    if header is None:
        return None
    match = _KEY.fullmatch(header.strip())
    if match is None:
        raise ProblemError("bad-key", 'an Idempotency-Key is 1 to 255 printable characters, as in "8e03978e-40d5"')
    return match[1]


def _choose_card(services: Services, request: ProbeRequest) -> tuple[str, BasisName]:
    """Choose the card and the basis: a real card of a runner where there is one, else an emulated one."""
    slots = services.board.slots()
    real = [slot.gpu for slot in slots if slot.basis == "measured" and slot.gpu is not None]
    emulated = {slot.gpu for slot in slots if slot.basis == "emulated"}
    if request.gpu is None and real and request.basis != "emulated":
        return real[0], "measured"
    wanted = canonical_gpu(request.gpu or services.settings.default_gpu, strict=not real)
    if wanted in real and request.basis != "emulated":
        return wanted, "measured"
    if request.basis == "measured":
        raise ProblemError(
            "no-matching-runner", f"no runner has the card {wanted}: there are {', '.join(sorted(set(real))) or 'none'}"
        )
    canonical_gpu(wanted)  # what is emulated must stand in the catalogue
    if request.objective == "throughput":
        raise ProblemError(
            "no-matching-runner",
            f"no runner has the card {wanted}, and an emulated card knows no time: ask for max or plan",
        )
    if not emulated & {None, wanted}:  # None emulates any card
        others = sorted(filter(None, emulated))
        what = (
            f"those that emulate cards emulate {', '.join(others)}" if others else "none emulates cards at the moment"
        )
        raise ProblemError("no-matching-runner", f"no runner has the card {wanted}, and {what}")
    return wanted, "emulated"


def _fresh(services: Services, workload: str, gpu: str, basis: str, options: ProbeOptions) -> Measurement | None:
    """A measurement that answers and is not too old; None where there is none."""
    try:
        answer = answer_question(services.measurements, workload=workload, gpu=gpu, options=options, basis=basis)
    except PlanError as error:
        raise refuse_plan(options, error) from None
    measurement = answer.measurement
    if answer.verdict == "unknown" or measurement is None:
        return None
    return measurement if time.time() - measurement.created_at <= services.settings.fresh_for else None


def _options_of(services: Services, request: ProbeRequest, workload: str, gpu: str) -> dict[str, Any]:
    """The fields of the library's options that were asked for."""
    given = {
        "target": request.target,
        "world_size": request.world_size,
        "split": request.split,
        "multiple_of": request.multiple_of,
        "tolerance": request.tolerance,
        "objective": request.objective,
    }
    if request.deadline is not None:
        given["deadline"] = request.deadline
    # A size that ran out of memory in training is not tried again: the probe looks below it.
    _, ooms = services.measurements.series(workload, gpu)
    least = min((oom.failure.micro_batch_size for oom in ooms), default=None)
    if least is not None and least - 1 >= request.multiple_of:
        given["max_micro_batch"] = least - 1
    return given


def _submitted(services: Services, submission: Submission, *, request: ProbeRequest | None = None) -> Response:
    if submission.record is not None:
        form = probe_form(services, submission.record)
        headers = {"Location": f"/v1/probes/{submission.record.id}"}
        return JSONResponse(form.model_dump(mode="json"), status_code=202, headers=headers)
    measurement = services.measurements.get(submission.measurement_id or "")
    if measurement is None:
        raise ProblemError("not-found", "the measurement that answered this request was deleted since: take a new key")
    options = measurement.report.options
    known = KnownForm(
        state="succeeded",
        workload=measurement.workload,
        gpu=measurement.gpu,
        basis=measurement.report.basis,
        target=request.target if request else options.target,
        world_size=request.world_size if request else options.world_size,
        split=request.split if request else options.split,
        created_at=iso_time(measurement.created_at),
        ended_at=iso_time(measurement.created_at),
        measurement=measurement.id,
        plan=_plan_for(services, measurement, request),
    )
    return JSONResponse(known.model_dump(mode="json"), status_code=200)


def _plan_for(services: Services, measurement: Measurement, request: ProbeRequest | None) -> Any:
    if request is None:
        return measurement.report.plan
    options = make_options(
        target=request.target,
        world_size=request.world_size,
        split=request.split,
        multiple_of=request.multiple_of,
        tolerance=request.tolerance,
    )
    return answer_question(
        services.measurements,
        workload=measurement.workload,
        gpu=measurement.gpu,
        options=options,
        basis=measurement.report.basis,
    ).plan


def probe_form(services: Services, record: ProbeRecord, *, last_event: int = 0, with_plan: bool = True) -> ProbeForm:
    """Show a probe, with its plan once it has one."""
    options = record.order.options
    wanted = record.measurement_id if with_plan else None
    measurement = services.measurements.get(wanted) if wanted else None
    return ProbeForm(
        id=record.id,
        state=record.state,
        workload=record.order.workload,
        gpu=record.order.gpu,
        basis=record.order.basis,
        target=options["target"],
        world_size=options.get("world_size", 1),
        split=options.get("split", "even"),
        created_at=iso_time(record.created_at),
        started_at=iso_time(record.started_at),
        ended_at=iso_time(record.ended_at),
        attempts=record.attempts,
        cancel_requested=record.cancel_requested,
        measurement=record.measurement_id,
        plan=measurement.report.plan if measurement else None,
        problem=ProblemSummary(code=record.problem["code"], detail=record.problem["detail"])
        if record.problem
        else None,
        last_event=last_event,
    )


@router.get(
    "",
    responses={200: {"description": "a page of them"}, **problem_responses(*COMMON_PROBLEMS, "invalid-request")},
    summary="Probes, the newest first",
)
def list_probes(
    services: Served,
    principal: Reader,
    state: Annotated[list[State] | None, Query(description="only these", max_length=5, examples=[["running"]])] = None,
    before: Annotated[
        str | None, Query(pattern=r"^prb_[0-9a-f]{27}$", description="older than this id", examples=[_EXAMPLE])
    ] = None,
    limit: Annotated[int, Query(ge=1, le=200, description="most of them", examples=[50])] = 50,
) -> ProbeList:
    """List probes page by page, without their plans."""
    del principal
    records = services.queue.list_probes(states=state or (), before=before, limit=limit)
    return ProbeList(
        probes=[probe_form(services, record, with_plan=False) for record in records],
        next=records[-1].id if len(records) == limit else None,
    )


_ONE = (*COMMON_PROBLEMS, "invalid-request", "not-found")


@router.get(
    "/{probe_id}",
    responses={200: {"description": "it, as it stands"}, **problem_responses(*_ONE, "too-many-streams")},
    summary="One probe",
)
async def get_probe(
    services: Served,
    principal: Reader,
    http: Request,
    probe_id: _ProbeId,
    wait: Annotated[
        float, Query(ge=0, le=_LONGEST_WAIT, description="seconds to wait for its end", examples=[0.5])
    ] = 0.0,
    after: Annotated[
        int | None,
        Query(
            ge=0,
            le=2**31 - 1,
            description="with wait: come back as soon as there is an event with a higher number",
            examples=[3],
        ),
    ] = None,
) -> ProbeForm:
    """Show a probe as it stands, at once or after waiting for its end or for news."""
    record, last_event = await run_in_threadpool(_look, services, probe_id)
    if wait and not _is_news(record, last_event, after):
        with services.streams.hold(principal):
            until = time.monotonic() + wait
            while time.monotonic() < until and not _is_news(record, last_event, after):
                if http.app.state.closing.is_set() or await http.is_disconnected():
                    break
                await asyncio.sleep(min(_LOOK_SECONDS, max(0.0, until - time.monotonic())))
                record, last_event = await run_in_threadpool(_look, services, probe_id)
    return await run_in_threadpool(lambda: probe_form(services, record, last_event=last_event))


def _is_news(record: ProbeRecord, last_event: int, after: int | None) -> bool:
    return record.state in ENDED or (after is not None and last_event > after)


def _look(services: Services, probe_id: str) -> tuple[ProbeRecord, int]:
    record = services.queue.get(probe_id)
    if record is None:
        raise _no_probe()
    return record, services.queue.last_event(probe_id)


def _no_probe() -> ProblemError:
    return ProblemError("not-found", "there is no probe of that id: GET /v1/probes lists them")


def _hold_stream(services: Served, principal: Reader, probe_id: _ProbeId) -> Iterator[ProbeRecord]:
    """What can be refused is refused before the stream begins."""
    record = services.queue.get(probe_id)
    if record is None:
        raise _no_probe()
    with services.streams.hold(principal):
        yield record


@router.get(
    "/{probe_id}/events",
    response_class=EventSourceResponse,
    responses={
        200: {
            "description": "events until the probe has ended; `data` is an Event as JSON, `event` its kind and `id` its number",
            "content": {"text/event-stream": {"example": _STREAM}},
        },
        **problem_responses(*_ONE, "too-many-streams"),
    },
    summary="What happens to a probe, as it happens",
)
async def stream_events(
    services: Served,
    http: Request,
    record: Annotated[ProbeRecord, Depends(_hold_stream)],
    last_event_id: Annotated[
        str,
        Header(
            pattern=r"^[0-9]{1,9}$",
            description="number of the last event that you have: only later ones are sent",
            examples=["3"],
        ),
    ] = "0",
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events from the first one on, or from `Last-Event-ID`; the stream ends with the probe."""
    number = int(last_event_id)
    while True:
        # Looked at before the events: one that ends in between has its last event among the next ones.
        now = await run_in_threadpool(services.queue.get, record.id)
        events = await run_in_threadpool(services.queue.events_after, record.id, number)
        for event in events:
            number = event.number
            form = Event(number=number, at=iso_time(event.at) or "", kind=event.kind, data=dict(event.data))
            yield ServerSentEvent(data=form, event=event.kind, id=str(number))
            if event.kind in ENDED:
                return
        if events:
            continue
        if now is None or now.state in ENDED or http.app.state.closing.is_set():
            return
        await asyncio.sleep(_LOOK_SECONDS)


@router.post(
    "/{probe_id}/cancel",
    status_code=202,
    responses={
        202: {"description": "it has ended, or will within seconds"},
        **problem_responses(*_ONE, *BODY_PROBLEMS, "already-ended"),
    },
    summary="End a probe",
)
def cancel_probe(services: Served, principal: Prober, http: Request, probe_id: _ProbeId) -> ProbeForm:
    """End a queued probe at once, and a running one with all its processes within seconds."""
    del principal
    before = services.queue.get(probe_id)
    if before is None:
        raise _no_probe()
    if before.state in ENDED:
        raise ProblemError("already-ended", f"the probe ended as {before.state}: there is nothing to cancel")
    record = services.queue.cancel(probe_id)
    http.app.state.notify()
    if record is None:
        raise _no_probe()
    return probe_form(services, record)
