"""The page: one file that says all of a report, needs nothing from elsewhere, and believes nothing that a report holds."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import os
import re
from pathlib import Path

import pytest
from pure.test_breakdown import breakdown
from reports import FITS, GIB, MIXED, NOTHING_FITS, report, trial

from autobatch.errors import UsageError
from autobatch.options import ProbeOptions
from autobatch.present.page import check_page_path, render_page, write_page
from autobatch.present.plot import draw_throughput
from autobatch.present.throughput_plot import speeds_of
from autobatch.present.ways import next_goal, ways_to
from autobatch.report import Alternative, Report

pytest.importorskip("matplotlib")

SPLIT = breakdown(
    window=(32, 32),
    parameters_bytes=GIB,
    gradients_bytes=GIB,
    optimizer_state_bytes=2 * GIB,
    other_held_bytes=0,
    activations_bytes=24 * GIB,
    temporary_bytes=2 * GIB,
    workspaces_bytes=GIB // 8,
    unused_bytes=3 * GIB,
    context_bytes=GIB // 2,
)
EVEN = ProbeOptions(target=256)


def full_report(**changes: object) -> Report:
    """A report with everything that a page can show."""
    alternatives = (
        Alternative(
            change="expandable_segments",
            plan=EVEN.make_plan(64),
            max_micro_batch_size=70,
            smallest_failing=71,
            certified=True,
        ),
        Alternative(
            change="checkpointing=true",
            plan=None,
            max_micro_batch_size=None,
            smallest_failing=None,
            certified=False,
            problem="the model has none",
        ),
    )
    given = {
        "options": EVEN,
        "plan": EVEN.make_plan(37),
        "breakdown": SPLIT,
        "alternatives": alternatives,
        "expected_error": "peak memory within about 0.4 %",
        **changes,
    }
    return report(**given)


def timed_report() -> Report:
    """One of a real card, at three sizes."""
    trials = [
        dataclasses.replace(
            trial((size, size), FITS, size),
            seconds_per_step=seconds,
            seconds_per_step_deviation=seconds / 50,
            seconds_per_step_end=0.01,
            timed_steps=6,
        )
        for size, seconds in ((8, 0.2), (30, 0.55), (32, 0.5))
    ]
    options = ProbeOptions(target=256, objective="throughput")
    return full_report(
        basis="measured",
        expected_error="",
        trials=tuple(trials),
        options=options,
        plan=options.make_plan(32),
        max_micro_batch_size=32,
        smallest_failing=33,
        objective="throughput",
    )


class Reader(html.parser.HTMLParser):
    """Reads a page as a browser would: its visible text, its tags, and what it asks for elsewhere."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in {"meta", "link", "br", "img", "use", "path"}:
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href"}]

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.scripts.append(data)
        elif "style" not in self.open:
            self.text.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


REPORTS = {"full": full_report(), "plain": report(), "nothing fits": report(**NOTHING_FITS), "timed": timed_report()}


@pytest.mark.parametrize("name", REPORTS)
def test_a_page_needs_nothing_from_elsewhere_and_carries_its_report(name: str) -> None:
    """No link but into itself; the JSON in it is the report."""
    page = Reader(render_page(REPORTS[name]))
    assert all(link.startswith("#") for link in page.links)
    assert page.tags.count("script") == 1
    assert Report.from_json("".join(page.scripts)) == REPORTS[name]
    assert not {"link", "iframe", "img"} & set(page.tags)


def test_a_page_says_what_was_found() -> None:
    words = Reader(render_page(full_report())).words
    for said in (
        "32 × 8 = 256",
        "--micro-batch-size 32 --accumulation-steps 8",
        "emulated, not measured",
        "activations 24 GiB",
        "768 MiB for each sample",
        "expandable_segments 70 64 × 4",
        "the model has none",
        "2 × 37",
        "asked for 7 GiB more",
        "From 32 to 64",
    ):
        assert said.lower() in words.lower(), said


def test_what_was_not_looked_at_is_said() -> None:
    assert "Not taken apart: no trial was run for it" in Reader(render_page(report())).words
    words = Reader(render_page(report(**NOTHING_FITS))).words
    assert "Nothing fits" in words
    assert "Not taken apart: nothing fits" in words


def test_the_bar_is_the_whole_card() -> None:
    """Its parts are as wide as they are large: together the card."""
    shares = [float(share) for share in re.findall(r'style="flex: ([\d.]+) 1 0"', render_page(full_report()))]
    assert len(shares) == 12
    assert sum(shares) == pytest.approx(100, abs=0.01)


def test_a_page_believes_nothing_that_a_report_holds() -> None:
    """A workload's name is the user's own text, and a note may be anything that a job printed."""
    hostile = "</script><script>alert(1)</script><b onload=x>{{ 7 * 7 }}"
    noted = dataclasses.replace(MIXED[0], note=hostile)
    changed = full_report(
        workload=hostile,
        warnings=(hostile,),
        trials=(noted, *MIXED[1:]),
        alternatives=(dataclasses.replace(full_report().alternatives[1], problem=hostile),),
    )
    page = Reader(render_page(changed))
    assert page.tags.count("script") == 1
    assert "b" not in page.tags
    assert hostile in "".join(page.text)
    assert "49" not in page.words.replace("499", "")
    assert json.loads("".join(page.scripts))["workload"] == hostile


