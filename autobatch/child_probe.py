"""Probe a training job by its name, or any training command, in child processes: what the command line and the service run."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from autobatch.errors import UsageError
from autobatch.options import ProbeOptions
from autobatch.probing import TrialSource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from autobatch.breakdown import MemoryBreakdown
    from autobatch.cache.consultation import Consultation
    from autobatch.cache.uses import CacheUse
    from autobatch.command.template import CommandTemplate
    from autobatch.emulator.machine import EmulatedMachine
    from autobatch.isolation import IsolatedTrials
    from autobatch.lengths import LengthTable
    from autobatch.probing import ProbeEvent
    from autobatch.report import Report

__all__ = ["CardProbes", "CardsOfOneMachine", "check_job", "probe_command", "probe_lengths", "probe_workload"]

# As many as one machine has; ranks beyond it are on other machines.
_MOST_CARDS = 8


def probe_workload(
    workload: str,
    *,
    target: int,
    progress: Callable[[ProbeEvent], None] | None = None,
    environment: Mapping[str, str] | None = None,
    show_output: bool = False,
    cache: CacheUse = "off",
    breakdown: bool = False,
    **options: Any,
) -> Report:
    """Find the largest micro-batch of a training job that trains, and plan for the target.

    The job runs in a child process, on this machine's GPU or, with `emulate`, on an emulated card. Whatever it does there,
    this process survives it; the child and all that it started are ended before the call returns or raises.

    Args:
        workload: a built-in (`gpt2`), `module:factory` or `path/to/file.py:factory`, with parameters as in `gpt2?seq_len=512`.
        target: samples per optimizer step, over all ranks.
        progress: called with each event as it comes.
        environment: the child's environment variables; this process's own where None.
        show_output: whether what the job prints goes to standard error.
        cache: `"confirm"` answers from what earlier probes of this user measured, once a single trial has come out as it did
            then; `"trust"` without any trial, where nothing is seen to have changed; `"off"` neither reads nor keeps anything.
        breakdown: whether the report says what the memory at the plan's size is made of: one trial more.
        options: further fields of `ProbeOptions`, by name.

    Returns:
        The report; its plan is None where nothing fits.

    Raises:
        UsageError: an option or the workload's name has no meaning.
        PlanError: the target cannot be hit under the split.
        WorkloadError: the job failed other than for memory, died, or took too long.
        NoGpuError: there is no GPU to measure, and none was to be emulated.
        BusyError: the deadline passed, or the GPU is taken by others.

    Example:
        >>> report = probe_workload("gpt2", target=256, emulate="L4")  # doctest: +SKIP
        >>> report.plan.micro_batch_size, report.basis  # doctest: +SKIP
        (16, 'emulated')
    """
    job = _Workload(name=workload, show_output=show_output)
    asked = _Asked.of(environment, progress, cache, breakdown=breakdown)
    return job.probe(job.options(target=target, **options), asked)


def probe_command(
    command: Sequence[str],
    *,
    target: int,
    edits: Sequence[str] = (),
    progress: Callable[[ProbeEvent], None] | None = None,
    environment: Mapping[str, str] | None = None,
    show_output: bool = False,
    cache: CacheUse = "off",
    breakdown: bool = False,
    **options: Any,
) -> Report:
    """Find the largest micro-batch with which a training command trains, and plan for the target.

    The command needs no change. Each trial runs it anew, with `{micro_batch_size}`, `{accumulation_steps}`, `{target}` and
    `{world_size}` of its arguments filled in, and the same in variables such as `AUTOBATCH_MICRO_BATCH_SIZE`. A hook inside
    counts its optimizer steps, and ends it at once when the trial has its windows: nothing of the script runs after that.

    Args:
        command: the program and its arguments.
        target: samples per optimizer step, over all ranks.
        edits: `FILE:KEY=VALUE` each, set in a copy of a JSON, YAML or TOML file that an argument names.
        progress: called with each event as it comes.
        environment: the command's environment variables; this process's own where None.
        show_output: whether what the command prints goes to standard error.
        cache: what the cache is for, as for `probe_workload`.
        breakdown: whether the report says what the memory at the plan's size is made of: one trial more.
        options: further fields of `ProbeOptions`, by name; `split="balanced"` is refused, since a command takes one size.

    Returns:
        The report; its plan is None where nothing fits.

    Raises:
        UsageError: an option has no meaning, nothing of the command depends on the size, or it cannot be started.
        PlanError: the target cannot be hit under the split.
        WorkloadError: the command failed other than for memory, made too few optimizer steps, or took too long.
        NoGpuError: there is no GPU to measure, and none was to be emulated.
        BusyError: the deadline passed, or the GPU is taken by others.

    Example:
        >>> command = ["python", "train.py", "--batch-size", "{micro_batch_size}", "--accumulate", "{accumulation_steps}"]
        >>> probe_command(command, target=256, emulate="L4").plan.micro_batch_size  # doctest: +SKIP
        32
    """
    job = _Command.parse(command, edits, show_output=show_output)
    asked = _Asked.of(environment, progress, cache, breakdown=breakdown)
    return job.probe(job.options(target=target, **options), asked)


def probe_lengths(  # noqa: PLR0913 - what each caller may choose
    job: str | Sequence[str],
    lengths: Sequence[int],
    *,
    target: int,
    edits: Sequence[str] = (),
    progress: Callable[[ProbeEvent], None] | None = None,
    length_started: Callable[[int], None] | None = None,
    environment: Mapping[str, str] | None = None,
    show_output: bool = False,
    cache: CacheUse = "off",
    **options: Any,
) -> LengthTable:
    """Find a micro-batch for each sequence length, for loaders that put sequences of like length together.

    Each length is probed by trials of its own. What fitted at others says where to begin, so that most take few trials.

    Args:
        job: a workload's name or a command, with `{seq_len}` where the length goes.
        lengths: in tokens, or whatever the job counts; at least one.
        target: samples per optimizer step, over all ranks.
        edits: as for `probe_command`.
        progress: called with each event as it comes.
        length_started: called with each length before its trials.
        environment: the child's environment variables; this process's own where None.
        show_output: whether what the job prints goes to standard error.
        cache: `"confirm"` answers from what earlier probes of this user measured, once a single trial has come out as it did
            then; `"trust"` without any trial, where nothing is seen to have changed; `"off"` neither reads nor keeps anything.
        options: further fields of `ProbeOptions`, by name.

    Returns:
        An entry for each length, shortest first.

    Raises:
        UsageError: the job has no place for the length, or as `probe_workload` and `probe_command` do.
    """
    from autobatch.lengths import LengthEntry, LengthTable, first_size, order_of_lengths

    wanted = tuple(sorted(set(lengths)))
    subject = _subject(job, edits, show_output=show_output)
    question = subject.options(target=target, lengths=wanted, **options)
    asked = _Asked.of(environment, progress, cache)
    reports: dict[int, Report] = {}
    for length in order_of_lengths(wanted):
        if length_started is not None:
            length_started(length)
        found = {one: report.max_micro_batch_size or 0 for one, report in reports.items()}
        first = first_size(length, found)
        reports[length] = subject.probe(question, asked, first=first, seq_len=length)
    return LengthTable(entries=tuple(LengthEntry(seq_len=length, report=reports[length]) for length in wanted))


def check_job(
    job: str | Sequence[str], options: ProbeOptions, *, edits: Sequence[str] = (), lengths: Sequence[int] = ()
) -> None:
    """Refuse a job, or options, that cannot be probed, before anything is started.

    Raises:
        UsageError, PlanError: as the probe itself would.
    """
    subject = _subject(job, edits, show_output=False)
    subject.options(lengths=lengths, **vars(options))


class CardProbes:
    """Probes of one job on several kinds of emulated cards."""

    def __init__(
        self,
        job: str | Sequence[str],
        *,
        edits: Sequence[str],
        environment: Mapping[str, str] | None,
        show_output: bool,
        cache: CacheUse,
        options: Mapping[str, Any],
    ) -> None:
        """Prepare the probes.

        Args:
            job: a workload's name, or a command.
            edits: as for `probe_command`.
            environment: the children's environment variables; this process's own where None.
            show_output: whether what the job prints goes to standard error.
            cache: what the cache is for.
            options: fields of `ProbeOptions` that are the same on every card, `target` among them.

        Raises:
            UsageError: the job has no meaning.
        """
        self._subject = _subject(job, edits, show_output=show_output)
        self._asked = _Asked.of(environment, None, cache)
        self._options = dict(options)
        self._children: list[IsolatedTrials] = []

    @property
    def name(self) -> str:
        """The job's name, for people."""
        return self._subject.name

    @property
    def is_command(self) -> bool:
        """Whether the job is a command, of which each trial is a process of its own."""
        return isinstance(self._subject, _Command)

    @property
    def cards_at_once(self) -> int:
        """Cards that may stand in one machine."""
        from autobatch.emulator.machine import MOST_DEVICES

        return 1 if self.is_command else MOST_DEVICES

    def options(self, gpu: str, count: int) -> ProbeOptions:
        """The question on so many cards of a kind.

        Raises:
            UsageError, PlanError: it has no meaning, or the target cannot be hit.
        """
        return self._subject.options(**self._options, emulate=gpu, world_size=count)

    def trusted(self, options: ProbeOptions) -> Report | None:
        """The answer without a trial, where the cache is trusted and has it."""
        return self._subject.consultation(options, self._asked).trusted_report(self._asked.environment)

    @contextlib.contextmanager
    def machine(self, gpus: Sequence[str]) -> Iterator[CardsOfOneMachine]:
        """A machine with these cards, to be probed one after the other."""
        if isinstance(self._subject, _Command):
            yield _OneCommand(self._subject, self._asked)
            return
        from autobatch.emulator.launch import open_machine
        from autobatch.gpu.opening import check_torch_build

        check_torch_build()
        tenant_bytes = self.options(gpus[0], 1).tenant_bytes
        with open_machine(gpus, tenant_bytes=tenant_bytes) as machine, contextlib.ExitStack() as stack:
            yield _SharedChild(self._subject, self._asked, machine, stack, self._children)

    def end_children(self) -> None:
        """End every child, from another thread than those that wait for them."""
        for child in list(self._children):
            child.end_child()


