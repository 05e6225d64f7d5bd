"""The built-in training jobs as data: what each is called, what it does, and which parameters it takes."""

from __future__ import annotations

import inspect
import typing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from autobatch.workload.builtin import BUILTIN_WORKLOADS

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["BuiltinWorkload", "builtin_workloads"]


@dataclass(frozen=True, kw_only=True)
class BuiltinWorkload:
    """A built-in training job."""

    name: str
    """What it is called, as in `autobatch probe gpt2`."""
    description: str
    """One line."""
    parameters: Mapping[str, int | float | bool | str]
    """Its parameters by name, each with its default."""
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The values that a parameter may take, where they are listed."""


def builtin_workloads() -> tuple[BuiltinWorkload, ...]:
    """List the built-in training jobs, without importing torch.

    Example:
        >>> [job.name for job in builtin_workloads()]
        ['gpt2', 'resnet50', 'vit']
    """
    described = []
    for name, factory in BUILTIN_WORKLOADS.items():
        hints = typing.get_type_hints(factory)
        parameters = {key: parameter.default for key, parameter in inspect.signature(factory).parameters.items()}
        described.append(
            BuiltinWorkload(
                name=name,
                description=(inspect.getdoc(factory) or "").partition("\n")[0],
                parameters=parameters,
                choices={
                    key: typing.get_args(hints[key])
                    for key in parameters
                    if typing.get_origin(hints[key]) is typing.Literal
                },
            )
        )
    return tuple(described)
