"""Real training scripts, unmodified, probed on emulated cards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_probes import CARD, ROOT, SCRIPTS, SIZES, SMALL, environment, probe

import autobatch
from autobatch import UsageError, WorkloadError
from autobatch.emulator.launch import open_machine

pytestmark = pytest.mark.usefixtures("libraries")


def test_a_hand_written_loop(tmp_path: Path) -> None:
    """Real accumulation, and neither its checkpoint nor what its `atexit` writes is there afterwards."""
    report = probe("plain_loop.py", *SIZES, *SMALL, "--output", str(tmp_path))
    assert report.plan is not None
    assert (report.plan.micro_batch_size, report.plan.accumulation_steps) == (64, 1)
    assert [(trial.micro_batch_size, trial.micro_batches_per_step, trial.steps) for trial in report.trials] == [
        (4, 2, 3),
        (64, 1, 3),
    ]
    accumulated = report.trials[0]
    assert 0 < accumulated.gradient_bytes < accumulated.held_bytes < accumulated.peak_allocated_bytes
    assert report.basis == "emulated"
    assert report.certified
    assert not report.warnings
    assert list(tmp_path.iterdir()) == []
    assert "{micro_batch_size}" in report.workload


@pytest.mark.slow
def test_a_script_that_takes_no_accumulation() -> None:
    """Where the plan accumulates, it is told and not certified; the whole share in one micro-batch needs none."""
    arguments = (*SIZES[:2], *SMALL)
    whole = probe("plain_loop.py", *arguments, target=1)
    assert whole.certified
    assert not whole.warnings
    accumulating = probe("plain_loop.py", *arguments, target=2, max_micro_batch=1)
    assert not accumulating.certified
    assert "one micro-batch for each optimizer step" in accumulating.warnings[0]
    assert {trial.micro_batches_per_step for trial in accumulating.trials} == {1}


def test_a_script_that_catches_its_own_error(tmp_path: Path) -> None:
    """The allocator is heard before the script's handler; the keys are set in a copy of its JSON."""
    settings = tmp_path / "settings.json"
    text = '{"train": {"batch_size": 1, "accumulate": 1}}'
    settings.write_text(text)
    edits = [
        f"{settings}:train.batch_size={{micro_batch_size}}",
        f"{settings}:train.accumulate={{accumulation_steps}}",
    ]
    report = probe("halves_itself.py", str(settings), edits=edits, target=1600, max_micro_batch=800, objective="plan")
    failed = [trial for trial in report.trials if not trial.fits]
    assert failed
    assert all(trial.outcome.value == "out_of_memory" for trial in failed)
    assert failed[0].oom_request_bytes > 1 << 28
    assert report.max_micro_batch_size is not None
    assert settings.read_text() == text


def test_two_optimizers_and_variables() -> None:
    """A GAN whose critic steps twice as often; it reads its sizes from the environment."""
    report = probe("gan.py", target=2, max_micro_batch=1)
    assert report.certified
    assert not report.warnings
    # The critic has made six windows when the generator has made three.
    assert {(trial.micro_batches_per_step, trial.steps) for trial in report.trials} == {(2, 6)}


@pytest.mark.slow  # a ranking and the library call run ranks too
def test_two_ranks_under_torchrun() -> None:
    """A trial ends when each rank has reported, from a card of its own; the launcher and its workers are gone."""
    before = set(psutil.Process().children(recursive=True))
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    report = probe("two_ranks.py", *SIZES, "--backend", "nccl", launcher=launcher, world_size=2)
    assert report.plan is not None
    assert report.plan.micro_batch_size == 32
    assert report.certified
    # The script chose its card before anything else, which makes a context: its own, nobody else's.
    assert report.memory.other_tenants_bytes == 0
    assert report.memory.context_bytes
    assert set(psutil.Process().children(recursive=True)) <= before


