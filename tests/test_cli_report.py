"""`autobatch probe --report`, `--chart`, `--what-if`: one probe, and all that can be seen of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from reports import MIXED, report
from rich.console import Console

from autobatch.cli import main
from autobatch.present.chart import chart_view
from autobatch.report import Report
from autobatch.trial import Outcome

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'server'}"}
JOB = "gpt2?seq_len=64&layers=2&width=256&heads=4&vocab=1024"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """One probe with every outlet."""
    folder = tmp_path_factory.mktemp("report")
    options = ["--target", "64", "--emulate", "T4", "--no-cache", "--format", "json", "--chart"]
    changes = ["--what-if", "expandable_segments", "--what-if", "seq_len=128", "--what-if", "tenant=15GiB"]
    command = [
        sys.executable,
        "-m",
        "autobatch",
        "probe",
        JOB,
        *options,
        *changes,
        "--report",
        str(folder / "found.html"),
    ]
    ended = subprocess.run(
        command, env=ENVIRONMENT, cwd=folder, capture_output=True, text=True, timeout=200, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended, folder / "found.html"


def test_the_report_holds_the_breakdown_and_what_was_tried(
    run: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    """Each change is a probe of its own; one that cannot be probed says why, and the others stand."""
    found = Report.from_dict(json.loads(run[0].stdout))
    assert found.breakdown is not None
    alternatives = {one.change: one for one in found.alternatives or ()}
    assert list(alternatives) == ["expandable_segments", "seq_len=128", "tenant=15GiB"]
    assert alternatives["seq_len=128"].plan == found.options.make_plan(64)
    assert "a tenant of 15 GiB does not fit on T4" in alternatives["tenant=15GiB"].problem


def test_the_page_is_that_report(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    page = run[1].read_text()
    embedded = page.split('<script type="application/json" id="report">')[1].split("</script>")[0]
    assert Report.from_json(embedded) == Report.from_dict(json.loads(run[0].stdout))
    assert f"report written to {run[1]}" in run[0].stderr


def test_the_chart_stands_beside_what_a_program_reads(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    assert "memory against micro-batch size" in run[0].stderr
    assert "memory against" not in run[0].stdout


def chart(whole: Report) -> list[str]:
    console = Console(width=100, no_color=True)
    with console.capture() as captured:
        console.print(chart_view(whole))
    return captured.get().splitlines()


def test_a_bar_is_as_long_as_its_footprint() -> None:
    """Against a whole row of 44 cells for a card of 44 GiB: a cell for each GiB; dots as far as the budget."""
    rows = chart(report())
    eight, ran_out, plan = (next(row for row in rows if name in row) for name in ("2 × 8 ", "2 × 38 ", "36+37"))
    assert eight.count("█") == 10
    assert ran_out.count("·") == 38
    assert "← plan" in plan
    assert rows[-1].index("▲") == ran_out.rindex("·")


def test_the_chart_says_every_outcome_in_words() -> None:
    text = "\n".join(chart(report()))
    for outcome in {trial.outcome for trial in MIXED}:
        assert {
            Outcome.FITS: "fits",
            Outcome.OVER_BUDGET: "over budget",
            Outcome.THRASHES: "thrashes",
            Outcome.OUT_OF_MEMORY: "out of memory",
        }[outcome] in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--report", "found.pdf"], "does not end in .html"),
        (["--report", "nowhere/found.html"], "there is no folder"),
        (["--plot-throughput", "speed.gif"], "has the suffix '.gif'"),
        (["--what-if", "depth=3"], "--what-if depth=3: workload gpt2"),
        (["--what-if", "emulate=L4"], "autobatch rank"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_started(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["probe", "gpt2", "--target", "64", "--emulate", "T4", *arguments]) == 2
    assert said in capsys.readouterr().err
