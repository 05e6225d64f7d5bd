"""Probe a training job by its name, or any training command, in child processes: what the command line and the service run."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from autobatch.options import ProbeOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from autobatch.emulator.machine import EmulatedMachine
    from autobatch.probing import ProbeEvent
    from autobatch.report import Report

__all__ = ["probe_command", "probe_workload"]

# As many as one machine has; ranks beyond it are on other machines.
_MOST_CARDS = 8


def probe_workload(
    workload: str,
    *,
    target: int,
    progress: Callable[[ProbeEvent], None] | None = None,
    environment: Mapping[str, str] | None = None,
    show_output: bool = False,
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
    from autobatch.isolation import IsolatedTrials
    from autobatch.probing import conduct_probe
    from autobatch.workload.loader import WorkloadName

    WorkloadName.parse(workload)
    asked = ProbeOptions(target=target, **options)
    asked.make_plan(asked.ceiling)  # says before anything is started that the target cannot be hit
    with _surroundings(asked, environment) as (surroundings, machine):
        trials = IsolatedTrials(workload, asked, environment=surroundings, machine=machine, show_output=show_output)
        with trials:
            return conduct_probe(trials, asked, workload=workload, progress=progress)


def probe_command(
    command: Sequence[str],
    *,
    target: int,
    edits: Sequence[str] = (),
    progress: Callable[[ProbeEvent], None] | None = None,
    environment: Mapping[str, str] | None = None,
    show_output: bool = False,
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
    from autobatch.command.template import CommandTemplate
    from autobatch.command.trials import CommandTrials
    from autobatch.probing import conduct_probe

    template = CommandTemplate.parse(command, edits)
    asked = ProbeOptions(target=target, **options)
    template.check_options(asked)
    asked.make_plan(asked.ceiling)
    # A card for each rank that the command may start here.
    with _surroundings(asked, environment, cards=asked.world_size) as (surroundings, machine):
        trials = CommandTrials(template, asked, environment=surroundings, machine=machine, show_output=show_output)
        with trials:
            return conduct_probe(trials, asked, workload=template.text, progress=progress)


@contextlib.contextmanager
def _surroundings(
    options: ProbeOptions, environment: Mapping[str, str] | None, *, cards: int = 1
) -> Iterator[tuple[Mapping[str, str], EmulatedMachine | None]]:
    """The environment in which trials run, and the emulated machine where one is asked for."""
    surroundings = dict(os.environ if environment is None else environment)
    if options.emulate is None:
        yield surroundings, None
        return
    from autobatch.emulator.launch import open_machine
    from autobatch.gpu.opening import check_torch_build

    check_torch_build()
    with open_machine((options.emulate,) * min(cards, _MOST_CARDS), tenant_bytes=options.tenant_bytes) as machine:
        yield machine.environment(surroundings), machine
