"""The training jobs that may be asked for: the built-in ones and the operator's. HTTP only ever names them."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self
from urllib.parse import parse_qsl, quote

from pydantic import BaseModel, ConfigDict, Field, model_validator

from autobatch import UsageError, WorkloadName, builtin_workloads

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "Parameter",
    "ParameterDeclaration",
    "Workload",
    "WorkloadCatalogue",
    "WorkloadDeclaration",
    "WorkloadProblem",
    "check_names",
]

Parameter = int | float | bool | str

WORKLOAD_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""What a workload may be called: no slash, no colon, so that a name is never a path or a module."""
_PARAMETER_NAME = r"^[A-Za-z_][A-Za-z0-9_]{0,63}$"
_LARGEST_INTEGER = 2**53 - 1  # what every JSON reader holds exactly


class ParameterDeclaration(BaseModel):
    """One parameter of a workload: its type and what it may be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["integer", "number", "boolean", "string"]
    default: Parameter | None = None
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[Parameter, ...] = ()
    max_length: int = Field(128, ge=1, le=1024, description="for strings: most characters")
    description: str = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.type in {"boolean", "string"} and (self.minimum is not None or self.maximum is not None):
            raise ValueError(f"minimum and maximum are for numbers, not for {self.type}")
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise ValueError(f"minimum {self.minimum:g} is above maximum {self.maximum:g}")
        for value in (*self.choices, *(() if self.default is None else (self.default,))):
            problem = self.problem_with(value)
            if problem:
                raise ValueError(f"{value!r} {problem}")
        return self

    def problem_with(self, value: object) -> str:
        """Say what is wrong with a value; empty where nothing is."""
        if not self._is_of_type(value):
            return f"is not of type {self.type}"
        if self.choices and value not in self.choices:
            return f"is none of {', '.join(map(str, self.choices))}"
        if isinstance(value, str) and (len(value) > self.max_length or not value.isprintable()):
            return f"is longer than {self.max_length} characters, or not printable"
        if isinstance(value, str) and not isinstance(_read_json(value), str):
            return "reads as a number or a truth value, and would reach the job as one"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            low = -_LARGEST_INTEGER if self.minimum is None else self.minimum
            high = _LARGEST_INTEGER if self.maximum is None else self.maximum
            if not low <= value <= high:
                return f"is not from {low:g} to {high:g}"
        return ""

    def normal(self, value: Parameter) -> Parameter:
        """The one form of a value: numbers that are equal are written alike."""
        return float(value) + 0.0 if self.type == "number" else value

    def _is_of_type(self, value: object) -> bool:
        if self.type == "boolean":
            return isinstance(value, bool)
        if self.type == "string":
            return isinstance(value, str)
        kinds = int if self.type == "integer" else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)


class WorkloadDeclaration(BaseModel):
    """A `[workloads.NAME]` table of the operator's file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    factory: str = Field(description="module:factory or path/to/file.py:factory")
    description: str = ""
    parameters: dict[Annotated[str, Field(pattern=_PARAMETER_NAME)], ParameterDeclaration] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "?" in self.factory:
            raise ValueError(
                "factory takes no parameters after '?': declare them under parameters, each with a default"
            )
        path = self.factory.removeprefix("hf:") if self.factory.endswith(".json") else self.factory.rpartition(":")[0]
        if path.endswith((".py", ".json")) and not Path(path).is_absolute():
            raise ValueError(f"factory {self.factory!r} is a relative path: write it from the root")
        WorkloadName.parse(self.factory)
        return self


