"""The memory curve: every trial is in it, it says what it shows, and a file is replaced whole or not at all."""

from __future__ import annotations

import itertools
import re
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest
from reports import FITS, GIB, MIXED, NOTHING_FITS, OOM, OVER, report, trial

from autobatch.errors import UnavailableError, UsageError
from autobatch.options import ProbeOptions
from autobatch.present import curve, curve_parts, plot, text_layout, themes
from autobatch.present.plot import check_plot_path, draw_report, report_svg
from autobatch.report import Memory
from autobatch.trial import Outcome, Trial

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from matplotlib.text import Text

pytest.importorskip("matplotlib")

SVG = "{http://www.w3.org/2000/svg}"
THEMES = ("light", "dark")
LONG_NAME = "/home/someone/a_$very$_long/path/" * 6 + "train.py:make?depth=12"
# What one meets: neighbours, one trial only, the plan at the maximum, thousands, a curve that is not monotone.
PICTURES = {
    "mixed": report(),
    "nothing fits": report(**NOTHING_FITS),
    "one trial": report(
        plan=ProbeOptions(target=1).make_plan(1),
        max_micro_batch_size=1,
        smallest_failing=None,
        ceiling_reached=True,
        trials=(trial((1,), FITS, 3.0),),
        micro_batches_per_step=1,
        basis="measured",
    ),
    "thousands": report(
        plan=ProbeOptions(target=131072).make_plan(48000),
        max_micro_batch_size=48000,
        smallest_failing=48001,
        trials=(
            trial((64, 64), FITS, 1.0),
            trial((48000, 48000), FITS, 38.5),
            trial((48001, 48001), OOM, 38.5),
            trial((32768, 32768), FITS, 26.0, confirmation=True),
        ),
    ),
    "not monotone": report(
        max_micro_batch_size=37,
        smallest_failing=38,
        monotone=False,
        trials=(*MIXED, trial((41, 41), FITS, 38.2)),
        workload=LONG_NAME,
    ),
    "other tenants unknown": report(
        memory=Memory(budget_bytes=int(38.6 * GIB), headroom_bytes=GIB, other_tenants_bytes=None, context_bytes=None),
        basis="measured",
        trials=MIXED[:3],
    ),
}


def parsed(svg: str | bytes) -> ET.Element:
    return ET.fromstring(svg)  # noqa: S314 (drawn by this test)


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in parsed(svg).iter(f"{SVG}text")]


def ids(svg: str) -> list[str]:
    return [found for element in parsed(svg).iter() if (found := element.get("id")) is not None]


@pytest.mark.parametrize("name", PICTURES)
def test_every_trial_is_drawn_with_its_words(name: str) -> None:
    """Each trial has one group of its own with something drawn in it, named by its place in the report."""
    shown = PICTURES[name]
    root = parsed(report_svg(shown))
    groups = {element.get("id", "").partition("-trial-")[2]: element for element in root.iter(f"{SVG}g")}
    groups.pop("", None)
    assert sorted(groups, key=int) == [str(number) for number in range(1, len(shown.trials) + 1)]
    for number, each in enumerate(shown.trials, start=1):
        group = groups[str(number)]
        assert group.find(f".//{SVG}use") is not None
        hint = group.findtext(f"{SVG}title", "")
        assert str(max(each.window)) in hint
        assert each.outcome.value.replace("_", " ") in hint


def test_trials_stand_at_their_size_and_footprint() -> None:
    """A trial that ran lies at what it took; one that ran out of memory above the card, at no height of its own."""
    picture = curve.Picture(report(), themes.THEMES["light"])
    points = {line.get_gid(): line for line in picture._axes.lines if str(line.get_gid()).startswith("trial-")}
    places = [tuple(float(value[0]) for value in points[f"trial-{n}"].get_data()) for n in range(1, 8)]
    assert [x for x, _ in places] == [8, 37, 38, 36.5, 39, 40, 42]
    assert [y for _, y in places[:2]] == [10, 38]
    assert places[2][1] == places[6][1] > 44


def test_points_are_told_apart_without_colour() -> None:
    """Outcomes differ by shape; a confirmation is hollow, a mixed window half filled, one micro-batch has a bar."""
    shown = report(trials=(*MIXED, trial((37, 37), FITS, 38.0, confirmation=True)))
    picture = curve.Picture(shown, themes.THEMES["light"])
    points = {str(line.get_gid()): line for line in picture._axes.lines}
    shapes = [points[f"trial-{n}"].get_marker() for n in (1, 3, 5, 6)]
    assert len(set(shapes)) == 4
    assert points["trial-4"].get_fillstyle() == "left"
    assert points["trial-8"].get_markerfacecolor() == "none" != points["trial-2"].get_markerfacecolor()
    bars = [line for line in picture._axes.lines if line.get_marker() == "_"]
    assert [tuple(line.get_xdata()) for line in bars] == [(42,)]


