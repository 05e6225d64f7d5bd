"""Budgets, caps and devices, on emulated cards: two of different sizes, with a tenant on each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import ScriptRunner

SCRIPT = Path(__file__).parent / "scripts" / "device_memory.py"
EXPANDABLE = Path(__file__).parent / "scripts" / "expandable_maximum.py"
GIB = 1 << 30
TENANT = 6 * GIB


@pytest.fixture(scope="module")
def answers(scripts: ScriptRunner) -> dict[str, Any]:
    variables = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return scripts.run(SCRIPT, ["T4", "A10G"], tenant_bytes=TENANT, variables=variables).answer


def test_the_budget_is_what_others_leave(answers):
    """Without headroom and limit: CUDA's total less the tenant."""
    assert answers["whole"] == answers["totals"][0] - TENANT


def test_a_memory_limit_is_for_this_process_alone(answers):
    """A limit that fits beside the tenant is not lowered by it, and a percentage of headroom is of the limit."""
    assert answers["limited"] == 4 * GIB
    assert answers["limited_percent"] == 2 * GIB


def test_a_headroom_above_the_limit_is_refused_with_both_numbers(answers):
    """Headroom above what is stood in for leaves nothing, and the message has both."""
    assert "5 GiB" in answers["impossible"]
    assert "4 GiB" in answers["impossible"]


def test_the_allocator_fails_at_the_budget_and_is_free_afterwards(answers):
    """What it gives and what lies outside it stay within the budget, use it up, and the cap is lifted at the end."""
    cap = answers["cap"]
    assert cap["footprint"] <= cap["budget"]
    assert cap["budget"] - cap["footprint"] < 80 << 20
    assert cap["fraction_after"] == 1.0


def test_the_library_probes_the_device_that_the_optimizer_is_on(answers):
    """A model on cuda:1 is measured there, without being told, and the current device is put back."""
    second = answers["second"]
    assert second["name"] == "NVIDIA A10G"
    assert second["current_after"] == 0
    assert all(second["peaks"])
    assert second["certified"]
    assert second["basis"] == "emulated"


def test_a_job_on_another_device_than_the_one_measured_is_refused(answers):
    """Its trials would all fit: both devices are named, and the way out."""
    assert "cuda:1" in answers["second"]["refused"]
    assert "cuda:0" in answers["second"]["refused"]
    assert "--device" in answers["second"]["refused"]


@pytest.mark.slow
def test_expandable_segments_are_searched_to_their_own_maximum(scripts: ScriptRunner):
    """With expandable segments the answer is that of brute force without any cap, above what a fraction would allow."""
    variables = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    answer = scripts.run(EXPANDABLE, ["RTX 3060"], variables=variables).answer
    assert answer["certified"]
    assert answer["found"] == answer["brute_force"]


@pytest.mark.slow
def test_a_tenant_that_left_while_a_trial_ran_did_not_fail_it(scripts: ScriptRunner) -> None:
    """It was there when the trial was capped, which then could not but fail: that says nothing of the job."""
    answer = scripts.run(Path(__file__).parent / "gpu" / "scripts" / "tenant.py", ["A10G"], "grows").answer
    assert answer["tried_again"]
    assert answer["largest"] == answer["largest_alone"]
