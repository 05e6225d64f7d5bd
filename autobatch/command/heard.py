"""What the runs of a training command said: of a trial, and of the command itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autobatch.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from autobatch.command.launching import Ended, Message
    from autobatch.options import ProbeOptions
    from autobatch.trial import Trial

__all__ = ["CommandTraits", "RunSoFar", "describe_end", "severity", "steps_text"]

# Sizes this many times apart take different memory, unless a step alone takes the most.
_TELLING = 4


@dataclass
class RunSoFar:
    """What one run has said."""

    window: tuple[int, ...]
    hooked: dict[int, str] = field(default_factory=dict)
    """Processes in which the hook runs, and their programs."""
    trials: list[Trial] = field(default_factory=list)
    tenant_growth_bytes: int = 0
    windows: int = 0
    trains_on_cpu: bool = False
    backwards: int = 0
    message: str = ""
    traceback: str = ""
    as_memory: Mapping[str, Any] | None = None
    _training: set[int] = field(default_factory=set)

    @property
    def size(self) -> int:
        """Samples of one micro-batch."""
        return self.window[0]

    def hear(self, message: Message) -> None:
        """Take in what was said."""
        content = message.content
        if message.kind == "hello":
            self.hooked[message.pid] = content["program"]
            return
        self.trains_on_cpu |= message.kind == "cpu"
        self._training.add(message.pid)
        self.windows = max(self.windows, content.get("windows", 0))
        if message.kind == "ended":
            self.backwards = max(self.backwards, content["backwards"])
            self.message = self.message or content["message"]  # a launcher's own, that a rank failed, comes last
            self.traceback = self.traceback or content["traceback"]
            self.as_memory = content["as_memory"] or self.as_memory

    def training_pids(self) -> tuple[int, ...]:
        """Processes that train, or else the one that was started last."""
        return tuple(self._training) or tuple(self.hooked)[-1:]


@dataclass
class CommandTraits:
    """What the runs showed of the command itself."""

    reads: set[str] = field(default_factory=set)
    """Variables of ours that the command read."""
    lacks_accumulation: bool = False
    idle: tuple[str, ...] = ()
    frozen_bytes: int = 0
    peaks: dict[int, int] = field(default_factory=dict)

    def note(self, content: Mapping[str, Any], trial: Trial, *, asked: int) -> None:
        """Take in a trial's message."""
        if trial.fits:
            self.lacks_accumulation |= asked > trial.micro_batches_per_step
            self.idle = tuple(content["idle_optimizers"])
            self.frozen_bytes = content["frozen_bytes"]

    def warnings(self, options: ProbeOptions) -> tuple[str, ...]:
        """What the user is to know."""
        found = []
        if self.idle:
            found.append(
                f"an optimizer with parameters on the GPU ({', '.join(sorted(set(self.idle)))}) made fewer than "
                f"{options.min_windows} steps in a trial; if it steps later, memory rises then: --min-windows N runs further"
            )
        if self.frozen_bytes:
            found.append(
                f"parameters of {format_bytes(self.frozen_bytes)} that the optimizer holds were frozen during the trials; if "
                "they thaw, memory rises then: --min-windows N runs further"
            )
        sizes = sorted(self.peaks)
        if len(set(self.peaks.values())) == 1 and sizes[-1] >= _TELLING * sizes[0]:
            found.append(
                f"micro-batches of {sizes[0]} and {sizes[-1]} took the same memory: does the command use the size that it is "
                "given?"
            )
        return tuple(found)


def steps_text(steps: int) -> str:
    """A number of optimizer steps, in words."""
    return f"{steps} optimizer step{'' if steps == 1 else 's'}"


def severity(trial: Trial) -> tuple[bool, int]:
    """Orders ranks' trials: one that failed before all that fitted, then by memory."""
    return not trial.fits, trial.footprint_bytes


def describe_end(so_far: RunSoFar, ended: Ended, said: str) -> str:
    """Say how a command came to its own end, and what may have led to it."""
    words = f"; its last words: {said}" if said else ""
    how = "ended by itself" if ended.status == 0 else f"failed with status {ended.status}"
    if ended.status < 0:
        how = f"was killed by signal {-ended.status}"
    if not so_far.hooked:
        return (
            f"the command {how}, and the hook was not loaded in any process of it (python -I, -E or -S, a cleared "
            f"environment, or no Python at all?){words}"
        )
    if so_far.message:
        return so_far.message
    if ended.status != 0:
        return f"the command {how} at micro-batch {so_far.size} after {steps_text(so_far.windows)}{words}"
    return _describe_success(so_far, words)


def _describe_success(so_far: RunSoFar, words: str) -> str:
    """Say why a command that ended well made no trial."""
    if so_far.windows:
        smaller = f", or --max-micro-batch below {so_far.size}" if so_far.size > 1 else ""
        return (
            f"the command ended after {steps_text(so_far.windows)} at micro-batch {so_far.size}, and a trial needs more: "
            f"give it more data or steps{smaller}"
        )
    if so_far.trains_on_cpu:
        return "the command trained on the CPU alone: move its model to the GPU that is probed"
    if so_far.backwards:
        return (
            f"the command made {so_far.backwards} backward passes and no step of a torch optimizer on the GPU: a step that is "
            "written by hand cannot be seen"
        )
    return f"the command ended without a backward pass or an optimizer step of torch{words}"
