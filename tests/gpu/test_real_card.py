"""The probe on a real card. Skipped where there is none; an emulated card does not count as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from autobatch.gpu.nvml import NvmlSession
from autobatch.gpu.presence import find_presence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not find_presence().usable or "AUTOBATCH_EMULATED_GPU" in os.environ, reason="needs a real NVIDIA GPU"
    ),
]

GIB = 1 << 30


@pytest.fixture(scope="module")
def report() -> dict[str, object]:
    """One probe of GPT-2 from the command line, kept to 16 GiB of the card."""
    command = [sys.executable, "-m", "autobatch", "probe", "gpt2", "--target", "256", "--memory-limit", "16GiB"]
    result = subprocess.run([*command, "--format", "json"], capture_output=True, text=True, check=False, timeout=280)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_answer_is_measured_and_certified(report):
    """N ran and fitted, N + 1 ran and did not, and the report says that it was measured."""
    outcomes = {trial["micro_batch_size"]: trial["outcome"] for trial in report["trials"]}
    largest = report["max_micro_batch_size"]
    assert report["basis"] == "measured"
    assert report["certified"]
    assert outcomes[largest] == "fits"
    assert outcomes[largest + 1] != "fits"


def test_every_trial_keeps_to_the_budget_and_is_timed(report):
    """What fits stays below the limit that stands in for a smaller card, by NVML's reading, and has a time."""
    for trial in report["trials"]:
        if trial["outcome"] == "fits":
            assert trial["footprint_bytes"] <= report["memory"]["budget_bytes"] <= 16 * GIB
            assert trial["seconds_per_step"] > 0


def test_nvml_and_cuda_agree_on_what_is_free():
    """NVML's free memory is CUDA's, within the few MiB that move between two readings."""
    import torch

    torch.cuda.init()
    with NvmlSession() as session:
        device = session.device(0)
        free, total = torch.cuda.mem_get_info(0)
        assert abs(device.free_bytes - free) <= 64 << 20
        assert total <= device.total_bytes


def test_the_library_puts_everything_back_on_the_card():
    """A probe in this process leaves model, optimizer and generators as they were, by hash."""
    import torch

    import autobatch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.BatchNorm1d(512), torch.nn.Dropout(0.1)).cuda()
    optimizer = torch.optim.AdamW(model.parameters())

    def micro_step(n: int) -> None:
        model(torch.randn(1024 * n, 512, device="cuda")).square().mean().backward()

    before = autobatch.state_hash([model, optimizer])
    report = autobatch.probe(micro_step, optimizer=optimizer, target=1 << 20, restore=[model], memory_limit="8GiB")
    assert autobatch.state_hash([model, optimizer]) == before
    assert report.certified


def test_the_memory_is_taken_apart():
    """The parts sum to the footprint that NVML showed; workspaces of cuBLAS are seen, which an emulated card has too."""
    import autobatch

    report = autobatch.probe_workload("gpt2?seq_len=512", target=64, max_micro_batch=8, breakdown=True)
    split = report.breakdown
    assert split is not None
    trial = next(one for one in reversed(report.trials) if one.window == split.window)
    assert split.footprint_bytes == pytest.approx(trial.footprint_bytes, rel=0.02)
    assert split.parameters_bytes == split.gradients_bytes
    assert split.optimizer_state_bytes >= 2 * split.parameters_bytes
    assert split.activations_bytes > 0
