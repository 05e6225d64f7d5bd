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
            first, *others = optimizer.param_groups[0]["params"]
            both = [torch.optim.SGD(some, lr=0.1, momentum=0.9) for some in ([first], others)]
            for _ in range(100):
                for _ in range(steps):
                    micro_step(size)
                for one in both:
                    one.step()
                for one in both:
                    one.zero_grad()
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
    (folder / "ways.py").write_text(JOB + WAYS)
    return folder


WAYS = f"""
import autobatch, json

def loss_of(model, n):
    return torch.nn.functional.relu(model(torch.randn(n, {WIDTH}, device="cuda"))).sum()

class Codes(torch.Tensor):
    # A subclass that has no memory but that of the tensor in it, as those of quantised optimizers.
    @staticmethod
    def __new__(cls, codes):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, device=codes.device, dtype=torch.float32)

    def __init__(self, codes):
        self.codes = codes

    def __tensor_flatten__(self):
        return ["codes"], []

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(str(function))

class Quantised(torch.optim.Optimizer):
    def __init__(self, parameters):
        super().__init__(parameters, dict())

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            if "codes" not in self.state[parameter]:
                codes = torch.zeros(parameter.shape, dtype=torch.uint8, device="cuda")
                self.state[parameter]["codes"] = Codes(codes)
            parameter.add_(parameter.grad, alpha=-0.1)

def probe(way):
    model = make_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    end_window, restore, last = None, [model], [0]

    def micro_step(n):
        last[0] = n
        loss_of(model, n).backward()

    if way == "gradients by torch.autograd.grad":
        def micro_step(n):
            for p, g in zip(trained, torch.autograd.grad(loss_of(model, n), trained)):
                p.grad = g if p.grad is None else p.grad + g
    if way == "gradients that stand through the forward":
        first = [True]

        def micro_step(n):
            loss = loss_of(model, n)
            if first[0]:
                optimizer.zero_grad()
                first[0] = False
            loss.backward()

        def end_window():
            optimizer.step()
            first[0] = True
    if way == "a closure":
        def closure():
            optimizer.zero_grad()
            loss = loss_of(model, last[0])
            loss.backward()
            return loss.detach()

        def end_window():
            optimizer.step(closure)
            optimizer.zero_grad()
    if way == "state that wraps a tensor":
        optimizer = Quantised(trained)
    if way == "a history of its own":
        torch.cuda.memory._record_memory_history()
    report = autobatch.probe(
        micro_step, optimizer=optimizer, end_window=end_window, restore=restore, breakdown=True, **{{**OPTIONS}}
    )
    split = report.breakdown
    return None if split is None else split.parts(), list(report.warnings)

OPTIONS = dict(target=16384, headroom=0, multiple_of=4096, max_micro_batch=4096)
ways = ["plain", "gradients by torch.autograd.grad", "gradients that stand through the forward", "a closure",
        "state that wraps a tensor", "a history of its own"]
found = dict((way, probe(way)) for way in ways)
events = sum(map(len, torch.cuda.memory._snapshot()["device_traces"]))
print(json.dumps(dict(found=found, events=events)))
"""


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


def test_ways_to_train(scripts: ScriptRunner, folder: Path) -> None:
    """Whatever makes the gradients and keeps the state, the parts are told apart."""
    answer = scripts.run(folder / "ways.py", [CARD]).answer
    found = {way: parts for way, (parts, _) in answer["found"].items()}
    own = found.pop("a history of its own")
    whole = (LAYERS - FROZEN) * LAYER_BYTES
    for way, parts in found.items():
        assert parts["parameters"] == LAYERS * LAYER_BYTES, way
        assert parts["gradients"] == whole, way
        assert parts["optimizer_state"] == (whole // 4 if way == "state that wraps a tensor" else whole), way
    # Of two histories there can be one: the job's own goes on.
    assert own is None
    assert "records the allocator's history itself" in answer["found"]["a history of its own"][1][-1]
    assert answer["events"] > 0


@pytest.mark.slow
def test_an_answer_stands_where_it_cannot_be_taken_apart(folder: Path) -> None:
    """A job that fails in the trial more: its plan is not lost, and the report says why."""
    (folder / "once.py").write_text(
        JOB
        + "\nmade = []\n\ndef failing():\n    made.append(1)\n    assert len(made) < 4, 'enough'\n    return job()\n"
    )
    job = f"{folder}/once.py:failing"
    asked: dict[str, Any] = {"emulate": CARD, "target": 8, "headroom": 0, "max_micro_batch": 4}
    report = autobatch.probe_workload(job, breakdown=True, cache="confirm", **asked)
    assert report.plan is not None
    assert report.breakdown is None
    assert any("what the memory is made of is not known" in one and "enough" in one for one in report.warnings)
    # What is remembered is the answer, with the files that it rests on, and not what went wrong after it.
    trusted = autobatch.probe_workload(job, cache="trust", **asked)
    assert (trusted.plan, trusted.warnings) == (report.plan, report.warnings[:-1])
    assert trusted.cached is not None
    again = autobatch.probe_workload(job, breakdown=True, cache="trust", **asked)
    assert "no trial run" in again.warnings[-1]
    (folder / "once.py").write_text(JOB + "\n\ndef failing():\n    return job()\n")
    changed = autobatch.probe_workload(job, cache="trust", **asked)
    assert changed.cached is None or changed.cached.confirmed
