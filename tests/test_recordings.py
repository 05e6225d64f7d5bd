"""What records a card and what compares recordings: on emulated cards, and on recordings whose differences are known."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import MARK, wait_until_gone

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "gpu"), str(ROOT / "tests" / "benchmarks")]

import against_card
import fidelity
import record
import workspaces
from recordings import read_recording, write_recording

GIB = 1 << 30
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'server'}"}


def row(size: int, outcome: str, gib: float) -> list[Any]:
    """A trial whose peaks follow from its footprint."""
    values = {
        "micro_batch_size": size,
        "outcome": outcome,
        "footprint_bytes": int(gib * GIB),
        "peak_reserved_bytes": int((gib - 0.5) * GIB),
        "peak_allocated_bytes": int((gib - 1) * GIB),
    }
    return [values.get(column, 0) for column in fidelity.COLUMNS]


def recorded(basis: str = "measured") -> dict[str, Any]:
    """A recording of one language model and one convolutional net."""
    machine = {
        "basis": basis,
        "card": "NVIDIA X",
        "driver": "1",
        "torch": "2",
        "cudnn": 9,
        "cuda_total_bytes": 80 * GIB,
    }
    reading = {"moment": "context", "cuda_free_bytes": 79 * GIB, "reserved_bytes": GIB // 4}
    caps = [{"cap": "16 GiB", "rows": [row(9, "fits", 15.0), row(10, "out_of_memory", 16.0)], "largest": 9}]
    setting = {
        "precision": "bf16",
        "allocator": "default",
        "problem": "",
        "context": [{"moment": "before CUDA", "nvml_free_bytes": 80 * GIB}, reading],
        "curve": {"rows": [row(1, "fits", 2.0), row(4, "fits", 8.0)]},
        "traces": [{"micro_batch_size": 4, "events": [["alloc", 512], ["alloc", 2048], ["free_completed", 512]]}],
        "caps": [{**each, "is_certified": True} for each in caps],
    }
    settings = [{"workload": name, **copy.deepcopy(setting)} for name in ("gpt2", "resnet50")]
    return {"columns": list(fidelity.COLUMNS), "machine": machine, "settings": settings, "missing": []}


def hold_against(folder: Path, measured: dict[str, Any], emulated: dict[str, Any]) -> against_card.Comparison:
    write_recording(folder / "fidelity.json.gz", measured)
    write_recording(folder / "fidelity-emulated.json.gz", emulated)
    return against_card.compare(folder)


def test_a_recording_against_itself_has_no_error(tmp_path: Path) -> None:
    found = hold_against(tmp_path, recorded(), recorded("emulated"))
    assert len(found.pairs) == 8
    assert found.agreement == 1.0
    assert {error for family in against_card.FAMILIES for error in found.errors(family, "footprint_bytes")} == {0.0}
    assert [(one.measured, one.emulated) for one in found.largest] == [(9, 9), (9, 9)]
    assert all(not more for *_, more in found.traces)
    assert {(moment, one, other) for _, moment, one, other in found.contexts} == {
        ("context", GIB * 3 // 4, GIB * 3 // 4)
    }
    assert "REHEARSAL" not in against_card.text_of(found)


def test_each_difference_is_found_where_it_is(tmp_path: Path) -> None:
    """A footprint 10 % low, a size that fits on one side alone, a block asked for once, a larger context."""
    measured, emulated = recorded(), recorded("emulated")
    net = measured["settings"][1]
    net["curve"]["rows"][1] = row(4, "fits", 8.0 / 0.9)
    net["caps"][0]["rows"][0] = row(9, "thrashes", 16.0)
    net["caps"][0]["largest"] = 8
    net["traces"][0]["events"].append(["alloc", 4096])
    net["context"][1]["reserved_bytes"] -= 1 << 20
    found = hold_against(tmp_path, measured, emulated)
    language, convolutions = against_card.FAMILIES
    assert found.errors(language, "footprint_bytes") == [0.0, 0.0, 0.0]
    assert found.errors(convolutions, "footprint_bytes") == pytest.approx([0.0, -0.1])
    assert found.agreement == 7 / 8
    assert [(one.setting, one.measured, one.emulated) for one in found.largest if one.measured != one.emulated] == [
        ("resnet50, bf16, default", 8, 9)
    ]
    assert [more for *_, more in found.traces] == [{}, {4096: 1}]
    assert found.contexts[1][2] - found.contexts[1][3] == 1 << 20
    text = against_card.text_of(found)
    assert "the same in 1 of 2" in text
    assert "+1 × 4,096" in text
    assert "-10.00%" in text


def test_workspaces_are_compared_by_operation(tmp_path: Path) -> None:
    key = [0, 32, "bf16", "last", False]
    rows = [[*key, "forward", [512], [512], [4096]], [*key, "weight", [1024], [1024, 1024], [4096]]]
    others = [[*key, "forward", [512], [512], [4096]], [*key, "weight", [], [], [4096]]]
    failed = [*key, "input", ["RuntimeError: no engine"], ["RuntimeError: no engine"], []]
    rows.append([*key, "input", [], [], [4096]])
    others.append(failed)
    write_recording(tmp_path / "workspaces.json.gz", {"rows": rows})
    write_recording(tmp_path / "workspaces-emulated.json.gz", {"rows": others})
    text = against_card.text_of(hold_against(tmp_path, recorded(), recorded("emulated")))
    assert "| forward, bf16, channels last, heuristics | 1 | 100% | 512 | 512 | 0 |" in text
    assert "| weight, bf16, channels last, heuristics | 1 | 0% | 2,048 | 0 | 2,048 |" in text
    assert "| input, bf16, channels last, heuristics | 1 | 0% | 0 | failed | 0 |" in text


def test_what_was_not_recorded_is_told(tmp_path: Path) -> None:
    measured, emulated = recorded(), recorded("emulated")
    measured["missing"] = ["vit, fp32, default: not reached"]
    del emulated["settings"][1]
    text = against_card.text_of(hold_against(tmp_path, measured, emulated))
    assert "- vit, fp32, default: not reached" in text
    assert "- resnet50, bf16, default: not emulated" in text


def test_what_is_missing_of_a_recording_is_named() -> None:
    """A setting that was not reached, and a cap without a certificate; the reason, where there is one."""
    kept = recorded()
    kept["settings"][1]["caps"][0]["is_certified"] = False
    kept["settings"][1]["problem"] = "ended after 40 s"
    settings = [
        fidelity.Setting(workload=name, precision="bf16", allocator="default") for name in ("gpt2", "resnet50", "vit")
    ]
    assert fidelity.missing(kept, settings, (16,)) == [
        "resnet50, bf16, default: 16 GiB not reached (ended after 40 s)",
        "vit, bf16, default: not reached",
    ]


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "kept.json.gz"
    write_recording(path, {"a": 1})
    with pytest.raises(TypeError):
        write_recording(path, {"a": object()})
    assert read_recording(path) == {"a": 1}
    assert [one.name for one in tmp_path.iterdir()] == ["kept.json.gz"]


def test_the_convolutions_are_those_of_the_networks_named() -> None:
    """Every network has some, each shape stands once, and an output's sides are torch's own."""
    import torch

    shapes = json.loads(workspaces.CONVOLUTIONS.read_text())
    networks = {name for shape in shapes for name in shape["networks"]}
    assert networks == {*workspaces.TIMM, "unet", "whisper"}
    assert len({json.dumps({**shape, "networks": 0}) for shape in shapes}) == len(shapes)
    for shape in shapes:
        out = torch.nn.functional.conv2d if len(shape["weight"]) == 4 else torch.nn.functional.conv1d
        x, weight = (torch.empty(1, *shape["in"], device="meta"), torch.empty(shape["weight"], device="meta"))
        made = out(x, weight, None, shape["stride"], shape["padding"], shape["dilation"], shape["groups"])
        assert list(made.shape[2:]) == workspaces.output_sides(shape)


def test_a_part_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    code = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '100']).pid, flush=True); time.sleep(100)"
    running = record.Running("slow", [sys.executable, "-c", code], tmp_path / "log")
    while not (text := (tmp_path / "log").read_text()):
        time.sleep(0.02)
    ended = running.wait(0.1)
    assert ended.state == "out of time"
    child = int(text)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and time.monotonic() < deadline:
        if psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.02)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_everything_is_packed_into_one_file(tmp_path: Path) -> None:
    """Whole each time, without itself and without what is half written."""
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / ".half").write_text("")
    for _ in range(2):
        record.pack(tmp_path, tmp_path / "all.tar.gz")
    with tarfile.open(tmp_path / "all.tar.gz") as packed:
        assert packed.getnames() == ["summary.json"]
    assert sorted(one.name for one in tmp_path.iterdir()) == [".half", "all.tar.gz", "summary.json"]


def test_a_convolution_that_fails_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """No algorithm for one operation: the reason stands in its row, and the others are recorded."""
    import torch

    def run(case: workspaces.Case, operation: str) -> None:
        if operation == "input":
            raise RuntimeError("GET was unable to find an engine to execute this computation")

    monkeypatch.setattr(workspaces.Case, "__init__", lambda *_: None)
    monkeypatch.setattr(workspaces.Case, "run", run)
    monkeypatch.setattr(workspaces, "blocks", lambda call: (call() or [512], [1024]))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    (found,) = workspaces.rows([{}], [(0, 32, "bf16", "last", False)])
    reason = ["RuntimeError: GET was unable to find an engine to execute this computation"]
    assert [(row[5], row[7]) for row in found] == [
        ("forward", [512]), ("input", reason), ("weight", [512]), ("norm", [512]),
    ]  # fmt: skip


def test_a_part_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    running = record.Running("bad", [sys.executable, "-c", "raise SystemExit('no luck')"], tmp_path / "log")
    ended = running.wait(30)
    assert (ended.state, ended.detail) == ("failed", "no luck")


def test_without_a_card_it_says_so_at_once(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "tests/gpu/run.sh"), str(tmp_path / "out")]
    variables = {name: value for name, value in ENVIRONMENT.items() if name != "AUTOBATCH_EMULATED_GPU"}
    ended = subprocess.run(
        command, env={**variables, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 69
    assert "no NVIDIA GPU can be used here" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("libraries")
def test_a_rehearsal_runs_every_part_and_agrees_with_itself(tmp_path: Path) -> None:
    """Everything on an emulated card, and once more on another: what both record is the same, and is called a rehearsal."""
    command = ["bash", str(ROOT / "tests/gpu/run.sh"), str(tmp_path), "--quick", "--emulate", "T4", "--seconds", "400"]
    ended = subprocess.run(
        command, env={**ENVIRONMENT, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=500, check=False
    )
    assert ended.returncode == 0, ended.stderr
    states = {one["part"]: one["state"] for one in json.loads((tmp_path / "summary.json").read_text())}
    assert states == dict.fromkeys(record.PARTS, "done"), ended.stderr
    found = against_card.compare(tmp_path)
    assert found.is_rehearsal
    assert len(found.pairs) >= 40
    assert found.agreement == 1.0
    errors = (found.errors(family, each) for family in against_card.FAMILIES for each in against_card.QUANTITIES)
    assert {error for some in errors for error in some} == {0.0}
    assert len(found.largest) == 8
    assert all(one.measured == one.emulated for one in found.largest)
    assert found.workspaces
    assert all(one == other for _, one, other in found.workspaces)
    assert not any(more for *_, more in found.traces)
    assert "REHEARSAL" in against_card.text_of(found)
    peers = json.loads((tmp_path / "peers.json").read_text())
    assert peers["pairs"][0]["is_whole"]


@pytest.mark.slow
@pytest.mark.usefixtures("libraries")
def test_a_recording_that_ran_out_of_time_is_gone_on_with(tmp_path: Path) -> None:
    """With next to no time little is recorded, and told; the next run does the rest and keeps what was there."""
    script = [sys.executable, str(ROOT / "tests/gpu/fidelity.py")]
    emulate = [sys.executable, "-m", "autobatch", "emulate", "T4", "--"]
    first, second = tmp_path / "first.json.gz", tmp_path / "second.json.gz"
    short = [*emulate, *script, str(first), "--quick", "--seconds", "6"]
    subprocess.run(short, env=ENVIRONMENT, check=True, timeout=200)
    before = read_recording(first)
    assert before["missing"]
    subprocess.run(
        [*emulate, *script, str(second), "--quick", "--resume", str(first)], env=ENVIRONMENT, check=True, timeout=200
    )
    after = read_recording(second)
    assert after["missing"] == []
    certified = [(one["workload"], each) for one in before["settings"] for each in one["caps"] if each["is_certified"]]
    assert all(
        any(each in one["caps"] for one in after["settings"] if one["workload"] == name) for name, each in certified
    )


def test_what_was_recorded_better_before_stays(tmp_path: Path) -> None:
    """A later run that came less far takes nothing away; what it adds is there, and each time the file says what is missing."""
    wanted = [fidelity.Setting(workload=name, precision="bf16", allocator="default") for name in ("gpt2", "resnet50")]
    recording = fidelity.Recording(tmp_path / "kept.json.gz", recorded(), wanted, (16, 24))
    cut = {"workload": "gpt2", "precision": "bf16", "allocator": "default", "problem": "ended after 5 s"}
    worse = {"cap": "16 GiB", "rows": [], "largest": None, "is_certified": False}
    better = {"cap": "24 GiB", "rows": [row(14, "fits", 23.0)], "largest": 14, "is_certified": True}
    recording.add({**cut, "caps": [worse, better]})
    kept = read_recording(tmp_path / "kept.json.gz")
    gpt2 = next(one for one in kept["settings"] if one["workload"] == "gpt2")
    assert [(one["cap"], one["largest"]) for one in gpt2["caps"]] == [("16 GiB", 9), ("24 GiB", 14)]
    assert gpt2["curve"] == recorded()["settings"][0]["curve"]
    assert kept["missing"] == ["resnet50, bf16, default: 24 GiB not reached"]


@pytest.mark.slow
@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("seconds", [1.0, 4.0, 9.0])
def test_ended_at_any_moment_it_leaves_nothing_running(seconds: float, tmp_path: Path) -> None:
    """Neither the process that records nor the one that waits for its turn, nor what stands between on an emulated card."""
    mark = f"{os.getpid()}-{seconds}"
    out = str(tmp_path / "kept.json.gz")
    command = [
        sys.executable,
        "-m",
        "autobatch",
        "emulate",
        "T4",
        "--",
        sys.executable,
        str(ROOT / "tests/gpu/fidelity.py"),
        out,
    ]
    process = subprocess.Popen([*command, "--quick"], env={**ENVIRONMENT, MARK: mark}, stderr=subprocess.DEVNULL)
    time.sleep(seconds)
    process.terminate()
    assert process.wait(30) == 143
    assert wait_until_gone(mark, 10) == []
