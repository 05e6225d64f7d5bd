"""What the README says of options, forms and exit codes is what the code has, and its programs run."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import run_two_ranks

import autobatch
from autobatch import errors
from autobatch.cli import main
from autobatch.cli.flags import default_text
from autobatch.cli.settings import read_settings
from autobatch.options import ProbeOptions
from autobatch.present.formats import plan_as_environment

if TYPE_CHECKING:
    from conftest import ScriptRunner

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def table_after(heading: str) -> list[list[str]]:
    """Rows of the first table whose header begins so."""
    lines = README[README.index(heading) :].splitlines()
    rows = []
    for line in lines[2:]:
        if not line.strip().startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip(" |"))])
    return rows


def test_the_option_table_is_the_list_of_knobs():
    """Every field of ProbeOptions has a row with its default, and every row is a field."""
    rows = {
        match.group(1): row
        for row in table_after("| option of `probe`")
        if (match := re.match(r"`--([a-z-]+)", row[0]))
    }
    fields = {field.name.replace("_", "-"): field for field in dataclasses.fields(ProbeOptions)}
    of_faces = {"breakdown", "chart", "plot-throughput", "report", "what-if"}
    of_faces |= {"format", "plan-file", "plot", "report-to", "set", "sizes", "cache"}
    assert set(rows) - of_faces == set(fields)
    for name, field in fields.items():
        if field.default not in {None, dataclasses.MISSING}:
            assert rows[name][2].strip("`") == default_text(field)


def test_the_memory_of_the_sample_adds_up():
    """The lines from the card to the budget sum to it, as they are printed."""
    lines = README[README.index("\nmemory\n") :].split("\n\n")[0].splitlines()[2:]
    figures = {name: int(size.replace(",", "").replace("−", "-")) for name, size in _named_sizes(lines)}
    del figures["CUDA context"]
    budget = figures.pop("budget")
    assert sum(figures.values()) == budget > 0
    assert list(figures) == ["card", "kept by the driver", "other tenants", "headroom"]


def _named_sizes(lines: list[str]) -> list[tuple[str, str]]:
    return [match.groups() for line in lines if (match := re.match(r"(.+?) {2,}(\S+) MiB", line))]


def test_every_variable_is_explained():
    """What `--format env` sets is in the README's table, and nothing else is."""
    named = {name for row in table_after("  | variable") for name in re.findall(r"AUTOBATCH_[A-Z_]+", row[0])}
    lines = plan_as_environment(ProbeOptions(target=256).make_plan(97)).splitlines()
    assert {re.search(r"AUTOBATCH_[A-Z_]+", line)[0] for line in lines} == named


def test_the_sample_of_a_pyproject_is_read(tmp_path: Path):
    """Each of its keys means something."""
    path = tmp_path / "pyproject.toml"
    path.write_text(block("toml", "[tool.autobatch]"))
    settings = read_settings(path)
    assert (settings.workload, settings.form, settings.verbose) == ("train_job.py:job", "json", True)
    assert ProbeOptions(**settings.options).share == 64


def block(language: str, start: str) -> str:
    """The code block that begins so."""
    return README[README.index(f"```{language}\n{start}") :].split("\n", maxsplit=1)[1].partition("```")[0]


