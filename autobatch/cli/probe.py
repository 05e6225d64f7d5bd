"""`autobatch probe`: find the micro-batch and print the plan."""

from __future__ import annotations

import argparse
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autobatch.cache.uses import CACHE_USES
from autobatch.cli.flags import add_format_flag, add_option_flags, options_from
from autobatch.cli.output import error_console, say, write_json, write_plan, write_text, write_view
from autobatch.cli.settings import read_settings
from autobatch.errors import AutobatchError, NoGpuError, PlanError, UnavailableError, UsageError
from autobatch.lengths import parse_lengths
from autobatch.present.formats import check_form

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from autobatch.alternatives import Change
    from autobatch.cache.uses import CacheUse
    from autobatch.cli.settings import Settings
    from autobatch.lengths import LengthTable
    from autobatch.options import ProbeOptions
    from autobatch.plan import Plan
    from autobatch.report import Alternative, Report
    from autobatch.reporting import ReportingService

__all__ = ["DEFAULT_CARD", "DEFAULT_WORKLOAD", "Subject", "add_command_flags", "add_commands", "choose_card"]

DEFAULT_WORKLOAD = "gpt2"
"""What is probed where neither the command line nor a pyproject.toml names a training job."""
DEFAULT_CARD = "A100-SXM4-40GB"
"""The card that is emulated, unasked, on a machine without a GPU."""

_DESCRIPTION = """\
Find the largest micro-batch that trains, and print the plan that hits the target. WORKLOAD is a built-in (gpt2,
resnet50, vit), a model of transformers (hf:CONFIG) or timm (timm:MODEL), module:factory or path/to/file.py:factory, with
parameters as gpt2?seq_len=512&layers=24; without one, the workload in [tool.autobatch] of ./pyproject.toml, else gpt2.
Every option can stand in that table too; a flag wins.

Behind -- stands any training command instead, unmodified, with {micro_batch_size} and {accumulation_steps} ({target},
{world_size}) where its arguments take them; AUTOBATCH_MICRO_BATCH_SIZE and so on say the same. It is started for each trial and
ended before it saves anything."""


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "probe",
        help="find the micro-batch, print the plan",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("workload", nargs="?", metavar="WORKLOAD", help="the training job")
    add_option_flags(parser)
    add_format_flag(parser)
    add_command_flags(parser)
    parser.add_argument(
        "--plot", metavar="FILE", help="draw size against memory into a .png, .svg or .pdf (needs matplotlib)"
    )
    parser.add_argument(
        "--plot-throughput",
        metavar="FILE",
        help="draw samples per second against size, with the noise (needs matplotlib; with --objective throughput)",
    )
    parser.add_argument("--chart", action="store_true", help="draw size against memory into the terminal too")
    parser.add_argument(
        "--report",
        metavar="FILE.html",
        help="write all of it as one page: plan, curve, what the memory is made of, ways to a larger size (needs matplotlib)",
    )
    parser.add_argument(
        "--breakdown",
        action="store_true",
        help="run one trial more and show what the memory at the plan's size is made of",
    )
    parser.add_argument(
        "--what-if",
        action="append",
        default=[],
        metavar="CHANGE",
        help="probe again with one thing changed: expandable_segments, an option (headroom=0), a parameter of the workload "
        "(checkpointing=true); may be given several times",
    )
    parser.add_argument(
        "--plan-file",
        metavar="FILE",
        help="write the report as JSON, for autobatch.plan_from_env() where AUTOBATCH_PLAN_FILE names it",
    )
    parser.add_argument(
        "--report-to", metavar="URL", help="send the result to the service there; a token comes from AUTOBATCH_TOKEN"
    )
    parser.add_argument(
        "--report-as", metavar="NAME", help="what the service calls the training job, where its name here is another"
    )
    parser.set_defaults(run=run)


def add_command_flags(parser: argparse.ArgumentParser) -> None:
    """Add what is the same for all that probe: what is shown, what is remembered, and the command behind --."""
    parser.add_argument(
        "--verbose",
        action="store_true",
        default=argparse.SUPPRESS,  # so that a file's setting shows through
        help="show what the training job prints, and tracebacks",
    )
    parser.add_argument(
        "--cache",
        choices=CACHE_USES,
        default=argparse.SUPPRESS,
        help="what earlier probes measured: confirm it by one trial (the default), trust it where nothing changed, or neither "
        "read nor keep it",
    )
    parser.add_argument(
        "--no-cache", dest="cache", action="store_const", const="off", default=argparse.SUPPRESS, help="--cache off"
    )
    parser.add_argument(
        "--sizes",
        metavar="LENGTHS",
        help="a micro-batch for each sequence length, through {seq_len}: 128,256,512 or 128-1024:128",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FILE:KEY=VALUE",
        help="set a key in a copy of a JSON, YAML or TOML file of the command's, such as c.yaml:train.batch={micro_batch_size}",
    )


