"""`autobatch.probe` under torchrun on emulated cards: the answer of the smallest card, held to brute force."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import run_two_ranks

import autobatch
from autobatch.emulator.launch import open_machine
from autobatch.handover import write_plan_file

if TYPE_CHECKING:
    from autobatch.emulator.machine import EmulatedMachine

pytestmark = pytest.mark.usefixtures("libraries")
SCRIPT = Path(__file__).parent / "scripts" / "emulated_ranks.py"


def answers(machine: EmulatedMachine, folder: Path, *words: str) -> list[Any]:
    """What two ranks say."""
    run_two_ranks(machine, SCRIPT, str(folder), *words)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def check_report(reports: list[Any], wrapper: str) -> dict[str, Any]:
    assert reports[0] == reports[1]
    report: dict[str, Any] = reports[0][wrapper]
    assert (report["basis"], report["device"]["name"], report["certified"]) == ("emulated", "Tesla T4", True)
    assert report["plan"]["world_size"] == report["options"]["world_size"] == 2
    assert "rank 1 (Tesla T4)" in report["warnings"][-1]
    fitting = [trial["footprint_bytes"] for trial in report["trials"] if trial["outcome"] == "fits"]
    assert max(fitting) <= report["memory"]["budget_bytes"], "a trial's figures are of another card than the report's"
    return report


@pytest.mark.slow  # the README's example, which is no slow test, runs DDP so
def test_one_report_for_all_ranks(tmp_path: Path) -> None:
    """The smaller card decides; FSDP2, which spreads the optimizer over both, fits more than DDP."""
    with open_machine(("L4", "T4")) as machine:
        reports = answers(machine, tmp_path, "probe", "ddp", "fsdp2", "256")
    ddp, fsdp2 = (check_report(reports, wrapper) for wrapper in ("ddp", "fsdp2"))
    assert 0 < 1.5 * ddp["max_micro_batch_size"] < fsdp2["max_micro_batch_size"]


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_the_maximum_of_two_ranks_is_that_of_brute_force(wrapper: str, tmp_path: Path) -> None:
    """The size trains on both cards without autobatch, and the next one does not on the smaller."""
    with open_machine(("L4", "T4")) as machine:
        report = check_report(answers(machine, tmp_path, "probe", wrapper, "1"), wrapper)
        size, steps = report["max_micro_batch_size"], str(report["micro_batches_per_step"])
        assert answers(machine, tmp_path, "run", wrapper, str(size), steps) == ["fits", "fits"]
        larger, smaller = answers(machine, tmp_path, "run", wrapper, str(size + 1), steps)
        assert (larger, smaller != "fits") == ("fits", True)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_ranks_train_an_epoch_together(wrapper: str, tmp_path: Path) -> None:
    """Collectives on emulated cards carry no values: what ranks tell each other at the end of an epoch arrives all the same."""
    with open_machine(("L4", "T4")) as machine:
        assert answers(machine, tmp_path, "accumulate", wrapper) == [{"steps": 3, "samples": 14}] * 2


@pytest.mark.slow
def test_a_plan_that_one_rank_cannot_take_up_is_taken_up_by_none(tmp_path: Path) -> None:
    """Two L4 take the plan that was found for two L4; where one is a T4 its rank says why, and the other that it is not it."""
    report = autobatch.probe_workload(
        "gpt2?layers=1&seq_len=64&vocab=1000", target=256, emulate="L4", world_size=2, max_micro_batch=64, cache="off"
    )
    write_plan_file(report, tmp_path / "plan.json")
    with open_machine(("L4", "L4")) as machine:
        assert answers(machine, tmp_path, "take-up", str(tmp_path / "plan.json")) == [[64, 2]] * 2
    with open_machine(("L4", "T4")) as machine:
        first, second = answers(machine, tmp_path, "take-up", str(tmp_path / "plan.json"))
    assert first == "another rank cannot take up the plan: what it printed says why"
    assert second.startswith("the plan was found on NVIDIA L4")
