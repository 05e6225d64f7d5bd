"""Ranks that probe together on the CPU: whatever happens on one of them, none hangs, and all say the same."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import autobatch

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "scripts" / "probe_together.py"


def play(folder: Path, *scenes: str, python: str = sys.executable, waits_for: tuple[int, ...] = (0, 1, 2)) -> list[Any]:
    """What each of three ranks says, by scene; ranks that are not waited for are ended afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    try:
        for rank in range(3):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            variables = {**os.environ, **{key: str(value) for key, value in place.items()}, "OMP_NUM_THREADS": "1"}
            variables["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
            words = [python, str(SCRIPT), str(folder), *scenes]
            ranks.append(subprocess.Popen(words, env=variables, stderr=subprocess.PIPE, text=True))
        deadline = time.monotonic() + 120
        for rank in waits_for:
            _, said = ranks[rank].communicate(timeout=deadline - time.monotonic())
            assert ranks[rank].returncode == 0, said
    finally:
        for each in ranks:
            each.kill()
            each.communicate()
    files = [folder / f"{rank}.json" for rank in range(3)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files]


AGREE = [f"{wrapper}-{where}" for wrapper in ("ddp", "fsdp2") for where in ("forward", "backward")]
QUESTIONS = ["target", "workload", "mixed", "same-card", "world", "cache", "malformed"]
OWN = ["own", "own-backward", "own-even", "own-fastest", "own-in-one", "own-of-one"]
WRAPPED = ["unnamed-ddp", "unnamed-fsdp2", "compiled-fsdp2"]
FAULTS = ["swallows", "breaks", "one-more", "late"]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """All that the same processes can play one after the other, the death of rank 1 at the end."""
    return play(tmp_path_factory.mktemp("ranks"), *AGREE, *QUESTIONS, *OWN, *WRAPPED, *FAULTS, "dies", waits_for=(0, 2))


@pytest.mark.parametrize("scene", AGREE)
def test_a_rank_that_runs_out_ends_the_trial_for_all(said: list[Any], scene: str) -> None:
    """In the middle of a forward or a backward, of DDP or FSDP2: the others leave it too, and all is put back."""
    answers = [rank[scene] for rank in said]
    assert answers[0]["report"] == answers[1]["report"] == answers[2]["report"]
    report = answers[0]["report"]
    # Rank 1 has 700 MiB, of which its context takes 100, at 1 MiB a sample.
    assert (report["max_micro_batch_size"], report["smallest_failing"], report["certified"]) == (600, 601, True)
    plan = report["plan"]
    assert (plan["micro_batch_size"], plan["accumulation_steps"], plan["world_size"]) == (512, 2, 3)
    assert [trial["note"][:7] for trial in report["trials"] if trial["outcome"] == "out_of_memory"] == ["rank 1:"] * 2
    assert "rank 1 (scripted) has a budget of 700 MiB and others have up to 1000 MiB" in report["warnings"][0]
    assert all(answer["unchanged"] and answer["trains_on"] for answer in answers)


@pytest.mark.parametrize("scene", ["own", "own-backward"])
def test_each_rank_finds_its_own_size(said: list[Any], scene: str) -> None:
    """Cards of 1000, 700 and 900 MiB take 900, 600 and 800 samples, and share 5001 in three steps in that proportion."""
    reports = [rank[scene] for rank in said]
    assert reports[0] == reports[1] == reports[2]
    ranks = reports[0]["ranks"]
    assert [(rank["max_micro_batch_size"], rank["smallest_failing"]) for rank in ranks] == [
        (900, 901),
        (600, 601),
        (800, 801),
    ]
    plan = reports[0]["plan"]
    assert [sum(sizes) for sizes in plan["rank_micro_batch_sizes"]] == [1957, 1305, 1739]
    assert (plan["effective_batch_size"], plan["accumulation_steps"], plan["split"]) == (5001, 3, "balanced")
    assert reports[0]["max_micro_batch_size"] == 600  # for all alike, as its trials show
    assert autobatch.Report.from_dict(reports[0]).to_dict() == reports[0]


def test_a_model_that_was_compiled_is_no_wrapper_of_another_kind(said: list[Any]) -> None:
    """What `torch.compile` returned stands beside the model that `restore` names."""
    assert [rank["compiled-fsdp2"].get("max_micro_batch_size") for rank in said] == [600] * 3


def test_a_job_that_catches_what_stopped_it_is_stopped_all_the_same(said: list[Any]) -> None:
    """Each further collective is refused, and what came of the trial on that rank does not count."""
    assert [rank["swallows"]["max_micro_batch_size"] for rank in said] == [600] * 3


@pytest.mark.parametrize(
    ("scene", "kind", "message"),
    [
        ("target", "UsageError", "rank 0 has target 3072 and rank 2 has 96: every rank must ask the same"),
        ("workload", "UsageError", "rank 0 has workload 'a' and rank 1 has 'b': every rank must ask the same"),
        ("mixed", "UsageError", "rank 1 is on an emulated card and rank 0 on a real one"),
        ("same-card", "UsageError", "ranks 0 and 2 are on the same scripted (GPU-x)"),
        ("world", "UsageError", "world_size 2 does not divide the 3 ranks that run"),
        ("cache", "UsageError", "cache='confirm' is not there for several ranks yet"),
        ("own-even", "UsageError", "rank_sizes='own' mixes sizes, and split is 'even': give split='balanced' too"),
        ("own-fastest", "UsageError", "rank_sizes='own' gives each rank its largest size, whatever its speed"),
        (
            "own-in-one",
            "UsageError",
            "rank_sizes='own' needs data of its own on each of the 3 ranks, and world_size is 1",
        ),
        ("own-of-one", "UsageError", "rank 0 has rank_sizes 'same' and rank 1 has 'own'"),
        ("unnamed-ddp", "UsageError", "the model is in DistributedDataParallel, which restore does not name"),
        ("unnamed-fsdp2", "UsageError", "the model is in FSDP2 (fully_shard), which restore does not name"),
        ("one-more", "WorkloadError", "rank 0 ended its trial while rank 1 came to one more collective"),
        ("late", "BusyError", "the deadline of 0.2 s passed on rank 0"),
    ],
)
def test_all_ranks_say_the_same(said: list[Any], scene: str, kind: str, message: str) -> None:
    """Ranks that differ, and what is wrong with all of them."""
    for rank in said:
        assert rank[scene]["error"] == kind
        assert message in rank[scene]["message"]


@pytest.mark.parametrize(
    ("scene", "rank", "message"),
    [
        ("malformed", 2, "headroom 'much' is not a number of bytes"),
        (
            "breaks",
            1,
            "the training job failed at micro-batch 560, and not for want of memory: KeyError: 'no such column'",
        ),
    ],
)
def test_an_error_of_one_rank_reaches_all_with_its_rank(said: list[Any], scene: str, rank: int, message: str) -> None:
    """On the rank itself it is as it was raised there."""
    for number, answers in enumerate(said):
        named = "" if number == rank else f"rank {rank}: "
        assert answers[scene]["message"].startswith(named + message)


def test_a_rank_that_dies_is_named_by_the_others(said: list[Any]) -> None:
    """Killed in a trial, it says nothing: the others find out by a roll call, long before they would have waited enough."""
    assert "dies" not in said[1]
    for rank in (0, 2):
        assert said[rank]["dies"]["message"].startswith("rank 1 ended while the others waited for it")
        assert said[rank]["dies"]["seconds"] < 30


@pytest.mark.parametrize(
    ("scene", "message"),
    [
        pytest.param("hangs", "rank 1 did not answer within 3 s", marks=pytest.mark.slow),
        pytest.param("never", "rank 1 did not come to the probe within 2 s", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_keeps_the_others_waiting_is_named(scene: str, message: str, tmp_path: Path) -> None:
    """It is stuck in a trial, or never calls the probe."""
    first, _, last = play(tmp_path, scene, waits_for=(0, 2))
    assert first[scene]["message"].startswith(message)
    assert last[scene]["message"].startswith(message)
