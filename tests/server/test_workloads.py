"""What may be asked for is named by the operator; parameters are held to their declarations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from autobatch import UsageError, WorkloadName, builtin_workloads
from autobatch_server.workloads import (
    ParameterDeclaration,
    Workload,
    WorkloadCatalogue,
    WorkloadDeclaration,
    WorkloadProblem,
)

if TYPE_CHECKING:
    from pathlib import Path

    from service_fakes import RunningService

PARAMETERS = {
    "width": {"type": "integer", "default": 64, "minimum": 1, "maximum": 4096},
    "dropout": {"type": "number", "default": 0.1, "minimum": 0, "maximum": 1},
    "fused": {"type": "boolean", "default": True},
    "mode": {"type": "string", "default": "train", "choices": ["train", "tune"]},
    "tag": {"type": "string", "default": "-"},
    "depth": {"type": "integer"},
}


@pytest.fixture
def catalogue() -> WorkloadCatalogue:
    declared = WorkloadDeclaration.model_validate({"factory": "pkg.jobs:make", "parameters": PARAMETERS})
    return WorkloadCatalogue({"mine": declared})


def problem(catalogue: WorkloadCatalogue, text: str, parameters: dict[str, Any] | None = None) -> WorkloadProblem:
    with pytest.raises(WorkloadProblem) as caught:
        catalogue.find(text, parameters)
    return caught.value


def test_the_built_in_jobs_are_there_with_their_parameters(catalogue: WorkloadCatalogue) -> None:
    """Every one of the library's, each default kept; an operator's own may take the name."""
    for job in builtin_workloads():
        declared = catalogue.declaration(job.name).parameters
        assert {name: one.default for name, one in declared.items()} == dict(job.parameters)
        assert str(catalogue.find(job.name)) == job.name
    own = WorkloadCatalogue({"gpt2": WorkloadDeclaration(factory="pkg:make")})
    assert own.library_name(own.find("gpt2")) == "pkg:make"


def test_equal_jobs_have_equal_names(catalogue: WorkloadCatalogue) -> None:
    """However parameters are ordered, wherever they stand, and where they are the defaults."""
    first = catalogue.find("mine?depth=2&width=128&dropout=1")
    second = catalogue.find("mine", {"dropout": 1.0, "width": 128, "depth": 2, "mode": "train", "fused": True})
    assert str(first) == str(second) == "mine?width=128&dropout=1.0&depth=2"
    assert catalogue.find(str(first)) == first


def test_the_library_is_given_the_factory_and_the_values_in_their_types(catalogue: WorkloadCatalogue) -> None:
    """What the child parses is what was checked: no text becomes a number on the way."""
    job = catalogue.find("mine", {"depth": 3, "tag": "a b&c=d?e%20", "fused": False, "dropout": 0})
    parsed = WorkloadName.parse(catalogue.library_name(job))
    assert (parsed.target, parsed.factory) == ("pkg.jobs", "make")
    assert dict(parsed.parameters) == {"depth": 3, "tag": "a b&c=d?e%20", "fused": False, "dropout": 0.0}


@pytest.mark.parametrize(
    ("text", "parameters", "said"),
    [
        ("mine", {}, "needs a value for its parameter 'depth'"),
        ("mine?depth=x", {}, "not of type integer"),
        ("mine?depth=2.0", {}, "not of type integer"),
        ("mine?depth=true", {}, "not of type integer"),
        ("mine?depth=1&width=0", {}, "not from 1 to 4096"),
        ("mine?depth=1&width=99999999999999999999", {}, "not from 1 to 4096"),
        ("mine?depth=99999999999999999999", {}, "is not from"),
        ("mine?depth=1&dropout=NaN", {}, "is not from 0 to 1"),
        ("mine?depth=1&mode=other", {}, "none of train, tune"),
        ("mine?depth=1&fused=1", {}, "not of type boolean"),
        ("mine?depth=1&tag=12", {}, "reads as a number"),
        ("mine?depth=1&tag=True", {}, "reads as a number or a truth value"),
        ("mine?depth=1", {"tag": "x" * 129}, "longer than 128"),
        ("mine?depth=1", {"tag": "a\x1bb"}, "not printable"),
        ("mine?depth=1&nope=2", {}, "has no parameter 'nope': it takes width"),
        ("mine?depth=1&depth=2", {}, "more than once"),
        ("mine?depth=1", {"depth": 1}, "more than once"),
        ("mine?depth", {}, "name=value"),
    ],
)
def test_a_parameter_that_is_not_as_declared_is_refused(
    catalogue: WorkloadCatalogue, text: str, parameters: dict[str, Any], said: str
) -> None:
    """Each with a sentence that names it."""
    found = problem(catalogue, text, parameters)
    assert found.code == "bad-parameter"
    assert said in found.detail


@pytest.mark.parametrize("name", ["gtp2", "os:system", "/etc/passwd:x", "../gpt2", "", "mine/..", "gpt2#", "GPT2"])
def test_http_names_no_code(catalogue: WorkloadCatalogue, name: str) -> None:
    """A module, a path or a slip is an unknown name, whatever lies there; the nearest known one is told."""
    found = problem(catalogue, name)
    assert found.code == "unknown-workload"
    assert "GET /v1/workloads" in found.detail
    if name == "gtp2":
        assert "'gpt2'" in found.detail


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"factory": "train.py:make"}, "is a relative path"),
        ({"factory": "~/train.py:make"}, "is a relative path"),
        ({"factory": "/nowhere/train.py:make"}, "there is no file"),
        ({"factory": "not a module"}, "unknown workload"),
        ({"factory": "pkg:make?width=3"}, "declare them under parameters"),
        ({"factory": "pkg:make", "colour": 1}, "Extra inputs"),
        ({"factory": "pkg:make", "parameters": {"a-b": {"type": "integer"}}}, "pattern"),
        ({"factory": "pkg:make", "parameters": {"a": {"type": "tensor"}}}, "'integer', 'number'"),
        ({"factory": "pkg:make", "parameters": {"a": {"type": "integer", "default": "x"}}}, "not of type integer"),
        ({"factory": "pkg:make", "parameters": {"a": {"type": "integer", "default": 9, "maximum": 8}}}, "is not from"),
        (
            {"factory": "pkg:make", "parameters": {"a": {"type": "integer", "minimum": 9, "maximum": 8}}},
            "above maximum",
        ),
        ({"factory": "pkg:make", "parameters": {"a": {"type": "string", "minimum": 1}}}, "are for numbers"),
        ({"factory": "pkg:make", "parameters": {"a": {"type": "string", "choices": ["8"]}}}, "reads as a number"),
        ({"factory": "pkg:make", "parameters": {"a": {"type": "integer", "defualt": 1}}}, "Extra inputs"),
    ],
)
def test_a_declaration_that_cannot_work_is_refused_at_the_start(table: dict[str, Any], said: str) -> None:
    """Before anybody asks for the workload."""
    with pytest.raises(ValidationError, match=said):
        WorkloadDeclaration.model_validate(table)


def test_a_file_is_named_from_the_root(tmp_path: Path) -> None:
    """And is there."""
    path = tmp_path / "train.py"
    path.touch()
    assert WorkloadDeclaration(factory=f"{path}:make").factory == f"{path}:make"


def test_a_name_is_never_a_path_or_a_module() -> None:
    """Letters, digits and three signs, not first."""
    for name in ("a/b", "a:b", ".hidden", "", "a b", "x" * 65, "a\n"):
        with pytest.raises(UsageError, match="workload name"):
            WorkloadCatalogue({name: WorkloadDeclaration(factory="pkg:make")})


def test_values_are_written_so_that_they_come_back() -> None:
    """Numbers as JSON has them; signs that would end a parameter are escaped."""
    job = Workload(name="mine", parameters={"a": True, "b": 0.5, "c": "x&y=z"})
    assert str(job) == "mine?a=true&b=0.5&c=x%26y%3Dz"
    assert ParameterDeclaration(type="number").normal(-0.0) == 0.0
    assert str(ParameterDeclaration(type="number").normal(-0.0)) == "0.0"


def test_the_list_says_what_may_be_asked(service: RunningService) -> None:
    """GET /v1/workloads: names in order, each parameter with type, default and choices, and no factory."""
    listed = service.client.get("/v1/workloads").json()["workloads"]
    assert [one["name"] for one in listed] == sorted(job.name for job in builtin_workloads())
    gpt2 = next(one for one in listed if one["name"] == "gpt2")
    assert gpt2["parameters"]["precision"]["choices"] == ["bf16", "fp16", "fp32"]
    assert gpt2["parameters"]["seq_len"]["default"] == 1024
    assert "factory" not in gpt2