def test_times_are_drawn_where_there_are_any() -> None:
    assert "Throughput against micro-batch size" in Reader(render_page(timed_report())).words
    assert "Throughput against" not in Reader(render_page(full_report())).words


@pytest.mark.parametrize("name", ["report.txt", "report", "missing/report.html", "."])
def test_a_file_that_cannot_be_written_is_refused_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"does not end in \.html|there is no folder|is a folder"):
        check_page_path(name)
    (tmp_path / "there.html").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        check_page_path("there.html")


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "report.html"
    write_page(full_report(), file)
    before = file.read_text()
    assert before.rstrip().endswith("</html>")

    def fail(self: Path, target: Path) -> Path:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UsageError, match="No space left"):
        write_page(report(), file)
    assert file.read_text() == before
    assert [one.name for one in tmp_path.iterdir()] == ["report.html"]


# ---- ways to a larger size ------------------------------------------------------------------------------------------


def test_the_next_size_is_one_that_saves_steps() -> None:
    """By the line through 8 at 10 GiB and 37 at 38 GiB, 64 needs about 64 GiB."""
    goal = next_goal(full_report(trials=MIXED[:3]))
    assert goal is not None
    assert (goal.micro_batch_size, goal.accumulation_steps) == (64, 4)
    line = 10 + (38 - 10) / (37 - 8) * (64 - 8)
    assert goal.needed_bytes == pytest.approx(line * GIB, rel=0.001)
    assert goal.missing_bytes == goal.needed_bytes - int(38.6 * GIB)


def test_ways_say_what_they_free_and_whether_that_is_enough() -> None:
    whole = full_report(trials=MIXED[:3])
    goal = next_goal(whole)
    assert goal is not None
    ways = {way.name: way for way in ways_to(whole, goal)}
    assert ways["activation checkpointing"].frees_bytes == 48 * GIB  # of 64 samples
    assert ways["activation checkpointing"].suffices
    assert ways["expandable segments"].frees_bytes == 3 * GIB
    assert not ways["expandable segments"].suffices
    assert ways["8-bit optimizer"].frees_bytes == 3 * GIB // 2
    assert (ways["no headroom"].frees_bytes, ways["no headroom"].is_bound) == (GIB, False)
    assert [way.frees_bytes for way in ways_to(whole, goal)] == sorted(
        (w.frees_bytes for w in ways.values()), reverse=True
    )
    assert "--what-if checkpointing=true" not in ways["activation checkpointing"].how
    named = dataclasses.replace(whole, workload="hf:config.json?seq_len=512")
    found = {way.name: way.how for way in ways_to(named, goal)}
    assert "--what-if checkpointing=true" in found["activation checkpointing"]
    assert "weights in bf16" in found


def test_sharding_is_named_where_there_are_ranks() -> None:
    options = ProbeOptions(target=256, world_size=2)
    whole = full_report(trials=MIXED[:3], options=options, plan=options.make_plan(37))
    goal = next_goal(whole)
    assert goal is not None
    ways = {way.name: way.frees_bytes for way in ways_to(whole, goal)}
    assert ways["FSDP2 or ZeRO"] == 2 * GIB


@pytest.mark.parametrize(
    "changes",
    [
        {**NOTHING_FITS},
        {"plan": EVEN.make_plan(256), "max_micro_batch_size": 256, "smallest_failing": None, "ceiling_reached": True},
        {"trials": MIXED[:1], "breakdown": None},
    ],
)
def test_there_is_no_goal_where_none_would_help_or_nothing_is_known(changes: dict[str, object]) -> None:
    assert next_goal(full_report(**changes)) is None


def test_one_size_and_its_breakdown_are_enough_for_a_goal() -> None:
    one = trial((32, 32), FITS, 33.6)
    goal = next_goal(full_report(trials=(one,), max_micro_batch_size=32))
    assert goal is not None
    assert goal.needed_bytes == SPLIT.footprint_bytes + 26 * GIB


# ---- throughput -------------------------------------------------------------------------------------------------


def test_speeds_are_those_of_whole_batches_where_the_plan_has_the_size() -> None:
    """32: eight micro-batches, two a step of 0.49 s, and one end of 0.01 s; 30 is no plan's size: its own window counts."""
    speeds = {one.micro_batch_size: one for one in speeds_of(timed_report())}
    assert set(speeds) == {8, 30, 32}
    assert speeds[32].samples_per_second == pytest.approx(256 / (4 * 0.49 + 0.01))
    assert speeds[32].low == pytest.approx(256 / (4 * 0.49 + 0.01 + 4 * 0.01))
    assert speeds[30].samples_per_second == pytest.approx(60 / 0.55)
    assert (speeds[32].is_of_plan, speeds[30].is_of_plan) == (True, False)


@pytest.mark.parametrize("form", ["png", "svg", "pdf"])
def test_throughput_is_drawn_into_a_file(tmp_path: Path, form: str) -> None:
    file = tmp_path / f"speed.{form}"
    draw_throughput(timed_report(), file)
    start = {"png": b"\x89PNG", "svg": b"<svg", "pdf": b"%PDF"}[form]
    assert file.read_bytes().startswith(start)
    if form == "svg":
        assert "samples per second" in file.read_text()


def test_without_times_there_is_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no trial was timed"):
        draw_throughput(report(), tmp_path / "speed.png")
    assert not list(tmp_path.iterdir())
