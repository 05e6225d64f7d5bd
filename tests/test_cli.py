"""The command line: every bad input is one clear line with its exit code, and a probe's answer is as documented."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from autobatch.cli import main
from autobatch.cli.probe import _print
from autobatch.gpu.catalogue import find_card
from autobatch.present.tables import report_view
from autobatch.report import Report
from autobatch.units import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
PROBE = [sys.executable, "-m", "autobatch", "probe"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'server'}"}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pyproject.toml of ours is read, and nothing is written into the checkout."""
    monkeypatch.chdir(tmp_path)


def run_main(*arguments: str) -> int:
    """The exit status of a command in this process, argparse's own included."""
    try:
        return main(arguments)
    except SystemExit as ended:
        return int(ended.code or 0)


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROBE, *arguments],
        env={**ENVIRONMENT, **(env or {})},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def write_job(folder: Path, body: str) -> str:
    """Write a small job whose micro-step has this body; gives the workload's name."""
    source = f"""
import os, time
import torch

def job():
    model = torch.nn.Linear(1024, 1024, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def micro_step(n):
        x = torch.randn(n, 1024, device="cuda")
{textwrap.indent(textwrap.dedent(body), "        ")}

    return micro_step, optimizer
"""
    path = folder / "train.py"
    path.write_text(source)
    return f"{path}:job"


# ---- bad input ---------------------------------------------------------------------------------------------------------

