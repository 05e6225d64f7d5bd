"""Trials of a training command: each is the command itself, started anew."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from autobatch.breakdown import MemoryBreakdown
from autobatch.command.heard import CommandTraits, RunSoFar, describe_end, severity, steps_text
from autobatch.command.launching import CommandRun, Ended, Message, TimedOut, temporary_folder
from autobatch.command.template import MICRO_BATCH_VARIABLE, CommandValues
from autobatch.emulation import describe_emulation
from autobatch.errors import AutobatchError, BusyError, UsageError, WorkloadError
from autobatch.facts import AnswerRemarks, DeviceFacts
from autobatch.gpu.oom import FailureKind, classify
from autobatch.jsonform import from_json_form, to_json_form
from autobatch.lastwords import rebuilt_error
from autobatch.search import SearchSpace, next_size
from autobatch.throughput import windows_per_trial
from autobatch.trial import Outcome, Trial
from autobatch.workload.inspection import Inspection
from autobatch.workload.judging import try_beside_tenants

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from autobatch.command.template import CommandTemplate
    from autobatch.emulator.machine import EmulatedMachine
    from autobatch.options import ProbeOptions

__all__ = ["CommandTrials"]


_LACKS_ACCUMULATION = (
    "the command makes one micro-batch for each optimizer step, whatever accumulation_steps is: its trials ran without the "
    "gradients that accumulation holds, and it cannot train by this plan; give it {accumulation_steps} among its arguments, or "
    "let it read AUTOBATCH_ACCUMULATION_STEPS"
)


class CommandTrials:
    """Runs a training command once for each trial, with a hook inside that measures and ends it.

    A context manager: nothing that a trial started outlives it. The device is known from the first trial, which runs on the
    way in and is given when it is asked for.
    """

    def __init__(
        self,
        template: CommandTemplate,
        options: ProbeOptions,
        *,
        environment: Mapping[str, str],
        machine: EmulatedMachine | None = None,
        show_output: bool = False,
        first: int | None = None,
        seq_len: int | None = None,
    ) -> None:
        """Prepare the trials.

        Args:
            template: the command.
            options: what the probe is asked.
            environment: the command's environment variables.
            machine: the emulated machine that it runs on, where it does.
            show_output: whether what the command prints goes to standard error, rather than to a log that is shown where
                it fails.
            first: the size to begin with, where something is known.
            seq_len: what stands in `{seq_len}`.
        """
        self._first_size, self._seq_len = first, seq_len
        self._template = template
        self._options = options
        self._environment = environment
        self._machine = machine
        self._show_output = show_output
        self._facts: DeviceFacts | None = None
        self._inspection: Inspection | None = None
        self._smallest_run: int | None = None
        self._first: Trial | None = None
        self._itemizes = False
        self._breakdown: MemoryBreakdown | None = None
        self._traits = CommandTraits()
        self._files: set[str] = set()
        self._deadline = None if options.deadline is None else time.monotonic() + options.deadline

    def __enter__(self) -> Self:
        candidates, share = self._options.candidates(), self._options.share
        space = SearchSpace(candidates=candidates, budget_bytes=0, share=share, first=self._first_size)
        size = next_size([], space)
        if size is None:
            raise UsageError("there is no size to try")  # options hold at least one
        self._first = self._run((size,) * self._options.micro_batches_per_step(size), confirmation=False)
        self._template.check_size_is_used(variable_read=MICRO_BATCH_VARIABLE in self._traits.reads)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing is left: each run ends what it started."""

    @property
    def facts(self) -> DeviceFacts:
        """The device that the trials run on."""
        if self._facts is None:
            raise RuntimeError("no trial has run: use CommandTrials as a context manager")
        return self._facts

    def run_trial(self, window: Sequence[int], *, confirmation: bool) -> Trial:
        """Run the command once.

        Raises:
            WorkloadError: it failed other than for memory, made no optimizer step, or took too long.
            UsageError: it cannot be started, or runs on other ranks than the options say.
            BusyError: the whole probe's deadline passed, or others kept taking memory.
        """
        first, self._first = self._first, None
        if first is not None and len(window) >= len(first.window) and set(window) == {first.micro_batch_size}:
            return first
        return self._run(tuple(window), confirmation=confirmation)

    def itemize(self, window: Sequence[int]) -> MemoryBreakdown | None:
        """Run the command once more and take its memory apart; raises as `run_trial` does.

        Returns:
            What the memory is made of, where it runs on several ranks that of the first; None where the trial did not fit
            this time.
        """
        self._breakdown, self._itemizes = None, True
        try:
            trial = self._run(tuple(window), confirmation=True)
        finally:
            self._itemizes = False
        return self._breakdown if trial.fits else None

    def remarks(self) -> AnswerRemarks:
        """What is to be said of the answer."""
        warnings = self._traits.warnings(self._options)
        can_accumulate = not self._traits.lacks_accumulation and self._template.can_accumulate(self._traits.reads)
        unaccumulated = "" if can_accumulate else _LACKS_ACCUMULATION
        if self._machine is None:
            return AnswerRemarks(warnings=warnings, unaccumulated=unaccumulated)
        # Where no trial fitted, none was looked at closer.
        inspection = self._inspection or Inspection(data_dependent=(), has_convolutions=False)
        emulated = describe_emulation(inspection, self._machine.unsupported_calls())
        return AnswerRemarks(
            data_dependent=emulated.data_dependent,
            not_modelled=emulated.not_modelled,
            expected_error=emulated.expected_error,
            warnings=warnings,
            unaccumulated=unaccumulated,
        )

    def files(self) -> Sequence[str]:
        """The user's own files that processes of the command imported."""
        return sorted(self._files)

    # ---- one trial --------------------------------------------------------------------------------------------------

    def _run(self, window: tuple[int, ...], *, confirmation: bool) -> Trial:
        trial = try_beside_tenants(lambda: self._attempt(window, confirmation=confirmation))
        if trial.fits:
            self._smallest_run = min(trial.micro_batch_size, self._smallest_run or trial.micro_batch_size)
            self._traits.peaks[trial.micro_batch_size] = trial.peak_allocated_bytes
        return trial

    def _attempt(self, window: tuple[int, ...], *, confirmation: bool) -> tuple[Trial, int]:
        size, steps = window[0], len(window)
        values = CommandValues(
            micro_batch_size=size,
            accumulation_steps=steps,
            target=size * steps * self._options.world_size,  # so that a script that divides it makes short windows
            world_size=self._options.world_size,
            seq_len=self._seq_len,
        )
        setup = {
            "options": to_json_form(self._options),
            "window": list(window),
            "confirmation": confirmation,
            "windows": windows_per_trial(self._options),
            "inspect": self._machine is not None and self._inspection is None,
            "smaller_ran": self._smallest_run is not None and self._smallest_run < size,
            "itemize": self._itemizes,
        }
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(temporary_folder()))
            rendered = self._template.render(values, folder)
            run = stack.enter_context(
                CommandRun(
                    rendered.arguments,
                    environment={**self._environment, **rendered.environment},
                    setup=setup,
                    folder=folder,
                    show_output=self._show_output,
                )
            )
            return self._listen(run, RunSoFar(window=window))

    def _listen(self, run: CommandRun, so_far: RunSoFar) -> tuple[Trial, int]:
        """Follow a run to its trial."""
        limits = [None if (limit := self._options.trial_timeout) is None else time.monotonic() + limit, self._deadline]
        deadline = min((limit for limit in limits if limit is not None), default=None)
        while True:
            event = run.next_event(deadline)
            if isinstance(event, TimedOut):
                raise self._explain_timeout(run, so_far)
            if isinstance(event, Ended):
                return self._explain_end(run, so_far, event)
            so_far.hear(event)
            if event.kind == "hello" and str(event.content["ranks"]).isdecimal():
                self._check_ranks(int(event.content["ranks"]))
            self._traits.reads.update(event.content.get("reads", ()))
            if event.kind == "failed":
                raise rebuilt_error(event.content["error"])
            if event.kind == "trial":
                trial = self._take(event, so_far)
                # One rank out of memory is all of them: the others wait for it, for ever.
                if not trial.fits or len(so_far.trials) == event.content["local_ranks"]:
                    return max(so_far.trials, key=severity), so_far.tenant_growth_bytes

    def _take(self, message: Message, so_far: RunSoFar) -> Trial:
        content = message.content
        self._check_ranks(content["ranks"])
        trial = from_json_form(Trial, content["trial"], where="trial")
        so_far.trials.append(trial)
        so_far.tenant_growth_bytes = max(so_far.tenant_growth_bytes, content["tenant_growth_bytes"])
        if self._facts is None or message.rank == 0:
            self._facts = from_json_form(DeviceFacts, content["facts"], where="facts")
        if content["breakdown"] is not None and (self._breakdown is None or message.rank == 0):
            self._breakdown = from_json_form(MemoryBreakdown, content["breakdown"], where="breakdown")
        if content["inspection"] is not None and self._inspection is None:
            self._inspection = from_json_form(Inspection, content["inspection"], where="inspection")
        self._files.update(content["files"])
        self._traits.note(content, trial, asked=len(so_far.window))
        return trial

    def _check_ranks(self, ranks: int) -> None:
        expected = self._options.world_size
        if ranks != expected:
            raise UsageError(
                f"the command runs {ranks} ranks (WORLD_SIZE), and the probe was asked for {expected}: give "
                f"--world-size {ranks}, or start as many ranks, as by torchrun --nproc-per-node {{world_size}}"
            )

    # ---- what went wrong --------------------------------------------------------------------------------------------

    def _explain_timeout(self, run: CommandRun, so_far: RunSoFar) -> AutobatchError:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return BusyError(
                f"the deadline of {self._options.deadline:g} s passed at micro-batch {so_far.size}: give --deadline more"
            )
        place = run.where_it_is(so_far.training_pids())
        where = f" in {place}" if place else ""
        limit = f"{self._options.trial_timeout:g} s"
        if so_far.windows:
            text = f"made {steps_text(so_far.windows)} in {limit} at micro-batch {so_far.size} and was ended{where}"
        else:
            on_cpu = " on the GPU, only on the CPU," if so_far.trains_on_cpu else ""
            text = f"made no optimizer step{on_cpu} in {limit} at micro-batch {so_far.size} and was ended{where}"
        return WorkloadError(
            f"the command {text}: give --trial-timeout more if it only is slow", traceback_text=run.tail()
        )

    def _explain_end(self, run: CommandRun, so_far: RunSoFar, ended: Ended) -> tuple[Trial, int]:
        """Make out why a command came to its own end before its trial did.

        Raises:
            WorkloadError: for another reason than memory.
            UsageError: it could not be started.
        """
        if ended.problem:
            raise UsageError(f"cannot run {self._template.arguments[0]}: {ended.problem}")
        if so_far.trials:  # some ranks had reported
            return max(so_far.trials, key=severity), so_far.tenant_growth_bytes
        if self._template.misspelt():
            self._template.check_size_is_used(variable_read=False)
        tail = run.tail(400)
        if ended.status != 0:
            verdict = classify(RuntimeError(tail), device_nearly_full=False, smaller_size_ran=False)
            if verdict.kind is FailureKind.MEMORY:
                return self._trial_of_last_words(so_far, verdict.reason), 0
        raise WorkloadError(
            describe_end(so_far, ended, run.last_words()), traceback_text=so_far.traceback or run.tail()
        )

    def _trial_of_last_words(self, so_far: RunSoFar, reason: str) -> Trial:
        if so_far.as_memory is not None:
            self._facts = self._facts or from_json_form(DeviceFacts, so_far.as_memory["facts"], where="facts")
            return from_json_form(Trial, so_far.as_memory["trial"], where="trial")
        if self._facts is None:
            raise WorkloadError(f"the command ran out of memory before its device could be measured ({reason})")
        return Trial(
            micro_batch_size=so_far.size,
            outcome=Outcome.OUT_OF_MEMORY,
            micro_batches_per_step=len(so_far.window),
            steps=0,
            peak_allocated_bytes=0,
            peak_reserved_bytes=0,
            footprint_bytes=0,
            alloc_retries=0,
            seconds_per_step=None,
            note=f"the last words of the command: {reason}",
        )