class CardsOfOneMachine(Protocol):
    """Cards that stand in one machine."""

    @property
    def is_alive(self) -> bool:
        """Whether the next of them can be probed."""

    def probe(self, index: int, options: ProbeOptions, *, first: int | None) -> Report:
        """Probe on the card of this number; raises as `probe_workload` does."""


@dataclass
class _SharedChild:
    """One child process that probes on one card after the other."""

    subject: _Workload
    asked: _Asked
    machine: EmulatedMachine
    stack: contextlib.ExitStack
    """Ends the child."""
    children: list[IsolatedTrials]
    """Where it is entered, for whoever must end it meanwhile."""
    trials: IsolatedTrials | None = None

    @property
    def is_alive(self) -> bool:
        return self.trials is None or self.trials.is_alive

    def probe(self, index: int, options: ProbeOptions, *, first: int | None) -> Report:
        import dataclasses

        from autobatch.isolation import IsolatedTrials

        # As if the card were the only one, but for where it stands.
        here = dataclasses.replace(options, emulate=None, tenant=0, device=f"cuda:{index}")
        if self.trials is None:
            trials = IsolatedTrials(
                self.subject.name,
                here,
                environment=self.machine.environment(self.asked.environment),
                machine=self.machine,
                show_output=self.subject.show_output,
            )
            self.children.append(trials)
            self.trials = self.stack.enter_context(trials)
        else:
            self.trials.move_to(here)
        consultation = self.subject.consultation(options, self.asked)
        return _conduct(self.trials, options, self.asked, consultation, workload=self.subject.name, first=first)


