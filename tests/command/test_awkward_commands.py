"""Scripts that train, are started or live in ways that a hook can miss."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from command_probes import CARD, ROOT, SCRIPTS, SIZES, SMALL, environment, probe

from autobatch import UsageError, WorkloadError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("libraries")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fork", "autograd-grad", "cpu-before", "resets-peaks"])
def test_awkward_ways_to_train(way: str) -> None:
    """In a forked child, without a backward, after a small model on the CPU, with peaks that the script resets."""
    report = probe("awkward.py", way, *SIZES, target=8, max_micro_batch=4)
    assert report.certified
    assert {(trial.window, trial.steps) for trial in report.trials} == {((1, 1), 3), ((4, 4), 3)}
    peaks = {trial.micro_batch_size: trial.peak_allocated_bytes for trial in report.trials}
    assert peaks[4] - peaks[1] > 3 * 64 * 512 * 4 * 2  # what three samples keep for the backward, at least
    assert not report.warnings


def test_accumulation_is_not_taken_from_the_backwards_alone() -> None:
    """Two for each micro-batch look like two micro-batches; but the number of steps never reaches the script."""
    report = probe("awkward.py", "two-backwards", *SIZES[:2], target=2, max_micro_batch=1)
    assert not report.certified
    assert "cannot train by this plan" in report.warnings[-1]


def test_training_on_the_cpu_alone() -> None:
    """Named as what it is."""
    with pytest.raises(WorkloadError, match="trained on the CPU alone: move its model"):
        probe("awkward.py", "cpu-alone", *SIZES)


@pytest.mark.slow
def test_ranks_that_no_launcher_names(tmp_path: Path) -> None:
    """Torch knows how many train together, where no variable says it."""
    variables = {**environment(), "STORE": str(tmp_path / "store")}
    with pytest.raises(UsageError, match=r"runs 2 ranks .*--world-size 2"):
        probe("awkward.py", "ranks", *SIZES, environment=variables)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
def test_an_empty_variable_of_a_launcher(name: str) -> None:
    """Is as good as none."""
    report = probe("plain_loop.py", *SIZES, *SMALL, target=1, environment={**environment(), name: ""})
    assert report.plan is not None


def test_a_long_folder_for_temporary_files(tmp_path: Path) -> None:
    """Longer than a socket's path may be."""
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    command = [*(sys.executable, "-m", "autobatch", "probe", "--target", "1", "--emulate", CARD, "--"), sys.executable]
    run = subprocess.run(
        [*command, str(SCRIPTS / "plain_loop.py"), *SIZES, *SMALL],
        env={**environment(), "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert list(folder.glob("autobatch-*")) == []
