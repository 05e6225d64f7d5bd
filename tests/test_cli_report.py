"""`autobatch probe --report`, `--chart`, `--what-if`: one probe, and all that can be seen of it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from reports import MIXED, NOTHING_FITS, report
from rich.console import Console

from autobatch.alternatives import parse_change, try_alternatives
from autobatch.cli import main
from autobatch.cli.probe import Subject
from autobatch.errors import UsageError
from autobatch.options import ProbeOptions
from autobatch.present.chart import chart_view
from autobatch.present.tables import report_view
from autobatch.report import Alternative, Report
from autobatch.trial import Outcome

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'server'}"}
JOB = "gpt2?seq_len=64&layers=2&width=256&heads=4&vocab=1024"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """One probe with every outlet."""
    folder = tmp_path_factory.mktemp("report")
    options = ["--target", "64", "--emulate", "T4", "--no-cache", "--format", "json", "--chart"]
    changes = ["--what-if", "seq_len=128", "--what-if", "tenant=15GiB"]
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
    assert list(alternatives) == ["seq_len=128", "tenant=15GiB"]
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


@pytest.mark.parametrize("width", [30, 60, 200])
def test_the_chart_fits_its_terminal(width: int) -> None:
    """Sizes and words are kept, bars give way."""
    console = Console(width=width, no_color=True)
    with console.capture() as captured:
        console.print(chart_view(report()))
    lines = captured.get().splitlines()
    assert all(len(line) <= width for line in lines)
    if width > 40:
        assert any("2 × 38" in line and "out of memory" in line for line in lines)
        assert any("37.6 GiB" in line and "← plan" in line for line in lines)


def test_brackets_in_a_change_are_no_markup() -> None:
    """What a user wrote, and what a job said."""
    odd = Alternative(
        change="layers=[/b]",
        plan=None,
        max_micro_batch_size=None,
        smallest_failing=None,
        certified=False,
        problem="no file [/home/me/x]",
    )
    console = Console(width=120, no_color=True)
    with console.capture() as captured:
        console.print(report_view(report(alternatives=(odd,))))
    assert "layers=[/b]" in captured.get()
    assert "no file [/home/me/x]" in captured.get()


class Outlets:
    """A probe that is there at once, and what becomes of its outlets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, found: Report) -> None:
        monkeypatch.setattr(Subject, "probe", lambda *_, **__: found)
        monkeypatch.setattr("autobatch.cli.probe._check_card", lambda _: None)

    def run(self, *arguments: str) -> int:
        return main(["probe", "gpt2", "--target", "256", "--emulate", "A100-40GB", *arguments])


def test_an_interrupted_what_if_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answer is printed, and the files are there, though nobody waited for the change."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    outlets = Outlets(monkeypatch, report())
    monkeypatch.setattr(Subject, "alternatives", interrupted)
    files = ["--report", str(tmp_path / "found.html"), "--plan-file", str(tmp_path / "plan.json")]
    with contextlib.suppress(KeyboardInterrupt):
        assert outlets.run("--what-if", "headroom=0", "--format", "json", *files) == 130
    assert Report.from_json(capsys.readouterr().out) == report()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["found.html", "plan.json"]


def test_one_file_that_cannot_be_written_keeps_no_other_from_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise UsageError("plot cannot be written")

    outlets = Outlets(monkeypatch, report())
    monkeypatch.setattr("autobatch.present.plot.draw_report", fail)
    files = ["--report", str(tmp_path / "found.html"), "--plot", str(tmp_path / "found.svg")]
    assert outlets.run("--format", "json", *files) == 2
    captured = capsys.readouterr()
    assert "plot cannot be written" in captured.err
    assert Report.from_json(captured.out) == report()
    assert [one.name for one in tmp_path.iterdir()] == ["found.html"]


def test_where_nothing_fits_the_page_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    outlets = Outlets(monkeypatch, report(**NOTHING_FITS))
    assert outlets.run("--report", str(tmp_path / "found.html")) == 3
    assert "Nothing fits" in (tmp_path / "found.html").read_text()


def test_changes_share_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that is left goes to the next; what it does not reach says so."""
    clock, asked = [0.0], []

    def probe(name: str, **options: Any) -> Report:
        asked.append(options["deadline"])
        clock[0] += 40
        return report()

    monkeypatch.setattr("autobatch.alternatives.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("autobatch.child_probe.probe_workload", probe)
    changes = [parse_change(f"seq_len={length}") for length in (64, 128, 256)]
    found = try_alternatives("gpt2", changes, ProbeOptions(target=256, deadline=60))
    assert asked == [60, 20]
    assert [one.problem for one in found] == ["", "", "the deadline of 60 s passed before it began"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--plot-throughput", "speed.png"], "the emulated T4 has none"),
        (["--report", "found.pdf"], "does not end in .html"),
        (["--report", "nowhere/found.html"], "there is no folder"),
        (["--what-if", "depth=3"], "--what-if depth=3: workload gpt2"),
        (["--what-if", "emulate=L4"], "autobatch rank"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_started(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["probe", "gpt2", "--target", "64", "--emulate", "T4", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_allocators_setting_is_tried() -> None:
    """Expandable segments leave less unused: at least as much fits."""
    import autobatch
    from autobatch.alternatives import parse_change, try_alternatives

    options = autobatch.ProbeOptions(target=256, emulate="L4")
    plain = autobatch.probe_workload("gpt2", breakdown=True, **vars(options))
    (tried,) = try_alternatives("gpt2", [parse_change("expandable_segments")], options)
    assert tried.certified
    assert (tried.max_micro_batch_size or 0) >= (plain.max_micro_batch_size or 0)
    assert plain.breakdown is not None
    assert plain.breakdown.unused_bytes > 0