def test_text_names_basis_maximum_plan_and_memory() -> None:
    """What a reader looks for stands in the picture as text."""
    found = texts(report_svg(report(basis="measured", trials=MIXED[:4])))
    joined = "\n".join(found)
    assert "gpt2 on NVIDIA A100-SXM4-40GB, measured" in found
    assert "max 37" in found
    assert "plan 37 × 4 + 36 × 3" in found
    assert "38 ran out of memory" in found
    assert "37 ran and fitted, 38 ran out of memory, two micro-batches per optimizer step." in found
    for words in ("micro-batch size (samples)", "memory (GiB)", "card 44 GiB", "budget 38.6 GiB", "headroom 1 GiB",
                  "other tenants 4 GiB", "CUDA context 512 MiB", "kept by the driver 409.6 MiB"):  # fmt: skip
        assert words in found, words
    assert "torch 2.15.0" in joined
    assert "a guide only" in joined
    assert any("emulated" in text for text in texts(report_svg(report())))


def test_nothing_fits_is_said() -> None:
    """Without any size that fits there is still a picture, with the statement and neither maximum nor plan."""
    found = texts(report_svg(PICTURES["nothing fits"]))
    assert "Nothing fits: even 1 ran out of memory, two micro-batches per optimizer step." in found
    assert not any(text.startswith(("max", "plan")) for text in found)
    assert not any("guide" in text for text in found)


def test_limit_is_named() -> None:
    """What lies beyond --memory-limit is not called the driver's."""
    options = ProbeOptions(target=256, memory_limit=f"{int(38.6 * GIB) + GIB}B")
    found = texts(report_svg(report(options=options)))
    assert any(text.startswith("beyond the limit") for text in found)
    assert not any("driver" in text for text in found)


def test_fit_needs_two_sizes_of_one_kind() -> None:
    """A line is fitted through sizes under the answer's accumulation only, and spans these."""
    assert curve_parts.fitted_line(report(trials=MIXED[:1])) is None
    assert curve_parts.fitted_line(report(trials=(MIXED[0], trial((37,), FITS, 38.0)))) is None
    sizes, heights = curve_parts.fitted_line(report()) or ((), ())
    assert sizes == (8, 37)
    assert heights == pytest.approx((10, 38))


