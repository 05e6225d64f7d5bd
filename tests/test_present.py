"""What people read: tables and progress that fit a terminal, with the figures that they are for."""

from __future__ import annotations

import dataclasses
import io
import re

import pytest
import reports
from rich.console import Console, RenderableType

from autobatch.cli.output import write_view
from autobatch.doctor import Finding
from autobatch.facts import DeviceFacts
from autobatch.gpu.catalogue import load_catalogue
from autobatch.gpu.presence import Presence, PresentCard
from autobatch.options import ProbeOptions
from autobatch.plan import Plan
from autobatch.present.inventory import cards_view, findings_view
from autobatch.present.progress import ProgressLines
from autobatch.present.tables import plan_view, report_view
from autobatch.probing import TrialEnded, TrialStarted
from autobatch.report import Device, Memory, Report, Versions
from autobatch.search import find_bracket
from autobatch.trial import Outcome, Trial

GIB = 1 << 30
MARKUP = "my[bold]job[/bold].py:job[x]"
DEVICE = Device(
    name="NVIDIA A100-SXM4-40GB [x]", uuid="GPU-1", total_bytes=40 * GIB, compute_capability="8.0", driver="550.1"
)
MEMORY = Memory(
    budget_bytes=int(38.6 * GIB), headroom_bytes=819 << 20, other_tenants_bytes=None, context_bytes=400 << 20
)


def trial(size: int, outcome: Outcome, *, confirmation: bool = False, window: tuple[int, ...] = ()) -> Trial:
    return Trial(
        micro_batch_size=size,
        outcome=outcome,
        micro_batches_per_step=2,
        window=window or (size, size),
        steps=3,
        peak_allocated_bytes=size * GIB,
        peak_reserved_bytes=size * GIB + 12345678,
        footprint_bytes=size * GIB + 423456789,
        alloc_retries=0,
        seconds_per_step=None,
        confirmation=confirmation,
        oom_request_bytes=7 * GIB if outcome is Outcome.OUT_OF_MEMORY else 0,
    )


TRIALS = (
    trial(8, Outcome.FITS),
    trial(38, Outcome.OUT_OF_MEMORY),
    trial(37, Outcome.FITS),
    trial(37, Outcome.FITS, confirmation=True, window=(37, 36)),
)


def report(**changes: object) -> Report:
    return reports.report(
        **{
            "workload": MARKUP,
            "device": DEVICE,
            "memory": MEMORY,
            "trials": TRIALS,
            "versions": Versions(autobatch="0", torch="2", cuda="13"),
            "not_modelled": ("NCCL buffers [all]",),
            "expected_error": "peak memory within about 0.4 %",
            **changes,
        }
    )


def rendered(view: RenderableType, width: int) -> str:
    page = io.StringIO()
    Console(file=page, width=width, color_system=None).print(view)
    return "".join(f"{line.rstrip()}\n" for line in page.getvalue().splitlines())


VIEWS = {
    "report": report_view(report()),
    "nothing fits": report_view(report(plan=None, max_micro_batch_size=None, smallest_failing=8, trials=TRIALS[1:2])),
    "timed": report_view(
        report(
            basis="measured",
            not_modelled=(),
            expected_error="",
            trials=tuple(dataclasses.replace(t, seconds_per_step=1.2345) for t in TRIALS),
        )
    ),
    "plan": plan_view(ProbeOptions(target=257).make_plan(97)),
    "cards": cards_view(
        Presence(
            usable=True,
            any_sign=True,
            problem="",
            cards=(PresentCard(name="Tesla [T4]", uuid="GPU-1", total_bytes=15 * GIB, free_bytes=14 * GIB),),
        ),
        load_catalogue(),
    ),
    "findings": findings_view(
        [Finding(what="GPU", ok=False, found="none [bold]x[/]", mend="install the driver " * 9)], can_probe=False
    ),
}


def figures(text: str, title: str) -> dict[str, str]:
    """Names and figures of one table, as they are printed."""
    lines = text[text.index(f"{title}\n") :].split("\n\n", maxsplit=1)[0].splitlines()[1:]
    rows = (re.split(r" {2,}", line.strip()) for line in lines if not line.startswith("    "))
    return {row[0]: row[1] for row in rows}


def mebibytes(figure: str) -> int:
    return int(figure.removesuffix(" MiB").replace(",", "").replace("−", "-"))


A100 = dataclasses.replace(DEVICE, total_bytes=40 * GIB)
T4 = dataclasses.replace(DEVICE, total_bytes=15 * GIB)
# The headroom of 2 % of 15 GiB, and a CUDA total as drivers report it, are no whole MiB.
T4_LEFT = 15_835_660_288


