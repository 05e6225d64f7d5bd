"""How the cache tells one training job from another before anything of it is started."""

from __future__ import annotations

import hashlib
import marshal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autobatch._version import __version__
from autobatch.report import fingerprint
from autobatch.throughput import windows_per_trial
from autobatch.workload.loader import WorkloadName
from autobatch.workload.named import local_config

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autobatch.command.template import CommandTemplate
    from autobatch.facts import DeviceFacts
    from autobatch.jsonform import JsonValue
    from autobatch.options import ProbeOptions
    from autobatch.workload.job import TrainingJob

__all__ = ["JobIdentity", "command_identity", "function_identity", "workload_identity"]


@dataclass(frozen=True, kw_only=True)
class JobIdentity:
    """A training job as the cache knows it."""

    name: str
    """What people read in a list."""
    job: str
    """Hash of all that names it."""
    files: tuple[str, ...] = ()
    """Files that it is seen from outside to be made of."""
    torch_is_ours: bool = True
    """Whether it runs on the torch of this environment; a command may run on another."""

    def series(self, facts: DeviceFacts, options: ProbeOptions) -> str:
        """Hash the job with what else its trials depend on: the card, the versions, the allocator, steps per trial.

        The budget is not among it: which trials hold under another one can be told (`known.still_holding`).
        """
        return fingerprint(
            job=self.job,
            basis=facts.basis,
            card=facts.device.name,
            total_bytes=facts.device.total_bytes,
            driver=facts.device.driver,
            torch=facts.torch_version,
            cuda=facts.cuda_version,
            allocator=facts.allocator_settings,
            windows=windows_per_trial(options),
        )


def _identity(name: str, *, files: Sequence[str] = (), torch_is_ours: bool = True, **facts: JsonValue) -> JobIdentity:
    job = fingerprint(autobatch=__version__, **facts)
    return JobIdentity(name=name, job=job, files=tuple(files), torch_is_ours=torch_is_ours)


def workload_identity(name: str) -> JobIdentity:
    """A workload by its name; one of the user's own belongs to a folder, from which it is imported."""
    parsed = WorkloadName.parse(name)
    is_file = parsed.target.endswith(".py")
    if not parsed.is_own and parsed.factory is not None:
        return _model_identity(parsed, parsed.factory)
    return _identity(
        str(parsed),
        workload=str(Path(parsed.target).resolve()) if is_file else parsed.target,
        factory=parsed.factory,
        parameters=dict(parsed.parameters),
        folder=None if parsed.factory is None or is_file else str(Path.cwd()),
        files=[str(Path(parsed.target).resolve())] if is_file else [],
    )


def _model_identity(name: WorkloadName, model: str) -> JobIdentity:
    """A model of another library by its configuration, and the library's version."""
    path = local_config(model) if name.target == "hf" else None
    return _identity(
        str(name),
        workload=name.target,
        model=model if path is None else str(path.resolve()),
        parameters=dict(name.parameters),
        library=_version_of({"hf": "transformers"}.get(name.target, name.target)),
        files=[] if path is None else [str(path.resolve())],
    )


def _version_of(library: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def command_identity(template: CommandTemplate, options: ProbeOptions, seq_len: int | None) -> JobIdentity:
    """A command with its places, in the folder in which it is started, with as many ranks."""
    named = [argument.partition("=")[2] or argument for argument in template.arguments]
    files = [str(Path(name).resolve()) for name in named if _is_file(name)]
    return _identity(
        template.text if seq_len is None else f"{template.text} ({seq_len=})",
        command=list(template.arguments),
        edits=[edit.text for edit in template.edits],
        seq_len=seq_len,
        folder=str(Path.cwd()),
        world_size=options.world_size,
        files=files,
        torch_is_ours=False,
    )


def function_identity(workload: str, job: TrainingJob) -> JobIdentity:
    """A micro-step of a script by the name that its caller gives it, its code, and the parameters that it trains."""
    optimizers = [
        [type(one).__qualname__, [_parameters(group) for group in one.param_groups]] for one in job.optimizers()
    ]
    script = sys.argv[0] if sys.argv else ""
    return _identity(
        f"{Path(script).name}: {workload}" if script else workload,
        function=workload,
        script=str(Path(script).resolve()) if _is_file(script) else script,
        code=[_code(job.micro_step), _code(job.end_window)],
        optimizers=fingerprint(optimizers=optimizers),
        scaler=job.scaler is not None,
    )


def _parameters(group: dict[str, Any]) -> list[JsonValue]:
    """The parameters of a group and its settings of kinds that choose what the optimizer keeps (a learning rate does not)."""
    values: list[JsonValue] = [
        [list(value.shape), str(value.dtype), value.requires_grad, str(value.device.type)] for value in group["params"]
    ]
    chosen = {key: value for key, value in group.items() if isinstance(value, bool | None)}
    return [*values, dict(sorted(chosen.items()))]


def _code(function: Callable[..., Any] | None) -> str:
    """Hash of a function's code; of anything else that can be called, its type's name."""
    code = getattr(function, "__code__", None)
    if code is None:
        return "" if function is None else type(function).__qualname__
    return hashlib.sha256(marshal.dumps(code)).hexdigest()


def _is_file(name: str) -> bool:
    try:
        return bool(name) and Path(name).is_file()
    except (OSError, ValueError):  # a name too long, or with a NUL
        return False