@pytest.fixture(scope="module")
def own_words(scripts: ScriptRunner, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the two programs of the README did, one after the other in one process on an emulated card."""
    path = tmp_path_factory.mktemp("readme") / "both.py"
    path.write_text(
        block("python", "# train.py")
        + f"\nexec({block('python', '# train_job.py')!r})\nown = job(width=64)\nown.micro_step(2)\n"
        "import json\n"
        "state = optimizer.state[next(model.parameters())]\n"
        "print(json.dumps({'plan': [plan.effective_batch_size, sum(plan.micro_batch_sizes)],\n"
        "    'epoch': scheduler.last_epoch, 'steps': float(state['step']), 'basis': report.basis,\n"
        "    'gradients': all(p.grad is not None for g in own.optimizer.param_groups for p in g['params'])}))\n"
    )
    return scripts.run(path, ["RTX-3060-12GB"]).answer


def test_the_library_example_trains(own_words: dict[str, Any]):
    """It runs from its first line to its last: ten steps of the whole batch, and none of the probe's own is left."""
    assert own_words["basis"] == "emulated"
    assert own_words["plan"] == [256, 256]
    assert own_words["epoch"] == own_words["steps"] == 10


def test_the_job_example_makes_gradients(own_words: dict[str, Any]):
    """The factory makes a job whose micro-step runs forward and backward."""
    assert own_words["gradients"]


@pytest.mark.slow
def test_the_example_of_several_ranks_runs(scripts: ScriptRunner, tmp_path: Path):
    """Two ranks under torchrun on cards that differ: one plan, of the smaller card, said once."""
    path = tmp_path / "train_ranks.py"
    path.write_text(block("python", "# train_ranks.py"))
    with scripts.open("L4", "T4") as machine:
        run = run_two_ranks(machine, path)
    said = run.stdout.strip().splitlines()
    assert len(said) == 1
    name, world_size, size, steps = said[0].rsplit(maxsplit=3)
    assert (name, world_size) == ("Tesla T4", "2")
    assert int(size) * int(steps) * 2 == 4096
    assert int(steps) > 1


def test_the_accumulation_example_trains_and_is_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Thirty updates of 100, each in balanced micro-batches, whose loss falls; and `check` finds its parts equal."""
    path = tmp_path / "accumulate.py"
    path.write_text(block("python", "# accumulate.py"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, path], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    lines = [line.split(maxsplit=2) for line in run.stdout.splitlines()]
    assert [int(line[0]) for line in lines] == [5, 10, 15, 20, 25, 30]
    losses = [float(line[1]) for line in lines]
    assert losses[-1] < losses[0] / 2
    assert all(line[2].startswith("(25, 25, 25, 25)") for line in lines)
    assert main(["check", f"{path}:parts"]) == 0
    assert "equal" in capsys.readouterr().out


def test_the_samples_of_schedulers_files_are_those_of_the_files():
    """The lines of a Slurm script and the annotations of a Pod."""
    script = (ROOT / "docker/slurm/train.sbatch").read_text()
    lines = [line for line in README.splitlines() if line.startswith("#AUTOBATCH ")]
    assert len(lines) == 2
    assert "\n".join(lines) in script
    manifest = (ROOT / "docker/kubernetes/train-with-webhook.yaml").read_text()
    [annotations] = re.findall(r"```yaml\nannotations:\n(.*?)```", README, re.DOTALL)
    assert all(re.search(rf"^ +{re.escape(line.strip())}", manifest, re.MULTILINE) for line in annotations.splitlines())


def test_the_picture_is_there_and_says_what_it_is():
    """Drawn by `--plot`, and marked as emulated."""
    [path] = re.findall(r"^32\]\((\S+\.svg)\)$", README, re.MULTILINE)
    drawn = (ROOT / path).read_text()
    assert "emulated" in drawn
    assert "max 37" in drawn


def test_the_exit_code_table_has_every_code():
    """The exit codes of the errors are in the README's table."""
    documented = {code for row in table_after("| exit code") for code in map(int, row[0].split(", "))}
    raised = {getattr(errors, name).exit_code for name in errors.__all__} - {errors.AutobatchError.exit_code}
    assert raised | {0, 1, 6, 129, 130, 143} == documented


@pytest.mark.parametrize("name", sorted(set(re.findall(r"autobatch\.([A-Za-z_]+)", README)) - {"org", "integrations"}))
def test_every_name_that_it_uses_is_public(name: str):
    """`autobatch.X` in the README is in `autobatch.__all__`."""
    assert name in autobatch.__all__
