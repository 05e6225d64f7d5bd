"""Find a training job by its name, each with parameters.

Built-in, a model of another library (`hf:`, `timm:`), `module:factory` or `path/to/file.py:factory`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import json
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote

from autobatch.errors import AutobatchError, UsageError, WorkloadError
from autobatch.workload.builtin import BUILTIN_WORKLOADS
from autobatch.workload.job import TrainingJob
from autobatch.workload.judging import first_line
from autobatch.workload.named import NAMED_MODELS, local_config

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

__all__ = ["WorkloadName", "load_factory", "make_job"]

Parameter = int | float | bool | str


@dataclass(frozen=True, kw_only=True)
class WorkloadName:
    """A workload as people write it.

    `gpt2`, `gpt2?seq_len=512&layers=24`, `train.py:job`, `package.train:job?width=64`, `hf:config.json?seq_len=512`,
    `timm:vit_base_patch16_224`.
    """

    target: str
    """A built-in's name, or what stands before the colon: a module, the path of a Python file, `hf` or `timm`."""
    factory: str | None
    """The factory's name in it, or that of a model or its configuration; None for a built-in."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    """Keyword arguments for the factory."""

    @classmethod
    def parse(cls, text: str) -> WorkloadName:
        """Read a workload's name.

        Raises:
            UsageError: it is malformed, or names a built-in, a parameter of one, or a file that is not there.
        """
        name, _, query = text.partition("?")
        scheme, _, model = name.partition(":")
        if scheme in NAMED_MODELS and model:
            named = cls(target=scheme, factory=model, parameters=_parse_parameters(query, text))
            _check_parameters(named, load_factory(named))
            if scheme == "hf":
                local_config(model)
            return named
        target, colon, factory = name.rpartition(":")
        if not colon:
            _check_builtin(name)
            builtin = cls(target=name, factory=None, parameters=_parse_parameters(query, text))
            _check_parameters(builtin, BUILTIN_WORKLOADS[name])  # at once, rather than when torch has been imported
            return builtin
        is_module = all(part.isidentifier() for part in target.split("."))
        if not factory.isidentifier() or not (is_module or target.endswith(".py")):
            raise UsageError(f"workload {text!r} is not of the form module:factory or path/to/file.py:factory")
        if target.endswith(".py") and not Path(target).is_file():
            raise UsageError(f"workload {text!r}: there is no file {target} in {Path.cwd()}")
        return cls(target=target, factory=factory, parameters=_parse_parameters(query, text))

    @property
    def is_own(self) -> bool:
        """Whether it is the user's own code."""
        return self.factory is not None and self.target not in NAMED_MODELS

    def __str__(self) -> str:
        name = f"{self.target}:{self.factory}" if self.factory else self.target
        query = "&".join(
            f"{key}={json.dumps(value) if not isinstance(value, str) else quote(value, safe='/:,')}"
            for key, value in self.parameters.items()
        )
        return f"{name}?{query}" if query else name


def _check_builtin(name: str) -> None:
    if name in BUILTIN_WORKLOADS:
        return
    if name.endswith(".py"):
        raise UsageError(
            f"workload {name!r} lacks the factory: write {name}:NAME, of a function in it that makes the job"
        )
    near = difflib.get_close_matches(name, BUILTIN_WORKLOADS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"built-in are {', '.join(BUILTIN_WORKLOADS)};"
    raise UsageError(
        f"unknown workload {name!r}: {hint} your own is module:factory or path/to/file.py:factory, a model of transformers or "
        "timm is hf:CONFIG or timm:MODEL"
    )


def _parse_parameters(query: str, text: str) -> dict[str, Parameter]:
    if not query:
        return {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
    except ValueError:
        raise UsageError(f"workload {text!r}: parameters are written name=value, joined by '&'") from None
    names = [key for key, _ in pairs]
    if twice := sorted({key for key in names if names.count(key) > 1}):
        raise UsageError(f"workload {text!r}: {', '.join(twice)} is given more than once")
    return {key: _parse_value(value) for key, value in pairs}


def _parse_value(text: str) -> Parameter:
    """Read a number or a truth value, as JSON or Python spells it; anything else is text."""
    if text in {"True", "False"}:  # as text, `False` would count as true
        return text == "True"
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float | bool) else text


def load_factory(name: WorkloadName) -> Callable[..., object]:
    """Import a workload's factory.

    Raises:
        UsageError: the module or the factory is not there.
        WorkloadError: the module failed while it was imported.
    """
    if name.factory is None:
        return BUILTIN_WORKLOADS[name.target]
    if not name.is_own:
        return functools.partial(NAMED_MODELS[name.target], name.factory)
    module = _import(name.target)
    factory = getattr(module, name.factory, None)
    if not callable(factory):
        functions = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
        ]
        known = f"it has {', '.join(functions)}" if functions else "it has no public functions"
        raise UsageError(f"{name.target} has no function {name.factory!r}: {known}")
    return factory  # type: ignore[no-any-return]  # callable() says no more than that it can be called


def _import(target: str) -> ModuleType:
    try:
        return _import_file(Path(target).resolve()) if target.endswith(".py") else _import_module(target)
    except ModuleNotFoundError as error:
        if error.name == target or target.startswith(f"{error.name}."):
            raise UsageError(f"there is no module {target} to import: is it installed, or in {Path.cwd()}?") from None
        raise _failed(f"importing {target}", error) from error
    except AutobatchError:
        raise
    except SystemExit as error:
        raise WorkloadError(
            f"importing {target} ended the program ({first_line(error) or 'sys.exit()'}): put what it does when it is run "
            "under `if __name__ == '__main__':`",
            traceback_text="".join(traceback.format_exception(error)),
        ) from error
    except Exception as error:
        raise _failed(f"importing {target}", error) from error


def _import_module(target: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(target)


def _import_file(path: Path) -> ModuleType:
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # as `python file.py` does, so that its neighbours are found
    name = path.stem
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) != str(path):
        name = f"{name}_workload"  # a file called like a module that is in use must not take that one's place
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def make_job(name: WorkloadName, factory: Callable[..., object]) -> TrainingJob:
    """Call a factory with the workload's parameters.

    Raises:
        UsageError: it takes no such parameter.
        WorkloadError: it returned something that is no job. What it raises itself passes as it is: whether that is
            for want of memory is for the trial to decide.
    """
    _check_parameters(name, factory)
    return TrainingJob.from_result(factory(**name.parameters), origin=str(name))


def _check_parameters(name: WorkloadName, factory: Callable[..., object]) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return  # a callable that does not say what it takes
    try:
        signature.bind(**name.parameters)
    except TypeError as error:
        accepted = ", ".join(signature.parameters) or "no parameters"
        raise UsageError(f"workload {name}: {error}; it takes {accepted}") from None


def _failed(what: str, error: BaseException) -> WorkloadError:
    return WorkloadError(
        f"{what} failed: {type(error).__name__}: {first_line(error)}".removesuffix(": "),
        traceback_text="".join(traceback.format_exception(error)),
    )
