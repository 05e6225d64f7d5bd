"""Memory curves to search: recorded ones, and synthetic ones whose answer is known."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autobatch.search import SearchSpace, find_bracket, next_size
from autobatch.trial import Outcome, Trial

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autobatch.search import Bracket

MIB = 1 << 20
FOLDER = Path(__file__).parent / "data" / "curves"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What every size of one training job does on one card, by brute force."""

    name: str
    budget_bytes: int
    trial_at: Callable[[int], Trial]
    largest_recorded: int

    def true_maximum(self, ceiling: int) -> int | None:
        """The largest size that fits below every size that does not, by brute force; None where none fits."""
        sizes = range(1, min(ceiling, self.largest_recorded) + 1)
        fails = next((n for n in sizes if not self.trial_at(n).fits), None)
        largest = sizes[-1] if fails is None else fails - 1
        return largest or None

    def right_answers(self, ceiling: int) -> set[int | None]:
        """Every size that fits and whose next larger one does not: one alone, where the curve is monotone."""
        fits = [self.trial_at(n).fits for n in range(1, min(ceiling, self.largest_recorded) + 1)]
        ends = {
            n
            for n, (this, following) in enumerate(zip(fits, [*fits[1:], False], strict=True), start=1)
            if this and not following
        }
        return ends or {None}


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search that has run to its end."""

    trials: tuple[Trial, ...]
    bracket: Bracket

    @property
    def num_sizes(self) -> int:
        return len({trial.micro_batch_size for trial in self.trials})

    @property
    def num_ooms(self) -> int:
        return sum(trial.outcome is Outcome.OUT_OF_MEMORY for trial in self.trials)

    @property
    def path(self) -> str:
        return " ".join(f"{trial.micro_batch_size}{'+' if trial.fits else '-'}" for trial in self.trials)


def search_curve(curve: Curve, candidates: Sequence[int], *, most_trials: int = 64, first: int | None = None) -> Search:
    """Search a curve as a probe would; a search that does not end is an error."""
    space = SearchSpace(candidates=candidates, budget_bytes=curve.budget_bytes, share=candidates[-1] + 1, first=first)
    trials: list[Trial] = []
    while (size := next_size(trials, space)) is not None:
        trials.append(curve.trial_at(size))
        if len(trials) > most_trials:
            raise AssertionError(
                f"no end after {most_trials} trials on {curve.name}: {[t.micro_batch_size for t in trials]}"
            )
    return Search(trials=tuple(trials), bracket=find_bracket(trials))


def recorded_curves() -> list[Curve]:
    """The curves under `data/curves`, recorded on emulated cards by `record_curves.py`."""
    return [_load(path) for path in sorted(FOLDER.glob("*.json.gz"))]


def _load(path: Path) -> Curve:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        content = json.load(file)
    steps = content["micro_batches_per_step"]
    trials = {}
    for row in content["rows"]:
        values = dict(zip(content["columns"], row, strict=True))
        values["outcome"] = Outcome(values["outcome"])
        trials[values["micro_batch_size"]] = Trial(**values, micro_batches_per_step=steps, seconds_per_step=None)
    largest = max(trials)

    def trial_at(size: int) -> Trial:
        if size <= largest:
            return trials[size]
        # Brute force ended some sizes past the last that fitted: what lies beyond asks for more, and fails too.
        last = trials[largest]
        asked = last.oom_request_bytes * size // largest
        return dataclasses.replace(last, micro_batch_size=size, window=(), oom_request_bytes=asked)

    return Curve(
        name=path.name.removesuffix(".json.gz"),
        budget_bytes=content["budget_bytes"],
        trial_at=trial_at,
        largest_recorded=largest,
    )


def synthetic_curve(
    *,
    budget_mib: int = 10_000,
    base_mib: float = 500,
    per_sample_mib: float = 100,
    step: int = 1,
    noise_mib: float = 0,
    overhead: float = 0.1,
    failing: Sequence[int] = (),
    seed: int = 0,
) -> Curve:
    """A curve from a formula.

    Args:
        budget_mib: what a trial may use.
        base_mib: what is held apart from samples.
        per_sample_mib: what a sample adds.
        step: samples that are allocated together, as by a tile or a padded dimension.
        noise_mib: spread of what is reserved beyond what is allocated.
        overhead: share of the allocated bytes that is reserved beyond them.
        failing: sizes that run out of memory although their neighbours fit.
        seed: of the noise, which is the same for a size whenever it is asked.
    """
    budget = budget_mib * MIB
    context = 300 * MIB

    def trial_at(size: int) -> Trial:
        jitter = random.Random(seed * 1_000_003 + size).uniform(0, noise_mib)
        padded = -(-size // step) * step
        allocated = int((base_mib + per_sample_mib * padded) * MIB)
        needed = int(allocated + jitter * MIB)
        fits = needed + context <= budget and size not in failing
        reserved = min(budget - context, int(needed * (1 + overhead))) if fits else budget - context
        return Trial(
            micro_batch_size=size,
            outcome=Outcome.FITS if fits else Outcome.OUT_OF_MEMORY,
            micro_batches_per_step=2,
            steps=3 if fits else 0,
            peak_allocated_bytes=min(allocated, budget - context),
            peak_reserved_bytes=reserved,
            footprint_bytes=reserved + context,
            alloc_retries=0,
            seconds_per_step=None,
            held_bytes=int(base_mib * MIB),
            largest_segment_bytes=int(per_sample_mib * padded * MIB / 20),
            oom_request_bytes=0 if fits else int(per_sample_mib * padded * MIB / 20),
        )

    return Curve(name="synthetic", budget_bytes=budget, trial_at=trial_at, largest_recorded=1 << 20)