@pytest.mark.parametrize(
    ("device", "left", "tenants", "limit", "names"),
    [
        (A100, 42_298_834_944, 0, None, ["kept by the driver", "other tenants"]),
        (A100, 42_298_834_944 - 123_456_789, 123_456_789, None, ["kept by the driver", "other tenants"]),
        (T4, T4_LEFT, None, None, ["kept by the driver", "other tenants"]),
        (T4, T4_LEFT, 0, 15 * GIB, ["kept by the driver", "other tenants"]),
        (T4, 6_000_000_000, 3 * GIB, 6_000_000_000, ["beyond the limit"]),
        (T4, T4_LEFT - GIB, GIB, 80 * GIB, ["kept by the driver", "other tenants"]),
    ],
)
def test_the_memory_adds_up_as_it_is_printed(
    device: Device, left: int, tenants: int | None, limit: int | None, names: list[str]
) -> None:
    """The figures on the screen sum to the budget, which is the one that the trials are held against."""
    options = ProbeOptions(target=256, split="balanced", memory_limit=limit)
    headroom = options.headroom_bytes(device.total_bytes)
    budget = min(left, limit or left) - headroom
    memory = Memory(
        budget_bytes=budget, headroom_bytes=headroom, other_tenants_bytes=tenants, context_bytes=527_433_728
    )
    text = rendered(report_view(report(device=device, memory=memory, options=options)), 120)
    shown_figures = figures(text, "memory")
    assert list(shown_figures) == ["card", *names, "headroom", "budget", "CUDA context"]
    assert shown_figures.pop("CUDA context") == "503 MiB"
    *parts, total = map(mebibytes, shown_figures.values())
    assert sum(parts) == total
    exact = {"card": device.total_bytes, "headroom": -headroom, "other tenants": -(tenants or 0), "budget": budget}
    exact["kept by the driver"] = -(device.total_bytes - (tenants or 0) - headroom - budget)
    exact["beyond the limit"] = -(device.total_bytes - (limit or 0))
    for name, figure in shown_figures.items():
        assert abs(mebibytes(figure) - exact[name] / (1 << 20)) < 1, name


def test_a_limit_says_what_it_does() -> None:
    """It is what bounds the budget, or it is no less than what is there anyway; either way it is on the screen."""
    options = ProbeOptions(target=256, split="balanced", memory_limit=24 * GIB)
    memory = dataclasses.replace(MEMORY, budget_bytes=24 * GIB - MEMORY.headroom_bytes, other_tenants_bytes=3 * GIB)
    text = rendered(report_view(report(memory=memory, options=options)), 120)
    assert "--memory-limit 24 GiB; other tenants, here 3 GiB, take of this first" in text
    options = ProbeOptions(target=256, split="balanced", memory_limit=80 * GIB)
    assert "--memory-limit 80 GiB is no less" in rendered(report_view(report(options=options)), 120)


def test_ranks_that_differ_are_shown_each() -> None:
    """No rank's sizes are left to be guessed from those of rank 0, and they sum to the effective batch."""
    text = rendered(plan_view(ProbeOptions(target=250, world_size=4, split="balanced").make_plan(16)), 80)
    assert re.search(r"micro-batch sizes +16, 15 ", text)
    assert re.search(r"effective batch size +250 +over 4 ranks that differ, exact\n", text)
    assert re.search(r"ranks 0 to 1 +3 × 16 \+ 1 × 15 = 63 each\n", text)
    assert re.search(r"ranks 2 to 3 +2 × 16 \+ 2 × 15 = 62 each\n", text)
    text = rendered(plan_view(ProbeOptions(target=7, world_size=3, split="balanced").make_plan(16)), 80)
    assert re.search(r" rank 0 +1 × 3 = 3\n", text)
    assert re.search(r" ranks 1 to 2 +1 × 2 = 2 each\n", text)


def test_ranks_that_are_equal_are_shown_once() -> None:
    """A factor says it, which counts for the whole sum."""
    text = rendered(plan_view(ProbeOptions(target=512, world_size=2, split="balanced").make_plan(97)), 80)
    assert "(1 × 86 + 2 × 85) × 2 ranks, exact" in text
    assert "rank 0" not in text


def test_a_plan_of_very_many_kinds_of_rank_is_cut() -> None:
    """Such a plan is never made here, but it may be read from JSON."""
    ranks = tuple((size,) for size in range(40, 0, -1))
    plan = Plan(
        target=820, world_size=40, split="balanced", micro_batch_size=40, accumulation_steps=1, micro_batch_sizes=(40,),
        effective_batch_size=820, exact=True, rank_micro_batch_sizes=ranks,
    )  # fmt: skip
    text = rendered(plan_view(plan), 400)
    assert text.count("\n  rank ") == 8
    assert "--format json lists every rank" in text