def run(parsed: argparse.Namespace) -> int:
    """Run the probe that the command line asks for."""
    from autobatch.probing import nothing_fits

    settings = read_settings(Path("pyproject.toml"))
    subject = Subject.read(parsed, settings)
    form = getattr(parsed, "format", None) or settings.form or "table"
    # Kept where what shows errors finds it too.
    parsed.verbose = getattr(parsed, "verbose", settings.verbose or False)
    asked = options_from(parsed, settings.options)
    # Before the first trial, and before torch is imported: whether the target can be hit at all.
    subject.check(asked)
    subject.check_outlets(parsed, form)
    check_form(asked, form)
    named_a_device = hasattr(parsed, "device") or "device" in settings.options
    takes_default = not named_a_device and form in {"table", "json"} and parsed.report_to is None
    options = choose_card(asked, may_emulate=takes_default and subject.command is None)
    _check_card(options)
    if parsed.plot_throughput is not None and options.emulate is not None:
        raise UsageError(f"--plot-throughput needs times, and the emulated {options.emulate} has none: leave it out")
    outlets = _Outlets.open(parsed, subject)
    changes = subject.changes(parsed.what_if, options)
    if subject.lengths:
        return _probe_lengths(subject, options, form, verbose=parsed.verbose)
    breakdown = parsed.breakdown or outlets.page is not None
    report = subject.probe(options, verbose=parsed.verbose, breakdown=breakdown)
    # Files first: whatever becomes of what comes after, they are there.
    problem = outlets.write(report, is_last=not changes)
    try:
        if changes:
            alternatives = subject.alternatives(changes, options, verbose=parsed.verbose)
            report = dataclasses.replace(report, alternatives=alternatives)
            problem = outlets.write(report, is_last=True)
    finally:  # also where it was interrupted: the answer itself stands
        _print(report, form)
        if parsed.chart:
            _show_chart(report, form)
    outlets.send(report)
    if report.plan is None:
        raise nothing_fits(report)
    if problem is not None:
        raise problem
    return 0


def _show_chart(report: Report, form: str) -> None:
    """Draw the chart where people read: below the table, or beside what a program reads."""
    from autobatch.present.chart import chart_view

    if form == "table":
        write_text("")
        write_view(chart_view(report))
    else:
        error_console().print(chart_view(report))


