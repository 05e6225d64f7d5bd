"""A training job is found by its name, and where it is not, the error says what there is instead."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
import torch

from autobatch.errors import UsageError, WorkloadError
from autobatch.workload.builtin import BUILTIN_WORKLOADS
from autobatch.workload.loader import WorkloadName, load_factory, make_job

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from autobatch.workload.job import TrainingJob

JOB = """
import torch

def job(width: int = 4, bias: bool = True):
    model = torch.nn.Linear(width, 1, bias=bias)
    def micro_step(n):
        model(torch.ones(n, width)).sum().backward()
    return micro_step, torch.optim.SGD(model.parameters(), lr=0.1)

def other_job():
    return job()
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = dict(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - set(before):
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def load(text: str) -> TrainingJob:
    name = WorkloadName.parse(text)
    return make_job(name, load_factory(name))


# ---- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "target", "factory", "parameters"),
    [
        ("gpt2", "gpt2", None, {}),
        ("gpt2?seq_len=512&layers=24", "gpt2", None, {"seq_len": 512, "layers": 24}),
        ("package.train:job", "package.train", "job", {}),
        ("train:job?width=64&lr=1e-3&mixed=true&name=a:b", "train", "job", None),
    ],
)
def test_names_are_read(text: str, target: str, factory: str | None, parameters: dict[str, object] | None) -> None:
    """Built-in, module and parameters, each as it was written."""
    name = WorkloadName.parse(text)
    assert (name.target, name.factory) == (target, factory)
    expected = {"width": 64, "lr": 1e-3, "mixed": True, "name": "a:b"} if parameters is None else parameters
    assert name.parameters == expected


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("7", 7),
        ("-1.5", -1.5),
        ("true", True),
        ("false", False),
        ("True", True),
        ("False", False),
        ("bf16", "bf16"),
        ("null", "null"),
        ("[1]", "[1]"),
        ("", ""),
        ("a%20b", "a b"),
    ],
)
def test_parameters_have_the_type_that_they_look_like(written: str, value: object) -> None:
    """Numbers and truth values in either spelling; `False` as text would count as true."""
    read = WorkloadName.parse(f"train:job?x={written}").parameters["x"]
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    "text", ["gpt2", "gpt2?seq_len=512&layers=24", "m.train:job?name=a%26b%3Dc&flag=true&lr=0.001", "t:job?x=a%20b"]
)
def test_a_name_is_written_as_it_is_read(text: str) -> None:
    """What is shown can be given again."""
    name = WorkloadName.parse(text)
    assert WorkloadName.parse(str(name)) == name


@pytest.mark.parametrize(
    ("text", "near"), [("gtp2", "gpt2"), ("resnet", "resnet50"), ("vitt", "vit"), ("gpt-2?layers=2", "gpt2")]
)
def test_an_unknown_name_names_the_nearest(text: str, near: str) -> None:
    """A slip of the finger is answered with what was meant."""
    with pytest.raises(UsageError, match=f"did you mean '{near}'.*module:factory"):
        WorkloadName.parse(text)


def test_a_name_near_to_none_lists_them_all() -> None:
    """Where nothing is near, there is a list, and how one's own is written."""
    with pytest.raises(UsageError) as caught:
        WorkloadName.parse("llama-70b-instruct")
    assert all(known in str(caught.value) for known in BUILTIN_WORKLOADS)
    assert "path/to/file.py:factory" in str(caught.value)


@pytest.mark.parametrize("text", ["train:", ":job", "train:a job", "train:job()", "path/train:job", ".train:job", ":"])
def test_a_malformed_name_is_refused(text: str) -> None:
    """Before anything is imported."""
    with pytest.raises(UsageError, match=r"not of the form module:factory or path/to/file\.py:factory"):
        WorkloadName.parse(text)


@pytest.mark.parametrize("query", ["layers", "layers=2&", "=&", "layers=2;seq_len=3&x"])
def test_a_malformed_query_is_refused(query: str) -> None:
    """The error shows how parameters are written."""
    with pytest.raises(UsageError, match="name=value, joined by '&'"):
        WorkloadName.parse(f"gpt2?{query}")


def test_a_parameter_given_twice_is_refused() -> None:
    """The last would win in silence."""
    with pytest.raises(UsageError, match="layers is given more than once"):
        WorkloadName.parse("gpt2?layers=2&layers=3")


def test_a_file_that_is_not_there_is_named_with_where_it_was_looked_for(here: Path) -> None:
    """Before anything runs."""
    with pytest.raises(UsageError, match=rf"no file lost\.py in {here}"):
        WorkloadName.parse("lost.py:job")


# ---- loading ------------------------------------------------------------------------------------------------------


def test_a_file_and_a_module_are_loaded(here: Path) -> None:
    """By path, with its neighbours in reach, and by name from the working directory."""
    (here / "sub").mkdir()
    (here / "sub" / "neighbour.py").write_text("WIDTH = 5\n")
    (here / "sub" / "own_train.py").write_text(f"from neighbour import WIDTH\n{JOB}")
    (here / "own_module.py").write_text(JOB)
    for text in ("sub/own_train.py:job?width=3", "own_module:job?width=3"):
        job = load(text)
        job.micro_step(2)
        assert job.optimizers()[0].param_groups[0]["params"][0].shape == (1, 3)


def test_a_builtin_is_its_own_factory() -> None:
    """No import of the user's takes part."""
    assert load_factory(WorkloadName.parse("vit?layers=2")) is BUILTIN_WORKLOADS["vit"]


