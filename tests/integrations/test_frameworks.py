"""Frameworks tuned in their own words on an emulated card, with the real libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import run_two_ranks, script_environment

from autobatch.emulator.launch import open_machine

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.usefixtures("libraries")
HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples" / "integrations"


def run(script: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A script on an emulated L4, which has to end well."""
    with open_machine(("L4",)) as machine:
        ended = subprocess.run(
            [sys.executable, str(script), *words],
            env={**script_environment(machine), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended


def answers(*actions: Sequence[str]) -> list[Any]:
    """What the actions of `frameworks.py` say, in one process."""
    words = [word for action in actions for word in (*action, ",")][:-1]
    lines = run(HERE / "frameworks.py", *words).stdout.splitlines()
    return [json.loads(line.removeprefix("ANSWER ")) for line in lines if line.startswith("ANSWER ")]


def last_line(script: str, *words: str) -> str:
    return run(EXAMPLES / script, *words).stdout.splitlines()[-1]


def test_a_trainer_is_left_as_it_was_but_for_its_sizes() -> None:
    """Weights to the bit, random generators, wrapping, no callback called; the loader has the new size, as `train` will ask."""
    pytest.importorskip("transformers")
    tuned, refused = answers(["tune"], ["refused"])
    assert tuned["unchanged"]
    assert tuned["attributes"] == ["_train_batch_size"]
    assert tuned["trains_under_autocast"]
    assert tuned["callbacks"] == 0
    assert tuned["sizes"] == [16, 8, 16]
    assert tuned["plan"] == [16, 8]
    assert tuned["workload"] == "Trainer of GPT2LMHeadModel"
    assert tuned["warning"].startswith("looked at 500 of 20000 samples")
    said = [
        "split cannot be given here: the trainer decides it",
        "cache cannot be given here: the trainer decides it",
        "auto_find_batch_size halves the batch after an out-of-memory error",
        "dataset_size 20000 is below target 30000",
        "the trainer has no train_dataset",
        "the trainer has no eval_dataset",
    ]
    assert [one.startswith(begins) for one, begins in zip(refused, said, strict=True)] == [True] * 6


@pytest.mark.slow
def test_a_trainer_trains_and_evaluates_as_tuned() -> None:
    """20,000 texts in windows of 8,192: three steps, evaluated after two and at the end."""
    pytest.importorskip("transformers")
    ended = run(EXAMPLES / "hf_trainer.py", "8192", "--evaluate")
    assert ended.stdout.splitlines()[-1] == "2048 4 steps: 3"
    assert ended.stdout.count("'eval_loss'") == 2


@pytest.mark.slow
def test_what_train_prepares_is_measured_and_what_a_step_keeps_is_forgotten() -> None:
    """Gradient checkpointing is on by then; a list that `compute_loss` fills, and what it logs, are as before."""
    pytest.importorskip("transformers")
    (found,) = answers(["prepared"])
    assert 1.5 * found["peak_True"] < found["peak_False"]
    assert (found["seen"], found["logged"], found["ran"]) == ([7], 0, True)


@pytest.mark.slow
def test_evaluation_is_tuned_apart_from_training() -> None:
    """Predictions of the whole set have no room on the card: that is told with its way out, and training keeps its sizes."""
    pytest.importorskip("transformers")
    (found,) = answers(["evaluate"])
    assert "predictions gathered for compute_metrics take 38." in found["all_on_the_card"]
    assert "set eval_accumulation_steps" in found["all_on_the_card"]
    assert found["sizes"] == [found["found"], 32, 2]
    assert 32 < found["found"] <= 4096


def test_lightning_trains_as_tuned() -> None:
    """16,384 rows in windows of 8,192; the schedule was made for as many steps as there are."""
    pytest.importorskip("lightning")
    assert last_line("lightning_fit.py", "8192") == "512 16 steps: 2 of 2"


@pytest.mark.slow
def test_what_lightning_cannot_be_tuned_for() -> None:
    """A module that steps by hand, loaders given to fit, nothing that holds the size, a loader that does not heed it."""
    pytest.importorskip("lightning")
    (said,) = answers(["lightning-refused"])
    begins = [
        "Model optimizes by hand",
        "loaders were passed to fit directly",
        "neither Model, nor its hparams",
        "train_dataloader() gives batches of 1 samples, and batch_size is 8 now",
    ]
    assert [one.startswith(begin) for one, begin in zip(said, begins, strict=True)] == [True] * 4


@pytest.mark.slow
def test_a_lightning_module_in_all_its_freedom() -> None:
    """64 samples in eights: 8 batches and 4 updates; of the trials nothing is left in what the module keeps or logs."""
    pytest.importorskip("lightning")
    (seen,) = answers(["odd-module"])
    assert (seen["kept"], seen["logged"], seen["updates"]) == (8, 8, 4)
    assert seen["transferred"] == seen["steps"] > 8


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_accelerate_trains_as_tuned(num_ranks: int) -> None:
    """Alone on an L4, and with a T4 beside it, which decides."""
    pytest.importorskip("accelerate")
    if num_ranks == 1:
        assert last_line("accelerate_loop.py", "4096") == "1024 4 steps: 2"
        return
    with open_machine(("L4", "T4")) as machine:
        assert "512 4 steps: 2" in run_two_ranks(machine, EXAMPLES / "accelerate_loop.py", "4096").stdout


@pytest.mark.slow
def test_a_trainer_trains_as_tuned_on_two_ranks() -> None:
    """An L4 and a T4 with a plan for both: a share of 4,096 in four micro-batches on each."""
    pytest.importorskip("transformers")
    with open_machine(("L4", "T4")) as machine:
        lines = run_two_ranks(machine, EXAMPLES / "hf_trainer.py", "8192").stdout.splitlines()
    assert lines.count("1024 4 steps: 3") == 2


LIGHTNING_ON_TWO_RANKS = """
from lightning.pytorch.strategies import DDPStrategy
from lightning_fit import BatchSizeTuner, fit

# Lightning sends objects between ranks, and the emulated card's collectives carry nothing.
strategy = DDPStrategy(process_group_backend="cpu:gloo,cuda:nccl")
trainer, model, data = fit(BatchSizeTuner(target=4096), devices=2, strategy=strategy)
print(data.batch_size, trainer.accumulate_grad_batches, "steps:", trainer.global_step, "of", model.planned_steps)
"""


@pytest.mark.slow
def test_lightning_trains_as_tuned_on_two_ranks(tmp_path: Path) -> None:
    """Under DDP, which its own finder refuses; the schedule is as long as the training."""
    pytest.importorskip("lightning")
    script = tmp_path / "fit_on_two.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(EXAMPLES)!r})\n{LIGHTNING_ON_TWO_RANKS}")
    with open_machine(("L4", "T4")) as machine:
        lines = run_two_ranks(machine, script).stdout.splitlines()
    assert lines.count("256 8 steps: 4 of 4") == 2


@pytest.mark.slow
def test_ray_train_takes_the_drivers_plan(tmp_path: Path) -> None:
    """The worker trains with it, on the card that the driver's child probed."""
    pytest.importorskip("ray.train", exc_type=ImportError)
    assert last_line("ray_train.py", "4096", str(tmp_path)) == "512 8"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("framework", ["transformers", "lightning"])
def test_the_maximum_is_that_of_the_framework_alone(framework: str) -> None:
    """The size trains by the framework without autobatch, and the next one does not."""
    pytest.importorskip(framework)
    (found,) = answers(["maximum", framework])
    size, steps = found["size"], str(found["steps"])
    assert answers(["train", framework, str(size), steps]) == ["fits"]
    assert answers(["train", framework, str(size + 1), steps]) != ["fits"]


def test_a_framework_is_needed_for_its_own_module_only() -> None:
    """Each is an extra: the package does without."""
    code = "import autobatch, autobatch.cli, sys; sys.exit(any(name in sys.modules for name in ('transformers', 'lightning')))"
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
