"""What a probe on an emulated card says of a job beside its sizes: shapes read from values, memory left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from autobatch.isolation import IsolatedTrials
from autobatch.options import ProbeOptions
from autobatch.probing import conduct_probe

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import ScriptRunner

    from autobatch.report import Report

JOB = """
import torch

KEPT = []

def leaking():
    model = torch.nn.Linear(1024, 1024).cuda()
    def micro_step(n):
        out = model(torch.ones(n * 4096, 1024, device="cuda"))
        (out.sum() + out[out > 0].sum()).backward()
        torch.eye(8, device="cuda").to_sparse() @ torch.ones(8, 8, device="cuda")
        KEPT.append(model(torch.ones(1024, 1024, device="cuda")).sum())  # with its graph: input and weights, 4 MiB each
    return micro_step, torch.optim.AdamW(model.parameters())

def tidy():
    model = torch.nn.Linear(1024, 1024).cuda()
    rows = torch.zeros(8, dtype=torch.long, device="cuda")
    def micro_step(n):
        out = model(torch.ones(n * 4096, 1024, device="cuda"))
        (out.sum() + out[rows].sum()).backward()
    return micro_step, torch.optim.AdamW(model.parameters())
"""


def probe(scripts: ScriptRunner, folder: Path, factory: str) -> Report:
    """Probe one of the jobs above in a child process on an emulated card."""
    (folder / "job.py").write_text(JOB)
    options = ProbeOptions(target=512)
    name = f"{folder / 'job.py'}:{factory}"
    with (
        scripts.open("T4") as machine,
        IsolatedTrials(name, options, environment=machine.environment(), machine=machine) as trials,
    ):
        return conduct_probe(trials, options, workload=name)


@pytest.fixture(scope="module")
def leaking(scripts: ScriptRunner, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return probe(scripts, tmp_path_factory.mktemp("leaking"), "leaking")


@pytest.fixture(scope="module")
def tidy(scripts: ScriptRunner, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return probe(scripts, tmp_path_factory.mktemp("tidy"), "tidy")


@pytest.mark.slow
def test_a_job_that_keeps_its_outputs_is_told_that_it_leaks(leaking: Report) -> None:
    """What it keeps of each trial, and by the graph what that was made from, is there when the next one begins."""
    starts = [trial.held_at_start_bytes for trial in leaking.trials]
    assert starts == sorted(starts)
    assert starts[-1] - starts[0] > len(starts) * 8 << 20
    assert any("the job leaks memory" in warning for warning in leaking.warnings)


def test_a_job_that_keeps_nothing_starts_every_trial_with_nothing(tidy: Report) -> None:
    """No leak is seen where there is none: what a trial made is gone when the next one begins."""
    assert {trial.held_at_start_bytes for trial in tidy.trials} == {0}
    assert tidy.warnings == ()


def test_an_index_by_a_mask_is_named_as_what_it_is(leaking: Report) -> None:
    """As the README names it, and not as an index by numbers, whose shape the host knows."""
    assert "boolean index" in leaking.data_dependent
    assert "index" not in leaking.data_dependent
    assert not leaking.certified


def test_a_sparse_tensor_made_on_the_card_is_named(leaking: Report) -> None:
    """How many entries it has is read from the card, where every value is 0."""
    assert "_to_sparse" in leaking.data_dependent


def test_an_index_by_numbers_reads_no_shape(tidy: Report) -> None:
    """Its output is as long as the index, whatever it holds."""
    assert tidy.data_dependent == ()
    assert tidy.certified
