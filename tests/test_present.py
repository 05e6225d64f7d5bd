"""What people read: tables and progress that fit a terminal, with the figures that they are for."""

from __future__ import annotations

import dataclasses
import io
import re

import pytest
from rich.console import Console, RenderableType

from autobatch.cli.output import write_view
from autobatch.doctor import Finding
from autobatch.facts import DeviceFacts
from autobatch.gpu.catalogue import load_catalogue
from autobatch.gpu.presence import Presence, PresentCard
from autobatch.options import ProbeOptions
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
    options = ProbeOptions(target=256, split="balanced")
    whole = Report(
        basis="emulated",
        workload=MARKUP,
        fingerprint="0" * 16,
        plan=options.make_plan(37),
        objective="max",
        measured_at="2026-11-20T11:00:00Z",
        micro_batches_per_step=2,
        max_micro_batch_size=37,
        smallest_failing=38,
        ceiling_reached=False,
        monotone=True,
        device=DEVICE,
        memory=MEMORY,
        trials=TRIALS,
        versions=Versions(autobatch="0", torch="2", cuda="13"),
        options=options,
        certified=True,
        not_modelled=("NCCL buffers [all]",),
        expected_error="peak memory within about 0.4 %",
    )
    return dataclasses.replace(whole, **changes)  # type: ignore[arg-type]  # the caller names fields


def rendered(view: RenderableType, width: int) -> str:
    page = io.StringIO()
    Console(file=page, width=width, color_system=None).print(view)
    return page.getvalue()


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
    assert re.search(r"micro-batch size +37 ", text)
    assert re.search(r"accumulation steps +7 ", text)
    assert "4 × 37 + 3 × 36, exact" in text
    assert re.search(r"largest micro-batch +37 +ran and fitted; 38 ran and did not", text)
    assert "other tenants unknown" in text
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