@dataclass(frozen=True)
class _OneCommand:
    """A command, of which each trial is a process of its own."""

    subject: _Command
    asked: _Asked
    is_alive = True

    def probe(self, index: int, options: ProbeOptions, *, first: int | None) -> Report:
        del index
        return self.subject.probe(options, self.asked, first=first)


def _subject(job: str | Sequence[str], edits: Sequence[str], *, show_output: bool) -> _Workload | _Command:
    if isinstance(job, str):
        return _Workload(name=job, show_output=show_output)
    return _Command.parse(job, edits, show_output=show_output)


@dataclass(frozen=True, kw_only=True)
class _Workload:
    """A training job by its name."""

    name: str
    show_output: bool

    def options(self, *, lengths: Sequence[int] = (), **options: Any) -> ProbeOptions:
        from autobatch.lengths import LENGTH_PLACE
        from autobatch.workload.loader import WorkloadName

        if bool(lengths) != (LENGTH_PLACE in self.name):
            raise UsageError(
                f"lengths go where {LENGTH_PLACE} stands in the job, as in 'gpt2?seq_len={LENGTH_PLACE}' --sizes 128,256: "
                f"{self.name} is given {len(lengths)}"
            )
        WorkloadName.parse(self._at(lengths[0] if lengths else None))
        return _checked(ProbeOptions(**options))

    def consultation(self, options: ProbeOptions, asked: _Asked, *, seq_len: int | None = None) -> Consultation:
        from autobatch.cache.consultation import Consultation
        from autobatch.cache.identity import workload_identity

        return Consultation(workload_identity(self._at(seq_len)), options, asked.cache, asked.progress)

    def _at(self, seq_len: int | None) -> str:
        from autobatch.lengths import LENGTH_PLACE

        return self.name if seq_len is None else self.name.replace(LENGTH_PLACE, str(seq_len))

    def probe(
        self, options: ProbeOptions, asked: _Asked, *, first: int | None = None, seq_len: int | None = None
    ) -> Report:
        from autobatch.isolation import IsolatedTrials

        name = self._at(seq_len)
        consultation = self.consultation(options, asked, seq_len=seq_len)
        if (report := consultation.trusted_report(asked.environment)) is not None:
            return asked.trusted(report)
        with _surroundings(options, asked.environment) as (surroundings, machine):
            trials = IsolatedTrials(
                name, options, environment=surroundings, machine=machine, show_output=self.show_output
            )
            with trials:
                return _conduct(trials, options, asked, consultation, workload=name, first=first)


