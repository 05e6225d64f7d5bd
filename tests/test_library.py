"""A probe in the caller's own process finds the true maximum and leaves every bit of the training as it was.

Memory is scripted everywhere, so that out-of-memory errors come where a test says. The tests of what is left behind run
on CPU tensors, whose values are real, and on a real GPU where there is one.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from fakes import MIB, ScriptedMemory, out_of_memory, scripted_device, small_job
from torch import nn

import autobatch
from autobatch.errors import NothingFitsError, UsageError, WorkloadError
from autobatch.gpu import opening
from autobatch.library import probe_on
from autobatch.options import ProbeOptions
from autobatch.report import Report
from autobatch.snapshot import state_hash
from autobatch.trial import Outcome
from autobatch.workload.job import TrainingJob
from autobatch.workload.running import TrialRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LARGEST = 5
"""The largest micro-batch of `Training`."""


class Fp32Momentum(torch.optim.Optimizer):
    """Momentum in fp32 for bf16 parameters, its state made at the first step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p, dtype=torch.float32)
                state["momentum"].mul_(0.9).add_(p.grad.float())
                p.sub_((group["lr"] * state["momentum"]).to(p.dtype))


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm1d(6).eval()
        self.head = nn.Linear(6, 2)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.frozen(self.dropout(self.norm(self.first(x)))))
        return out


class Training:
    """A training loop with all that a probe may disturb: 5 samples fit, or 6 without accumulation."""

    def __init__(self, kind: str, device: str = "cpu") -> None:
        seed()
        self.memory = ScriptedMemory()
        self.model = Net(torch.bfloat16 if kind == "bf16" else torch.float32).to(device)
        make = Fp32Momentum if kind == "bf16" else torch.optim.AdamW
        self.optimizer: torch.optim.Optimizer = make(self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.scaler = torch.amp.GradScaler(device, init_scale=8.0, growth_interval=2) if kind == "scaler" else None
        self.micro_steps = 0
        self.at: dict[int, Callable[[], object]] = {}
        self.fail_in_end_window = False
        if kind == "with state":
            self.train(2)
        if kind == "with gradients":
            self.micro_step(2)

    @property
    def state(self) -> list[object]:
        scaler = [self.scaler] if self.scaler else []
        return [self.model, self.optimizer, self.scheduler, *scaler]

    def micro_step(self, n: int) -> None:
        self.micro_steps += 1
        random.random()
        np.random.rand()
        gradients = any(p.grad is not None for p in self.model.parameters())
        self.memory.use((150 * n + (100 if gradients else 0)) * MIB)
        self.at.get(self.micro_steps, lambda: None)()
        weight = next(self.model.parameters())
        self.model.dropout.train()
        loss = self.model(torch.randn(n + 1, 4, dtype=weight.dtype, device=weight.device)).square().mean()
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def end_window(self) -> None:
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if self.fail_in_end_window and self.memory.peak_bytes >= 3 * 150 * MIB:
            raise out_of_memory()  # with what `unscale_` did not yet undone by `update`
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def probe(self, **options: Any) -> Report:
        job = TrainingJob(
            micro_step=self.micro_step, optimizer=self.optimizer, scaler=self.scaler, end_window=self.end_window
        )
        asked = ProbeOptions(**{"target": 64, **options})
        return probe_on(
            scripted_device(self.memory), job, asked, restore=[self.model, self.scheduler], workload="training"
        )

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.micro_step(2)
            self.micro_step(2)
            self.end_window()


KINDS = ["without state", "with state", "with gradients", "bf16", "scaler"]


def seed() -> None:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)


def drawn_by_numpy() -> list[int]:
    state: Any = np.random.get_state()
    return [int(word) for word in state[1]]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    # An emulated card holds no values: nothing could be told from there.
    if name == "cuda" and (not torch.cuda.is_available() or "AUTOBATCH_EMULATED_GPU" in os.environ):
        pytest.skip("no real NVIDIA GPU")
    return name


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


def probe_job(
    memory: ScriptedMemory, use: Callable[[int], object], *, job: TrainingJob | None = None, **options: Any
) -> Report:
    """Probe a small job that uses memory as `use` says."""
    job = job or small_job(use)
    return probe_on(scripted_device(memory), job, ProbeOptions(**options), restore=[], workload="job")


