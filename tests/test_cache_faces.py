"""The cache as people meet it: a second probe, a changed script, a training that runs out of memory, a list, a library call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from command_probes import SIZES, environment
from service_fakes import make_report

import autobatch
from autobatch.cache.identity import JobIdentity
from autobatch.cache.remembered import cache_path, opened_cache
from autobatch.cli import main
from autobatch.command.training import WatchedTraining
from autobatch.emulator.launch import open_machine
from autobatch.facts import DeviceFacts
from autobatch.probing import Noted

if TYPE_CHECKING:
    from autobatch.probing import ProbeEvent

ROOT = Path(__file__).parents[1]
CARD = "RTX-3060-12GB"
JOB = """
    import torch

    def job(width=64):
        model = torch.nn.Sequential(torch.nn.Linear({features}, width), torch.nn.ReLU(), torch.nn.Linear(width, 1)).cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def micro_step(n):
            model(torch.zeros(n, {features}, device="cuda")).square().mean().backward()

        return micro_step, optimizer
"""


def write_job(folder: Path, features: int, *, comment: str = "") -> None:
    (folder / "train.py").write_text(textwrap.dedent(JOB.format(features=features)) + comment)


def notes(events: list[ProbeEvent]) -> list[str]:
    return [event.text for event in events if isinstance(event, Noted)]


@pytest.mark.slow
def test_a_second_probe_takes_one_trial_and_a_changed_job_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comment changes nothing but what is said; a wider layer does, and is seen by its memory alone."""
    monkeypatch.chdir(tmp_path)
    write_job(tmp_path, 200_000)
    told: list[ProbeEvent] = []

    def probe(cache: str, **options: Any) -> autobatch.Report:
        told.clear()
        asked = {"target": 32768, "emulate": CARD, "headroom": 0, **options}
        return autobatch.probe_workload("train.py:job", cache=cache, progress=told.append, **asked)  # type: ignore[arg-type]

    def num_run() -> int:
        return sum(isinstance(event, autobatch.TrialEnded) for event in told)

    first = probe("confirm")
    assert first.cached is None
    assert num_run() == len(first.trials) > 2
    trusted = probe("trust", target=16384)
    assert num_run() == 0
    assert trusted.plan is not None
    assert trusted.plan.effective_batch_size == 16384
    write_job(tmp_path, 200_000, comment="# nothing new\n")
    again = probe("trust")
    assert num_run() == 1  # a changed file is not trusted
    assert (again.plan, again.certified) == (first.plan, True)
    assert again.cached is not None
    assert again.cached.confirmed
    assert "just now; one runs again" in notes(told)[0]
    assert "changed since the earlier trials: train.py" in again.warnings
    write_job(tmp_path, 300_000)
    wider = probe("confirm")
    assert wider.cached is None
    assert (wider.max_micro_batch_size or 0) < (first.max_micro_batch_size or 0)
    assert "tried anew" in notes(told)[1]
    with opened_cache() as cache:  # the new ones are remembered in the place of the old
        assert [entry.report.max_micro_batch_size for entry in cache.entries()] == [wider.max_micro_batch_size]


@pytest.mark.slow
def test_a_command_is_confirmed_by_its_first_trial() -> None:
    """Its device is known from then on: no trial more is needed."""
    command = [sys.executable, str(ROOT / "tests/examples/commands/plain_loop.py"), *SIZES, "--width", "64"]
    told: list[ProbeEvent] = []
    options: dict[str, Any] = {"target": 96, "max_micro_batch": 50, "emulate": CARD, "environment": environment()}
    first = autobatch.probe_command(command, cache="confirm", **options)
    again = autobatch.probe_command(command, cache="confirm", progress=told.append, **options)
    assert again.plan == first.plan
    assert [event.trial.micro_batch_size for event in told if isinstance(event, autobatch.TrialEnded)] == [48]
    trusted = autobatch.probe_command(command, cache="trust", **options)
    assert trusted.plan == first.plan
    assert trusted.cached is not None
    assert not trusted.cached.confirmed


RUNS_OUT = """
import argparse, torch
parser = argparse.ArgumentParser()
parser.add_argument("--batch-size", type=int)
parser.add_argument("--accumulate", type=int)
parser.add_argument("--steps", type=int, default=8)
options = parser.parse_args()
model = torch.nn.Linear(1 << 20, 64).cuda()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(options.steps):
    for _ in range(options.accumulate):
        model(torch.zeros(options.batch_size, 1 << 20, device="cuda")).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    # As a longer sequence late in an epoch does, for what is a large batch.
    if step == 5 and options.batch_size > 3:
        kept = torch.zeros(20, 1 << 28, device="cuda")
print("trained with", options.batch_size)
"""