@dataclass(kw_only=True, eq=False)  # not frozen: whoever raises and catches writes to an exception
class WorkloadProblem(Exception):  # noqa: N818 - a finding about a request, turned into a problem document
    """A request names a workload or a parameter that there is not."""

    code: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A training job with the values of its parameters."""

    name: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    """Those that differ from their defaults, by name in order: equal jobs are equal values."""

    def __str__(self) -> str:
        query = "&".join(
            f"{key}={quote(value, safe='/:,') if isinstance(value, str) else json.dumps(value)}"
            for key, value in self.parameters.items()
        )
        return f"{self.name}?{query}" if query else self.name


def check_names(names: Iterable[str]) -> None:
    """Refuse what a workload cannot be called; raises `UsageError`."""
    for name in names:
        if not re.fullmatch(WORKLOAD_NAME, name):
            raise UsageError(
                f"workload name {name!r} is not 1 to 64 letters, digits, '.', '_' and '-', the first no sign"
            )


class WorkloadCatalogue:
    """The workloads of one service."""

    def __init__(self, declared: Mapping[str, WorkloadDeclaration]) -> None:
        """Take the built-in workloads and the operator's, whose own take a built-in's place.

        Raises:
            UsageError: a name is malformed.
        """
        check_names(declared)
        self._declared: dict[str, WorkloadDeclaration] = {**_builtin_declarations(), **declared}

    @property
    def names(self) -> tuple[str, ...]:
        """Every name, in order."""
        return tuple(sorted(self._declared))

    def declaration(self, name: str) -> WorkloadDeclaration:
        """The declaration of a name; raises `WorkloadProblem`."""
        try:
            return self._declared[name]
        except KeyError:
            near = difflib.get_close_matches(name[:64], self._declared, n=1)
            hint = f"the nearest is {near[0]!r}; " if near else ""
            detail = f"no workload of this service has that name: {hint}GET /v1/workloads lists them"
            raise WorkloadProblem(code="unknown-workload", detail=detail) from None

    def find(self, text: str, parameters: Mapping[str, object] | None = None) -> Workload:
        """Read a workload as a request names it, `gpt2` or `gpt2?seq_len=512`, with further parameters beside it.

        Raises:
            WorkloadProblem: the name is unknown, or a parameter is not as declared.
        """
        name, _, query = text.partition("?")
        declaration = self.declaration(name)
        in_name, beside = _parameters_of(query, declaration), parameters or {}
        if set(in_name) & set(beside):
            raise WorkloadProblem(code="bad-parameter", detail=_TWICE)
        given = {**in_name, **beside}
        unknown = sorted(set(given) - set(declaration.parameters))
        if unknown:
            known = ", ".join(declaration.parameters) or "none"
            raise WorkloadProblem(
                code="bad-parameter", detail=f"{name} has no parameter {unknown[0][:64]!r}: it takes {known}"
            )
        values: dict[str, Parameter] = {}
        for key, declared in declaration.parameters.items():
            value = given.get(key, declared.default)
            if value is None:
                raise WorkloadProblem(code="bad-parameter", detail=f"{name} needs a value for its parameter {key!r}")
            problem = declared.problem_with(value)
            if problem:
                raise WorkloadProblem(code="bad-parameter", detail=f"parameter {key!r} of {name} {problem}")
            if value != declared.default:
                values[key] = declared.normal(value)  # type: ignore[arg-type] # problem_with saw that it is one
        return Workload(name=name, parameters=values)

    def library_name(self, workload: Workload) -> str:
        """What the library calls it: a built-in or a factory, with every parameter."""
        factory = self.declaration(workload.name).factory
        return f"{factory}{str(workload)[len(workload.name) :]}"


def _parameters_of(query: str, declaration: WorkloadDeclaration) -> dict[str, object]:
    """Read `seq_len=512&precision=bf16` by the declared types; what cannot be read stays text, to be refused."""
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, max_num_fields=64) if query else []
    except ValueError:
        raise WorkloadProblem(
            code="bad-parameter", detail="parameters in a workload's name are written name=value, joined by '&'"
        ) from None
    if len({key for key, _ in pairs}) < len(pairs):
        raise WorkloadProblem(code="bad-parameter", detail=_TWICE)
    return {key: _read(value, declaration.parameters.get(key)) for key, value in pairs}


def _read(text: str, declared: ParameterDeclaration | None) -> object:
    if declared is None or declared.type == "string":
        return text
    return _read_json(text.lower() if declared.type == "boolean" else text)


def _read_json(text: str) -> object:
    """Read a number or a truth value as the library does from a workload's name; anything else stays text."""
    if text in {"True", "False"}:
        return text == "True"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, int | float | bool) else text


def _builtin_declarations() -> dict[str, WorkloadDeclaration]:
    """The library's own jobs, with the parameters that their factories take."""
    return {
        job.name: WorkloadDeclaration.model_construct(
            factory=job.name,
            description=job.description,
            parameters={
                name: ParameterDeclaration(
                    type=_TYPES[type(default)],
                    default=default,
                    choices=job.choices.get(name, ()),
                    minimum=1 if isinstance(default, int) else None,
                    maximum=_LARGEST_BUILTIN if isinstance(default, int) else None,
                )
                for name, default in job.parameters.items()
            },
        )
        for job in builtin_workloads()
    }


_TWICE = "a parameter is given more than once"
_TYPES: Mapping[type, Any] = {int: "integer", float: "number", bool: "boolean", str: "string"}
_LARGEST_BUILTIN = 1_048_576
