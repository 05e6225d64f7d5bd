"""What the steps of a trial took, and how far they were apart."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

__all__ = ["StepTimes"]


@dataclass
class StepTimes:
    """Seconds of the steps of one trial, each parted into its micro-batches and its end.

    The first step loads kernels and makes the optimizer's state: the figures are of the later ones, which are what
    training is like. Each is None where no step, or for the deviation fewer than two, came after the first.

    The device is waited for between the two parts, so that the end of a step is told apart from backward passes that
    still run. That costs what the host's launches of the optimizer's kernels would otherwise overlap with: a little, and
    the same at every size.
    """

    _parts: list[tuple[float, float]] = field(default_factory=list)

    def add(self, micro_batches_seconds: float, end_seconds: float) -> None:
        """Note a step that ran: what its micro-batches took together, and what came once after them."""
        self._parts.append((micro_batches_seconds, end_seconds))

    @property
    def num_steady(self) -> int:
        """Steps after the first."""
        return len(self._parts[1:])

    @property
    def median_seconds(self) -> float | None:
        """Median seconds of a whole step."""
        return statistics.median(self._steady) if self._steady else None

    @property
    def deviation_seconds(self) -> float | None:
        """Median absolute deviation from it, in seconds: one slow step among several does not move it."""
        steady = self._steady
        if len(steady) < 2:
            return None
        median = statistics.median(steady)
        return statistics.median(abs(seconds - median) for seconds in steady)

    @property
    def end_seconds(self) -> float | None:
        """Median seconds of the end of a step."""
        return statistics.median(end for _, end in self._parts[1:]) if self.num_steady else None

    @property
    def _steady(self) -> list[float]:
        return [micro_batches + end for micro_batches, end in self._parts[1:]]