GPT2 = ("probe", "gpt2", "--target", "8", "--emulate", "T4")
ON_T4 = ("probe", "--target", "8", "--emulate", "T4")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ((), 2, ["COMMAND", "--help"]),
        (("prob",), 2, ["prob", "probe"]),
        (("probe",), 2, ["no target", "--target N"]),
        (("probe", "gtp2", "--target", "8"), 2, ["'gtp2'", "'gpt2'"]),
        (("probe", "nothing.py:job", "--target", "8"), 2, ["no file nothing.py"]),
        (("probe", "gpt2", "vit", "--target", "8"), 2, ["vit"]),
        (("probe", "--target", "0"), 2, ["target 0", "at least 1"]),
        (("probe", "--target", "-1"), 2, ["target -1", "at least 1"]),
        (("probe", "--target", "abc"), 2, ["--target", "'abc'", "whole number"]),
        (("probe", "--targt", "8"), 2, ["--targt", "did you mean --target?"]),
        (("probe", "--headrom", "3%"), 2, ["--headrom", "did you mean --headroom?"]),
        (("probe", "--micro-batch=3"), 2, ["did you mean --max-micro-batch?"]),
        (("probe", "--target", "8", "--emulate", "A10O"), 2, ["'A10O'", "A10"]),
        (("probe", "--target", "8", "--emulate", "A100"), 2, ["'A100'", "A100-SXM4-40GB", "A100-PCIE-80GB"]),
        ((*GPT2, "--headroom", "99GiB"), 2, ["99 GiB", "15 GiB"]),
        ((*GPT2, "--headroom", "5G"), 2, ["5GiB", "5GB"]),
        ((*GPT2, "--headroom", "3"), 2, ["headroom '3' is 3 bytes", "3GiB", "'3%'"]),
        ((*GPT2, "--memory-limit", "24"), 2, ["memory_limit '24' is 24 bytes", "24GiB"]),
        ((*GPT2, "--tenant", "2"), 2, ["tenant '2' is 2 bytes", "2GiB"]),
        ((*GPT2, "--headroom", "5GiB", "--memory-limit", "4GiB"), 2, ["5 GiB", "memory_limit 4 GiB"]),
        ((*GPT2, "--headroom", "20GiB", "--memory-limit", "80GiB"), 2, ["20 GiB", "the card's 15 GiB"]),
        ((*GPT2, "--headroom", "100%"), 2, ["100%"]),
        ((*GPT2, "--memory-limit", "xyz"), 2, ["memory_limit", "'xyz'"]),
        ((*GPT2, "--memory-limit", "0"), 2, ["memory_limit", "'0'"]),
        ((*GPT2, "--tenant", "99GiB"), 2, ["99 GiB", "14.7 GiB", "--tenant"]),
        ((*GPT2, "--world-size", "9"), 2, ["target 8", "world_size 9"]),
        ((*GPT2, "--multiple-of", "9"), 2, ["multiple_of 9", "8 samples"]),
        ((*GPT2, "--max-micro-batch", "0"), 2, ["max_micro_batch 0"]),
        ((*GPT2, "--tolerance", "200%"), 2, ["'200%'"]),
        ((*GPT2, "--trial-timeout", "soon"), 2, ["'soon'", "none"]),
        ((*GPT2, "--device", "cuda:7"), 2, ["T4", "cuda:7", "cuda:0"]),
        ((*GPT2, "--device", "cpu"), 69, ["device cpu", "NVIDIA"]),
        ((*GPT2, "--objective", "throughput"), 2, ["throughput", "real GPU", "max or plan"]),
        ((*GPT2, "--", "python", "train.py"), 2, ["both the workload gpt2 and a command"]),
        ((*ON_T4, "--sizes", "128", "--", "t.py", "{micro_batch_size}"), 2, ["no {seq_len}"]),
        ((*ON_T4, "--", "t.py", "{micro_batch_size}", "{seq_len}"), 2, ["say which lengths", "--sizes"]),
        ((*ON_T4, "--sizes", "1-", "--", "t.py", "{seq_len}"), 2, ["'1-' is neither"]),
        ((*ON_T4, "gpt2", "--sizes", "128"), 2, ["gpt2?seq_len={seq_len}"]),
        ((*ON_T4, "gpt2?seq_len={seq_len}"), 2, ["is given 0"]),
        ((*ON_T4, "gpt2?seq_len={seq_len}", "--sizes", "8", "--format", "env"), 2, ["--format env", "--format json"]),
        (("run", "--target", "8", "--sizes", "8", "--", "x", "{seq_len}"), 2, ["--sizes 8", "probe with it"]),
        (("run", "--target", "8"), 2, ["no command", "autobatch run --target N -- COMMAND"]),
        (
            ("run", "--target", "8", "--emulate", "T4", "--", "x", "{micro_batch_size}"),
            2,
            ["--emulate T4", "where the card is"],
        ),
        ((*ON_T4, "--"), 2, ["no command", "write --"]),
        ((*ON_T4, "--set", "a.yaml:b=1"), 2, ["--set a.yaml:b=1", "behind --"]),
        (
            (*ON_T4, "--split", "balanced", "--", "python", "t.py", "{micro_batch_size}"),
            2,
            ["mixes two", "--split even"],
        ),
        ((*ON_T4, "--set", "a.yaml=1", "--", "python", "t.py"), 2, ["FILE:KEY=VALUE"]),
        ((*ON_T4, "--set", "a.ini:b=1", "--", "python", "t.py"), 2, ["a.ini", ".json, .yaml"]),
        ((*ON_T4, "--set", "no.yaml:b=1", "--", "python", "no.yaml"), 2, ["cannot read no.yaml"]),
        (("probe", "--target", "8", "--device", "mps"), 69, ["device mps", "--emulate"]),
        (("probe", "--target", "8", "--device", "tpu"), 2, ["'tpu'", "cuda:N"]),
        (("probe", "--target", "10", "--world-size", "4"), 5, ["target 10", "world_size 4", "--split balanced"]),
        (
            (
                "probe",
                "--target",
                "9",
                "--world-size",
                "4",
                "--split",
                "balanced",
                "--format",
                "args",
                "--emulate",
                "T4",
            ),
            5,
            ["target 9", "world_size 4", "--format env", "--split even with a --tolerance"],
        ),
        (
            ("plan", "--target", "256", "--max-micro-batch", "97", "--split", "balanced", "--format", "args"),
            5,
            ["86 and 85", "--split even", "--format env or json"],
        ),
        (("plan", "--target", "8"), 2, ["--max-micro-batch"]),
        (("plan", "--target", "10", "--max-micro-batch", "8", "--world-size", "4"), 5, ["10", "4", "--tolerance"]),
        (("plan", "--target", "8", "--max-micro-batch", "2", "--", "x"), 2, ["no command after --"]),
        (("gpus", "--", "x"), 2, ["no command after --"]),
        (("doctor", "--", "x"), 2, ["no command after --"]),
        (("emulate", "T4"), 2, ["emulate GPU -- COMMAND"]),
        (("emulate", ",", "--", "true"), 2, ["names no card"]),
        (("emulate", "A100", "--", "true"), 2, ["A100-SXM4-80GB"]),
        (("emulate", "T4", "--", "no-such-program"), 127, ["no-such-program"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_line_and_its_code(
    arguments: tuple[str, ...], status: int, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Bad input costs no start of torch, names both numbers and the way out, and prints nothing on standard output."""
    assert run_main(*arguments) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("autobatch")
    assert printed.err.count("\n") == 1, printed.err
    assert all(word in printed.err for word in words), printed.err


def test_a_flag_unlike_any_gets_no_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    """A guess that nobody could mean sends its reader the wrong way; the help lists every flag."""
    assert run_main("probe", "--foo") == 2
    printed = capsys.readouterr().err
    assert "did you mean" not in printed
    assert "autobatch probe --help" in printed


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"tool = 3", ["no target"]),
        (b"[tool]\nautobatch = 3", ["[tool.autobatch]", "3"]),
        (b"[tool.autobatch]\ntarge = 3", ["targe", "target"]),
        (b"[tool.autobatch", ["cannot read pyproject.toml", "Expected ']'"]),
        (b"\xff\xfe", ["cannot read pyproject.toml", "0xff"]),
        (b'[tool.autobatch]\ntarget = "x"', ["target 'x'"]),
        (b"[tool.autobatch]\ntarget = true", ["target True"]),
        (b"[tool.autobatch]\ntarget = 8\nworkload = 3", ["workload is 3"]),
        (b"[tool.autobatch]\ntarget = 8\nheadroom = 1.5", ["headroom 1.5"]),
        (b"[tool.autobatch]\ntarget = 8\nheadroom = 3", ["headroom '3' is 3 bytes", "'3%'"]),
        (b"[tool.autobatch]\ntarget = 8\nmemory_limit = 24", ["memory_limit '24' is 24 bytes"]),
        (b'[tool.autobatch]\ntarget = 8\nformat = "yaml"', ["format is 'yaml'", "table, json, env, args"]),
        (b"[tool.autobatch]\ntarget = 8\nformat = [3]", ["format is [3]"]),
        (b"[tool.autobatch]\ntarget = 8\nverbose = 1", ["verbose is 1", "true or false"]),
        (b'[tool.autobatch]\ntarget = 8\nemulate = ["T4"]', ["emulate ['T4']"]),
        (b'[tool.autobatch]\ntarget = 8\nworkload = "gtp2"', ["'gtp2'"]),
    ],
    ids=lambda value: value.decode(errors="replace")[-20:] if isinstance(value, bytes) else None,
)
def test_a_bad_pyproject_is_one_line(
    content: bytes, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever stands in the file, the error says what is wrong with it."""
    (tmp_path / "pyproject.toml").write_bytes(content)
    assert run_main("probe") == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert all(word in printed for word in words), printed


NO_GPU = pytest.mark.skipif(
    any(Path(sign).exists() for sign in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")), reason="a GPU is here"
)


@NO_GPU
@pytest.mark.parametrize("extra", [("--format", "env"), ("--format", "args"), ("--device", "cuda:0")])
def test_no_card_is_emulated_unasked_where_a_figure_could_be_mistaken(
    extra: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """What scripts read, and what names a device, is never answered for a card that is not there."""
    assert run_main("probe", "gpt2", "--target", "8", *extra) == 69
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "no NVIDIA GPU" in printed.err
    assert "--emulate" in printed.err


@NO_GPU
def test_a_device_in_the_file_counts_like_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A project that names its device wants that one measured."""
    (tmp_path / "pyproject.toml").write_text('[tool.autobatch]\ntarget = 8\ndevice = "cuda:0"\n')
    assert run_main("probe") == 69
    assert "no NVIDIA GPU" in capsys.readouterr().err


@NO_GPU
def test_a_format_in_the_file_counts_like_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What scripts read is not answered for a card that is not there, wherever the format was asked for."""
    (tmp_path / "pyproject.toml").write_text('[tool.autobatch]\ntarget = 8\nformat = "env"\n')
    assert run_main("probe", "gpt2") == 69
    assert "no NVIDIA GPU" in capsys.readouterr().err
    # Refused as a form that cannot say the plan, before any card is looked for.
    (tmp_path / "pyproject.toml").write_text('[tool.autobatch]\ntarget = 9\nsplit = "balanced"\nworld_size = 4\n')
    assert run_main("probe", "gpt2", "--format", "args") == 5


def test_what_the_file_says_of_verbose_is_heard(tmp_path: Path) -> None:
    """The traceback of a job that fails is shown as under `--verbose`, and the file's own job is the one that runs."""
    (tmp_path / "mine.py").write_text("def job():\n    raise ValueError('by mine')\n")
    (tmp_path / "pyproject.toml").write_text(
        '[tool.autobatch]\ntarget = 8\nworkload = "mine.py:job"\nemulate = "T4"\nverbose = true\n'
    )
    ended = run()
    assert ended.returncode == 4
    assert "Traceback" in ended.stderr
    assert "by mine" in ended.stderr.splitlines()[-1]
    assert "--verbose" not in ended.stderr


SETTINGS = """
[tool.autobatch]
target = 250
world-size = 4
split = "balanced"
headroom = "3%"
max_micro_batch = 5
format = "json"
"""


def test_plan_reads_the_file_under_its_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Target, ranks, split and format come from the file where no flag says otherwise."""
    (tmp_path / "pyproject.toml").write_text(SETTINGS)
    assert run_main("plan", "--max-micro-batch", "16") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["target"], plan["world_size"], plan["split"]) == (250, 4, "balanced")
    assert plan["rank_micro_batch_sizes"] == [[16, 16, 16, 15]] * 2 + [[16, 16, 15, 15]] * 2
    assert run_main("plan", "--max-micro-batch", "16", "--world-size", "1", "--target", "64", "--format", "args") == 0
    assert capsys.readouterr().out == "--micro-batch-size 16 --accumulation-steps 4\n"


def test_plan_takes_no_maximum_from_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There it is where a probe stops, which nobody has seen fit."""
    (tmp_path / "pyproject.toml").write_text(SETTINGS)
    assert run_main("plan") == 2
    assert "no maximum: give --max-micro-batch" in capsys.readouterr().err


def test_plan_refuses_a_bad_file_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A slip in the table is said by every command that reads it."""
    (tmp_path / "pyproject.toml").write_text("[tool.autobatch]\ntarge = 3\n")
    assert run_main("plan", "--target", "8", "--max-micro-batch", "4") == 2
    assert "has targe: it takes" in capsys.readouterr().err


def test_a_folder_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell may stand in a folder that was removed."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert run_main("probe", "x.py:job", "--target", "8") == 2
    assert "current folder is gone" in capsys.readouterr().err


# ---- what is printed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [(), ("probe",), ("plan",), ("emulate",), ("gpus",), ("doctor",)])
def test_every_command_has_help(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Help goes to standard output and is no failure."""
    assert run_main(*command, "--help") == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"usage: {' '.join(('autobatch', *command))}")
    assert printed.err == ""
    assert "%%" not in printed.out


def test_help_reads_as_a_person_would_write(capsys: pytest.CaptureFixture[str]) -> None:
    """Percentages and seconds have their units, and an option is explained for the command that it is of."""
    assert run_main("probe", "--help") == 0
    of_probe = " ".join(capsys.readouterr().out.split())
    assert "[--headroom 512MiB|3%]" in of_probe
    assert "percentage (default 2%)" in of_probe
    assert "may miss it (default 0%)" in of_probe
    assert "one trial may take (default 600 s)" in of_probe
    assert "largest micro-batch size to try" in of_probe
    assert run_main("plan", "--help") == 0
    of_plan = " ".join(capsys.readouterr().out.split())
    assert "--max-micro-batch N largest micro-batch size that fits" in of_plan
    assert "to try" not in of_plan


PLAN = ("plan", "--target", "256", "--max-micro-batch", "97")


def test_a_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """`plan --format json` is the documented plan object alone, with its warnings."""
    assert run_main(*PLAN, "--format", "json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "target": 256,
        "world_size": 1,
        "split": "even",
        "micro_batch_size": 64,
        "accumulation_steps": 4,
        "micro_batch_sizes": [64, 64, 64, 64],
        "effective_batch_size": 256,
        "exact": True,
        "warnings": [],
    }


def test_a_plan_for_shells(capsys: pytest.CaptureFixture[str]) -> None:
    """`env` can be evaluated by a shell, `args` stands on a command line."""
    assert run_main(*PLAN, "--split", "balanced", "--format", "env") == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("autobatch: note: AUTOBATCH_MICRO_BATCH_SIZE is unset")
    script = printed.out + 'echo "$AUTOBATCH_ACCUMULATION_STEPS $AUTOBATCH_MICRO_BATCH_SIZES"'
    assert subprocess.run(["sh", "-ec", script], capture_output=True, text=True, check=True).stdout == "3 86,85,85\n"
    assert run_main(*PLAN, "--format", "args") == 0
    assert capsys.readouterr().out == "--micro-batch-size 64 --accumulation-steps 4\n"


def test_a_warning_that_a_form_has_no_place_for_is_talk(capsys: pytest.CaptureFixture[str]) -> None:
    """A script that evaluates a plan that misses its target leaves a line in the log."""
    arguments = ("--target", "257", "--max-micro-batch", "97", "--tolerance", "1%", "--format", "args")
    assert run_main("plan", *arguments) == 0
    printed = capsys.readouterr()
    assert printed.out == "--micro-batch-size 86 --accumulation-steps 3\n"
    assert printed.err == "autobatch: note: effective batch 258 misses target 257 by 1 (0.39%)\n"


def test_a_prime_target_is_served_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    """1 × 257 is exact, and slow: the table names what would be better."""
    assert run_main("plan", "--target", "257", "--max-micro-batch", "97") == 0
    printed = capsys.readouterr().out
    assert "257 × 1, exact" in printed
    assert "--split balanced hits it exactly in 3 steps" in printed


def test_the_cards_as_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Each card of the catalogue is named, with both totals."""
    assert run_main("gpus", "--format", "json") == 0
    content = json.loads(capsys.readouterr().out)
    assert set(content) == {"present", "problem", "can_be_emulated"}
    assert len(content["can_be_emulated"]) >= 15
    assert run_main("gpus") == 0
    table = capsys.readouterr().out
    for card in content["can_be_emulated"]:
        assert card["name"] in table
        assert card["cuda_total_bytes"] < card["nvml_total_bytes"]
        assert {find_card(name).name for name in (*card["aliases"], card["name"])} == {card["name"]}
    assert any(card["aliases"] for card in content["can_be_emulated"])


def test_doctor_as_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Both forms name the same findings, and the exit status says whether a probe can run."""
    status = run_main("doctor", "--format", "json")
    content = json.loads(capsys.readouterr().out)
    assert status == (0 if content["can_probe"] else 69)
    assert run_main("doctor") == status
    table = capsys.readouterr().out
    assert all(finding["what"] in table for finding in content["findings"])


def shell(line: str) -> subprocess.CompletedProcess[str]:
    command = line.replace("autobatch", f"{sys.executable} -m autobatch")
    # Unbuffered, Python itself drops what a pipe does not take at once.
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    """`autobatch … | head` ends quietly."""
    line = "autobatch plan --target 1000000 --max-micro-batch 1 --format json | head -1; echo ${PIPESTATUS[0]}"
    ended = shell(line)
    assert ended.stdout.split() == ["{", "141"]
    assert ended.stderr == ""


@pytest.mark.parametrize(("end", "words"), [(">/dev/full", "No space left"), (">&-", "standard output")])
def test_output_that_cannot_be_written_is_said(end: str, words: str) -> None:
    """An answer that went nowhere is no success."""
    ended = shell(f"autobatch plan --target 8 --max-micro-batch 2 {end}")
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert words in ended.stderr


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A probe whose job hangs in its child, and the child's process id."""
    job, mark = tmp_path / "hang.py", tmp_path / "pid"
    job.write_text(
        f"import os, pathlib, time\np = pathlib.Path({str(mark)!r})\n"
        "p.with_suffix('.new').write_text(str(os.getpid()))\np.with_suffix('.new').rename(p)\ntime.sleep(100)\n"
    )
    with subprocess.Popen(
        [*PROBE, f"{job}:job", "--target", "8", "--emulate", "T4"], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    ) as process:
        while not mark.exists():
            assert process.poll() is None, process.stderr
            time.sleep(0.02)
        yield process, int(mark.read_text())
        process.kill()


def shared_memory_of(pid: int) -> list[str]:
    return [str(path) for path in Path("/dev/shm").glob(f"autobatch-gpu-{pid}-*")]  # noqa: S108 - where the cards live


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=str
)
def test_a_signal_ends_the_probe_and_leaves_nothing(
    hanging: tuple[subprocess.Popen[str], int], number: int, status: int
) -> None:
    """Within two seconds: the documented exit status, no child, no shared memory, no traceback."""
    process, child = hanging
    assert shared_memory_of(process.pid)
    process.send_signal(number)
    _, talk = process.communicate(timeout=2)
    # Interrupted within a string that the interpreter evaluates, Python ends by the signal itself: a shell sees 130 too.
    assert process.returncode in {status, -number}
    assert "Traceback" not in talk
    assert talk.splitlines()[-1] in {"autobatch: interrupted", "autobatch: terminated"}
    assert not Path(f"/proc/{child}").exists()
    assert not shared_memory_of(process.pid)


def test_a_killed_child_is_said(hanging: tuple[subprocess.Popen[str], int]) -> None:
    """The kernel's out-of-memory killer takes the child: the probe says so, and exits 4."""
    process, child = hanging
    os.kill(child, signal.SIGKILL)
    _, talk = process.communicate(timeout=2)
    assert process.returncode == 4
    assert "was killed by SIGKILL" in talk
    assert not shared_memory_of(process.pid)


# ---- whole probes on emulated cards --------------------------------------------------------------------------------------

REPORT_KEYS = {
    "schema_version", "basis", "workload", "fingerprint", "plan", "objective", "measured_at", "micro_batches_per_step",
    "max_micro_batch_size", "smallest_failing", "ceiling_reached", "monotone", "device", "memory", "trials", "versions",
}  # fmt: skip
OUR_KEYS = {"cached", "options", "certified", "data_dependent", "not_modelled", "expected_error", "warnings"}
TRIAL_KEYS = {
    "micro_batch_size", "outcome", "steps", "peak_allocated_bytes", "peak_reserved_bytes", "footprint_bytes",
    "alloc_retries", "seconds_per_step", "micro_batches_per_step", "confirmation",
}  # fmt: skip
OUR_TRIAL_KEYS = {
    "window", "held_bytes", "held_at_start_bytes", "gradient_bytes", "largest_segment_bytes", "oom_request_bytes", "note",
    "seconds_per_step_deviation", "seconds_per_step_end", "timed_steps",
}  # fmt: skip


def probe_json(*arguments: str) -> dict[str, Any]:
    ended = run(*arguments, "--format", "json")
    assert ended.returncode == 0, ended.stderr
    content: dict[str, Any] = json.loads(ended.stdout)
    check_certificate(content)
    return content


def check_certificate(content: dict[str, Any]) -> None:
    """N fitted and the next size did not, each in a trial of its own, and every size of the plan has run."""
    report = Report.from_dict(content)
    assert report.basis == "emulated"
    assert report.certified
    outcomes = {trial["micro_batch_size"]: trial["outcome"] for trial in content["trials"]}
    largest = report.max_micro_batch_size
    assert largest is not None
    assert report.plan is not None
    assert outcomes[largest] == "fits"
    if not report.ceiling_reached:
        assert report.smallest_failing == largest + report.options.multiple_of
        assert outcomes[report.smallest_failing] != "fits"
    ran = {size for trial in content["trials"] if trial["outcome"] == "fits" for size in trial["window"]}
    assert set(report.plan.micro_batch_sizes) <= ran
    for trial in content["trials"]:
        assert trial["steps"] >= 3 or trial["outcome"] != "fits"
        assert len(trial["window"]) == trial["micro_batches_per_step"]
        assert trial["micro_batches_per_step"] == min(2, -(-report.plan.target // trial["micro_batch_size"]))
        assert trial["seconds_per_step"] is None
        assert trial["footprint_bytes"] <= report.memory.budget_bytes


@pytest.fixture(scope="module")
def gpt2_on_an_a100(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return probe_json("gpt2", "--target", "256", "--emulate", "A100-SXM4-40GB")


def test_the_report_has_the_documented_keys(gpt2_on_an_a100: dict[str, Any]) -> None:
    """The JSON of the design page, and what it grew; no key is lost or added unnoticed."""
    content = gpt2_on_an_a100
    assert set(content) == REPORT_KEYS | OUR_KEYS
    assert set(content["device"]) == {"name", "uuid", "total_bytes", "compute_capability", "driver"}
    assert set(content["memory"]) == {"budget_bytes", "headroom_bytes", "other_tenants_bytes", "context_bytes"}
    assert set(content["versions"]) == {"autobatch", "torch", "cuda"}
    assert content["schema_version"] == 1
    for trial in content["trials"]:
        assert set(trial) == TRIAL_KEYS | OUR_TRIAL_KEYS


def test_the_answer_for_gpt2(gpt2_on_an_a100: dict[str, Any]) -> None:
    """GPT-2 small on a 40 GB card, and the plan for 256 that it gives; 2 % of the card stay free."""
    content = gpt2_on_an_a100
    assert content["device"]["name"] == "NVIDIA A100-SXM4-40GB"
    assert content["device"]["compute_capability"] == "8.0"
    assert content["memory"]["headroom_bytes"] == round(0.02 * content["device"]["total_bytes"])
    assert content["memory"]["other_tenants_bytes"] == 0
    plan = content["plan"]
    assert plan["micro_batch_size"] == max(n for n in range(1, content["max_micro_batch_size"] + 1) if 256 % n == 0)
    assert sum(plan["micro_batch_sizes"]) == plan["effective_batch_size"] == 256
    assert not content["ceiling_reached"]
    searched = [trial for trial in content["trials"] if not trial["confirmation"]]
    assert len(searched) <= 8


def test_the_report_goes_through_json_and_back(gpt2_on_an_a100: dict[str, Any]) -> None:
    """What the command line prints is what the library reads."""
    assert json.loads(Report.from_json(json.dumps(gpt2_on_an_a100)).to_json()) == gpt2_on_an_a100


def test_a_report_for_shells(gpt2_on_an_a100: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """What is evaluated says on what it rests, and the talk beside it how far to trust that."""
    report = Report.from_dict(gpt2_on_an_a100)
    _print(report, "env")
    printed = capsys.readouterr()
    assert "export AUTOBATCH_BASIS=emulated" in printed.out.splitlines()
    assert f"autobatch: note: emulated: {report.expected_error}\n" in printed.err


def _shape(text: str) -> list[str]:
    """Lines without their figures and widths; the trials, which are as many as it took, are left out."""
    before, _, after = text.partition("micro-batches  reserved")
    trials_header, _, rest = after.partition("\n")
    rest = rest.partition("\n\n")[2]
    lines = [*before.splitlines(), trials_header, " ".join(rest.split())]
    return [re.sub(r"[0-9.,]+|−", "#", " ".join(line.split())).replace("##", "#") for line in lines]


def test_the_sample_in_the_readme_is_what_is_printed(gpt2_on_an_a100: dict[str, Any]) -> None:
    """Every line of it, to the paragraph at its end, but for figures that move with versions."""
    page = io.StringIO()
    Console(file=page, width=120, color_system=None).print(report_view(Report.from_dict(gpt2_on_an_a100)))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    sample = readme[readme.index("gpt2 on NVIDIA A100-SXM4-40GB, emulated") :].partition("```")[0]
    assert _shape(sample) == _shape(page.getvalue())


@pytest.mark.slow
def test_without_headroom_the_answer_is_the_cards_own(gpt2_on_an_a100: dict[str, Any]) -> None:
    """`--headroom 0` is just before the out-of-memory error: never less than with headroom."""
    content = probe_json("gpt2", "--target", "256", "--emulate", "A100-SXM4-40GB", "--headroom", "0")
    assert content["memory"]["headroom_bytes"] == 0
    assert content["max_micro_batch_size"] >= gpt2_on_an_a100["max_micro_batch_size"]


@pytest.mark.slow  # brute force, in another file, asks more of both
@pytest.mark.parametrize(("workload", "card"), [("resnet50", "T4"), ("vit", "RTX 3060")])
def test_the_image_workloads(workload: str, card: str) -> None:
    """The other built-in jobs, on a small card each, in coarse steps; both have convolutions, whose error is larger."""
    content = probe_json(workload, "--target", "1024", "--emulate", card, "--multiple-of", "64")
    assert 64 <= content["max_micro_batch_size"] < 1024
    assert any("cuDNN" in part for part in content["not_modelled"])


# One process, many probes: importing torch is most of what one costs.
LIBRARY_SCRIPT = """
import json, sys
import autobatch
from autobatch.workload.builtin import build_gpt2

job = build_gpt2(layers=1, seq_len=256)
def report(**options):
    found = autobatch.probe(job.micro_step, optimizer=job.optimizer, target=4096, restore=[], **options)
    return json.loads(found.to_json())
print(json.dumps({
    "plain": report(),
    "no_headroom": report(headroom=0, multiple_of=8),
    "limited": report(memory_limit="6GiB", multiple_of=8),
    "balanced": report(split="balanced", max_micro_batch=30),
}))
"""


@pytest.fixture(scope="module")
def library_reports() -> dict[str, Any]:
    ended = subprocess.run(
        [sys.executable, "-m", "autobatch", "emulate", "T4", "--", sys.executable, "-c", LIBRARY_SCRIPT],
        env=ENVIRONMENT, capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    reports: dict[str, Any] = json.loads(ended.stdout)
    return reports


def test_the_library_on_an_emulated_card(library_reports: dict[str, Any]) -> None:
    """A script that calls `autobatch.probe` under `autobatch emulate` gets a certified, emulated answer."""
    content = library_reports["plain"]
    check_certificate(content)
    assert content["device"]["name"] == "Tesla T4"
    assert not content["ceiling_reached"]


def test_headroom_and_limits_only_ever_take_away(library_reports: dict[str, Any]) -> None:
    """No headroom gives at least as much, a memory limit less; and no trial used more than its budget."""
    largest = {name: content["max_micro_batch_size"] for name, content in library_reports.items()}
    assert library_reports["balanced"]["ceiling_reached"]
    assert largest["limited"] < largest["plain"] // 8 * 8 <= largest["no_headroom"]
    check_certificate(library_reports["limited"])
    check_certificate(library_reports["no_headroom"])
    limited = library_reports["limited"]
    assert limited["memory"]["budget_bytes"] <= parse_bytes("6GiB")
    fitting = [trial["footprint_bytes"] for trial in limited["trials"] if trial["outcome"] == "fits"]
    assert 0 < max(fitting) <= parse_bytes("6GiB")


def test_a_balanced_plan_is_confirmed_as_the_window_that_it_is(library_reports: dict[str, Any]) -> None:
    """Sizes that differ are run together, since one after the other they need not fit where each alone does."""
    content = library_reports["balanced"]
    check_certificate(content)
    plan = content["plan"]
    assert set(plan["micro_batch_sizes"]) == {29, 30}
    assert sum(plan["micro_batch_sizes"]) == plan["effective_batch_size"] == 4096
    assert sorted(content["trials"][-1]["window"]) == [29, 30]
    assert content["trials"][-1]["confirmation"]


def test_a_job_whose_shapes_are_data_is_not_certified(tmp_path: Path) -> None:
    """A mask on an emulated card under-measures: it is listed, and the answer says that it is none to trust.

    The same run has a tenant beside it, which the budget leaves alone.
    """
    workload = write_job(tmp_path, "x[x > 0].sum(); model(x).mean().backward()")
    ended = run(workload, "--target", "8", "--emulate", "T4", "--tenant", "4GiB", "--format", "json")
    assert ended.returncode == 0, ended.stderr
    content = json.loads(ended.stdout)
    assert not content["certified"]
    assert len(content["data_dependent"]) == 1
    assert "index" in content["data_dependent"][0]
    assert any("not certified" in warning for warning in content["warnings"])
    memory = content["memory"]
    assert memory["other_tenants_bytes"] == parse_bytes("4GiB")
    assert memory["budget_bytes"] <= content["device"]["total_bytes"] - parse_bytes("4GiB") - memory["headroom_bytes"]


def test_a_plan_that_a_form_cannot_say_is_not_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Known only after the probe: the sizes are named, with a command that prints the plan without another probe."""
    workload = write_job(tmp_path, "model(x).mean().backward()")
    options = ("--target", "257", "--max-micro-batch", "97", "--split", "balanced")
    ended = run(workload, *options, "--emulate", "T4", "--format", "args")
    assert ended.returncode == 5
    assert ended.stdout == ""
    last = ended.stderr.splitlines()[-1]
    assert "86 and 85" in last
    command = last.partition("without a new probe: autobatch ")[2].split()
    assert run_main(*command) == 0
    assert json.loads(capsys.readouterr().out)["micro_batch_sizes"] == [86, 86, 85]


def test_a_trial_that_hangs_is_ended_and_placed(tmp_path: Path) -> None:
    """The line at which the job stood is worth more than that it was slow."""
    ended = run(write_job(tmp_path, "time.sleep(1000)"), "--target", "8", "--emulate", "T4", "--trial-timeout", "8")
    assert ended.returncode == 4
    last = ended.stderr.splitlines()[-1]
    assert "micro-batch 1 took more than 8 s" in last
    assert "train.py, line 11 in micro_step" in last
    assert "--trial-timeout" in last
    assert ended.stdout == ""


def test_a_call_that_the_emulated_card_lacks_is_named(tmp_path: Path) -> None:
    """Not a silent success, nor torch's bare status code: the call's own name."""
    ended = run(write_job(tmp_path, "torch.fft.fft(x)"), "--target", "8", "--emulate", "T4", "--verbose")
    assert ended.returncode == 4
    assert "does not implement cufft" in ended.stderr.splitlines()[-1]
    assert "in micro_step" in ended.stderr  # --verbose shows the job's traceback


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("pass", "no parameter of the optimizer has a gradient"),
        ("os._exit(3)", "ended by itself with status 3 at micro-batch 1"),
        ("import ctypes; ctypes.string_at(0)", "killed by SIGSEGV at micro-batch 1"),
        ("raise SystemExit(5)", "ended the program"),
        ("raise KeyboardInterrupt", "raised KeyboardInterrupt"),
        ("raise MemoryError", "host memory"),
        ("torch.empty(1 << 50)", "host memory"),
        ("os.closerange(3, 256)", "closed the pipe"),
    ],
)
def test_a_job_that_fails_in_a_trial(tmp_path: Path, body: str, words: str) -> None:
    """Whatever a micro-step does, the command ends with 4 and one line that names it."""
    ended = run(write_job(tmp_path, body), "--target", "8", "--emulate", "T4")
    assert ended.returncode == 4
    assert words in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync", "remove backend:cudaMallocAsync"),
        ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1", "unset it"),
    ],
)
def test_an_allocator_that_cannot_be_measured_is_refused(name: str, value: str, words: str) -> None:
    """Its figures would be wrong, so none is given."""
    ended = run("gpt2", "--target", "8", "--emulate", "T4", env={name: value})
    assert ended.returncode == 69
    assert words in ended.stderr.splitlines()[-1]


def test_a_reduced_environment_is_enough(tmp_path: Path) -> None:
    """Without HOME, with every GPU hidden, in a folder that cannot be written, a job that uses loader processes runs."""
    workload = write_job(
        tmp_path,
        """
        data = torch.utils.data.TensorDataset(torch.zeros(64, 1))
        next(iter(torch.utils.data.DataLoader(data, batch_size=n, num_workers=1)))
        model(x).mean().backward()
        """,
    )
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "HOME"} | {"CUDA_VISIBLE_DEVICES": ""}
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    ended = subprocess.run(
        [*PROBE, workload, "--target", "8", "--emulate", "T4", "--format", "args"],
        env=environment, cwd=locked, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "--micro-batch-size 8 --accumulation-steps 1\n"


# ---- brute force ---------------------------------------------------------------------------------------------------------

ONE_TRIAL = """
import os, sys
from autobatch.isolation import IsolatedTrials
from autobatch.options import ProbeOptions
workload, size = sys.argv[1], int(sys.argv[2])
options = ProbeOptions(target=4096)
with IsolatedTrials(workload, options, environment=os.environ) as trials:
    print(trials.run_trial((size,) * options.micro_batches_per_step(size), confirmation=False).outcome)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("card", ["T4", "RTX 3060", "A10G"])
@pytest.mark.parametrize("workload", ["gpt2", "resnet50", "vit"])
def test_the_maximum_is_that_of_brute_force(workload: str, card: str) -> None:
    """Each size around the answer, in a fresh process of its own: fits up to N, and not beyond."""
    content = probe_json(workload, "--target", "4096", "--emulate", card)
    largest = content["max_micro_batch_size"]
    outcomes = {}
    for size in range(max(1, largest - 2), largest + 4):
        ended = subprocess.run(
            [sys.executable, "-m", "autobatch", "emulate", card, "--", sys.executable, "-c", ONE_TRIAL, workload, str(size)],
            env=ENVIRONMENT, capture_output=True, text=True, check=True, cwd=ROOT,
        )  # fmt: skip
        outcomes[size] = ended.stdout.strip() == "fits"
    assert max(size for size, fits in outcomes.items() if fits) == largest, outcomes
    assert all(fits == (size <= largest) for size, fits in outcomes.items()), outcomes


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("probe --target 256 --emulate T4 python train.py --batch-size 3", "-- python train.py"),
        ("emulate T4 torchrun --nproc-per-node 2 train.py", "-- torchrun train.py"),
        ("probe --taget 256", "did you mean --target?"),
    ],
)
def test_what_is_not_understood_comes_with_a_way_out(words: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A command without -- before it is the likeliest slip."""
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    assert hint in capsys.readouterr().err


def test_a_file_without_its_factory_is_told_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    """It is no misspelt built-in."""
    assert main(["probe", "train_job.py", "--target", "8"]) == 2
    assert "lacks the factory: write train_job.py:NAME" in capsys.readouterr().err