@pytest.mark.slow
def test_a_training_that_runs_out_gets_a_smaller_plan_next_time(tmp_path: Path) -> None:
    """Probe, train, run out, and again with the size lowered; the run's own status and words are the script's."""
    (tmp_path / "train.py").write_text(RUNS_OUT)
    words = ["run", "--target", "4", "--", sys.executable, "train.py", *SIZES]
    with open_machine((CARD,)) as machine:
        variables = machine.environment({**os.environ, "PYTHONPATH": str(ROOT)})

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-m", "autobatch", *arguments],
                env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip

        failed = run(*words)
        assert failed.returncode == 1, failed.stderr
        assert "OutOfMemoryError" in failed.stderr
        assert "the training ran out of memory with micro-batch 4: the next plan for it will take less" in failed.stderr
        second = run(*words)
        assert second.returncode == 0, second.stderr
        assert second.stdout == "trained with 2\n"
        assert "micro-batch 4 counts as too large: a training ran out of memory with it on" in second.stderr


@pytest.mark.parametrize(("flags", "watched"), [((), True), (("--no-cache",), False)])
def test_without_the_cache_a_training_is_started_as_by_hand(
    flags: tuple[str, ...], watched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No hook is in it then, since there is nothing to be told."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("autobatch.cli.run.choose_card", lambda options, **_: options)
    monkeypatch.setattr("autobatch.cli.probe.Subject.probe", lambda *_, **__: make_report(largest=32))
    code = "import os, sys; sys.exit(3 + ('AUTOBATCH_HOOK' in os.environ))"
    assert (
        main(["run", "--target", "256", *flags, "--", sys.executable, "-c", code, "{micro_batch_size}"]) == 3 + watched
    )


ENDINGS = {
    "raise torch.OutOfMemoryError('CUDA out of memory')": True,
    "raise RuntimeError('step failed') from torch.OutOfMemoryError('CUDA out of memory')": True,
    "raise ExceptionGroup('ranks', [ValueError('x'), torch.OutOfMemoryError('CUDA out of memory')])": True,
    "raise MemoryError('x')": False,
    "raise RuntimeError('cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a "
    "non-contiguous input.')": False,
    "\ntry:\n    raise torch.OutOfMemoryError('CUDA out of memory')\nexcept RuntimeError:\n    raise TypeError('handler')": False,
    "\ntry:\n    raise torch.OutOfMemoryError('CUDA out of memory')\nexcept RuntimeError:\n    pass": False,
}
# Stands in for torch, whose import takes seconds: only the error's type is told from others.
STAND_IN = "class torch:\n    class OutOfMemoryError(RuntimeError): pass\n"


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_training_is_judged_by_the_error_that_ended_it(ending: str, tmp_path: Path) -> None:
    """What it caught, and what is about something else, says nothing of its size."""
    with WatchedTraining(tmp_path) as training:
        run = end_by(STAND_IN + ending, training.environment(environment()))
        assert run.returncode == ("raise" in ending and "pass" not in ending[-5:])
        assert training.ran_out_of_memory() is ENDINGS[ending]


def test_a_training_with_the_hook_is_the_one_without(tmp_path: Path) -> None:
    """Nothing of ours is imported or printed, it waits for nobody, and outlives whoever started it."""
    (tmp_path / "autobatch.py").write_text("import sys; sys.exit(7)  # a user's own module of that name")
    code = (
        STAND_IN
        + "import sys; print(*[name for name in sys.modules if name.startswith('autobatch')])\n"
        + next(iter(ENDINGS))
    )
    with WatchedTraining(tmp_path) as training:
        variables = training.environment({**environment(), "PYTHONPATH": str(tmp_path)})
        for _ in range(14):  # more than a socket holds: net.unix.max_dgram_qlen is 10
            run = end_by(code, variables)
            assert (run.returncode, run.stdout) == (1, "\n")
            assert "autobatch" not in run.stderr
    run = end_by(code, variables)
    assert run.returncode == 1
    assert run.stderr.endswith("OutOfMemoryError: CUDA out of memory\n")


def end_by(code: str, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=60, check=False
    )


# ---- autobatch cache ----------------------------------------------------------------------------------------------------


def fill(*workloads: str) -> None:
    with opened_cache() as cache:
        for workload in workloads:
            report = make_report(workload=workload)
            facts = DeviceFacts(
                basis=report.basis, device=report.device, memory=report.memory,
                torch_version="2", cuda_version="13", allocator_settings="",
            )  # fmt: skip
            cache.keep(JobIdentity(name=workload, job=workload[:64]), report, facts, [])


def test_what_is_remembered_is_listed_and_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    """A table for people, JSON for programs; all, some, or those of a job are forgotten."""
    assert main(["cache", "ls"]) == 0
    assert f"nothing is remembered in {cache_path()}" in capsys.readouterr().err
    fill("gpt2", "vit", "gpt2?seq_len=64")
    assert main(["cache", "ls"]) == 0
    table = capsys.readouterr().out
    assert "A100-SXM4-40GB, emulated" in table
    assert "gpt2?seq_len=64" in table
    assert main(["cache", "ls", "--format", "json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["job"] for entry in listed] == ["gpt2?seq_len=64", "vit", "gpt2"]
    assert listed[0]["max_micro_batch_size"] == 37
    assert main(["cache", "clear", "--job", "gpt2", "--older-than", "1h"]) == 0
    assert "0 of 3 measurements forgotten" in capsys.readouterr().err
    assert main(["cache", "clear", listed[1]["id"]]) == 0
    assert "1 of 3 measurements forgotten" in capsys.readouterr().err
    assert main(["cache", "clear", "--job", "gpt2"]) == 0
    assert "2 of 2 measurements forgotten" in capsys.readouterr().err
    fill("gpt2")
    assert main(["cache", "clear"]) == 0
    assert f"the cache {cache_path()} is empty now" in capsys.readouterr().err
    assert not cache_path().exists()


@pytest.mark.parametrize(
    ("words", "status", "named"),
    [
        (["cache", "clear", "mea_0"], 2, "there is no measurement mea_0: `autobatch cache ls` lists them"),
        (
            ["cache", "clear", "--older-than", "soon"],
            2,
            "--older-than 'soon' is no age: write a number and m, h, d or w",
        ),
        (["cache", "clear", "--job", ""], 2, "--job '' names no job: leave it out to forget them all"),
        (["cache", "ls", "--", "x"], 2, "autobatch cache takes no command after --"),
        (["probe", "--target", "8", "--cache", "maybe"], 2, "invalid choice: 'maybe'"),
    ],
)
def test_what_is_asked_wrongly_is_said_in_one_line(
    words: list[str], status: int, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the way out, and the documented status."""
    try:
        code = main(words)
    except SystemExit as ended:
        code = int(ended.code or 0)
    said = capsys.readouterr().err
    assert (code, said.count("\n")) == (status, 1)
    assert named in said


def test_a_broken_cache_is_named_and_cleared(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Listing says what is wrong; clearing removes it from where it usually stands."""
    monkeypatch.delenv("AUTOBATCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache_path().parent.mkdir(parents=True)
    cache_path().write_bytes(b"\0" * 4096)
    assert main(["cache", "ls"]) == 69
    said = capsys.readouterr().err
    assert f"{cache_path()} is no cache of autobatch, or broken: `autobatch cache clear` removes it" in said
    assert said.count("\n") == 1
    assert main(["cache", "clear"]) == 0
    assert main(["cache", "ls"]) == 0


def test_a_hostile_name_stays_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Markup, colours, newlines and endless names are shown as text, or cut."""
    fill("gpt2?x=[red]a\n\x1b[31mb" + "c" * 3000)
    assert main(["cache", "ls"]) == 0
    shown = capsys.readouterr().out
    assert "[red]a" in shown
    assert "\x1b" not in shown
    assert len(shown) < 1500


# ---- the library call ---------------------------------------------------------------------------------------------------

LIBRARY = """
import json, sys, torch, autobatch
model = torch.nn.Sequential(torch.nn.Linear(100_000, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)).cuda()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

def micro_step(n):
    model(torch.zeros(n, 100_000, device="cuda")).square().mean().backward()

told = []
for cache in ("off", "confirm", "confirm", "trust"):
    before = len(told)
    report = autobatch.probe(
        micro_step, optimizer=optimizer, target=8192, restore=[model], cache=cache, workload="mlp", progress=told.append
    )
    ran = sum(isinstance(event, autobatch.TrialEnded) for event in told[before:])
    cached = report.cached
    print(json.dumps([ran, report.plan.micro_batch_size, None if cached is None else cached.confirmed]), file=sys.stderr)
    sys.stderr.flush()
autobatch.remember_out_of_memory(report)
lower = autobatch.probe(micro_step, optimizer=optimizer, target=8192, restore=[model], cache="confirm", workload="mlp")
print(json.dumps([report.plan.micro_batch_size, lower.plan.micro_batch_size, lower.warnings[0]]))
"""


@pytest.mark.slow
def test_a_library_call_remembers_where_it_is_asked_to(tmp_path: Path) -> None:
    """Off by default; confirmed by one trial; trusted without any; lowered where a training tells."""
    script = tmp_path / "train.py"
    script.write_text(LIBRARY)
    with open_machine((CARD,)) as machine:
        run = subprocess.run(
            [sys.executable, str(script)],
            env=machine.environment({**os.environ, "PYTHONPATH": str(ROOT)}),
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert run.stdout, run.stderr
    calls = [json.loads(line) for line in run.stderr.splitlines() if line.startswith("[")]
    off, first, confirmed, trusted = calls
    assert off == first
    assert off[0] > 2
    assert confirmed == [1, first[1], True]
    assert trusted == [0, first[1], False]
    before, lower, warning = json.loads(run.stdout.splitlines()[-1])
    assert lower < before
    assert f"micro-batch {before} counts as too large" in warning