def test_the_ranks_are_as_many_as_asked_for() -> None:
    """Otherwise the plan would be for another effective batch."""
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    with pytest.raises(UsageError, match=r"runs 2 ranks \(WORLD_SIZE\).*asked for 1: give --world-size 2"):
        probe("two_ranks.py", *SIZES, launcher=launcher)


def test_a_script_that_hangs() -> None:
    """Where it was is read off its stack."""
    with pytest.raises(WorkloadError, match=r"made no optimizer step in 8 s .*hangs\.py, line \d+ in wait_for_peer"):
        probe("hangs.py", *SIZES[:2], trial_timeout=8)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("--batch-size", "4"), UsageError, "nothing of the command depends on the micro-batch size: write"),
        (("--batch-size", "{micro_batch}"), UsageError, r"\{micro_batch\} is no place"),
        ((*SIZES, "--steps", "2"), WorkloadError, "ended after 2 optimizer steps at micro-batch 4"),
        ((*SIZES, "--steps", "0"), WorkloadError, "without a backward pass or an optimizer step"),
        ((*SIZES, "--width", "-1"), WorkloadError, r"failed at micro-batch 4.*RuntimeError"),
        ((*SIZES, "--widht", "8"), WorkloadError, "failed with status 2 .*unrecognized arguments: --widht 8"),
    ],
)
def test_scripts_that_cannot_be_probed(arguments: tuple[str, ...], kind: type[Exception], message: str) -> None:
    """One line that says why, and what would help."""
    small = () if "--width" in arguments else SMALL
    with pytest.raises(kind, match=message):
        probe("plain_loop.py", *arguments, *small)


def test_the_hook_is_missed() -> None:
    """A Python that reads no PYTHONPATH is named as what it is."""
    with pytest.raises(WorkloadError, match=r"the hook was not loaded in any process of it \(python -I"):
        probe("plain_loop.py", *SIZES, *SMALL, "--steps", "1", launcher=("-I",))
    with pytest.raises(UsageError, match="cannot run no-such-program: No such file"):
        autobatch.probe_command(["no-such-program", "{micro_batch_size}"], target=8, emulate=CARD)


def test_a_users_own_sitecustomize_runs(tmp_path: Path) -> None:
    """The one that ours hides; and a script run as a module of a package."""
    (tmp_path / "sitecustomize.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "train.py").write_text((SCRIPTS / "plain_loop.py").read_text())
    command = [sys.executable, "-m", "package.train", *SIZES, *SMALL]
    report = autobatch.probe_command(
        command, target=1, emulate=CARD, environment={**environment(), "PYTHONPATH": str(tmp_path)}
    )
    assert report.plan is not None
    assert (tmp_path / "ran").exists()


@pytest.mark.slow
def test_run_probes_and_trains(tmp_path: Path) -> None:
    """The command starts for real with the plan in place, to its own end, output, files and status."""
    output = tmp_path / "output"
    output.mkdir()
    settings = tmp_path / "settings.json"
    settings.write_text('{"size": 0}')
    words = (*SIZES[2:], *SMALL, "--steps", "4", "--output", str(output))
    with open_machine((CARD,)) as machine:
        run = subprocess.run(
            [
                *(sys.executable, "-m", "autobatch", "run", "--target", "96", "--max-micro-batch", "50"),
                *("--set", f"{settings}:size={{micro_batch_size}}", "--"),
                *(sys.executable, "-c", READS_SETTINGS, str(SCRIPTS / "plain_loop.py"), str(settings), *words),
            ],
            env=machine.environment({**environment(), "PYTHONPATH": str(ROOT)}),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert run.returncode == 7, run.stderr
    assert run.stdout == "trained 4 steps\nsize 48\n"
    assert "starting the command with micro-batch 48 and 2 accumulation steps: effective batch size 96" in run.stderr
    assert {path.name for path in output.iterdir()} == {"checkpoint.pt", "uploaded"}
    assert settings.read_text() == '{"size": 0}'


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[64, 512], [64, 512, 128]], ids=["two", "three"])
def test_a_size_for_each_length(lengths: list[int]) -> None:
    """Longer sequences fit fewer; each length has a certificate, found by few trials where others say where to begin."""
    command = [sys.executable, str(SCRIPTS / "plain_loop.py"), *SIZES, "--width", "{seq_len}"]
    options: dict[str, Any] = {"emulate": CARD, "target": 4096, "memory_limit": "1GiB", "environment": environment()}
    if len(lengths) == 2:
        options["multiple_of"] = 32  # a few trials for the last bit of each are left to the longer test
    started: list[int] = []
    table = autobatch.probe_lengths(command, lengths, length_started=started.append, **options)
    assert started == [512, *(length for length in lengths if length != 512)]
    assert [entry.seq_len for entry in table.entries] == sorted(lengths)
    largest = [entry.report.max_micro_batch_size or 0 for entry in table.entries]
    assert largest == sorted(largest, reverse=True)
    assert largest[0] > 2 * largest[-1] > 0
    assert all(entry.report.certified and not entry.report.warnings for entry in table.entries)
    assert table.micro_batch_sizes[64] == table.entries[0].report.plan.micro_batch_size  # type: ignore[union-attr]