@dataclass(frozen=True, kw_only=True)
class _Command:
    """A training command."""

    template: CommandTemplate
    show_output: bool

    @classmethod
    def parse(cls, command: Sequence[str], edits: Sequence[str], *, show_output: bool) -> _Command:
        from autobatch.command.template import CommandTemplate

        return cls(template=CommandTemplate.parse(command, edits), show_output=show_output)

    def options(self, *, lengths: Sequence[int] = (), **options: Any) -> ProbeOptions:
        asked = ProbeOptions(**options)
        self.template.check_options(asked, lengths=lengths)
        return _checked(asked)

    @property
    def name(self) -> str:
        return self.template.text

    def consultation(self, options: ProbeOptions, asked: _Asked, *, seq_len: int | None = None) -> Consultation:
        from autobatch.cache.consultation import Consultation
        from autobatch.cache.identity import command_identity

        return Consultation(command_identity(self.template, options, seq_len), options, asked.cache, asked.progress)

    def probe(
        self, options: ProbeOptions, asked: _Asked, *, first: int | None = None, seq_len: int | None = None
    ) -> Report:
        from autobatch.command.trials import CommandTrials

        consultation = self.consultation(options, asked, seq_len=seq_len)
        if (report := consultation.trusted_report(asked.environment)) is not None:
            return asked.trusted(report)
        # Only its first trial shows the command's device: it is the one that what is remembered would be confirmed by.
        first = consultation.first_size(asked.environment) or first
        # A card for each rank that the command may start here.
        with _surroundings(options, asked.environment, cards=options.world_size) as (surroundings, machine):
            trials = CommandTrials(
                self.template,
                options,
                environment=surroundings,
                machine=machine,
                show_output=self.show_output,
                first=first,
                seq_len=seq_len,
            )
            with trials:
                return _conduct(trials, options, asked, consultation, workload=self.template.text, first=first)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """How a job is to be probed."""

    environment: dict[str, str]
    """The child's variables."""
    progress: Callable[[ProbeEvent], None] | None
    cache: CacheUse
    breakdown: bool = False
    """Whether the report is to say what the memory is made of."""

    @classmethod
    def of(
        cls,
        environment: Mapping[str, str] | None,
        progress: Callable[[ProbeEvent], None] | None,
        cache: CacheUse,
        *,
        breakdown: bool = False,
    ) -> _Asked:
        from autobatch.cache.uses import check_cache_use

        check_cache_use(cache)
        surroundings = dict(os.environ if environment is None else environment)
        return cls(environment=surroundings, progress=progress, cache=cache, breakdown=breakdown)

    def trusted(self, report: Report) -> Report:
        """A report that no trial was run for."""
        from autobatch.probing import unitemized

        return unitemized(report, "what is remembered was trusted, and no trial run") if self.breakdown else report


class _Trials(TrialSource, Protocol):
    """Trials of a job in processes of its own."""

    def files(self) -> Sequence[str]:
        """The user's own files that the job imported."""

    def itemize(self, window: Sequence[int]) -> MemoryBreakdown | None:
        """Run a window once more and take its memory apart; None where it did not fit this time."""


def _conduct(
    trials: _Trials,
    options: ProbeOptions,
    asked: _Asked,
    consultation: Consultation,
    *,
    workload: str,
    first: int | None,
) -> Report:
    """Probe with what the cache knows, and let it know what was found."""
    from autobatch.probing import conduct_probe, itemized

    known = consultation.recall(trials.facts)
    report = conduct_probe(
        trials,
        options,
        workload=workload,
        first=first,
        known=known,
        confirm=consultation.confirms,
        progress=asked.progress,
    )
    consultation.keep(report, trials.facts, trials.files)
    # What comes now may fail: the answer is kept.
    return itemized(report, trials.itemize, asked.progress) if asked.breakdown else report


def _checked(options: ProbeOptions) -> ProbeOptions:
    options.make_plan(options.ceiling)  # says before anything is started that the target cannot be hit
    return options


@contextlib.contextmanager
def _surroundings(
    options: ProbeOptions, environment: dict[str, str], *, cards: int = 1
) -> Iterator[tuple[dict[str, str], EmulatedMachine | None]]:
    """The environment in which trials run, and the emulated machine where one is asked for."""
    if options.emulate is None:
        yield environment, None
        return
    from autobatch.emulator.launch import open_machine
    from autobatch.gpu.opening import check_torch_build

    check_torch_build()
    with open_machine((options.emulate,) * min(cards, _MOST_CARDS), tenant_bytes=options.tenant_bytes) as machine:
        yield machine.environment(environment), machine
