"""`autobatch probe`: find the micro-batch and print the plan."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autobatch.cli.flags import add_format_flag, add_option_flags, options_from
from autobatch.cli.output import error_console, say, write_plan, write_text, write_view
from autobatch.cli.settings import read_settings
from autobatch.errors import NoGpuError, PlanError, UsageError
from autobatch.present.formats import check_form

if TYPE_CHECKING:
    from collections.abc import Iterator

    from autobatch.emulator.machine import EmulatedMachine
    from autobatch.options import ProbeOptions
    from autobatch.plan import Plan
    from autobatch.report import Report

__all__ = ["DEFAULT_CARD", "DEFAULT_WORKLOAD", "add_commands"]

DEFAULT_WORKLOAD = "gpt2"
"""What is probed where neither the command line nor a pyproject.toml names a training job."""
DEFAULT_CARD = "A100-SXM4-40GB"
"""The card that is emulated, unasked, on a machine without a GPU."""

_DESCRIPTION = """\
Find the largest micro-batch that trains, and print the plan that hits the target. WORKLOAD is a built-in (gpt2,
resnet50, vit), module:factory or path/to/file.py:factory, with parameters as gpt2?seq_len=512&layers=24; without one, the
workload in [tool.autobatch] of ./pyproject.toml, else gpt2. Every option can stand in that table too; a flag wins."""


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "probe", help="find the micro-batch, print the plan", description=_DESCRIPTION, allow_abbrev=False
    )
    parser.add_argument("workload", nargs="?", metavar="WORKLOAD", help="the training job")
    add_option_flags(parser)
    add_format_flag(parser)
    parser.add_argument(
        "--verbose",
        action="store_true",
        default=argparse.SUPPRESS,  # so that a file's setting shows through
        help="show what the training job prints, and tracebacks",
    )
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Run the probe that the command line asks for."""
    from autobatch.isolation import IsolatedTrials
    from autobatch.present.progress import ProgressLines
    from autobatch.probing import conduct_probe, nothing_fits

    if parsed.command is not None:
        raise UsageError("a training command after -- is not supported yet: name a workload, such as train.py:job")
    settings = read_settings(Path("pyproject.toml"))
    workload = parsed.workload or settings.workload or DEFAULT_WORKLOAD
    form = getattr(parsed, "format", None) or settings.form or "table"
    # Kept where what shows errors finds it too.
    parsed.verbose = getattr(parsed, "verbose", settings.verbose or False)
    asked = options_from(parsed, settings.options)
    _check_workload(workload)
    # Before the first trial, and before torch is imported: whether the target can be hit at all.
    asked.make_plan(asked.ceiling)
    check_form(asked, form)
    options = _choose_card(
        asked,
        may_emulate=not hasattr(parsed, "device") and "device" not in settings.options and form in {"table", "json"},
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
    _print(report, form)
    if report.plan is None:
        raise nothing_fits(report)
    return 0


def _check_workload(workload: str) -> None:
    from autobatch.workload.loader import WorkloadName

    WorkloadName.parse(workload)


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
        notes = [*report.warnings, *([f"emulated: {report.expected_error}"] if report.basis == "emulated" else [])]
        try:
            write_plan(report.plan, form, basis=report.basis, notes=notes)
        except PlanError as error:
            raise PlanError(f"{error}; without a new probe: {_plan_command(report.plan, report.options)}") from None


def _plan_command(plan: Plan, options: ProbeOptions) -> str:
    """The command that prints this plan again: its largest size gives the same steps as the largest that fitted."""
    # Also what is the default: a pyproject.toml here may say something else.
    return (
        f"autobatch plan --target {plan.target} --max-micro-batch {plan.micro_batch_size} --split {plan.split} "
        f"--world-size {plan.world_size} --multiple-of {options.multiple_of} --format json"
    )