READS_SETTINGS = """
import json, pathlib, runpy, sys
script, settings, *rest = sys.argv[1:]
size = json.loads(pathlib.Path(settings).read_text())["size"]
sys.argv = [script, "--batch-size", str(size), *rest]
runpy.run_path(script, run_name="__main__")
print("size", size)
sys.exit(7)
"""


def counted_run(script: str, arguments: tuple[str, ...], size: int, steps: int) -> str:
    """How a script ends at one size on an emulated card, without a probe: `fits`, or why not."""
    words = [
        word.format(micro_batch_size=size, accumulation_steps=steps) if "{" in word else word for word in arguments
    ]
    variables = {"AUTOBATCH_MICRO_BATCH_SIZE": str(size), "AUTOBATCH_ACCUMULATION_STEPS": str(steps)}
    with open_machine((CARD,)) as machine:
        run = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("run_and_count.py")), str(SCRIPTS / script), *words],
            env=machine.environment({**environment(), **variables}),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    return run.stdout.splitlines()[-1] if run.returncode == 0 else run.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(900)  # loaders that put together batches of hundreds of MiB on the host
@pytest.mark.parametrize(
    ("script", "arguments", "options"),
    [
        ("plain_loop.py", (*SIZES, "--steps", "6"), {}),
        (
            "hf_trainer.py",
            (
                *("--output_dir", "{folder}", "--max_steps", "6", "--report_to", "none"),
                *("--per_device_train_batch_size", "{micro_batch_size}"),
                *("--gradient_accumulation_steps", "{accumulation_steps}"),
            ),
            {},
        ),
        ("lightning_fit.py", SIZES, {}),
        ("accelerate_loop.py", SIZES, {}),
        ("gan.py", (), {}),
    ],
)
def test_the_maximum_is_the_brute_force_one(
    script: str, arguments: tuple[str, ...], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script itself, run at the answer and one sample beside it, without a probe, says the same."""
    monkeypatch.chdir(tmp_path)
    arguments = tuple(word.replace("{folder}", str(tmp_path)) for word in arguments)
    report = probe(script, *arguments, target=16384, **options)
    largest = report.max_micro_batch_size
    assert largest is not None
    assert report.smallest_failing == largest + 1
    # transformers looks for packed sequences in the position ids, on the device: what an emulated card reads there is no value.
    assert report.data_dependent == (("item",) if script == "hf_trainer.py" else ())
    assert report.certified == (script != "hf_trainer.py")
    assert counted_run(script, arguments, largest, 2) == "fits"
    assert counted_run(script, arguments, largest + 1, 2) != "fits"