@pytest.mark.parametrize("name", PICTURES)
def test_words_lie_in_the_picture_and_on_nothing(name: str) -> None:
    """No text overlaps another or a trial, and all lie within the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with plot._own_settings():
        picture = curve.Picture(PICTURES[name], themes.THEMES["light"])
        picture.figure.set_dpi(200)
        renderer = FigureCanvasAgg(picture.figure).get_renderer()
        picture.figure.draw(renderer)
        legends = picture.figure.legends
        found: list[Text] = [*picture.figure.texts, picture._axes.xaxis.label, picture._axes.yaxis.label]
        found += [*picture._axes.get_xticklabels(), *picture._axes.get_yticklabels()]
        found += [text for legend in legends for text in legend.get_texts()]
        boxes = {text.get_text(): text.get_window_extent(renderer) for text in found if text.get_text()}
        whole = picture.figure.bbox
        for words, box in boxes.items():
            assert box.x0 >= 0 and box.x1 <= whole.x1 and box.y0 >= 0 and box.y1 <= whole.y1, words  # noqa: PT018 (one claim)
        for (one, first), (other, second) in itertools.combinations(boxes.items(), 2):
            assert not first.overlaps(second), (one, other)
        places = [
            line.get_transform().transform(line.get_xydata())[0] for line in picture._axes.lines if line.get_gid()
        ]
        points = [place for place in places if len(place) == 2]
        for words, box in boxes.items():
            assert not any(box.contains(x, y) for x, y in points), words


def test_labels_are_moved_no_more_than_needed() -> None:
    """Labels with room stay; neighbours share the move; the ends are kept."""
    assert text_layout.spread([10, 50], [10, 10], 0, 100) == [10, 50]
    assert text_layout.spread([50, 50], [10, 10], 0, 100) == [45, 55]
    assert text_layout.spread([98, 99], [10, 10], 0, 100) == [85, 95]
    assert text_layout.spread([1, 2], [10, 10], 0, 100) == [5, 15]
    assert text_layout.spread([20, 50, 52, 54], [10] * 4, 0, 100) == [20, 42, 52, 62]


def test_same_report_gives_same_bytes(tmp_path: Path) -> None:
    """Nothing of the time or of chance goes into a picture, in any format."""
    for suffix in ("png", "svg", "pdf"):
        files = [tmp_path / f"{name}.{suffix}" for name in "ab"]
        for file in files:
            draw_report(report(), file)
        assert files[0].read_bytes() == files[1].read_bytes(), suffix
    assert report_svg(report()) == report_svg(report())


def test_formats_are_what_the_suffix_says(tmp_path: Path) -> None:
    """Each suffix, in any case, gives its format; a file has a size and a ground, and any reader may open it."""
    starts = {"a.PNG": b"\x89PNG", "a.pdf": b"%PDF", "a.svg": b"<svg"}
    for name, start in starts.items():
        draw_report(report(), tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    root = parsed((tmp_path / "a.svg").read_bytes())
    assert root.get("width") == "576pt"
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(starts)
    beside = tmp_path / "plain"
    beside.touch()
    assert (tmp_path / "a.PNG").stat().st_mode == beside.stat().st_mode


def test_element_can_stand_in_a_page() -> None:
    """Inlined: no prologue, no style sheet or attribute, no size, described for screen readers, all links resolved."""
    svg = report_svg(report())
    root = parsed(svg)
    assert svg.startswith("<svg ")
    assert not {"width", "height"} & set(root.attrib)
    assert root.get("role") == "img"
    assert not re.search(r"style=|<style|<metadata|xlink", svg)
    own = ids(svg)
    assert len(own) == len(set(own))
    words = {element.get("id"): element.text for element in root}
    assert words[root.get("aria-labelledby")] == "Memory curve of gpt2 on NVIDIA A100-SXM4-40GB, emulated"
    described = words[root.get("aria-describedby")] or ""
    assert "2 × 38 out of memory, asked for 7 GiB more" in described
    assert "The plan for 256: 37 × 4 + 36 × 3." in described
    links = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)
    assert links
    assert {one or other for one, other in links} <= set(own)
    ground = next(element for element in root.iter() if element.get("id", "").endswith("-patch_1"))
    assert ground[0].get("opacity") == "0"


def test_pictures_share_no_ids_on_a_page() -> None:
    """A light and a dark picture, or two reports, can be inlined together; only the two themes are known."""
    sets = [set(ids(report_svg(report(), theme=theme))) for theme in THEMES]
    sets.append(set(ids(report_svg(report(workload="other")))))
    for one, other in itertools.combinations(sets, 2):
        assert not one & other
    with pytest.raises(UsageError, match="'sepia' is none of light, dark"):
        report_svg(report(), theme="sepia")


def test_names_are_shown_as_they_are() -> None:
    """Mark-up, formulas and control characters in a name do nothing; a letter that the font lacks warns of nothing."""
    svg = report_svg(report(workload="a<b>&$x_1$\n\x00用"))
    assert "a<b>&$x_1$\ufffd\ufffd\ufffd on NVIDIA A100-SXM4-40GB, emulated" in texts(svg)
    title = parsed(svg).findtext(f"{SVG}title", "")
    assert title.startswith("Memory curve of a<b>&$x_1$\ufffd\ufffd用 on")


def test_long_name_loses_its_beginning_and_the_basis_stays() -> None:
    """A workload longer than the picture is cut at its front."""
    (title,) = [text for text in texts(report_svg(report(workload=LONG_NAME))) if " on NVIDIA" in text]
    assert title.startswith("…")
    assert title.endswith("train.py:make?depth=12 on NVIDIA A100-SXM4-40GB, emulated")


@pytest.mark.parametrize(("name", "message"), [
    ("plot.jpg", r"has the suffix '.jpg': end it in .png, .svg or .pdf"),
    ("plot", r"has no suffix: end it in .png, .svg or .pdf"),
    ("missing/plot.png", r"there is no folder '.*missing'"),
    ("folder.svg", r"is a folder"),
    (f"{'n' * 300}.svg", r"File name too long"),
])  # fmt: skip
def test_path_is_refused_early(tmp_path: Path, name: str, message: str) -> None:
    """What could not be written is refused in one line, by the check and by drawing."""
    (tmp_path / "folder.svg").mkdir()
    for call in (check_plot_path, lambda path: draw_report(report(), path)):
        with pytest.raises(UsageError, match=message) as caught:
            call(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["folder.svg"]


def test_good_path_is_accepted_and_not_made(tmp_path: Path) -> None:
    """The check leaves nothing behind."""
    for name in ("plot.png", "plot.SVG", f"{'n' * 251}.pdf"):
        check_plot_path(str(tmp_path / name))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_files() -> Iterator[None]:
    """Let this process write no file beyond 1 KiB, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
def test_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """When writing ends midway the old file is whole, nothing is left beside it, and the error is one line."""
    file = tmp_path / "plot.svg"
    file.write_text("old")
    with pytest.raises(UsageError, match=r"plot\.svg' cannot be written: File too large"):
        draw_report(report(), file)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


