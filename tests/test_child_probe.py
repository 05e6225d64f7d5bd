"""A job is probed by its name, in child processes that are gone afterwards; what cannot be is said before any starts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from autobatch import PlanError, Report, TrialEnded, UsageError, WorkloadError, probe_workload

if TYPE_CHECKING:
    from pathlib import Path

    from autobatch import ProbeEvent

SMALL = "gpt2?seq_len=32&layers=1&width=64&heads=2&vocab=128"


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, list[ProbeEvent], set[int]]:
    """One probe on an emulated card with little memory: its report, its events, and the children left of it."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    events: list[ProbeEvent] = []
    environment = {key: text for key, text in os.environ.items() if key != "PYTHONPATH"} | {
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "TMPDIR": str(tmp_path_factory.mktemp("job")),
    }
    report = probe_workload(
        SMALL, target=8, progress=events.append, environment=environment, emulate="T4", headroom=0
    )  # fmt: skip
    left = {child.pid for child in psutil.Process().children(recursive=True)} - before
    return report, events, left


def test_the_report_is_that_of_an_emulated_card(probed: tuple[Report, list[ProbeEvent], set[int]]) -> None:
    """Its name and its parameters, the card, the plan."""
    report, _, _ = probed
    assert (report.workload, report.basis, report.device.name) == (SMALL, "emulated", "Tesla T4")
    assert report.plan is not None
    assert report.plan.micro_batch_sizes == (8,)
    assert report.options.headroom == 0
    assert report.breakdown is None  # one trial more, and nobody asked for it
    assert not {"breakdown", "alternatives"} & set(report.to_dict())


def test_every_trial_is_told_while_it_runs(probed: tuple[Report, list[ProbeEvent], set[int]]) -> None:
    """The events hold the report's trials, in order."""
    report, events, _ = probed
    assert tuple(event.trial for event in events if isinstance(event, TrialEnded)) == report.trials


def test_no_process_is_left(probed: tuple[Report, list[ProbeEvent], set[int]]) -> None:
    """The child and all that it started are gone when the call returns."""
    _, _, left = probed
    assert left == set()


@pytest.mark.parametrize(
    ("workload", "options", "error"),
    [
        ("gtp2", {"target": 8}, UsageError),
        ("nowhere.py:make", {"target": 8}, UsageError),
        ("gpt2", {"target": 0}, UsageError),
        ("gpt2", {"target": 8, "emulate": "Z9000"}, UsageError),
        ("gpt2", {"target": 7, "world_size": 2}, PlanError),
    ],
)
def test_what_cannot_be_probed_is_said_before_a_child_starts(
    workload: str, options: dict[str, Any], error: type[Exception]
) -> None:
    """No process, no compiler, no seconds."""
    started: list[ProbeEvent] = []
    with pytest.raises(error):
        probe_workload(workload, progress=started.append, **({"emulate": "T4"} | options))
    assert started == []


def test_what_the_job_raises_comes_back_and_leaves_no_process(tmp_path: Path) -> None:
    """With its own traceback, from the child."""
    job = tmp_path / "job.py"
    job.write_text("def make():\n    raise LookupError('no data here')\n", encoding="utf-8")
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(WorkloadError, match="no data here") as caught:
        probe_workload(f"{job}:make", target=8, emulate="T4")
    assert "LookupError" in caught.value.traceback_text
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
