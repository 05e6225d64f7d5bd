"""The probe on a real card. Skipped where there is none.

An emulated card counts as one only for a rehearsal (`AUTOBATCH_REHEARSAL=1` under `autobatch emulate`), which shows that these
tests run, and nothing about a card.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TO_ITS_LAST_LINE

import autobatch
from autobatch.gpu.nvml import NvmlSession
from autobatch.gpu.presence import find_presence

IS_REHEARSAL = bool(os.environ.get("AUTOBATCH_REHEARSAL"))
IS_EMULATED = "AUTOBATCH_EMULATED_GPU" in os.environ

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not find_presence().usable or (IS_EMULATED and not IS_REHEARSAL), reason="needs a real NVIDIA GPU"
    ),
]

GIB, MIB = 1 << 30, 1 << 20
TESTS = Path(__file__).parents[1]
BASIS = "emulated" if IS_EMULATED else "measured"
HF = ("hf:gpt2?task=causal-lm&seq_len=512", "hf:bert?task=masked-lm&seq_len=256")


def run(*arguments: str, **variables: str) -> str:
    """Run a command of ours to its end; gives what it printed."""
    ended = subprocess.run(
        [sys.executable, "-m", "autobatch", *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def check_certificate(report: dict[str, Any]) -> None:
    """N ran and fitted, N + 1 ran and did not; what fits keeps to the budget, and is timed where time is real."""
    outcomes = {trial["micro_batch_size"]: trial["outcome"] for trial in report["trials"]}
    largest = report["max_micro_batch_size"]
    assert report["basis"] == BASIS
    assert report["certified"]
    assert outcomes[largest] == "fits"
    assert outcomes[largest + 1] != "fits"
    for trial in report["trials"]:
        if trial["outcome"] == "fits":
            assert trial["footprint_bytes"] <= report["memory"]["budget_bytes"]
            assert (trial["seconds_per_step"] or 0) > 0 or IS_EMULATED


def script(name: str, *arguments: str, **variables: str) -> str:
    """Run one of the scripts beside this file; gives the last line that it printed."""
    path = Path(name) if Path(name).is_absolute() else Path(__file__).parent / "scripts" / name
    ended = subprocess.run(
        [sys.executable, "-c", TO_ITS_LAST_LINE, str(path), *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout.splitlines()[-1]


def test_nvml_and_cuda_agree_on_what_is_free() -> None:
    """NVML's free memory is CUDA's, within the few MiB that move between two readings."""
    import torch

    torch.cuda.init()
    with NvmlSession() as session:
        device = session.device(0)
        free, total = torch.cuda.mem_get_info(0)
        assert abs(device.free_bytes - free) <= 64 * MIB
        assert total <= device.total_bytes
        memory = device.memory()
        assert abs(memory.total_bytes - memory.reserved_bytes - total) <= 64 * MIB


@pytest.mark.parametrize("settings", ["", "expandable_segments:True"])
def test_the_cap_of_a_smaller_budget_holds(settings: str) -> None:
    """Pieces of 64 MiB until it fails: what NVML shows keeps to 4 GiB and comes near to it, and nothing stays afterwards."""
    answer = json.loads(script("cap.py", PYTORCH_CUDA_ALLOC_CONF=settings))
    assert answer["budget"] == 4 * GIB
    assert answer["footprint"] <= 4 * GIB
    assert 4 * GIB - answer["footprint"] < 80 * MIB
    assert answer["nvml_footprint"] <= 4 * GIB + 8 * MIB
    assert answer["held_after"] < 64 * MIB


def test_a_tenant_that_is_there_is_left_its_memory() -> None:
    """Another process holds 3 GiB all along: it is told, and the budget is what it leaves."""
    answer = json.loads(script("tenant.py", "stays"))
    if answer["tenants"] is None:
        pytest.skip("NVML does not say here what other processes hold")
    assert 3 * GIB <= answer["tenants"] <= 6 * GIB  # with contexts: its own, and that of the process that tests
    assert answer["budget"] <= answer["usable"] - 3 * GIB
    assert answer["certified"]


def test_a_tenant_that_grows_meanwhile_is_not_taken_for_the_job() -> None:
    """It takes what a trial was to have, and gives it back when that has failed: the answer is as without it."""
    answer = json.loads(script("tenant.py", "grows"))
    assert answer["tried_again"]
    assert answer["certified"]
    assert answer["largest"] == answer["largest_alone"]


def test_thrash_is_found() -> None:
    """Blocks that grow from one micro-batch to the next: every window flushes the cache, and that is no fit."""
    answer = json.loads(script("thrash.py"))
    assert answer["outcome"] == "thrashes"
    assert answer["retries"] > 0


def test_an_out_of_memory_error_within_a_window_is_survived() -> None:
    """The accumulator halves the micro-batch in the middle of a window; steps and samples are what was asked for."""
    answer = json.loads(script(str(TESTS / "examples" / "out_of_memory_on_a_card.py")))
    assert answer["events"][0] == [8, 4]
    assert answer["steps"] == 3
    assert answer["samples"] == 3 * 64
    assert sum(answer["sizes"][0]) == 64


def test_the_library_puts_everything_back_on_the_card() -> None:
    """A probe in this process leaves model, optimizer and generators as they were, by hash; training goes on bit for bit."""
    import torch

    def train(*, with_probe: bool) -> list[float]:
        torch.manual_seed(0)
        torch.cuda.manual_seed_all(0)
        layers = (torch.nn.Linear(512, 512), torch.nn.BatchNorm1d(512), torch.nn.Dropout(0.1))
        model = torch.nn.Sequential(*layers).cuda()
        optimizer = torch.optim.AdamW(model.parameters())

        def micro_step(n: int) -> None:
            model(torch.randn(1024 * n, 512, device="cuda")).square().mean().backward()

        losses = []
        for step in range(6):
            if step == 3 and with_probe:
                before = autobatch.state_hash([model, optimizer])
                report = autobatch.probe(
                    micro_step, optimizer=optimizer, target=1 << 20, restore=[model], memory_limit="4GiB"
                )
                assert autobatch.state_hash([model, optimizer]) == before
                assert report.certified
            loss = model(torch.randn(64, 512, device="cuda")).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    assert train(with_probe=True) == train(with_probe=False)


@pytest.mark.parametrize("workload", ["gpt2", "resnet50", "vit"])
def test_a_built_in_job_from_the_command_line(workload: str) -> None:
    """The whole probe, kept to 8 GiB of the card."""
    options = ["--target", "4096", "--memory-limit", "8GiB", "--no-cache", "--format", "json"]
    report = json.loads(run("probe", workload, *options))
    assert report["memory"]["budget_bytes"] <= 8 * GIB
    check_certificate(report)


@pytest.mark.parametrize("workload", HF)
def test_a_model_of_transformers_from_the_library(workload: str) -> None:
    """The same by `probe_workload`, with all that the report holds."""
    if not importlib.util.find_spec("transformers"):
        pytest.skip("transformers is not installed")
    report = autobatch.probe_workload(workload, target=4096, memory_limit="8GiB")
    check_certificate(json.loads(report.to_json()))


@pytest.mark.parametrize("settings", ["", "expandable_segments:True"])
def test_the_plan_of_a_transformers_model_from_the_command_line(settings: str) -> None:
    """Under either kind of segments."""
    if not importlib.util.find_spec("transformers"):
        pytest.skip("transformers is not installed")
    options = ["--target", "4096", "--memory-limit", "6GiB", "--no-cache", "--format", "json"]
    check_certificate(json.loads(run("probe", HF[0], *options, PYTORCH_CUDA_ALLOC_CONF=settings)))


def test_any_script_is_probed_by_the_hook(tmp_path: Path) -> None:
    """A loop written by hand, started anew for each trial; it leaves neither checkpoint nor `atexit` behind."""
    loop = str(TESTS / "examples" / "commands" / "plain_loop.py")
    words = ["--batch-size", "{micro_batch_size}", "--accumulate", "{accumulation_steps}", "--output", str(tmp_path)]
    options = ["--target", "4096", "--memory-limit", "4GiB", "--no-cache", "--format", "json"]
    report = json.loads(run("probe", *options, "--", sys.executable, loop, *words))
    check_certificate(report)
    assert list(tmp_path.iterdir()) == []


def test_the_memory_is_taken_apart() -> None:
    """The parts sum to the footprint that NVML showed."""
    report = autobatch.probe_workload("gpt2?seq_len=512", target=64, max_micro_batch=8, breakdown=True)
    split = report.breakdown
    assert split is not None
    trial = next(one for one in reversed(report.trials) if one.window == split.window)
    assert split.footprint_bytes == pytest.approx(trial.footprint_bytes, rel=0.02)
    assert split.parameters_bytes == split.gradients_bytes
    assert split.optimizer_state_bytes >= 2 * split.parameters_bytes
    assert split.activations_bytes > 0


@pytest.mark.skipif(IS_EMULATED, reason="an emulated card knows no time")
def test_throughput_is_timed_and_planned_for() -> None:
    """Each size has a time and its noise, and the plan is not slower than the others beyond that."""
    report = autobatch.probe_workload("vit", target=256, objective="throughput", memory_limit="8GiB")
    timed = [trial for trial in report.trials if trial.fits and trial.seconds_per_step]
    assert len({trial.micro_batch_size for trial in timed}) >= 2
    assert all(trial.seconds_per_step_deviation is not None for trial in timed)
    assert report.plan is not None
    assert report.plan.micro_batch_size in {trial.micro_batch_size for trial in timed}
