"""`/v1/measurements`: what is known, and what others report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query

from autobatch import Report, SizeFailure, UsageError
from autobatch.store import Measurement, NewMeasurement, iso_time
from autobatch_server.gpus import canonical_gpu
from autobatch_server.problems import ProblemError, problem_responses
from autobatch_server.routes.parts import (
    BODY_PROBLEMS,
    COMMON_PROBLEMS,
    JSON_PROBLEMS,
    Administrator,
    Prober,
    Reader,
    Served,
)
from autobatch_server.schemas import (
    GpuName,
    MeasurementForm,
    MeasurementList,
    MeasurementReport,
    OomForm,
    OomReportRequest,
    WorkloadName,
)
from autobatch_server.services import Services

__all__ = ["router"]

router = APIRouter(prefix="/v1/measurements", tags=["query plane"])
_MeasurementId = Annotated[
    str,
    Path(
        pattern=r"^(mea|oom)_[0-9a-f]{27}$",
        description="id of a measurement or a reported error",
        examples=["mea_019aa3f0c1b2a3d4e5f60718293"],
    ),
]
_LINKS = {
    "measurement": {"operationId": "get_measurement", "parameters": {"measurement_id": "$response.body#/id"}},
    "forget": {"operationId": "delete_measurement", "parameters": {"measurement_id": "$response.body#/id"}},
}
# A probe tries eight sizes; a report with more trials than this is not one of ours.
_MOST_TRIALS = 1000
_MOST_MICRO_BATCHES = 2
# A page of measurements reads 200 of them, and a plan 50: one has some ten thousand characters.
_LARGEST_REPORT = 131_072


@router.get(
    "",
    responses={
        200: {"description": "a page of them, without their reports"},
        **problem_responses(*COMMON_PROBLEMS, "invalid-request", "unknown-gpu", "ambiguous-gpu"),
    },
    summary="Measurements, the newest first",
)
def list_measurements(
    services: Served,
    principal: Reader,
    workload: Annotated[WorkloadName | None, Query(description="of this job", examples=["gpt2"])] = None,
    gpu: Annotated[GpuName | None, Query(description="on this card", examples=["A100-SXM4-40GB"])] = None,
    before: Annotated[
        str | None,
        Query(
            pattern=r"^mea_[0-9a-f]{27}$",
            description="older than this id",
            examples=["mea_019aa3f0c1b2a3d4e5f60718293"],
        ),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=200, description="most of them", examples=[50])] = 50,
) -> MeasurementList:
    """List measurements page by page, without their reports."""
    del principal
    found = services.measurements.list_newest(
        workload=workload, gpu=canonical_gpu(gpu, strict=False) if gpu else None, before=before, limit=limit
    )
    return MeasurementList(
        measurements=[measurement_form(one, with_report=False) for one in found],
        next=found[-1].id if len(found) == limit else None,
    )


@router.get(
    "/{measurement_id}",
    responses={
        200: {"description": "it, with its report"},
        **problem_responses(*COMMON_PROBLEMS, "invalid-request", "not-found"),
    },
    summary="One measurement",
)
def get_measurement(services: Served, principal: Reader, measurement_id: _MeasurementId) -> MeasurementForm:
    """Show a measurement with its report, trials included."""
    del principal
    measurement = services.measurements.get(measurement_id)
    if measurement is None:
        raise _nothing()
    return measurement_form(measurement, with_report=True)


@router.post(
    "",
    status_code=201,
    response_model=MeasurementForm | OomForm,
    responses={
        201: {"description": "it is kept", "links": _LINKS},
        **problem_responses(
            *COMMON_PROBLEMS,
            *JSON_PROBLEMS,
            "unknown-workload",
            "unknown-gpu",
            "bad-parameter",
            "ambiguous-gpu",
            "invalid-report",
        ),
    },
    summary="Report a measurement, or an out-of-memory error",
)
def post_measurement(request: MeasurementReport, services: Served, principal: Prober) -> MeasurementForm | OomForm:
    """Keep a report of a probe that ran elsewhere (`autobatch probe --report-to URL`), or an error that lowers the bounds."""
    token_id = principal.token.id if principal.token else None
    if (request.report is None) == (request.oom is None):
        raise ProblemError("invalid-request", "send one of report and oom")
    if request.oom is not None:
        return _keep_oom(services, request.oom, token_id)
    report = _read_report(request)
    job = services.catalogue.find(_job_of(request.workload, report))
    gpu = canonical_gpu(report.device.name, strict=False)
    new = NewMeasurement.of(report, workload=str(job), gpu=gpu, source="reported")
    return measurement_form(services.measurements.add(new, token_id=token_id), with_report=True)


def _job_of(name: str | None, report: Report) -> str:
    """The job that a report is of: by the service's name for it, with the parameters that it ran with."""
    query = report.workload.partition("?")[2]
    if name is None:
        return report.workload
    return f"{name}?{query}" if query and "?" not in name else name


