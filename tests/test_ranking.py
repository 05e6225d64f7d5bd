"""Rankings of cards: the emulated ones in shared processes, jobs that bear no company, and what people see."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from processes import MARK, marked

import autobatch
from autobatch.cli import main
from autobatch.jsonform import from_json_form
from autobatch.placement import PlacementTable

if TYPE_CHECKING:
    from autobatch.ranking import CardRanked

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("libraries")

JOBS = """
    import os
    import time
    import torch

    def job(device="cuda"):
        model = torch.nn.Linear(65536, 1024, bias=False, device=device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def micro_step(n):
            model(torch.zeros(n, 65536, device=device)).square().mean().backward()

        return micro_step, optimizer

    def names_a_device():
        return job("cuda:0")

    def dies_on_an_l4():
        if "L4" in torch.cuda.get_device_name():
            os._exit(3)
        return job()

    def dies_above_four():
        micro_step, optimizer = job()
        return (lambda n: os._exit(9) if n > 4 else micro_step(n)), optimizer

    def hangs_on_an_l4():
        if "L4" in torch.cuda.get_device_name():
            time.sleep(600)
        return job()

    def breaks():
        raise KeyError("no such column")
"""


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "jobs.py").write_text(textwrap.dedent(JOBS))
    monkeypatch.chdir(tmp_path)
    return "jobs.py"


def ranked(job: str, gpus: list[str], **options: Any) -> PlacementTable:
    return autobatch.placements(job, target=16384, candidates=gpus, multiple_of=2048, headroom=0, **options)


@pytest.mark.slow
def test_the_plan_on_each_card_is_that_of_a_probe_on_it(jobs: str) -> None:
    """Cards beside others in one process answer as each does alone; counts of one card share its figures."""
    seen: list[CardRanked] = []
    table = ranked(f"{jobs}:job", ["T4", "L4", "L4:4", "A10", "RTX-3060-12GB:20000"], processes=1, progress=seen.append)
    found = {(one.gpu, one.count): one for one in table.placements}
    assert [each.done for each in seen] == [1, 2, 3, 4, 5]
    for gpu, count in (("T4", 1), ("L4", 4)):
        alone = autobatch.probe_workload(
            f"{jobs}:job", target=16384, emulate=gpu, multiple_of=2048, headroom=0, world_size=count
        )
        one = found[gpu, count]
        assert one.plan == alone.plan
        assert one.report is not None
        assert (one.report.options, one.report.certified) == (alone.options, True)
        assert one.report.max_micro_batch_size == alone.max_micro_batch_size
        assert one.basis == "emulated"
    assert found["RTX-3060-12GB", 20000].verdict == "no_plan"
    assert "target 16384 is below world_size 20000" in found["RTX-3060-12GB", 20000].reason
    assert "DDP takes 256 MiB to hold the gradients once more" in found["L4", 4].reason
    assert [one.rank for one in table.placements] == [1, 2, 3, 4, 5]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["names_a_device", "dies_on_an_l4"])
def test_a_job_that_bears_no_company_is_probed_alone(jobs: str, name: str) -> None:
    """Where it dies on one card, the others are not lost."""
    table = ranked(f"{jobs}:{name}", ["T4", "L4", "A10"], processes=1)
    verdicts = {one.gpu: (one.verdict, one.reason) for one in table.placements}
    assert verdicts["T4"][0] == verdicts["A10"][0] == "fits"
    if name == "names_a_device":
        assert verdicts["L4"][0] == "fits"
    else:
        assert verdicts["L4"][0] == "unknown"
        assert verdicts["L4"][1].startswith("the training job ended by itself with status 3 at micro-batch")


@pytest.mark.slow
def test_a_number_of_cards_on_which_the_job_dies_costs_no_other(jobs: str) -> None:
    """What died took its process along, and another is started."""
    table = autobatch.placements(f"{jobs}:dies_above_four", target=16, candidates=["T4", "T4:4"], processes=1)
    assert {one.count: one.verdict for one in table.placements} == {1: "unknown", 4: "fits"}


@pytest.mark.slow
def test_what_is_done_when_the_deadline_passes_is_not_lost(jobs: str) -> None:
    """The deadline is that of the whole ranking: who has not had its turn by then is told so."""
    table = ranked(f"{jobs}:hangs_on_an_l4", ["T4", "L4", "A10"], processes=1, deadline=20)
    reasons = {one.gpu: (one.verdict, one.reason) for one in table.placements}
    assert reasons["T4"][0] == "fits"
    assert reasons["L4"][0] == reasons["A10"][0] == "unknown"
    assert "deadline" in reasons["L4"][1]
    assert reasons["A10"][1] == "the deadline had passed before its turn came"


@pytest.mark.slow
def test_a_target_that_one_candidate_cannot_split_costs_no_other(jobs: str) -> None:
    """Of eight ranks each would take fewer samples than the multiple asked for; one card takes them all."""
    table = autobatch.placements(
        f"{jobs}:job", target=256, candidates=["L4", "L4:8"], multiple_of=64, max_micro_batch=64, processes=1
    )
    assert {one.count: one.verdict for one in table.placements} == {1: "fits", 8: "no_plan"}


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--target", "7", "--gpu", "L4:2"), 5, "the target cannot be split over any of the candidates"),
        (("--target", "16", "--gpu", "L4", "--headroom", "30GiB"), 3, "fits none of 1 candidates"),
        (("--target", "16", "--gpu", "L4", "--", "nosuch{micro_batch_size}"), 2, "nosuch"),
        (("--target", "16", "--gpu", "L4", "--rank-by", "cost"), 2, "--rank-by cost needs prices"),
    ],
)
def test_where_nothing_fits_the_exit_status_says_why(
    jobs: str, words: tuple[str, ...], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too large for each card, indivisible, or not a command at all."""
    job = () if "--" in words else (f"{jobs}:job",)
    assert main(["rank", *job, *words]) == status
    assert message in capsys.readouterr().err


def test_a_job_that_fails_everywhere_fails(jobs: str) -> None:
    """With its own words."""
    with pytest.raises(autobatch.WorkloadError, match="no such column"):
        ranked(f"{jobs}:breaks", ["T4", "L4"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rank_by": "speed"}, "rank_by 'speed' is unknown; choose gpus, cost, headroom"),
        ({"world_size": 4}, "world_size cannot be given to a ranking"),
        ({"candidates": "L4"}, r"candidates is the text 'L4': pass a list of them, as in \['L4'\]"),
        ({"candidates": []}, "there is no candidate"),
        ({"candidates": ["L5"]}, "GPU 'L5' cannot be emulated"),
        ({"headrom": 0}, r"placements\(\) has no option headrom"),
        ({"candidates": [("L4", 2)]}, r"candidate \('L4', 2\) is a tuple: give a Candidate, or text such as 'L4:4'"),
        ({"processes": -1}, "processes -1 is below 1"),
        ({"target": "x"}, "target 'x' is not"),
    ],
)
def test_what_has_no_meaning_is_refused_before_anything_starts(more: dict[str, Any], message: str) -> None:
    """In one line."""
    with pytest.raises(autobatch.UsageError, match=message):
        autobatch.placements("gpt2", **{"target": 16, **more})


@pytest.mark.slow
def test_the_command_line_ranks_prices_and_draws(jobs: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Two processes; JSON that reads back; the second time from the cache, by one trial a card; a table with prices."""
    words = ["rank", f"{jobs}:job", "--target", "16384", "--multiple-of", "2048", "--gpu", "nvidia l4:2", "--gpu", "T4"]
    assert main([*words, "--price", "L4=0.6", "--format", "json"]) == 0
    table = from_json_form(PlacementTable, json.loads(capsys.readouterr().out))
    assert [(one.gpu, one.count, one.price_per_hour) for one in table.placements] == [("L4", 2, 1.2), ("T4", 1, None)]
    assert table.rank_by == "cost"
    pytest.importorskip("matplotlib")
    assert main([*words, "--cache", "trust", "--plot", str(tmp_path / "cards.svg")]) == 0
    printed = capsys.readouterr()
    assert "T4" in printed.out.splitlines()[3]  # fewest cards
    assert "2 × L4" in printed.out
    assert "emulated" in printed.out
    drawn = (tmp_path / "cards.svg").read_text()
    assert "2  2 × L4" in drawn
    assert "emulated" in drawn
    assert main([*words, "--price", "A10=1"]) == 2
    assert "--price A10 is of a card that is not ranked: add --gpu A10" in capsys.readouterr().err


def test_nothing_that_fits_is_an_error_that_names_the_nearest(jobs: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 3, after the table."""
    (Path(jobs).parent / "jobs.py").write_text(textwrap.dedent(JOBS).replace("65536, 1024", "65536, 262144"))
    assert main(["rank", f"{jobs}:job", "--target", "16", "--gpu", "T4", "--gpu", "L4"]) == 3
    printed = capsys.readouterr()
    assert printed.out.count("does not fit") == 2
    assert "fits none of 2 candidates" in printed.err


def test_an_interrupted_ranking_leaves_nothing(jobs: str) -> None:
    """Ctrl-C while two processes probe."""
    mark = f"rank-{os.getpid()}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), MARK: mark}
    for seconds in (2.0, 6.0):
        ranking = subprocess.Popen(
            [sys.executable, "-m", "autobatch", "rank", "gpt2", "--target", "256", "--no-cache"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(seconds)
        ranking.send_signal(signal.SIGINT)
        assert ranking.wait(20) == 130
        assert marked(mark) == []
