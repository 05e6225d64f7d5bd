"""The built-in jobs as data: what a service or a person may ask of each, told without importing torch."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from autobatch import BuiltinWorkload, WorkloadName, builtin_workloads
from autobatch.workload.builtin import BUILTIN_WORKLOADS


def test_every_built_in_job_is_described() -> None:
    """Each by its name, in one line, in the order in which they are defined."""
    jobs = builtin_workloads()
    assert [job.name for job in jobs] == list(BUILTIN_WORKLOADS)
    for job in jobs:
        assert job.description.endswith(".")
        assert "\n" not in job.description
        assert WorkloadName.parse(job.name).factory is None


@pytest.mark.parametrize("job", builtin_workloads(), ids=lambda job: job.name)
def test_its_parameters_are_those_that_its_factory_takes(job: BuiltinWorkload) -> None:
    """Each with its default, of a kind that a name can carry; a choice holds its default."""
    taken = inspect.signature(BUILTIN_WORKLOADS[job.name]).parameters
    assert dict(job.parameters) == {name: parameter.default for name, parameter in taken.items()}
    assert all(isinstance(default, int | float | bool | str) for default in job.parameters.values())
    assert set(job.choices) <= set(job.parameters)
    assert all(job.parameters[name] in choices for name, choices in job.choices.items())
    assert all(name in job.choices for name, default in job.parameters.items() if isinstance(default, str))


def test_asking_costs_no_torch() -> None:
    """A scheduler's node may ask without the seconds that an import takes."""
    code = "import sys, autobatch; autobatch.builtin_workloads(); print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ended.stdout.strip() == "False"