class BrokenTrials:
    """Trials that can be read for a while: the renderer breaks midway."""

    reads = 0

    def __iter__(self) -> Iterator[Trial]:
        self.reads += 1
        if self.reads > 6:
            raise RuntimeError("broken midway")
        return iter(MIXED)


def settings() -> dict[str, object]:
    """Matplotlib's settings, but for the backend, which is chosen when it is read."""
    import matplotlib as mpl

    return {name: mpl.rcParams[name] for name in mpl.rcParams if name != "backend"}


def test_broken_renderer_leaves_the_old_file_and_the_settings(tmp_path: Path) -> None:
    """An error while drawing changes neither the file nor matplotlib's settings."""
    file = tmp_path / "plot.png"
    file.write_text("old")
    broken = report()
    object.__setattr__(broken, "trials", BrokenTrials())
    before = settings()
    with pytest.raises(RuntimeError, match="broken midway"):
        draw_report(broken, file)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
    assert settings() == before


def test_link_is_followed(tmp_path: Path) -> None:
    """A symbolic link stays one, and what it names is replaced."""
    (tmp_path / "kept").mkdir()
    link = tmp_path / "plot.svg"
    link.symlink_to(tmp_path / "kept" / "real")
    draw_report(report(), link)
    assert link.is_symlink()
    assert (tmp_path / "kept" / "real").read_text().startswith("<svg")


def test_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without matplotlib every entry says in one line what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    calls = (
        lambda: check_plot_path(tmp_path / "plot.png"),
        lambda: draw_report(report(), tmp_path / "plot.png"),
        lambda: report_svg(report()),
    )
    for call in calls:
        with pytest.raises(
            UnavailableError, match=re.escape("plots need matplotlib: pip install '.[plot]' in autobatch's own folder")
        ):
            call()


def test_threads_do_not_disturb_one_another() -> None:
    """Drawn from several threads at once, as a server does, each picture is the same, and the settings are put back."""
    before, expected = settings(), report_svg(report())
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: report_svg(report()), range(8))) == {expected}
    assert settings() == before


def test_report_without_trials_is_drawn() -> None:
    """A report that lists no trial still has its card, its budget and its maximum."""
    found = texts(report_svg(report(trials=())))
    assert {
        "max 37",
        "38 failed",
        "budget 38.6 GiB",
        "37 ran and fitted, two micro-batches per optimizer step.",
    } <= set(found)


def test_neither_pyplot_nor_settings_of_the_process() -> None:
    """Importing the module loads no matplotlib; drawing loads no pyplot, and the user's settings neither show nor change."""
    script = """
import sys
from autobatch.present.plot import report_svg
from autobatch.report import Report
assert "matplotlib" not in sys.modules
import matplotlib
report = Report.from_json(sys.stdin.read())
plain = report_svg(report)
matplotlib.rcParams.update({"lines.linewidth": 9, "font.size": 30, "axes.grid": True, "svg.fonttype": "path"})
names = set(matplotlib.rcParams) - {"backend"}  # which is chosen when it is read
before = {name: matplotlib.rcParams[name] for name in names}
assert report_svg(report) == plain
assert {name: matplotlib.rcParams[name] for name in names} == before
assert "matplotlib.pyplot" not in sys.modules
print("as it was")
"""
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, input=report().to_json(), text=True, capture_output=True, check=False)
    assert done.stdout == "as it was\n", done.stderr


def luminance(colour: str) -> float:
    """Relative luminance of sRGB, 0 to 1 (WCAG 2.2)."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("name", THEMES)
def test_outcomes_differ_in_grey(name: str) -> None:
    """Printed in grey, any two outcomes are at least 8 units of CIE lightness (of 100) apart."""
    lightness = sorted(116 * luminance(colour) ** (1 / 3) - 16 for colour in themes.THEMES[name].outcomes.values())
    assert len(lightness) == len(Outcome)
    assert min(after - before for before, after in itertools.pairwise(lightness)) >= 8


@pytest.mark.parametrize("name", THEMES)
def test_contrast_is_enough(name: str) -> None:
    """Shapes stand out from the ground by 3:1, and by that from every band; text by 4.5:1 (WCAG 2.2, 1.4.11 and 1.4.3)."""
    theme = themes.THEMES[name]
    for colour in theme.outcomes.values():
        assert contrast(colour, theme.background) >= 3
    # The points that may lie on bands: over the budget, or out of memory with its line.
    for outcome in (OOM, OVER):
        assert contrast(theme.outcomes[outcome], theme.headroom) >= 3, outcome
    for colour in (theme.ink, theme.muted, theme.outcomes[OOM]):
        assert contrast(colour, theme.background) >= 4.5
