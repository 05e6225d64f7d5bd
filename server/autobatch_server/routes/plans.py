"""`GET /v1/plan` and `POST /v1/placements`: answers from stored measurements, never a probe."""

from __future__ import annotations

import hashlib
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response

from autobatch import PlanError
from autobatch_server.answers import Answer, answer_question
from autobatch_server.gpus import canonical_gpu
from autobatch_server.placements import rank_candidates
from autobatch_server.problems import ProblemError, problem_responses
from autobatch_server.questions import make_options, refuse_plan
from autobatch_server.remembered import tagged
from autobatch_server.routes.parts import COMMON_PROBLEMS, JSON_PROBLEMS, Reader, Served
from autobatch_server.schemas import (
    LARGEST_TARGET,
    LARGEST_WORLD,
    BasisName,
    Bounds,
    GpuName,
    PlacementList,
    PlacementRequest,
    PlanAnswer,
    SplitName,
    WorkloadName,
)

__all__ = ["router"]

_TAGS = {
    "ETag": {
        "description": "changes with the answer: send it as If-None-Match",
        "required": True,
        "schema": {"type": "string", "pattern": '^"[0-9a-f]{32}"$'},
    },
    "Cache-Control": {
        "description": "`no-cache`: keep it, and ask again",
        "schema": {"type": "string", "const": "no-cache"},
    },
}


router = APIRouter(prefix="/v1", tags=["query plane"])


@router.get(
    "/plan",
    response_model=PlanAnswer,
    responses={
        200: {"description": "what is known, also where that is nothing", "headers": _TAGS},
        304: {"description": "the answer is still the one whose ETag was sent", "headers": _TAGS},
        **problem_responses(
            *COMMON_PROBLEMS,
            "unknown-workload",
            "unknown-gpu",
            "invalid-request",
            "bad-parameter",
            "ambiguous-gpu",
            "no-plan",
        ),
    },
    summary="The plan for a target, from what was measured",
)
async def get_plan(
    services: Served,
    principal: Reader,
    http: Request,
    workload: Annotated[WorkloadName, Query(examples=["gpt2", "gpt2?seq_len=512"])],
    gpu: Annotated[GpuName, Query(examples=["A100-SXM4-40GB", "NVIDIA L4"])],
    target: Annotated[
        int, Query(ge=1, le=LARGEST_TARGET, description="samples per optimizer step, over all ranks", examples=[256])
    ],
    world_size: Annotated[int, Query(ge=1, le=LARGEST_WORLD, description="data-parallel ranks", examples=[1])] = 1,
    split: Annotated[SplitName, Query(description="sizes all equal, or at most one apart", examples=["even"])] = "even",
    multiple_of: Annotated[
        int, Query(ge=1, le=LARGEST_TARGET, description="sizes are multiples of this", examples=[1])
    ] = 1,
    tolerance: Annotated[
        float, Query(ge=0, lt=1, description="share of the target by which an even plan may miss it", examples=[0.0])
    ] = 0.0,
    basis: Annotated[BasisName | None, Query(description="answer from nothing else", examples=["emulated"])] = None,
    if_none_match: Annotated[
        str | None,
        Header(description="ETag of the answer that you have", examples=['"4f0c1b2a3d4e5f60718293a4b5c6d7e8"']),
    ] = None,
) -> Response:
    """Answer `fits` with the plan, `does_not_fit`, or `unknown`: never a default number, and never by probing.

    Another target or world size than was probed is arithmetic where the measured bounds reach.
    """
    del principal
    _refuse_slips(http)
    job = services.catalogue.find(workload)
    card = canonical_gpu(gpu)
    options = make_options(
        target=target, world_size=world_size, split=split, multiple_of=multiple_of, tolerance=tolerance
    )
    number = await services.freshness.number()
    known = await services.known_series(number, str(job), card)
    try:
        answer = answer_question(known, workload=str(job), gpu=card, options=options, basis=basis)
    except PlanError as error:
        raise refuse_plan(options, error) from None
    form = _plan_answer(answer, workload=str(job), gpu=card, target=target, world_size=world_size, split=split)
    body = form.model_dump_json().encode()
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    services.metrics.count_answer(answer.verdict)
    services.answers.put(number, http.scope["query_string"], body, tag, answer.verdict)
    return tagged(if_none_match, body, tag)


_FIELDS = ("workload", "gpu", "target", "world_size", "split", "multiple_of", "tolerance", "basis")


def _refuse_slips(http: Request) -> None:
    """Refuse a field that there is not, or that is given twice: the answer would be to another question."""
    names = [name for name, _ in http.query_params.multi_items()]
    for name in names:
        if name not in _FIELDS:
            raise ProblemError(
                "invalid-request", f"query.{name[:64]}: there is no such field, only {', '.join(_FIELDS)}"
            )
        if names.count(name) > 1:
            raise ProblemError("invalid-request", f"query.{name}: given {names.count(name)} times, wanted once")


def _plan_answer(
    answer: Answer, *, workload: str, gpu: str, target: int, world_size: int, split: SplitName
) -> PlanAnswer:
    measurement, report = answer.measurement, answer.measurement.report if answer.measurement else None
    bound = answer.bound
    return PlanAnswer(
        verdict=answer.verdict,
        reason=answer.reason,
        workload=workload,
        gpu=gpu,
        target=target,
        world_size=world_size,
        split=split,
        plan=answer.plan,
        basis=report.basis if report else None,
        measurement=measurement.id if measurement else None,
        measured_at=report.measured_at if report else None,
        bounds=Bounds(
            micro_batches_per_step=bound.micro_batches_per_step,
            largest_fitting=bound.largest_fitting,
            smallest_failing=bound.smallest_failing,
        )
        if bound
        else None,
        footprint_bytes=answer.footprint_bytes,
        budget_bytes=report.memory.budget_bytes if report else None,
        missing_bytes=answer.missing_bytes,
        expected_error=(report.expected_error or None) if report else None,
        warnings=list(answer.plan.warnings) if answer.plan else [],
    )


@router.post(
    "/placements",
    responses={
        200: {"description": "every candidate, in order"},
        **problem_responses(
            *COMMON_PROBLEMS, *JSON_PROBLEMS, "unknown-workload", "unknown-gpu", "bad-parameter", "ambiguous-gpu"
        ),
    },
    summary="Which of these cards fit, in order",
)
def post_placements(request: PlacementRequest, services: Served, principal: Reader) -> PlacementList:
    """Rank candidates by stored measurements: what fits first, then what does not, then what is unknown."""
    del principal
    job = services.catalogue.find(request.workload, request.parameters)
    return rank_candidates(services.measurements, str(job), request)
