"""What a size's memory is made of, on an emulated card: from a workload, from a command, and in the caller's own process."""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING, Any

import pytest

import autobatch
from autobatch.breakdown import MemoryBreakdown
from autobatch.jsonform import from_json_form

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import ScriptRunner

    from autobatch.report import Report

CARD = "T4"
WIDTH, LAYERS, FROZEN, BUFFER = 1024, 6, 2, 32 << 20
LAYER_BYTES = 4 * WIDTH**2
OPTIONS: dict[str, Any] = {"target": 200_000, "headroom": 0, "multiple_of": 1000, "max_micro_batch": 100_000}

JOB = f"""
import torch

def make_model():
    model = torch.nn.Sequential(*[torch.nn.Linear({WIDTH}, {WIDTH}, bias=False) for _ in range({LAYERS})])
    model.register_buffer("kept", torch.zeros({BUFFER // 4}))
    model[:{FROZEN}].requires_grad_(False)
    return model.cuda()

def make_parts():
    model = make_model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)

    def micro_step(n):
        torch.nn.functional.relu(model(torch.randn(n, {WIDTH}, device="cuda"))).sum().backward()

    return model, micro_step, optimizer

def job():
    _, micro_step, optimizer = make_parts()
    return micro_step, optimizer
"""


def check(split: MemoryBreakdown | None, report: Report | None = None) -> None:
    """What can be reckoned by hand is exact; what cannot lies where it must."""
    assert split is not None
    parts = split.parts()
    assert parts["parameters"] == LAYERS * LAYER_BYTES  # those that no optimizer has included
    assert parts["gradients"] == (LAYERS - FROZEN) * LAYER_BYTES
    assert parts["optimizer_state"] == (LAYERS - FROZEN) * LAYER_BYTES
    assert BUFFER <= parts["other_held"] < BUFFER + (1 << 20)
    # The inputs of the layers that train and the loss: what frozen layers in front made is let go, the last function's own
    # result too when the backward has come to the widest place, which holds two gradients of activations.
    sample, size = 4 * WIDTH, max(split.window)
    assert parts["activations"] == (LAYERS - FROZEN) * sample * size + 4
    assert 2 * sample * size <= parts["temporary"] < 3 * sample * size
    assert split.phase == "backward"
    assert parts["context"] > 100 << 20
    if report is not None:
        trial = next(one for one in reversed(report.trials) if one.window == split.window)
        assert split.footprint_bytes == trial.footprint_bytes
        assert report.plan is not None
        assert max(split.window) == report.plan.micro_batch_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the job is, as a module, a script and a caller of the library."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "the_job.py").write_text(JOB)
    (folder / "train.py").write_text(
        JOB
        + textwrap.dedent("""
            import sys
            size, steps = map(int, sys.argv[1:])
            _, micro_step, optimizer = make_parts()
            for _ in range(100):
                for _ in range(steps):
                    micro_step(size)
                optimizer.step()
                optimizer.zero_grad()
        """)
    )
    (folder / "own.py").write_text(
        JOB
        + textwrap.dedent(f"""
            import autobatch, json
            model, micro_step, optimizer = make_parts()
            before = autobatch.state_hash([model])
            report = autobatch.probe(
                micro_step, optimizer=optimizer, restore=[model], breakdown=True, **{OPTIONS!r}
            )
            assert autobatch.state_hash([model]) == before
            assert torch.autograd.backward.__name__ == "backward"
            print(report.to_json())
        """)
    )
    return folder


@pytest.fixture(scope="module")
def of_a_workload(folder: Path) -> Report:
    return autobatch.probe_workload(f"{folder}/the_job.py:job", emulate=CARD, breakdown=True, **OPTIONS)


def test_a_workload(of_a_workload: Report) -> None:
    check(of_a_workload.breakdown, of_a_workload)


def test_a_report_keeps_it_in_its_json(of_a_workload: Report) -> None:
    assert autobatch.Report.from_json(of_a_workload.to_json()) == of_a_workload


def test_a_command(folder: Path) -> None:
    """By the hook inside of it; its script knows nothing of this."""
    command = [sys.executable, f"{folder}/train.py", "{micro_batch_size}", "{accumulation_steps}"]
    report = autobatch.probe_command(command, emulate=CARD, breakdown=True, **OPTIONS)
    check(report.breakdown, report)


def test_the_callers_own_process(scripts: ScriptRunner, folder: Path) -> None:
    """And everything is put back, torch's own functions too."""
    found = scripts.run(folder / "own.py", [CARD]).answer
    check(from_json_form(MemoryBreakdown, found["breakdown"], where="breakdown"))


def test_it_is_left_out_unless_asked_for(folder: Path) -> None:
    report = autobatch.probe_workload(f"{folder}/the_job.py:job", emulate=CARD, **OPTIONS)
    assert report.breakdown is None
    assert "breakdown" not in report.to_dict()


def test_an_answer_stands_where_it_cannot_be_taken_apart(folder: Path) -> None:
    """A job that fails in the trial more: its plan is not lost, and the report says why."""
    (folder / "once.py").write_text(
        JOB
        + "\nmade = []\n\ndef failing():\n    made.append(1)\n    assert len(made) < 4, 'enough'\n    return job()\n"
    )
    report = autobatch.probe_workload(
        f"{folder}/once.py:failing", emulate=CARD, breakdown=True, target=8, headroom=0, max_micro_batch=4
    )
    assert report.plan is not None
    assert report.breakdown is None
    assert any(
        "what the memory is made of is not known" in warning and "enough" in warning for warning in report.warnings
    )
