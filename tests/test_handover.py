"""A plan found by one process and taken up by another: where it holds, and what is said where it does not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import autobatch
from autobatch import PlanError, UsageError
from autobatch.cli import main
from autobatch.handover import write_plan_file

if TYPE_CHECKING:
    from conftest import ScriptRunner

SCRIPT = Path(__file__).parent / "scripts" / "take_up_plan.py"


@pytest.fixture(scope="module")
def report(libraries: object) -> autobatch.Report:
    """Of a small job on an emulated L4."""
    del libraries
    return autobatch.probe_workload(
        "gpt2?layers=1&seq_len=64&vocab=1000", target=256, emulate="L4", max_micro_batch=64, cache="off"
    )


def changed(report: autobatch.Report, **more: Any) -> autobatch.Report:
    return dataclasses.replace(report, **more)


def test_a_plan_is_taken_up_where_it_holds(
    report: autobatch.Report, scripts: ScriptRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same card; not on another one, under another torch, for other ranks, or where others hold the memory."""
    monkeypatch.chdir(tmp_path)
    assert report.plan is not None
    small = dataclasses.replace(report.plan, micro_batch_size=32, micro_batch_sizes=(32,) * 8, accumulation_steps=8)
    taking = max(trial.footprint_bytes for trial in report.trials)
    big = tuple(dataclasses.replace(trial, footprint_bytes=23 * 2**30) for trial in report.trials)
    assert taking < 23 * 2**30
    files = {
        "good.json": report,
        "card.json": changed(
            report, device=dataclasses.replace(report.device, name="Tesla T4", total_bytes=16 * 2**30)
        ),
        "torch.json": changed(report, versions=dataclasses.replace(report.versions, torch="1.0.0")),
        "build.json": changed(
            report, versions=dataclasses.replace(report.versions, torch=f"{autobatch_torch(report)}+other")
        ),
        "large.json": changed(report, trials=big),
        "again.json": changed(report, plan=small),
    }
    for name, content in files.items():
        write_plan_file(content, tmp_path / name)
    (tmp_path / "broken.json").write_text('{"plan": ')
    words = [*files, "broken.json", "none.json", "reprobe=card.json", "reprobe=good.json", ""]
    said = scripts.run(SCRIPT, ["L4"], *words).answer
    plan = [64, 4]
    assert said["good.json"] == said["build.json"] == said["reprobe=good.json"] == plan
    assert said["again.json"] == said["reprobe=card.json"] == [32, 8]
    expected = {
        "card.json": ("PlanError", "the plan was found on Tesla T4 with 16 GiB, and this is NVIDIA L4 with 22."),
        "torch.json": ("PlanError", "the plan was found with torch 1.0.0, and this is "),
        "large.json": ("PlanError", "the plan takes 23 GiB, and the budget on NVIDIA L4 is 21.5 GiB now"),
        "broken.json": ("UsageError", "AUTOBATCH_PLAN_FILE names broken.json: report is not JSON"),
        "none.json": ("UsageError", "AUTOBATCH_PLAN_FILE names none.json, which cannot be read: No such file"),
        "": ("UsageError", "AUTOBATCH_PLAN_FILE is not set"),
    }
    for name, (kind, begins) in expected.items():
        assert said[name][0] == kind
        assert said[name][1].startswith(begins)


def autobatch_torch(report: autobatch.Report) -> str:
    return (report.versions.torch or "").partition("+")[0]


def test_ranks_that_differ_are_named(report: autobatch.Report, tmp_path: Path) -> None:
    """Before a device is opened."""
    write_plan_file(report, tmp_path / "plan.json")
    environment = {"AUTOBATCH_PLAN_FILE": str(tmp_path / "plan.json"), "WORLD_SIZE": "4"}
    with pytest.raises(PlanError, match="the plan is for 1 ranks, and 4 train: probe with --world-size 4"):
        autobatch.plan_from_env(environment=environment)


@pytest.mark.slow
def test_the_command_line_writes_what_is_taken_up(
    libraries: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Besides its table; a folder that is not there is refused before the first trial."""
    del libraries
    words = ["probe", "gpt2?layers=1&seq_len=64&vocab=1000", "--target", "256", "--emulate", "L4"]
    words += ["--max-micro-batch", "64", "--plan-file"]
    assert main([*words, str(tmp_path / "plan.json")]) == 0
    assert f"plan written to {tmp_path / 'plan.json'}" in capsys.readouterr().err
    assert json.loads((tmp_path / "plan.json").read_text())["plan"]["micro_batch_size"] == 64
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]
    assert main([*words, str(tmp_path / "nowhere" / "plan.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_plan_file_that_cannot_be_written_leaves_nothing(report: autobatch.Report, tmp_path: Path) -> None:
    """The file before it stays as it was."""
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(UsageError, match="cannot write the plan file"):
        write_plan_file(report, tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]