def _probe_lengths(subject: Subject, options: ProbeOptions, form: str, *, verbose: bool) -> int:
    """Probe at each length and print the table of them."""
    from autobatch.probing import nothing_fits

    table = subject.probe_lengths(options, verbose=verbose)
    if form == "json":
        from autobatch.jsonform import to_json_form

        write_json(to_json_form(table))
    else:
        from autobatch.present.tables import lengths_view

        write_view(lengths_view(table))
    for entry in table.entries:
        if entry.report.plan is None:
            raise nothing_fits(entry.report)
    return 0


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is probed: a workload, or a command."""

    workload: str
    """The workload's name; the command's words where one is probed."""
    command: tuple[str, ...] | None
    edits: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    """Sequence lengths to probe at, where they are told apart."""
    cache: CacheUse = "confirm"
    """What the cache is for."""

    @classmethod
    def read(cls, parsed: argparse.Namespace, settings: Settings) -> Subject:
        """Read the command line, and check what can be checked before anything is started."""
        lengths = () if parsed.sizes is None else parse_lengths(parsed.sizes)
        cache = getattr(parsed, "cache", settings.cache or "confirm")
        if parsed.command is None:
            if parsed.set:
                raise UsageError(
                    f"--set {parsed.set[0]} edits a file of a training command: write the command behind --"
                )
            workload = parsed.workload or settings.workload or DEFAULT_WORKLOAD
            return cls(workload=workload, command=None, lengths=lengths, cache=cache)
        if parsed.workload is not None:
            raise UsageError(f"both the workload {parsed.workload} and a command behind -- are named: choose one")
        from autobatch.command.template import CommandTemplate

        template = CommandTemplate.parse(parsed.command, parsed.set)
        return cls(
            workload=template.text,
            command=template.arguments,
            edits=tuple(parsed.set),
            lengths=lengths,
            cache=cache,
        )

    def check(self, options: ProbeOptions) -> None:
        """Refuse what cannot be probed, or not with these options."""
        from autobatch.child_probe import check_job

        check_job(self.job, options, edits=self.edits, lengths=self.lengths)

    @property
    def job(self) -> str | tuple[str, ...]:
        """The workload's name, or the command."""
        return self.workload if self.command is None else self.command

    @property
    def starting(self) -> str:
        """What is said until the device is known: a command's comes with its first trial."""
        if self.cache == "trust":
            return "looking at what is remembered …"
        return "starting torch …" if self.command is None else "running the command once to see its device …"

    def check_outlets(self, parsed: argparse.Namespace, form: str) -> None:
        """Refuse what a table of lengths cannot be written to."""
        asked = {
            "--format " + form: form not in {"table", "json"},
            "--plot": parsed.plot,
            "--plot-throughput": parsed.plot_throughput,
            "--chart": parsed.chart,
            "--report": parsed.report,
            "--breakdown": parsed.breakdown,
            "--what-if": parsed.what_if,
            "--plan-file": parsed.plan_file,
            "--report-to": parsed.report_to,
        }
        if self.lengths and (wrong := next((name for name, given in asked.items() if given), None)):
            raise UsageError(f"{wrong} takes one report, and --sizes gives one for each length: take --format json")

    def probe(self, options: ProbeOptions, *, verbose: bool, breakdown: bool = False) -> Report:
        """Run the probe, with its progress on standard error."""
        from autobatch.child_probe import probe_command, probe_workload
        from autobatch.present.progress import ProgressLines

        with ProgressLines(error_console(), live=not verbose, starting=self.starting) as progress:
            if self.command is None:
                return probe_workload(
                    self.workload,
                    progress=progress,
                    show_output=verbose,
                    cache=self.cache,
                    breakdown=breakdown,
                    **vars(options),
                )
            return probe_command(
                self.command,
                edits=self.edits,
                progress=progress,
                show_output=verbose,
                cache=self.cache,
                breakdown=breakdown,
                **vars(options),
            )

    def changes(self, texts: Sequence[str], options: ProbeOptions) -> Sequence[Change]:
        """Read what is to be changed, and refuse what cannot be probed."""
        if not texts:
            return ()
        from autobatch.alternatives import check_changes, parse_change

        changes = [parse_change(text) for text in texts]
        check_changes(self.job, changes, options, edits=self.edits)
        return changes

    def alternatives(
        self, changes: Sequence[Change], options: ProbeOptions, *, verbose: bool
    ) -> tuple[Alternative, ...]:
        """Probe once for each change, with the progress of each on standard error."""
        from autobatch.alternatives import try_alternatives
        from autobatch.present.progress import ProgressLines

        with ProgressLines(error_console(), live=not verbose, starting=self.starting) as progress:
            return try_alternatives(
                self.job,
                changes,
                options,
                edits=self.edits,
                started=lambda change: say(f"what if {change.text}"),
                progress=progress,
                show_output=verbose,
                cache=self.cache,
            )

    def probe_lengths(self, options: ProbeOptions, *, verbose: bool) -> LengthTable:
        """Probe at each length, with the progress of each on standard error."""
        from autobatch.child_probe import probe_lengths
        from autobatch.present.progress import ProgressLines

        with ProgressLines(error_console(), live=not verbose, starting=self.starting) as progress:
            return probe_lengths(
                self.job,
                self.lengths,
                edits=self.edits,
                progress=progress,
                length_started=lambda length: say(f"sequence length {length}"),
                show_output=verbose,
                cache=self.cache,
                **vars(options),
            )