@pytest.mark.parametrize("name", ["A100", "V100", "A100-PCIE"])
def test_no_name_is_listed_that_is_refused(name: str) -> None:
    """Whoever copies a name from the list gets that card."""
    text = rendered(VIEWS["cards"], 160)
    listed = [word for line in text[text.index("also called") :].splitlines()[1:] for word in line.split()[7:]]
    assert name not in {word.rstrip(",") for word in listed}
    assert {"H100,", "A6000,", "A100-40GB,"} <= set(listed)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_fits_its_terminal(name: str, width: int) -> None:
    """Nothing runs over the edge, and no figure is cut short; what reads like markup is only text."""
    text = rendered(VIEWS[name], width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "[/]" not in text.replace("x[/]", "")


def test_a_report_says_what_it_is_for() -> None:
    """The job, the card, the basis, the plan, the maximum with its certificate, and every trial."""
    text = rendered(VIEWS["report"], 80)
    assert text.startswith(f"{MARKUP} on NVIDIA A100-SXM4-40GB [x], emulated")
    assert re.search(r"micro-batch sizes +37, 36 ", text)
    assert re.search(r"accumulation steps +7 ", text)
    assert "4 × 37 + 3 × 36, exact" in text
    assert re.search(r"largest micro-batch +37 +ran and fitted; 38 ran and did not", text)
    assert re.search(r"other tenants +0 MiB +unknown, counted as nothing", text)
    assert re.search(r"2 × 38 +38.0 GiB +– +– +out of memory", text)
    assert re.search(r"37\+36 .* fits \(confirmation\)", text)
    assert "Not modelled: NCCL buffers [all]." in text
    assert "s/step" not in text


def test_times_are_shown_where_they_were_measured() -> None:
    """An emulated card knows no time: the column is there on a real one only."""
    text = rendered(VIEWS["timed"], 80)
    assert "s/step" in text
    assert "1.23" in text
    assert "Not modelled" not in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"smallest_failing": None, "ceiling_reached": True}, "as large as asked for"),
        ({"certified": False}, "not certified"),
        ({"certified": False, "data_dependent": ("nonzero",)}, "not certified: shapes are read from the device"),
    ],
)
def test_the_certificate_says_what_was_shown(changes: dict[str, object], words: str) -> None:
    """An answer that proves less says so beside its figure."""
    assert words in rendered(report_view(report(**changes)), 80)


def test_figures_stand_right_aligned() -> None:
    """Sizes that are compared end in one column."""
    lines = [line for line in rendered(VIEWS["report"], 80).splitlines() if "GiB" in line and "%" in line]
    assert len(lines) == 3
    assert len({line.index("%") for line in lines}) == 1


def test_a_pipe_gets_lines_without_trailing_blanks(capsys: pytest.CaptureFixture[str]) -> None:
    """What is piped into a file or a mail has no colour codes and no padding."""
    write_view(VIEWS["report"])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert all(line == line.rstrip() for line in printed.splitlines())


FACTS = DeviceFacts(
    basis="emulated", device=DEVICE, memory=MEMORY, torch_version="2.15", cuda_version="13.2", allocator_settings=""
)


def shown(width: int, **console: object) -> str:
    """The progress of a whole probe."""
    page = io.StringIO()
    with ProgressLines(Console(file=page, width=width, **console)) as progress:  # type: ignore[arg-type]  # rich's own
        progress(FACTS)
        for index, each in enumerate(TRIALS):
            before, after = find_bracket(TRIALS[:index]), find_bracket(TRIALS[: index + 1])
            progress(TrialStarted(window=each.window, confirmation=each.confirmation, bracket=before, ceiling=256))
            progress(TrialEnded(trial=each, bracket=after, seconds=12.34))
    return page.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_progress_is_a_line_for_each_trial(width: int) -> None:
    """Size, outcome, what it took, the seconds, and the bracket, in a terminal of any usual width."""
    lines = shown(width, color_system=None).splitlines()
    assert max(map(len, lines)) <= width
    assert "NVIDIA A100-SXM4-40GB [x] (emulated), torch 2.15, budget 38.6 GiB" in lines
    assert re.search(r"2 × 8  fits +8\.4 GiB \(21\.7%\) +12\.3 s   at least 8$", lines[-4])
    assert re.search(r"2 × 38  out of memory asked for 7 GiB more +12\.3 s   between 8 and 38$", lines[-3])
    assert re.search(r"37\+36  fits .* confirmed$", lines[-1])


def test_progress_keeps_to_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    """With NO_COLOR a terminal gets no colours; the words tell outcomes apart."""
    assert "\x1b[32m" in shown(80, force_terminal=True, color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[3[0-9]m", shown(80, force_terminal=True))


def test_a_live_line_is_for_terminals_alone() -> None:
    """A log gets plain lines."""
    assert "\x1b" not in shown(80)
    assert "trying 2 × 38" in shown(80, force_terminal=True, color_system=None)
