"""`GET /v1/workloads` and `GET /v1/gpus`: what may be asked for."""

from __future__ import annotations

from fastapi import APIRouter

from autobatch import load_catalogue
from autobatch_server.problems import problem_responses
from autobatch_server.routes.parts import COMMON_PROBLEMS, Reader, Served
from autobatch_server.schemas import Gpu, GpuList, ParameterForm, WorkloadForm, WorkloadList

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["query plane"])


@router.get("/workloads", responses=problem_responses(*COMMON_PROBLEMS), summary="The workloads that may be asked for")
def list_workloads(services: Served, principal: Reader) -> WorkloadList:
    """List the built-in workloads and the operator's, with what their parameters may be."""
    del principal
    forms = []
    for name in services.catalogue.names:
        declared = services.catalogue.declaration(name)
        parameters = {
            key: ParameterForm(
                type=parameter.type,
                default=parameter.default,
                minimum=parameter.minimum,
                maximum=parameter.maximum,
                choices=list(parameter.choices),
                description=parameter.description,
            )
            for key, parameter in declared.parameters.items()
        }
        forms.append(WorkloadForm(name=name, description=declared.description, parameters=parameters))
    return WorkloadList(workloads=forms)


@router.get("/gpus", responses=problem_responses(*COMMON_PROBLEMS), summary="The cards that may be asked for")
def list_gpus(services: Served, principal: Reader) -> GpuList:
    """List the cards of the catalogue and those that runners have, with every name that is understood."""
    del principal
    slots = services.board.slots()
    emulates = any(slot.basis == "emulated" for slot in slots)
    held = [slot.gpu for slot in slots if slot.basis == "measured"]
    return GpuList(
        gpus=[
            Gpu(
                name=card.name,
                nvml_name=card.nvml_name,
                kubernetes=card.kubernetes_product,
                slurm=card.slurm_type,
                aliases=list(card.aliases),
                total_bytes=card.nvml_total_bytes,
                compute_capability="{}.{}".format(*card.compute_capability),
                can_be_emulated=emulates,
                runners=held.count(card.name),
            )
            for card in load_catalogue()
        ]
    )
