"""A question as a person types it: its fields as they were sent, and the answer or what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autobatch import PlanError
from autobatch_server.answers import Answer, answer_question
from autobatch_server.gpus import GpuProblem, canonical_gpu
from autobatch_server.problems import CODES, ProblemError
from autobatch_server.questions import make_options, refuse_plan
from autobatch_server.schemas import LARGEST_TARGET, LARGEST_WORLD, ProbeRequest
from autobatch_server.workloads import WorkloadProblem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from autobatch_server.services import Services

__all__ = ["Fields", "Finding", "search"]

_FIELD_OF_CODE = {
    "unknown-workload": "workload",
    "bad-parameter": "workload",
    "unknown-gpu": "gpu",
    "ambiguous-gpu": "gpu",
    "no-plan": "target",
}


@dataclass(frozen=True, kw_only=True)
class Fields:
    """The fields of the form, as they stand in it."""

    workload: str = ""
    gpu: str = ""
    target: str = ""
    world_size: str = "1"
    split: str = "even"

    @classmethod
    def of(cls, form: Mapping[str, str]) -> Fields:
        """Take them from a form or a query; missing ones are as in an empty form."""
        return cls(**{name: form[name].strip() for name in cls.__dataclass_fields__ if name in form})

    @property
    def is_empty(self) -> bool:
        """Whether nothing was asked."""
        return not (self.workload or self.gpu or self.target)

    def request(self) -> ProbeRequest:
        """Read the fields.

        Raises:
            ProblemError: one of them is missing or cannot be read; the first of `errors` names it.
        """
        for name, longest in (("workload", 512), ("gpu", 128)):
            value = getattr(self, name)
            if not 0 < len(value) <= longest:
                problem = "is missing" if not value else f"has {len(value)} characters, the most are {longest}"
                raise _refuse(name, f"{_NAMES[name]} {problem}")
        if self.split not in {"even", "balanced"}:
            raise _refuse("split", "the split is even or balanced")
        return ProbeRequest(
            workload=self.workload,
            gpu=self.gpu,
            target=self._whole("target", LARGEST_TARGET),
            world_size=self._whole("world_size", LARGEST_WORLD),
            split=self.split,
        )

    def _whole(self, name: str, largest: int) -> int:
        text = getattr(self, name).replace(",", "").replace("_", "")
        value = int(text) if text.isascii() and text.isdigit() and len(text) <= 12 else 0
        if not 1 <= value <= largest:
            raise _refuse(name, f"{_NAMES[name]} is not a whole number from 1 to {largest:,}")
        return value


_NAMES = {"workload": "the workload", "gpu": "the card", "target": "the target", "world_size": "the number of ranks"}


def _refuse(field: str, problem: str) -> ProblemError:
    return ProblemError("invalid-request", problem, errors=[{"place": field, "problem": problem}])


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found for the fields of a form."""

    fields: Fields
    status: int = 200
    workload: str = ""
    """The job by its one name."""
    gpu: str = ""
    """The card by its one name."""
    answer: Answer | None = None
    problem: str = ""
    wrong_field: str = ""

    def is_wrong(self, field: str) -> bool:
        """Whether the problem lies with a field."""
        return bool(self.problem) and field == self.wrong_field


def search(services: Services, fields: Fields) -> Finding:
    """Answer from what is stored; what is wrong with the fields is part of the finding, for the form to show.

    Raises:
        StoreUnavailableError: the database is away.
    """
    try:
        return _answer(services, fields)
    except ProblemError as error:
        place = error.errors[0]["place"] if error.errors else _FIELD_OF_CODE.get(error.code, "target")
        return _wrong(fields, error, place)
    except (WorkloadProblem, GpuProblem) as error:
        return _wrong(fields, error, _FIELD_OF_CODE[error.code])


def _wrong(fields: Fields, error: Any, field: str) -> Finding:
    detail = error.detail[:1].upper() + error.detail[1:]
    # People choose from the list beside the field.
    detail = detail.replace("GET /v1/workloads lists them", "the field lists them").replace(
        "GET /v1/gpus lists them", "the field lists them"
    )
    return Finding(fields=fields, status=CODES[error.code].status, problem=f"{detail}.", wrong_field=field)


def _answer(services: Services, fields: Fields) -> Finding:
    asked = fields.request()
    job = str(services.catalogue.find(asked.workload))
    gpu = canonical_gpu(fields.gpu)
    options = make_options(target=asked.target, world_size=asked.world_size, split=asked.split)
    try:
        answer = answer_question(services.measurements, workload=job, gpu=gpu, options=options)
    except PlanError as error:
        raise refuse_plan(options, error) from None
    return Finding(fields=fields, workload=job, gpu=gpu, answer=answer)
