"""The forms of requests and answers. What the library has a form for, plans and reports, is taken from it as it is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializerFunctionWrapHandler, WrapSerializer

from autobatch import Plan, Report
from autobatch_server.queue import State

__all__ = [
    "Bounds",
    "Candidate",
    "Event",
    "Gpu",
    "GpuList",
    "KnownForm",
    "MeasurementForm",
    "MeasurementList",
    "MeasurementReport",
    "OomForm",
    "Placement",
    "PlacementList",
    "PlacementRequest",
    "PlanAnswer",
    "ProbeForm",
    "ProbeList",
    "ProbeRequest",
    "WorkloadForm",
    "WorkloadList",
]

LARGEST_TARGET = 1_000_000_000
LARGEST_WORLD = 1_000_000


def _without_none(plan: Plan, handler: SerializerFunctionWrapHandler) -> Any:
    """Leave out what the library's own form leaves out."""
    form = handler(plan)
    if isinstance(form, dict) and form.get("rank_micro_batch_sizes") is None:
        form.pop("rank_micro_batch_sizes", None)
    return form


def _as_the_library(report: Report, handler: SerializerFunctionWrapHandler) -> Any:
    """Show a report in the one form that it has everywhere."""
    del handler
    return report.to_dict()


PlanForm = Annotated[Plan, WrapSerializer(_without_none)]
ReportForm = Annotated[Report, WrapSerializer(_as_the_library)]


def _whole(value: object) -> object:
    """JSON knows one kind of number: 256.0 is an integer, while `true` and "256" are none."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_WHOLE = BeforeValidator(_whole)
Target = Annotated[
    int, Field(strict=True, ge=1, le=LARGEST_TARGET, description="samples per optimizer step, over all ranks"), _WHOLE
]
WorldSize = Annotated[int, Field(strict=True, ge=1, le=LARGEST_WORLD, description="data-parallel ranks"), _WHOLE]
MultipleOf = Annotated[
    int, Field(strict=True, ge=1, le=LARGEST_TARGET, description="sizes are multiples of this"), _WHOLE
]
_Count = Annotated[int, Field(strict=True, ge=1, le=LARGEST_TARGET), _WHOLE]
Tolerance = Annotated[
    float, Field(strict=True, ge=0, lt=1, description="share of the target by which an even plan may miss it")
]
SplitName = Literal["even", "balanced"]
BasisName = Literal["measured", "emulated"]
# No control characters: PostgreSQL cannot keep NUL, and a name is shown in logs and on pages.
_PRINTED = r"^[^\x00-\x1f\x7f]+$"
WorkloadName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=512,
        pattern=_PRINTED,
        description="a name from GET /v1/workloads, with parameters as in `gpt2?seq_len=512`",
        examples=["gpt2"],
    ),
]
GpuName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=128,
        pattern=_PRINTED,
        description="a card by any usual name, see GET /v1/gpus",
        examples=["A100-SXM4-40GB"],
    ),
]


Parameters = Annotated[
    dict[
        Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")],
        int | float | bool | Annotated[str, Field(max_length=1024, pattern=r"^[^\x00-\x1f\x7f]*$")],
    ],
    Field(
        max_length=64,
        description="of the workload, by name, as GET /v1/workloads lists them",
        json_schema_extra={"additionalProperties": False},  # beside the pattern for names, which pydantic says alone
    ),
]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Bounds(_Form):
    """What the trials prove of sizes under one kind of accumulation."""

    micro_batches_per_step: int = Field(description="1 without accumulation, 2 with it")
    largest_fitting: int | None = Field(description="samples; null where none fitted")
    smallest_failing: int | None = Field(description="samples; null where none failed")


class PlanAnswer(_Form):
    """What is known of a job on a card for a target."""

    verdict: Literal["fits", "does_not_fit", "unknown"]
    reason: str
    workload: str
    gpu: str
    target: int
    world_size: int
    split: SplitName
    plan: PlanForm | None = None
    basis: BasisName | None = None
    measurement: str | None = Field(None, description="id of the measurement that decided")
    measured_at: str | None = None
    bounds: Bounds | None = None
    footprint_bytes: int | None = Field(None, description="memory of the card that the plan takes")
    budget_bytes: int | None = Field(None, description="memory that it might take")
    missing_bytes: int | None = Field(None, description="by about how many bytes the smallest size is too large")
    expected_error: str | None = Field(None, description="of an emulated answer")
    warnings: list[str] = Field(default_factory=list)


class Candidate(_Form):
    """Cards that a job could be placed on."""

    gpu: GpuName
    count: WorldSize = 1
    price_per_hour: float | None = Field(None, strict=True, ge=0, le=1e9, description="of one card, in any currency")


class PlacementRequest(_Form):
    """Which of these cards fit?"""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "workload": "gpt2",
                    "target": 256,
                    "candidates": [
                        {"gpu": "A100-SXM4-40GB", "count": 8, "price_per_hour": 1.5},
                        {"gpu": "L4", "count": 4, "price_per_hour": 0.6},
                    ],
                    "rank_by": "cost",
                }
            ]
        },
    )

    workload: WorkloadName
    parameters: Parameters = Field(default_factory=dict)
    target: Target
    split: SplitName = "even"
    candidates: list[Candidate] = Field(min_length=1, max_length=100)
    rank_by: Literal["gpus", "cost", "throughput", "headroom"] = "gpus"


class Placement(_Form):
    """One candidate with what is known of it."""

    rank: int = Field(description="1 is the best; what does not fit comes after what does, what is unknown last")
    gpu: str
    count: int
    verdict: Literal["fits", "does_not_fit", "no_plan", "unknown"]
    reason: str
    plan: PlanForm | None = None
    basis: BasisName | None = None
    measurement: str | None = None
    price_per_hour: float | None = Field(None, description="of all its cards together")
    headroom_bytes: int | None = Field(None, description="memory of a card that the plan leaves")
    missing_bytes: int | None = None
    samples_per_second: float | None = Field(None, description="over all its cards, where a real one was timed")


class PlacementList(_Form):
    """Candidates in order."""

    workload: str
    target: int
    split: SplitName
    rank_by: str
    placements: list[Placement]


class ProbeRequest(_Form):
    """A probe to be run."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"workload": "gpt2", "target": 256, "gpu": "A100-SXM4-40GB"}]},
    )

    workload: WorkloadName
    parameters: Parameters = Field(default_factory=dict)
    target: Target
    gpu: GpuName | None = Field(
        None, description="a card that a runner has, or one to emulate; any runner's own where null"
    )
    world_size: WorldSize = 1
    split: SplitName = "even"
    multiple_of: MultipleOf = 1
    tolerance: Tolerance = 0.0
    objective: Literal["max", "plan", "throughput"] = "max"
    basis: BasisName | None = Field(None, description="measure or emulate; a real card is preferred where null")
    deadline: float | None = Field(None, strict=True, gt=0, le=30 * 86400, description="seconds that it may run")
    force: bool = Field(False, strict=True, description="run it although a fresh measurement answers")


