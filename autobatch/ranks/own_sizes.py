"""Ranks with unequal cards: each finds its own largest micro-batch, while all train together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autobatch.errors import PlanError
from autobatch.probing import Noted
from autobatch.rankplan import make_rank_plan
from autobatch.search import SearchSpace, find_bracket, next_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autobatch.facts import DeviceFacts
    from autobatch.options import ProbeOptions
    from autobatch.plan import Plan
    from autobatch.probing import ProbeEvent
    from autobatch.ranks.trials import RankTrials
    from autobatch.search import Bracket
    from autobatch.trial import Trial

__all__ = ["find_own_sizes"]


def find_own_sizes(
    trials: RankTrials,
    facts: Sequence[DeviceFacts],
    options: ProbeOptions,
    progress: Callable[[ProbeEvent], None] | None = None,
) -> tuple[Plan, list[Bracket]]:
    """Find each rank's largest size, plan for all of them, and confirm the plan.

    Every rank searches for itself and all run their next sizes in one trial; who has found its answer runs that. A trial that
    fails on one rank tells the others nothing, so that they try the same again. All ranks see all trials, and so decide alike.

    Args:
        trials: run on all ranks; what their history holds already counts.
        facts: every rank's device.
        options: what is asked. The sizes accumulate: what fits after another micro-batch fits alone.
        progress: called with each event.

    Returns:
        The plan, and each rank's bracket.

    Raises:
        PlanError: the target cannot be shared out; or what fitted fits no more.
        WorkloadError: as `RankTrials.run_windows`, and BusyError.
    """
    ceiling = options.target - (len(facts) - 1) * options.multiple_of
    if options.max_micro_batch is not None:
        ceiling = min(ceiling, options.max_micro_batch)
    spaces = [
        SearchSpace(
            candidates=range(options.multiple_of, ceiling + 1, options.multiple_of),
            budget_bytes=each.memory.budget_bytes,
            share=2 * ceiling,  # no size of one of these trials is the whole share of its rank
        )
        for each in facts
    ]
    before: object = None
    while True:
        histories = [[trial for trial in history if trial.micro_batches_per_step > 1] for history in trials.history]
        brackets = [find_bracket(history) for history in histories]
        asked = [next_size(history, space) for history, space in zip(histories, spaces, strict=True)]
        if (asked, brackets) == before:  # nothing came of the last trial
            raise PlanError("sizes that fitted before do not fit any more: memory is not monotone here; probe again")
        before = asked, brackets
        if any(size is not None for size in asked):
            sizes = [size or bracket.fits or options.multiple_of for size, bracket in zip(asked, brackets, strict=True)]
            _run(trials, [(size, size) for size in sizes], progress, confirmation=False)
            continue
        plan = make_rank_plan(
            target=options.target,
            max_micro_batch_sizes=[bracket.fits or options.multiple_of for bracket in brackets],
            multiple_of=options.multiple_of,
            dataset_size=options.dataset_size,
        )
        if _run(trials, plan.rank_confirmation_windows, progress, confirmation=True).fits:
            return plan, brackets


def _run(
    trials: RankTrials,
    windows: Sequence[tuple[int, ...]],
    progress: Callable[[ProbeEvent], None] | None,
    *,
    confirmation: bool,
) -> Trial:
    trial = trials.run_windows(windows, confirmation=confirmation)
    if progress is not None:
        sizes = ", ".join("+".join(map(str, window)) for window in windows)
        rank = f" ({trial.note.partition(':')[0]})" if trial.note else ""
        progress(Noted(text=f"by rank, {sizes}: {trial.outcome.replace('_', ' ')}{rank}"))
    return trial