# ---- nothing is left behind -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_put_back_bit_for_bit(kind: str, device: str) -> None:
    """Weights, statistics, optimizer state or its absence, gradients, scaler, schedule, modes, generators: one hash."""
    training = Training(kind, device)
    before = state_hash(training.state)
    report = training.probe()
    assert report.max_micro_batch_size == LARGEST
    assert report.num_ooms >= 1
    assert training.micro_steps > 12
    assert state_hash(training.state) == before


@pytest.mark.parametrize("kind", KINDS)
def test_training_after_a_probe_is_the_training_without_one(kind: str, device: str) -> None:
    """Five steps later every bit is the same as where no probe ran."""
    plain = Training(kind, device)
    plain.train(5)
    expected = state_hash(plain.state)
    probed = Training(kind, device)  # seeds again
    probed.probe()
    probed.train(5)
    assert state_hash(probed.state) == expected


@pytest.mark.parametrize(
    ("micro_step", "error"), [(1, KeyboardInterrupt()), (4, ValueError("labels")), (9, KeyboardInterrupt())]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_that_ends_half_way_puts_everything_back_too(
    kind: str, device: str, micro_step: int, error: BaseException
) -> None:
    """An error of the job or an interrupt, in the first trial or a later one, after steps or before."""
    training = Training(kind, device)
    before = state_hash(training.state)

    def fail() -> None:
        raise error

    training.at[training.micro_steps + micro_step] = fail
    with pytest.raises((WorkloadError, KeyboardInterrupt)):
        training.probe()
    assert state_hash(training.state) == before
    assert training.memory.calls[-1] == "end"
    assert training.memory.begun == training.memory.ended


def test_an_out_of_memory_error_between_unscale_and_update_leaves_the_scaler_usable(device: str) -> None:
    """A scaler keeps what it did for each optimizer until `update`: without it put back, the next `unscale_` fails."""
    training = Training("scaler", device)
    training.fail_in_end_window = True
    before = state_hash(training.state)
    report = training.probe()
    assert report.max_micro_batch_size == 2
    assert any(trial.outcome is Outcome.OUT_OF_MEMORY and trial.micro_batch_size < 6 for trial in report.trials)
    assert state_hash(training.state) == before
    training.fail_in_end_window = False
    training.train(1)


def test_every_trial_starts_from_the_callers_state(device: str) -> None:
    """The second trial does not meet weights, statistics or optimizer state that the first one trained."""
    training = Training("with state", device)
    before = state_hash([training.model])
    seen: list[bool] = []
    begin = training.memory.on_call

    def look(call: str) -> None:
        begin(call)
        if call == "begin":
            seen.append(state_hash([training.model]) == before)

    training.memory.on_call = look
    training.probe()
    assert len(seen) >= 3
    assert all(seen)


def test_the_optimizer_keeps_no_hook_of_the_probe() -> None:
    """Nothing goes on counting after it."""
    training = Training("with state")
    hooks = dict(training.optimizer._optimizer_step_post_hooks)
    training.probe()
    assert dict(training.optimizer._optimizer_step_post_hooks) == hooks


def test_a_callback_that_fails_costs_nothing(device: str) -> None:
    """Progress is told to the caller's own code, which may raise."""
    training = Training("with state", device)
    before = state_hash(training.state)

    micro_steps = training.micro_steps

    def fail(_event: object) -> None:
        if training.micro_steps > micro_steps:  # after the first trial
            raise RuntimeError("broken pipe")

    job = TrainingJob(micro_step=training.micro_step, optimizer=training.optimizer, end_window=training.end_window)
    with pytest.raises(RuntimeError, match="broken pipe"):
        probe_on(
            scripted_device(training.memory),
            job,
            ProbeOptions(target=64),
            restore=[training.model, training.scheduler],
            workload="training",
            progress=fail,
        )
    assert state_hash(training.state) == before


@pytest.mark.parametrize("restore", ["model", None, nn.Sequential(nn.Linear(2, 2))])
def test_restore_is_a_list(restore: Any) -> None:
    """A module alone would be taken apart, or not be taken at all: said before any trial."""
    memory = ScriptedMemory()
    with pytest.raises(UsageError, match=r"restore is a .*restore=\[model\]"):
        probe_on(scripted_device(memory), small_job(int), ProbeOptions(target=4), restore=restore, workload="job")
    assert memory.calls == []


def test_what_cannot_be_put_back_is_refused_before_any_trial() -> None:
    """An object of no known kind is no training state."""
    memory = ScriptedMemory()
    with pytest.raises(UsageError, match="restore cannot take a object"):
        probe_on(scripted_device(memory), small_job(int), ProbeOptions(target=4), restore=[object()], workload="job")
    assert memory.calls == []


def test_a_probe_for_throughput_times_every_size_with_its_spread() -> None:
    """On a device that is timed each trial runs enough steps to tell noise from a difference, and says so in JSON."""
    memory = ScriptedMemory()
    report = probe_job(memory, lambda n: memory.use(n * 9 * MIB), target=256, objective="throughput")
    fitting = [trial for trial in report.trials if trial.fits]
    assert {trial.timed_steps for trial in fitting} == {6}
    assert all(
        trial.seconds_per_step_deviation is not None
        and trial.seconds_per_step is not None
        and trial.seconds_per_step_end is not None
        and 0 < trial.seconds_per_step_end < trial.seconds_per_step
        for trial in fitting
    )
    assert any("time per effective batch" in warning and " at 64" in warning for warning in report.warnings)
    assert Report.from_json(report.to_json()) == report
    absent = json.loads(report.to_json())
    for trial in absent["trials"]:  # as an earlier version wrote it
        for name in ("seconds_per_step_deviation", "seconds_per_step_end", "timed_steps", "held_at_start_bytes"):
            del trial[name]
    assert Report.from_dict(absent).trials[0].seconds_per_step_deviation is None


# ---- the face -------------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> ScriptedMemory:
    """`autobatch.probe` finds this device where it would open the process's GPU."""
    memory = ScriptedMemory()

    @contextlib.contextmanager
    def open_device(_options: ProbeOptions) -> Iterator[opening.OpenDevice]:
        yield scripted_device(memory)

    monkeypatch.setattr(opening, "open_device", open_device)
    return memory


def test_the_library_call_returns_the_plan(opened: ScriptedMemory) -> None:
    """From a micro-step and an optimizer to sizes, in one call."""
    job = small_job(lambda n: opened.use(n * 100 * MIB))
    report = autobatch.probe(
        job.micro_step, optimizer=job.optimizer, target=64, restore=[], split="balanced", workload="mine"
    )
    assert (report.max_micro_batch_size, report.smallest_failing, report.workload) == (9, 10, "mine")
    assert report.plan is not None
    assert report.plan.micro_batch_sizes == (8,) * 8


def test_unknown_options_and_those_of_the_command_line_are_refused(opened: ScriptedMemory) -> None:
    """A misspelt option is named with those that there are; a card cannot be emulated in a process that runs."""
    job = small_job(int)
    with pytest.raises(UsageError, match=r"no option worldsize: it takes .*world_size"):
        autobatch.probe(job.micro_step, optimizer=job.optimizer, target=64, restore=[], worldsize=2)
    with pytest.raises(UsageError, match="autobatch emulate"):
        autobatch.probe(job.micro_step, optimizer=job.optimizer, target=64, restore=[], emulate="T4")
    assert opened.calls == []


# ---- defects of other finders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "largest", "answer", "fails"),
    [(8192, 5000, 5000, 5001), (100, 100, 100, None), (100, 99, 99, 100), (100, 4000, 100, None)],
)
def test_peers_defect_1_the_ceiling_is_never_answered_unless_it_ran(
    target: int, largest: int, answer: int, fails: int | None
) -> None:
    """True maximum 5000 under a ceiling of 8192, and 100 under 100: the answer ran and fitted, nothing above it ran."""
    memory = ScriptedMemory(budget_bytes=(100 + largest) * MIB)
    report = probe_job(memory, lambda n: memory.use(n * MIB), target=target)
    assert (report.max_micro_batch_size, report.smallest_failing) == (answer, fails)
    assert any(trial.fits and trial.micro_batch_size == answer for trial in report.trials)
    assert max(trial.micro_batch_size for trial in report.trials) <= target
    assert report.plan is not None
    fitted = {size for trial in report.trials if trial.fits for size in trial.window}
    assert set(report.plan.sizes) <= fitted