@dataclass(frozen=True, kw_only=True)
class _Outlets:
    """Where a report goes besides standard output."""

    plot: Path | None
    throughput: Path | None
    page: Path | None
    plan_file: Path | None
    service: ReportingService | None
    reported_as: str

    @classmethod
    def open(cls, parsed: argparse.Namespace, subject: Subject) -> _Outlets:
        """See, before a probe of minutes, that each can be written to."""
        service, name = None, _name_at_service(parsed.report_as, subject)
        if parsed.report_to is not None and subject.command is not None and parsed.report_as is None:
            raise UsageError("a command has no name at the service: give --report-as NAME too")
        for path in filter(None, (parsed.plot, parsed.plot_throughput)):
            from autobatch.present.plot import check_plot_path

            check_plot_path(path)
        if parsed.report is not None:
            from autobatch.present.page import check_page_path

            check_page_path(parsed.report)
        plan_file = None if parsed.plan_file is None else Path(parsed.plan_file)
        if plan_file is not None and not plan_file.absolute().parent.is_dir():
            raise UsageError(
                f"cannot write the plan file {plan_file}: there is no folder {plan_file.absolute().parent}"
            )
        if parsed.report_to is not None:
            from autobatch.reporting import ReportingService

            service = ReportingService(url=parsed.report_to, token=os.environ.get("AUTOBATCH_TOKEN") or None)
            service.check(name)
        elif parsed.report_as is not None:
            raise UsageError(f"--report-as {parsed.report_as} names a workload for --report-to URL, which is missing")
        plot, throughput, page = (
            None if path is None else Path(path) for path in (parsed.plot, parsed.plot_throughput, parsed.report)
        )
        return cls(plot=plot, throughput=throughput, page=page, plan_file=plan_file, service=service, reported_as=name)

    def write(self, report: Report, *, is_last: bool) -> AutobatchError | None:
        """Write every file, each whatever becomes of the others.

        Args:
            report: what was found.
            is_last: whether nothing more is to come, so that it is said.

        Returns:
            The first problem; those that may not come to be raised are said.
        """
        problems: list[AutobatchError] = []
        for what, path, writer in self._files():
            try:
                writer(report, path)
            except AutobatchError as error:
                problems.append(error)
            else:
                if is_last:
                    say(f"{what} written to {path}")
        # The first ends the command, unless something weightier does.
        for other in problems if report.plan is None or self.service is not None else problems[1:]:
            say(str(other))
        return problems[0] if problems else None

    def _files(self) -> Iterator[tuple[str, Path, Callable[[Report, Path], None]]]:
        """What is written where, and by what."""
        if self.plan_file is not None:
            from autobatch.handover import write_plan_file

            yield "plan", self.plan_file, write_plan_file
        if self.plot is not None:
            from autobatch.present.plot import draw_report

            yield "plot", self.plot, draw_report
        if self.throughput is not None:
            from autobatch.present.plot import draw_throughput

            yield "plot", self.throughput, draw_throughput
        if self.page is not None:
            from autobatch.present.page import write_page

            yield "report", self.page, write_page

    def send(self, report: Report) -> None:
        """Send what was found to the service."""
        if self.service is None:
            return
        try:
            measurement = self.service.send(report, workload=self.reported_as)
        except UnavailableError as error:
            raise UnavailableError(f"{error}; nothing is lost: {_keep(report, self.reported_as)}") from None
        say(f"reported to {self.service.url} as {measurement}")


def _name_at_service(given: str | None, subject: Subject) -> str:
    """What the service calls the job: the name given, with the parameters that the job runs with here."""
    if given is None:
        return subject.workload
    query = "" if subject.command else subject.workload.partition("?")[2]
    return f"{given}?{query}" if query and "?" not in given else given


def _keep(report: Report, workload: str) -> str:
    """Write what could not be sent to a file, and say how to send it."""
    import json
    import tempfile

    body = json.dumps({"report": report.to_dict(), "workload": workload})
    with tempfile.NamedTemporaryFile("w", prefix="autobatch-report-", suffix=".json", delete=False) as file:
        file.write(body)
    return f"POST {file.name} to /v1/measurements later (curl --json @{file.name} URL/v1/measurements)"


def choose_card(options: ProbeOptions, *, may_emulate: bool) -> ProbeOptions:
    """Decide between a real card and an emulated one, which is used unasked only where no figure can be mistaken."""
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
    from autobatch.emulator.machine import check_tenant
    from autobatch.gpu.catalogue import find_card

    if options.emulate is None:
        return
    card = find_card(options.emulate)
    options.headroom_bytes(card.nvml_total_bytes)
    check_tenant(card, options.tenant_bytes)
    if options.objective == "throughput":
        raise UsageError("--objective throughput needs a real GPU: an emulated one knows no time; use max or plan")


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
