"""Jobs whose every size is known, as sources of trials and by brute force, and questions about them."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from curves import Curve, recorded_curves
from fakes import ScriptedMemory, scripted_device

from autobatch.errors import PlanError, UsageError
from autobatch.facts import AnswerRemarks, DeviceFacts
from autobatch.options import ProbeOptions

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Sequence

    from autobatch.plan import Plan
    from autobatch.trial import Trial

__all__ = ["JOBS", "Job", "question", "without_warnings"]


class Job:
    """A job on a card: a curve without accumulation and one with it, as a source of trials and by brute force."""

    def __init__(self, whole: Curve, accumulating: Curve) -> None:
        self.name = accumulating.name
        self._curves = {1: whole, 2: accumulating}
        self.budget_bytes = accumulating.budget_bytes
        known = scripted_device(ScriptedMemory(budget_bytes=self.budget_bytes)).facts
        self.facts = DeviceFacts(**{**vars(known), "basis": "emulated"})

    def run_trial(self, window: Sequence[int], *, confirmation: bool) -> Trial:
        # What opens a window of two sizes meets no gradients; what follows it does.
        windows = [self._at(window[0], 1)] if len(window) == 1 else [self._at(size, 2) for size in window[1:]]
        if len(window) > 1 and window[0] > window[1]:
            windows.append(self._at(window[0], 1))
        decisive = next((trial for trial in windows if not trial.fits), windows[0])
        return dataclasses.replace(
            decisive,
            micro_batch_size=max(window),
            micro_batches_per_step=len(window),
            window=tuple(window),
            confirmation=confirmation,
        )

    def remarks(self) -> AnswerRemarks:
        return AnswerRemarks()

    @functools.cache  # noqa: B019 - as many jobs as there are recordings
    def _at(self, size: int, micro_batches: int) -> Trial:
        return self._curves[micro_batches].trial_at(size)

    def fits(self, size: int, options: ProbeOptions) -> bool:
        return self._at(size, options.micro_batches_per_step(size)).fits

    def right_sizes(self, options: ProbeOptions) -> set[int | None]:
        """Every size that a probe may find, by brute force; None where no size fits.

        It is the share whole where that fits, or else a size that fits and whose next larger one does not.
        """
        largest = max(curve.largest_recorded for curve in self._curves.values())
        sizes = range(options.multiple_of, options.ceiling + 1, options.multiple_of)
        if options.ceiling == options.share and self.fits(options.share, options):
            return {options.share}
        if largest < options.ceiling:  # nothing fits beyond what brute force recorded
            sizes = range(options.multiple_of, largest + options.multiple_of + 1, options.multiple_of)
        fitting = [self.fits(size, options) for size in sizes]
        ends = {
            size
            for size, this, following in zip(sizes, fitting, [*fitting[1:], False], strict=True)
            if this and not following
        }
        return ends or {None}

    def right_answers(self, options: ProbeOptions) -> list[Plan | None]:
        """The plan for each of those sizes; a size that leaves no plan is left out."""
        answers: list[Plan | None] = []
        for size in self.right_sizes(options):
            try:
                answers.append(None if size is None else without_warnings(options.make_plan(size)))
            except PlanError:
                continue
        return answers


def recorded_jobs() -> Iterator[Job]:
    """Every recording; one made only with accumulation stands for both."""
    curves = {curve.name: curve for curve in recorded_curves()}
    for name, curve in curves.items():
        if name.endswith("-2"):
            yield Job(curves.get(f"{name[:-2]}-1", curve), curve)


JOBS = {job.name: job for job in recorded_jobs()}


def question(draw: random.Random, near: int) -> ProbeOptions:
    """A question as a scheduler may ask it, its share near a size or far from it."""
    while True:
        world_size = draw.choice([1, 1, 1, 2, 3, 4, 8])
        share = draw.choice([draw.randint(1, 2 * near), draw.randint(1, 20 * near), 2 ** draw.randint(0, 12)])
        try:
            options = ProbeOptions(
                target=max(world_size, share * world_size - draw.choice([0, 0, 0, 1])),
                world_size=world_size,
                split=draw.choice(["even", "balanced"]),
                multiple_of=draw.choice([1, 1, 1, 2, 4, 8]),
                tolerance=draw.choice([0.0, 0.0, 0.02, 0.1]),
            )
            options.make_plan(options.ceiling)
        except (UsageError, PlanError):
            continue
        return options


def without_warnings(plan: Plan) -> Plan:
    """The plan without its advice, which names what larger sizes could do, as far as they are known."""
    return dataclasses.replace(plan, warnings=())