def test_peers_defect_2_where_nothing_fits_no_number_is_answered(opened: ScriptedMemory) -> None:
    """Not 0, not 1, not 16: no plan in the report, and an error from the library call, with its trials."""
    job = small_job(lambda n: opened.use(901 * MIB))
    report = probe_on(scripted_device(opened), job, ProbeOptions(target=64), restore=[], workload="job")
    assert report.plan is None
    assert report.max_micro_batch_size is None
    assert report.smallest_failing == 1
    with pytest.raises(NothingFitsError, match="micro-batch 1 does not fit") as caught:
        autobatch.probe(job.micro_step, optimizer=job.optimizer, target=64, restore=[])
    assert [trial.micro_batch_size for trial in caught.value.trials] == [
        trial.micro_batch_size for trial in report.trials
    ]
    assert caught.value.exit_code == 3


def test_peers_defect_4_a_second_probe_does_not_start_from_the_firsts_answer() -> None:
    """It asks the same sizes again, and where there is more memory by then it finds the larger answer."""
    memory = ScriptedMemory(budget_bytes=140 * MIB)
    job = small_job(lambda n: memory.use(n * MIB))
    first = probe_job(memory, int, job=job, target=256)
    again = probe_job(memory, int, job=job, target=256)
    assert [trial.window for trial in first.trials] == [trial.window for trial in again.trials]
    memory.budget_bytes = 190 * MIB
    assert first.max_micro_batch_size == 40
    assert probe_job(memory, int, job=job, target=256).max_micro_batch_size == 90


