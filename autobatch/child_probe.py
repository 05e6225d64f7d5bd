"""Probe a training job by its name, in child processes: what the command line and the service run."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from autobatch.options import ProbeOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from autobatch.emulator.machine import EmulatedMachine
    from autobatch.probing import ProbeEvent
    from autobatch.report import Report

__all__ = ["probe_workload"]


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
    with contextlib.ExitStack() as stack:
        machine = stack.enter_context(_emulated_machine(asked)) if asked.emulate else None
        surroundings = dict(os.environ if environment is None else environment)
        trials = stack.enter_context(
            IsolatedTrials(
                workload,
                asked,
                environment=machine.environment(surroundings) if machine else surroundings,
                machine=machine,
                show_output=show_output,
            )
        )
        return conduct_probe(trials, asked, workload=workload, progress=progress)


@contextlib.contextmanager
def _emulated_machine(options: ProbeOptions) -> Iterator[EmulatedMachine]:
    from autobatch.emulator.launch import open_machine
    from autobatch.gpu.opening import check_torch_build

    check_torch_build()
    with open_machine((str(options.emulate),), tenant_bytes=options.tenant_bytes) as machine:
        yield machine
