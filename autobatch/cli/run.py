"""`autobatch run`: probe a training command, then start it for real with the plan in place."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autobatch.cli.flags import add_option_flags, options_from
from autobatch.cli.output import say
from autobatch.cli.probe import Subject, add_command_flags, choose_card
from autobatch.cli.settings import read_settings
from autobatch.cli.started import run_to_end
from autobatch.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    from autobatch.plan import Plan
    from autobatch.report import Report

__all__ = ["add_commands"]

_DESCRIPTION = """\
Probe COMMAND as `autobatch probe` does, then start it with the plan in its places: {micro_batch_size}, {accumulation_steps},
{target} and {world_size} among its arguments, the same in AUTOBATCH_MICRO_BATCH_SIZE and so on, and in the files of --set.
What the command prints and its exit status are its own."""


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "run",
        help="probe a training command, then start it with the plan",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_option_flags(parser)
    add_command_flags(parser)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Probe, then run the command to its end; returns its status."""
    from autobatch.probing import nothing_fits

    if not parsed.command:
        raise UsageError("no command: write autobatch run --target N -- COMMAND")
    settings = read_settings(Path("pyproject.toml"))
    parsed.workload = None
    parsed.verbose = getattr(parsed, "verbose", settings.verbose or False)
    subject = Subject.read(parsed, settings)
    asked = options_from(parsed, settings.options)
    if parsed.sizes is not None:
        raise UsageError(f"--sizes {parsed.sizes} gives a plan for each length, and run trains by one: probe with it")
    subject.check(asked)
    if asked.emulate is not None:
        raise UsageError(
            f"--emulate {asked.emulate} measures a card that is not here, and run trains: probe with it, and run where the "
            f"card is (`autobatch emulate {asked.emulate} -- autobatch run …` trains on an emulated card, which computes nothing)"
        )
    options = choose_card(asked, may_emulate=False)
    report = subject.probe(options, verbose=parsed.verbose)
    if report.plan is None:
        raise nothing_fits(report)
    for warning in report.warnings:
        say(f"note: {warning}")
    return _start(subject, report, report.plan)


def _start(subject: Subject, report: Report, plan: Plan) -> int:
    """Run the command with a plan, as if it had been started by hand."""
    import os

    from autobatch.command.launching import temporary_folder
    from autobatch.command.template import CommandTemplate, CommandValues
    from autobatch.command.training import WatchedTraining

    values = CommandValues(
        micro_batch_size=plan.micro_batch_size,
        accumulation_steps=plan.accumulation_steps,
        target=plan.target,
        world_size=plan.world_size,
    )
    say(
        f"starting the command with micro-batch {plan.micro_batch_size} and {plan.accumulation_steps} accumulation steps: "
        f"effective batch size {plan.effective_batch_size}"
    )
    with temporary_folder() as folder, WatchedTraining(Path(folder)) as training:
        rendered = CommandTemplate.parse(subject.command or (), subject.edits).render(values, Path(folder))
        variables = {**os.environ, **rendered.environment}
        if subject.cache == "off":
            return run_to_end(rendered.arguments, variables)
        status = run_to_end(rendered.arguments, training.environment(variables))
        if status and training.ran_out_of_memory():
            _remember(report, plan)
    return status


def _remember(report: Report, plan: Plan) -> None:
    """Let the cache know that the plan did not hold."""
    from autobatch.cache.consultation import remember_out_of_memory

    try:
        remembered = remember_out_of_memory(report)
    except UnavailableError as error:
        say(f"the training ran out of memory with micro-batch {plan.micro_batch_size}, but {error}")
        return
    if remembered:
        say(
            f"the training ran out of memory with micro-batch {plan.micro_batch_size}: the next plan for it will take less "
            "(`autobatch cache clear` forgets that, as where another program had taken the memory)"
        )