def test_peers_defect_5_an_out_of_memory_error_after_steps_costs_neither_weights_nor_samples(device: str) -> None:
    """OOM in the second window, after weights were trained: they are put back, and 20 samples stay 20."""
    training = Training("without state", device)
    before = state_hash(training.state)
    windows: list[int] = []

    def late(n: int) -> None:
        windows.append(n)
        if n > 16 and training.optimizer.state:
            raise out_of_memory()

    def micro_step(n: int) -> None:
        late(n)
        training.model(torch.randn(n + 1, 4, device=device)).square().mean().backward()

    job = TrainingJob(micro_step=micro_step, optimizer=training.optimizer)
    report = probe_on(
        scripted_device(training.memory), job, ProbeOptions(target=20), restore=[training.model], workload="job"
    )
    failed = [trial for trial in report.trials if trial.outcome is Outcome.OUT_OF_MEMORY]
    assert {trial.steps for trial in failed} == {1}
    assert report.max_micro_batch_size == 16
    assert report.plan is not None
    assert (report.plan.micro_batch_sizes, report.plan.effective_batch_size) == ((10, 10), 20)
    assert state_hash(training.state) == before


def test_peers_defect_6_no_batch_is_repeated_after_its_step() -> None:
    """A size that thrashes is judged and left: no second step on a batch, and none of its steps remains."""
    memory = ScriptedMemory()
    events: list[str] = []

    def use(n: int) -> None:
        events.append(f"micro {n}")
        memory.use(n * MIB)
        if n > 8:
            memory.flush()

    job = small_job(use)
    optimizer = job.optimizers()[0]
    handle = optimizer.register_step_post_hook(lambda *_: events.append("step"))
    before = state_hash([optimizer])
    report = probe_job(memory, int, job=job, target=64)
    handle.remove()
    assert report.max_micro_batch_size == 8
    assert {trial.outcome for trial in report.trials} == {Outcome.FITS, Outcome.THRASHES}
    expected = [event for trial in report.trials for event in [*(f"micro {size}" for size in trial.window), "step"] * 3]
    assert events == expected
    assert state_hash([optimizer]) == before


def test_peers_defect_7_a_probe_trains_nothing_of_the_callers(device: str) -> None:
    """Weights, batch-norm statistics, generators and gradients are those from before, each looked at by itself."""
    training = Training("with gradients", device)
    model = training.model
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    drawn = torch.get_rng_state(), random.getstate(), drawn_by_numpy()
    drawn_on_device = torch.cuda.get_rng_state() if device == "cuda" else None
    training.probe()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert gradient is not None
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]
    assert drawn_by_numpy() == drawn[2]
    if drawn_on_device is not None:
        assert torch.equal(torch.cuda.get_rng_state(), drawn_on_device)
    assert training.optimizer.state_dict()["state"] == {}
    assert model.training