def test_a_module_without_that_function_lists_what_it_has(here: Path) -> None:
    """Its own functions, not those that it imported, nor those whose name says that they are nobody else's."""
    (here / "own_train.py").write_text(f"from os.path import join\n{JOB}\ndef _inner(): ...\n")
    with pytest.raises(UsageError, match=r"own_train\.py has no function 'jobs': it has job, other_job$"):
        load_factory(WorkloadName.parse("own_train.py:jobs"))


def test_a_module_without_functions_says_so(here: Path) -> None:
    """A constant of the name asked for is no factory either."""
    (here / "own_train.py").write_text("job = 3\n")
    with pytest.raises(UsageError, match=r"has no function 'job': it has no public functions$"):
        load_factory(WorkloadName.parse("own_train:job"))


@pytest.mark.parametrize("text", ["no_such_module_here:job", "no_such_package_here.train:job", "json.no_such:job"])
def test_a_module_that_is_not_there_is_a_usage_error(text: str) -> None:
    """Also where only its package is missing, or only the module in its package."""
    with pytest.raises(UsageError, match="there is no module"):
        load_factory(WorkloadName.parse(text))


@pytest.mark.parametrize("text", ["own_train.py:job", "own_train:job"])
def test_a_module_missing_inside_the_users_own_is_not_his_module_missing(here: Path, text: str) -> None:
    """The traceback shows where it was imported."""
    (here / "own_train.py").write_text("import no_such_dependency\n")
    with pytest.raises(
        WorkloadError, match=r"importing .* failed: ModuleNotFoundError: No module named 'no_such_dep"
    ) as caught:
        load_factory(WorkloadName.parse(text))
    assert "import no_such_dependency" in caught.value.traceback_text


@pytest.mark.parametrize("source", ["def job(:\n", "raise RuntimeError('at import\\nmore')\n", "1 / 0\n"])
def test_a_module_that_fails_is_a_workload_error(here: Path, source: str) -> None:
    """Syntax errors and whatever it raises: one line, the traceback beside it, and nothing half-made left."""
    (here / "own_train.py").write_text(source)
    with pytest.raises(WorkloadError, match=r"importing own_train\.py failed: \w+Error: ") as caught:
        load_factory(WorkloadName.parse("own_train.py:job"))
    assert "\n" not in str(caught.value)
    assert "own_train.py" in caught.value.traceback_text
    assert "own_train" not in sys.modules


@pytest.mark.parametrize("text", ["own_train.py:job", "own_train:job"])
def test_a_script_that_ends_the_program_when_imported_is_explained(here: Path, text: str) -> None:
    """A training script without a main guard would end the probe without a word."""
    (here / "own_train.py").write_text("import sys\nsys.exit(2)\n")
    with pytest.raises(WorkloadError, match=r"ended the program \(2\).*__main__"):
        load_factory(WorkloadName.parse(text))


def test_a_file_named_like_a_module_in_use_does_not_take_its_place(here: Path) -> None:
    """A file called json.py must not become everyone's json."""
    import json

    (here / "json.py").write_text(JOB)
    assert load("json.py:job").optimizers()
    assert sys.modules["json"] is json


# ---- making -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?depth=3", "unexpected keyword argument 'depth'; it takes width, bias"),
        ("?width=3&n=1", "unexpected keyword argument 'n'; it takes width, bias"),
    ],
)
def test_a_parameter_that_the_factory_does_not_take_is_refused(here: Path, query: str, message: str) -> None:
    """With the list of those that it takes."""
    (here / "own_train.py").write_text(JOB)
    with pytest.raises(UsageError, match=message):
        load(f"own_train.py:job{query}")


def test_a_parameter_that_is_missing_is_named(here: Path) -> None:
    """A factory that needs one gets none by default."""
    (here / "own_train.py").write_text("def job(width):\n    return None\n")
    with pytest.raises(UsageError, match="missing a required argument: 'width'"):
        load("own_train.py:job")
    (here / "own_none.py").write_text("def job():\n    return None\n")
    with pytest.raises(UsageError, match="it takes no parameters"):
        load("own_none.py:job?width=3")


def test_parameters_of_a_builtin_are_checked() -> None:
    """By name, and by what they mean together, before anything is built."""
    with pytest.raises(UsageError, match="'depth'; it takes seq_len, layers, width, heads, vocab, precision"):
        load("gpt2?depth=3")
    with pytest.raises(UsageError, match="width 100 is not divisible by heads 12"):
        load("gpt2?width=100")
    with pytest.raises(UsageError, match="layers='many' must be a whole number"):
        load("gpt2?layers=many")


@pytest.mark.parametrize(
    ("returned", "kind"),
    [("None", r"nothing \(None\)"), ("(1, 2)", "a tuple"), ("(print, None, 3)", "a tuple"), ("'job'", "a str")],
)
def test_a_factory_that_returns_no_job_is_named(here: Path, returned: str, kind: str) -> None:
    """With its parameters, as it was asked for."""
    (here / "own_train.py").write_text(f"def job(width=1):\n    return {returned}\n")
    with pytest.raises(WorkloadError, match=rf"own_train\.py:job\?width=2 returned {kind}"):
        load("own_train.py:job?width=2")


@pytest.mark.parametrize("error", [ValueError("no data"), torch.OutOfMemoryError("CUDA out of memory.")])
def test_what_a_factory_raises_passes_as_it_is(error: Exception) -> None:
    """Whether it was for want of memory is for the trial to decide, and it needs the error itself."""

    def factory() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        make_job(WorkloadName(target="own", factory="job"), factory)
    assert caught.value is error


def test_a_type_error_inside_a_factory_is_not_a_bad_parameter() -> None:
    """Only the call itself is checked beforehand."""

    def factory() -> None:
        raise TypeError("inside")

    with pytest.raises(TypeError, match="inside"):
        make_job(WorkloadName(target="own", factory="job"), factory)