class ProblemSummary(_Form):
    """Why a probe failed."""

    code: str
    detail: str


class _ProbeFields(_Form):
    state: State
    workload: str
    gpu: str
    basis: BasisName
    target: int
    world_size: int
    split: SplitName
    created_at: str | None = None
    started_at: str | None = None
    ended_at: str | None = None
    attempts: int = 0
    cancel_requested: bool = False
    measurement: str | None = Field(None, description="id of what it measured")
    plan: PlanForm | None = Field(None, description="left out of lists")
    problem: ProblemSummary | None = None
    last_event: int = Field(0, description="number of its newest event")


class ProbeForm(_ProbeFields):
    """A probe."""

    id: str


class KnownForm(_ProbeFields):
    """What a probe would have found, known without one: in a probe's form, with no id."""

    id: None = None


class ProbeList(_Form):
    """Probes, the newest first."""

    probes: list[ProbeForm]
    next: str | None = Field(None, description="give it as `before` for the next page")


class Event(_Form):
    """One thing that happened to a probe: the data of a server-sent event."""

    number: int
    at: str
    kind: str
    data: dict[str, Any]


class MeasurementForm(_Form):
    """A report as it is kept."""

    id: str
    created_at: str
    workload: str
    gpu: str
    source: Literal["probe", "reported"]
    probe: str | None
    report: ReportForm | None = Field(None, description="left out of lists")
    basis: BasisName
    max_micro_batch_size: int | None
    micro_batches_per_step: int
    smallest_failing: int | None


class MeasurementList(_Form):
    """Measurements, the newest first."""

    measurements: list[MeasurementForm]
    next: str | None = None


class OomReportRequest(_Form):
    """An out-of-memory error of a training."""

    workload: WorkloadName
    gpu: GpuName
    micro_batch_size: _Count
    accumulation_steps: _Count = 1
    measurement: str | None = Field(None, max_length=64, description="of the plan that gave the size")


class MeasurementReport(_Form):
    """A report of a probe that ran elsewhere, or an out-of-memory error: one of the two."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "oneOf": [
                {"required": ["report"], "properties": {"report": {"type": "object"}, "oom": {"type": "null"}}},
                {"required": ["oom"], "properties": {"oom": {"type": "object"}, "report": {"type": "null"}}},
            ]
        },
    )

    report: dict[str, Any] | None = Field(
        None,
        description="what `autobatch probe --format json` prints",
        json_schema_extra={"anyOf": [{"$ref": "#/components/schemas/Report"}, {"type": "null"}]},
    )
    workload: WorkloadName | None = Field(
        None, description="the service's name for the job, where the report has another"
    )
    oom: OomReportRequest | None = None


class OomForm(_Form):
    """An out-of-memory error as it is kept."""

    id: str
    created_at: str
    workload: str
    gpu: str
    micro_batch_size: int
    micro_batches_per_step: int
    after_plan: bool


class ParameterForm(_Form):
    """A parameter of a workload."""

    type: Literal["integer", "number", "boolean", "string"]
    default: int | float | bool | str | None
    minimum: float | None
    maximum: float | None
    choices: list[int | float | bool | str]
    description: str


class WorkloadForm(_Form):
    """A workload that may be asked for."""

    name: str
    description: str
    parameters: dict[str, ParameterForm]


class WorkloadList(_Form):
    """The workloads of this service."""

    workloads: list[WorkloadForm]


class Gpu(_Form):
    """A card and its names."""

    name: str
    nvml_name: str
    kubernetes: str = Field(description="label nvidia.com/gpu.product")
    slurm: str = Field(description="gres type by AutoDetect=nvml")
    aliases: list[str] = Field(description="further names that are understood, Ray's accelerator types among them")
    total_bytes: int
    compute_capability: str
    can_be_emulated: bool
    runners: int = Field(description="cards of this kind that runners have")


class GpuList(_Form):
    """The cards that may be asked for."""

    gpus: list[Gpu]