def test_peers_defect_9_a_job_that_never_steps_is_no_answer() -> None:
    """Neither is a job that never calls backward; both are errors, and memory is let go."""
    memory = ScriptedMemory()
    with pytest.raises(WorkloadError, match="without an optimizer step"):
        probe_job(memory, int, job=small_job(int, end_window=lambda: None), target=64)
    weight = nn.Parameter(torch.ones(2))
    idle = TrainingJob(micro_step=lambda _: None, optimizer=torch.optim.SGD([weight], lr=0.1))
    with pytest.raises(WorkloadError, match="has a gradient"):
        probe_job(memory, int, job=idle, target=64)
    assert memory.begun == memory.ended == 2


def accumulating_job(memory: ScriptedMemory) -> TrainingJob:
    """12 samples fit without accumulation, 11 where gradients are held meanwhile."""
    memory.budget_bytes = (100 + 200 + 12 * 50 + 30) * MIB

    def use(n: int) -> None:
        gradients = any(weight.grad is not None for weight in job.optimizers()[0].param_groups[0]["params"])
        memory.use((200 + n * 50 + (60 if gradients else 0)) * MIB)

    job = small_job(use)
    return job


@pytest.mark.parametrize(("target", "answer", "micro_batches"), [(12, 12, 1), (24, 11, 2), (256, 11, 2), (13, 11, 2)])
def test_peers_defect_10_gradients_held_between_micro_batches_count(
    target: int, answer: int, micro_batches: int
) -> None:
    """12 where the target is 12 and nothing is accumulated, 11 where it is larger: what training will do."""
    memory = ScriptedMemory()
    report = probe_job(memory, int, job=accumulating_job(memory), target=target)
    assert (report.max_micro_batch_size, report.micro_batches_per_step) == (answer, micro_batches)
    if target > 12:
        assert report.smallest_failing == 12
    assert report.plan is not None
    run = TrialRunner(lambda: accumulating_job(memory), memory)
    size, steps = report.plan.micro_batch_size, report.plan.accumulation_steps
    assert run((size,) * steps).fits  # the whole window, as training runs it
    assert run((12,)).fits
    assert not run((12, 12)).fits


CURVES: dict[str, Callable[[int], int]] = {
    "falling between small sizes": lambda n: 50 * n + max(0, 4 - n) * 200,
    "flat, then steep": lambda n: 400 + max(0, n - 9) * 120,
    "in steps": lambda n: -(-50 * n // 300) * 300,
    "with a bump": lambda n: 40 * n + (300 if n == 7 else 0),
    "almost nothing at first": lambda n: n if n < 10 else 60 * n,
}


@pytest.mark.parametrize("target", [16, 64, 1000])
@pytest.mark.parametrize("curve", CURVES)
def test_peers_defect_11_a_fit_only_proposes(curve: str, target: int) -> None:
    """Where reserved memory falls with the size, or leads a line astray otherwise, the answer is brute force's."""
    reserved = CURVES[curve]
    memory = ScriptedMemory()

    def use(n: int) -> None:
        memory.use(min(n * 30, reserved(n)) * MIB, reserved(n) * MIB)

    job = small_job(use)
    run = TrialRunner(lambda: job, memory)
    options = ProbeOptions(target=target)
    ceiling = min(target, 40)  # every curve is beyond the budget there
    fits = [n for n in range(1, ceiling + 1) if run((n,) * options.micro_batches_per_step(n)).fits]
    report = probe_job(memory, int, job=job, target=target)
    assert report.max_micro_batch_size == max(fits)
    assert report.smallest_failing == (None if max(fits) == target else max(fits) + 1)


def test_a_lost_context_keeps_its_reason() -> None:
    """Nothing is put back on a lost context, so that the error is the job's own and not the attempt's."""
    memory = ScriptedMemory()
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def micro_step(n: int) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    job = TrainingJob(micro_step=micro_step, optimizer=optimizer)
    with pytest.raises(WorkloadError, match="device-side assert") as caught:
        probe_on(scripted_device(memory), job, ProbeOptions(target=8), restore=[model], workload="lost")
    assert caught.value.context_lost
    assert "end" not in memory.calls