def _read_report(request: MeasurementReport) -> Report:
    _check_windows(request.report or {})
    try:
        report = Report.from_dict(request.report or {})
    except (UsageError, ValueError, TypeError, RecursionError) as error:
        # Our own sentence about their own text: it names a field and a value, nothing of the inside.
        detail = str(error) if isinstance(error, UsageError) else "a field is of the wrong type"
        raise ProblemError("invalid-report", detail[:500]) from None
    size = len(report.to_json())
    if size > _LARGEST_REPORT:
        raise ProblemError("invalid-report", f"the report has {size} characters: at most {_LARGEST_REPORT} are taken")
    if not report.trials or len(report.trials) > _MOST_TRIALS:
        raise ProblemError(
            "invalid-report", f"the report has {len(report.trials)} trials: 1 to {_MOST_TRIALS} are taken"
        )
    return report


def _check_windows(report: Mapping[str, Any]) -> None:
    """A trial without a window is given one as long as it says: so what it says is looked at before that."""
    trials = report.get("trials")
    for trial in trials if isinstance(trials, list) else []:
        number = trial.get("micro_batches_per_step") if isinstance(trial, dict) else None
        if isinstance(number, int) and number > _MOST_MICRO_BATCHES:
            raise ProblemError("invalid-report", f"a trial has {number} micro-batches per step: 1 or 2 are taken")


def _keep_oom(services: Services, request: OomReportRequest, token_id: str | None) -> OomForm:
    job = services.catalogue.find(request.workload)
    measurement = services.measurements.get(request.measurement) if request.measurement else None
    oom = services.measurements.add_oom(
        SizeFailure(
            micro_batch_size=request.micro_batch_size, micro_batches_per_step=min(2, request.accumulation_steps)
        ),
        workload=str(job),
        gpu=canonical_gpu(request.gpu, strict=False),
        measurement_id=measurement.id if measurement else None,
        after_plan=measurement is not None,
        token_id=token_id,
    )
    return OomForm(
        id=oom.id,
        created_at=iso_time(oom.created_at) or "",
        workload=oom.workload,
        gpu=oom.gpu,
        micro_batch_size=oom.failure.micro_batch_size,
        micro_batches_per_step=oom.failure.micro_batches_per_step,
        after_plan=oom.after_plan,
    )


@router.delete(
    "/{measurement_id}",
    status_code=204,
    responses={
        204: {"description": "it is forgotten"},
        **problem_responses(*COMMON_PROBLEMS, *BODY_PROBLEMS, "invalid-request", "not-found"),
    },
    summary="Forget a measurement or a reported error",
)
def delete_measurement(services: Served, principal: Administrator, measurement_id: _MeasurementId) -> None:
    """Forget what was measured wrongly, or an error that had another cause."""
    del principal
    if not services.measurements.delete(measurement_id):
        raise _nothing()


def _nothing() -> ProblemError:
    return ProblemError("not-found", "there is no measurement of that id: GET /v1/measurements lists them")


def measurement_form(measurement: Measurement, *, with_report: bool) -> MeasurementForm:
    """Show a measurement."""
    report = measurement.report
    return MeasurementForm(
        id=measurement.id,
        created_at=iso_time(measurement.created_at) or "",
        workload=measurement.workload,
        gpu=measurement.gpu,
        source=measurement.source,
        probe=measurement.probe_id,
        report=report if with_report else None,
        basis=report.basis,
        max_micro_batch_size=report.max_micro_batch_size,
        micro_batches_per_step=report.micro_batches_per_step,
        smallest_failing=report.smallest_failing,
    )
