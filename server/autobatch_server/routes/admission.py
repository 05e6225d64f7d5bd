"""`POST /v1/kubernetes/mutate`: a mutating admission webhook, which answers from what is stored and admits every Pod."""

from __future__ import annotations

import base64
import json
import logging
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from autobatch.store import StoreUnavailableError
from autobatch_server.admission import Decision, decide
from autobatch_server.problems import problem_responses
from autobatch_server.routes.parts import COMMON_PROBLEMS, JSON_PROBLEMS, Reader, Served
from autobatch_server.services import Services

__all__ = ["router"]

_LOG = logging.getLogger(__name__)
# The API server waits a second, as docker/kubernetes/webhook.yaml has it; the rest is for the way there and back.
_SECONDS = 0.7
# The API server may cut a longer one (kubernetes.io, "Dynamic Admission Control", on warnings).
_LONGEST_WARNING = 256

router = APIRouter(prefix="/v1/kubernetes", tags=["query plane"])


class _KubernetesForm(BaseModel):
    model_config = ConfigDict(extra="ignore")  # the API server sends more, and with each version more again


class AdmissionRequest(_KubernetesForm):
    """What is about to be done in the cluster."""

    uid: str = Field(min_length=1, max_length=128, description="names this request; the answer repeats it")
    namespace: str = Field("", max_length=253, description="where it is done")
    operation: str = Field("CREATE", max_length=64, description="only `CREATE` is answered with a patch")
    object: dict[str, Any] | None = Field(None, description="the Pod")


_EXAMPLE: dict[str, Any] = {
    "apiVersion": "admission.k8s.io/v1",
    "kind": "AdmissionReview",
    "request": {
        "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
        "operation": "CREATE",
        "object": {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "train", "annotations": {"autobatch/workload": "gpt2", "autobatch/target": "256"}},
            "spec": {"containers": [{"name": "train", "resources": {"limits": {"nvidia.com/gpu": "1"}}}]},
        },
    },
}


class AdmissionReviewRequest(_KubernetesForm):
    """An `AdmissionReview` as the Kubernetes API server sends it (admission.k8s.io/v1)."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [_EXAMPLE]})

    apiVersion: Literal["admission.k8s.io/v1"]  # noqa: N815 - Kubernetes' own name
    kind: Literal["AdmissionReview"]
    request: AdmissionRequest


class AdmissionResponse(BaseModel):
    """The answer: always allowed, with a patch where a plan is known."""

    uid: str
    allowed: Literal[True] = True
    patchType: Literal["JSONPatch"] | None = None  # noqa: N815 - Kubernetes' own name
    patch: str | None = Field(None, description="a JSON Patch (RFC 6902) in base64")
    warnings: list[str] | None = Field(None, description="shown to whoever made the Pod")
    auditAnnotations: dict[str, str] | None = Field(  # noqa: N815 - Kubernetes' own name
        None, description="for the API server's audit log: verdict and measurement"
    )


_ANSWER_EXAMPLE: dict[str, Any] = {
    "apiVersion": "admission.k8s.io/v1",
    "kind": "AdmissionReview",
    "response": {
        "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
        "allowed": True,
        "warnings": [
            "autobatch: no measurement says which card takes gpt2 for target 256 over 1 rank: POST /v1/probes makes one"
        ],
        "auditAnnotations": {"verdict": "unknown"},
    },
}


class AdmissionReviewAnswer(BaseModel):
    """An `AdmissionReview` with the answer."""

    model_config = ConfigDict(json_schema_extra={"examples": [_ANSWER_EXAMPLE]})

    apiVersion: Literal["admission.k8s.io/v1"] = "admission.k8s.io/v1"  # noqa: N815 - Kubernetes' own name
    kind: Literal["AdmissionReview"] = "AdmissionReview"
    response: AdmissionResponse


@router.post(
    "/mutate",
    response_model=AdmissionReviewAnswer,
    response_model_exclude_none=True,
    responses={
        200: {"description": "the Pod is admitted, patched where a plan is known, with warnings where none is"},
        **problem_responses(*COMMON_PROBLEMS, *JSON_PROBLEMS),
    },
    summary="A mutating admission webhook for Kubernetes",
)
async def review_pod(review: AdmissionReviewRequest, services: Served, principal: Reader) -> AdmissionReviewAnswer:
    """Fill the plan into a Pod's environment, and its node affinity with the cards that the plan fits on.

    A Pod asks by the annotations `autobatch/workload` and `autobatch/target`. Nothing is probed, and no Pod is ever refused:
    where there is no answer in time it is admitted as it is, with a warning.
    """
    del principal
    decision = Decision()
    if review.request.operation == "CREATE":
        decision = await _decide_in_time(services, review.request)
    if decision.verdict:
        services.metrics.count_answer(decision.verdict)
    return AdmissionReviewAnswer(response=_response(review.request.uid, decision))


async def _decide_in_time(services: Services, request: AdmissionRequest) -> Decision:
    """Decide, or admit the Pod as it is: a job that goes without a plan is better than one that cannot start."""
    try:
        deciding = decide(services, request.object or {}, namespace=request.namespace)
        decision: Decision = await services.admissions.within(_SECONDS, deciding)
    except TimeoutError:
        return Decision(warnings=(f"no answer within {_SECONDS:g} s, the Pod goes on without a plan",))
    except StoreUnavailableError:
        return Decision(warnings=("the measurements cannot be read now, the Pod goes on without a plan",))
    except Exception:  # noqa: BLE001 - whatever is wrong here must not keep a Pod from starting
        _LOG.exception("a Pod could not be read")
        return Decision(warnings=("the service failed over this Pod, which goes on without a plan; its log says more",))
    return decision


def _response(uid: str, decision: Decision) -> AdmissionResponse:
    audit = {"verdict": decision.verdict, "measurement": decision.measurement}
    noted = {key: value for key, value in audit.items() if value}
    patch = base64.b64encode(json.dumps(decision.patch).encode()).decode() if decision.patch else None
    return AdmissionResponse(
        uid=uid,
        patchType="JSONPatch" if patch else None,
        patch=patch,
        warnings=[f"autobatch: {text}"[:_LONGEST_WARNING] for text in decision.warnings] or None,
        auditAnnotations=noted or None,
    )
