"""`autobatch probe`: find the micro-batch and print the plan."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autobatch.cli.flags import add_option_flags, options_from
from autobatch.cli.output import error_console, say, write_plan, write_text, write_view
from autobatch.errors import NoGpuError, UsageError
from autobatch.present.formats import FORMATS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping

    from autobatch.emulator.machine import EmulatedMachine
    from autobatch.options import ProbeOptions
    from autobatch.report import Report

__all__ = ["DEFAULT_CARD", "DEFAULT_WORKLOAD", "add_commands"]

DEFAULT_WORKLOAD = "gpt2"
"""What is probed where neither the command line nor a pyproject.toml names a training job."""
DEFAULT_CARD = "A100-SXM4-40GB"
"""The card that is emulated, unasked, on a machine without a GPU."""

_DESCRIPTION = """\
Find the largest micro-batch that trains, and print the plan that hits the target. WORKLOAD is a built-in (gpt2,
resnet50, vit), module:factory or path/to/file.py:factory, with parameters as gpt2?seq_len=512&layers=24; without one, the
workload in [tool.autobatch] of ./pyproject.toml, else gpt2."""


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "probe", help="find the micro-batch, print the plan", description=_DESCRIPTION, allow_abbrev=False
    )
    parser.add_argument("workload", nargs="?", metavar="WORKLOAD", help="the training job")
    add_option_flags(parser)
    parser.add_argument("--format", choices=FORMATS, default="table", help="how the plan is printed (default table)")
    parser.add_argument("--verbose", action="store_true", help="show what the training job prints, and tracebacks")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Run the probe that the command line asks for."""
    from autobatch.isolation import IsolatedTrials
    from autobatch.present.progress import ProgressLines
    from autobatch.probing import conduct_probe, nothing_fits

    if parsed.command is not None:
        raise UsageError("a training command after -- is not supported yet: name a workload, such as train.py:job")
    settings = _read_settings(Path("pyproject.toml"))
    workload = str(parsed.workload or settings.get("workload") or DEFAULT_WORKLOAD)
    asked = options_from(parsed, settings)
    _check_workload(workload)
    # Before the first trial, and before torch is imported: whether the target can be hit at all.
    asked.make_plan(asked.ceiling)
    options = _choose_card(
        asked,
        may_emulate=not hasattr(parsed, "device") and "device" not in settings and parsed.format in {"table", "json"},
    )
    _check_card(options)

    with contextlib.ExitStack() as stack:
        machine = stack.enter_context(_emulated_machine(options)) if options.emulate else None
        progress = stack.enter_context(ProgressLines(error_console(), live=not parsed.verbose))
        trials = stack.enter_context(
            IsolatedTrials(
                workload,
                options,
                environment=machine.environment() if machine else os.environ,
                machine=machine,
                show_output=parsed.verbose,
            )
        )
        report = conduct_probe(trials, options, workload=workload, progress=progress)
    _print(report, parsed.format)
    if report.plan is None:
        raise nothing_fits(report)
    return 0


def _check_workload(workload: str) -> None:
    from autobatch.workload.loader import WorkloadName

    WorkloadName.parse(workload)


def _read_settings(path: Path) -> Mapping[str, object]:
    """The `[tool.autobatch]` table of a pyproject.toml; empty where there is none."""
    import dataclasses
    import tomllib

    from autobatch.options import ProbeOptions

    try:
        Path.cwd()
    except FileNotFoundError:
        raise UsageError("the current folder is gone: change to one that is there") from None
    if not path.is_file():
        return {}
    try:
        tools = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    table = tools.get("autobatch", {}) if isinstance(tools, dict) else {}
    if not isinstance(table, dict):
        raise UsageError(
            f"{path}: tool.autobatch is {table!r}: write a table, [tool.autobatch], with target = 256 in it"
        )
    settings = {str(key).replace("-", "_"): value for key, value in table.items()}
    known = {"workload", *(field.name for field in dataclasses.fields(ProbeOptions))}
    if unknown := sorted(set(settings) - known):
        raise UsageError(f"[tool.autobatch] of {path} has {', '.join(unknown)}: it takes {', '.join(sorted(known))}")
    if not isinstance(settings.get("workload", ""), str):
        raise UsageError(
            f"[tool.autobatch] of {path}: workload is {settings['workload']!r}: write a name, such as 'gpt2'"
        )
    return settings


def _choose_card(options: ProbeOptions, *, may_emulate: bool) -> ProbeOptions:
    """Decide between a real card and an emulated one, which is used unasked only where no figure can be mistaken."""
    import dataclasses

    from autobatch.gpu.opening import parse_ordinal
    from autobatch.gpu.presence import find_presence

    ordinal = parse_ordinal(options.device)
    if options.emulate is not None:
        if ordinal:
            raise UsageError(f"--emulate {options.emulate} makes one card, cuda:0: leave --device {options.device} out")
        return options
    presence = find_presence()
    if presence.usable:
        return options
    if presence.any_sign or not may_emulate:
        raise NoGpuError(
            f"{presence.problem}: --emulate GPU answers for a card that is not here, `autobatch emulate GPU -- COMMAND` "
            "runs a program on one, `autobatch doctor` looks closer"
        )
    chosen = dataclasses.replace(options, emulate=DEFAULT_CARD)
    _check_card(chosen)
    say(
        f"no NVIDIA GPU on this machine: emulating an {DEFAULT_CARD} (choose another with --emulate; "
        "`autobatch gpus` lists them)"
    )
    return chosen


def _check_card(options: ProbeOptions) -> None:
    """Refuse what an emulated card cannot answer, before anything is started."""
    from autobatch.gpu.catalogue import find_card

    if options.emulate is None:
        return
    card = find_card(options.emulate)
    options.headroom_bytes(card.nvml_total_bytes)
    if options.objective == "throughput":
        raise UsageError("--objective throughput needs a real GPU: an emulated one knows no time; use max or plan")


@contextlib.contextmanager
def _emulated_machine(options: ProbeOptions) -> Iterator[EmulatedMachine]:
    from autobatch.emulator.launch import open_machine
    from autobatch.gpu.opening import check_torch_build

    check_torch_build()
    with open_machine((options.emulate or DEFAULT_CARD,), tenant_bytes=options.tenant_bytes) as machine:
        yield machine


def _print(report: Report, form: str) -> None:
    if form == "json":
        write_text(report.to_json(indent=2))
    elif form == "table":
        from autobatch.present.tables import report_view

        write_view(report_view(report))
    elif report.plan is not None:
        write_plan(report.plan, form)
