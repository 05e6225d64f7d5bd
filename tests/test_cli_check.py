"""`autobatch check`: what a factory gives is checked, the exit status says the outcome, bad input is one line."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from autobatch.cli import Parser, check
from autobatch.errors import AutobatchError, NoGpuError, UsageError, WorkloadError

if TYPE_CHECKING:
    from conftest import ScriptRunner

SOURCE = """
import types
import torch
from torch import nn

def model(*middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.ReLU(), nn.Linear(6, 1))

def batch(n):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, generator=generator), torch.randn(n, 1, generator=generator)

def loss(model, batch):
    return ((model(batch[0]) - batch[1]) ** 2).mean()

def total(model, batch):
    return ((model(batch[0]) - batch[1]) ** 2).sum()

def plain(width=4):
    return model(), batch(9), loss

def on_demand():
    return model(), batch, loss

def batch_norm():
    return model(nn.BatchNorm1d(6)), batch(8), loss

def sums():
    return types.SimpleNamespace(model=model(), batch=batch, loss_fn=total, loss_reduction="sum")

def a_job():
    net = model()
    return (lambda n: loss(net, batch(n)).backward()), torch.optim.SGD(net.parameters(), lr=0.1)

def swapped():
    return loss, batch, model()

def failing():
    raise RuntimeError("no data set here")

def on_a_card():
    return model().cuda(), batch(4), loss
"""


@pytest.fixture(autouse=True)
def in_a_folder_with_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factories stand in parts_of_check.py here; no pyproject.toml of ours is read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "parts_of_check.py").write_text(textwrap.dedent(SOURCE))
    sys.modules.pop("parts_of_check", None)


def run(*arguments: str) -> int:
    """Parse and run as the command line does; errors come through as they are."""
    parser = Parser(prog="autobatch")
    commands = parser.add_subparsers(required=True)
    check.add_commands(commands)
    parsed = parser.parse_args(["check", *arguments])
    parsed.command = None
    return int(parsed.run(parsed))


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    status = run(*arguments, "--format", "json")
    return status, json.loads(capsys.readouterr().out)


def test_equal_exits_0_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """A plain model: the table says equal, the micro-batches and the precision."""
    assert run("parts_of_check.py:plain") == 0
    out = capsys.readouterr().out
    assert "Accumulation over 3 + 3 + 3 is equal to the batch of 9." in out
    assert "float64" in out


def test_different_exits_6_with_the_parameter_and_the_cause(capsys: pytest.CaptureFixture[str]) -> None:
    """Batch norm: status 6, the parameter of the largest difference, cause and way out, in both forms."""
    status, form = answer(capsys, "parts_of_check.py:batch_norm")
    assert status == 6
    assert not form["equal"]
    assert [cause["name"] for cause in form["causes"]] == ["batch statistics"]
    assert run("parts_of_check.py:batch_norm") == 6
    out = capsys.readouterr().out
    assert "NOT equal" in out
    assert form["worst_parameter"] in out
    assert "BatchNorm1d" in out
    assert "GroupNorm" in out


def test_samples_and_micro_batch(capsys: pytest.CaptureFixture[str]) -> None:
    """A batch is cut, or made, to the samples asked for, and split by the micro-batch asked for."""
    assert answer(capsys, "parts_of_check.py:plain", "--samples", "5", "--micro-batch", "2")[1][
        "micro_batch_sizes"
    ] == [2, 2, 1]
    assert answer(capsys, "parts_of_check.py:on_demand", "--samples", "12")[1]["micro_batch_sizes"] == [4, 4, 4]
    assert sum(answer(capsys, "parts_of_check.py:on_demand")[1]["micro_batch_sizes"]) == 8
    with pytest.raises(UsageError, match="--samples 10 of a batch that has 9"):
        run("parts_of_check.py:plain", "--samples", "10")


def test_an_object_may_say_how_its_loss_is_reduced(capsys: pytest.CaptureFixture[str]) -> None:
    """An object with attributes instead of a tuple, here with a sum."""
    assert answer(capsys, "parts_of_check.py:sums")[0] == 0


def test_the_workload_of_the_file_here(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a name, [tool.autobatch] names it; without that, one is asked for."""
    with pytest.raises(UsageError, match="no workload"):
        run()
    Path("pyproject.toml").write_text('[tool.autobatch]\nworkload = "parts_of_check.py:plain"\n')
    assert run() == 0
    assert "equal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("workload", "error", "message"),
    [
        ("gpt2", UsageError, "gpt2 builds its batches itself, for a GPU: name a factory"),
        ("nowhere.py:parts", UsageError, "there is no file nowhere.py"),
        ("parts_of_check.py:missing", UsageError, "has no function 'missing'"),
        ("parts_of_check.py:plain?depth=2", UsageError, "unexpected keyword argument 'depth'"),
        ("parts_of_check.py:a_job", WorkloadError, "returned tuple: to be checked"),
        ("parts_of_check.py:swapped", WorkloadError, "returned function as model and Sequential as loss_fn"),
        ("parts_of_check.py:failing", WorkloadError, "failed: RuntimeError: no data set here"),
    ],
)
def test_what_cannot_be_checked_is_one_line(workload: str, error: type[AutobatchError], message: str) -> None:
    """Usage errors exit 2, the workload's own 4, each with the way out."""
    with pytest.raises(error, match=message) as caught:
        run(workload)
    assert caught.value.exit_code == (4 if error is WorkloadError else 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", [("--samples", "1"), ("--micro-batch", "0"), ("--samples", "many")])
def test_numbers_out_of_range_are_usage(words: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """One sample cannot be split."""
    with pytest.raises(SystemExit) as ended:
        run("parts_of_check.py:plain", *words)
    assert ended.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_an_emulated_card_is_refused_by_its_name(scripts: ScriptRunner, tmp_path: Path) -> None:
    """Every value is zero on it: the check says so, with the card's name and exit status 69."""
    script = tmp_path / "on_card.py"
    script.write_text(
        textwrap.dedent(
            """
            import json
            from autobatch.cli import Parser, check
            from autobatch.errors import AutobatchError

            def attempt(workload):
                parser = Parser(prog="autobatch")
                check.add_commands(parser.add_subparsers())
                parsed = parser.parse_args(["check", workload, "--format", "json"])
                parsed.command = None
                try:
                    return [parsed.run(parsed), ""]
                except AutobatchError as error:
                    return [error.exit_code, str(error)]

            refused = attempt("parts_of_check.py:on_a_card")
            on_the_cpu = attempt("parts_of_check.py:plain")
            print(json.dumps({"refused": refused, "on_the_cpu": on_the_cpu}))
            """
        )
    )
    found = scripts.run(script, ["T4"]).answer
    status, message = found["refused"]
    assert status == NoGpuError.exit_code == 69
    assert "T4" in message
    assert "is emulated" in message
    assert found["on_the_cpu"] == [0, ""]
