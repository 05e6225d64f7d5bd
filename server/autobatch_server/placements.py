"""Candidates in order: what fits first, each with its plan and the reason."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autobatch import PlanError, placement_key
from autobatch_server.answers import Answer, SeriesSource, answer_question
from autobatch_server.gpus import canonical_gpu
from autobatch_server.questions import make_options, refuse_plan
from autobatch_server.schemas import Candidate, Placement, PlacementList, PlacementRequest

if TYPE_CHECKING:
    from autobatch.store import MeasurementStore

__all__ = ["rank_candidates"]

# A ranking shows plans that a person could read; GET /v1/plan shows the others.
_LONGEST_LISTING = 4096


@dataclass(frozen=True, kw_only=True)
class _Considered:
    """A candidate with what is known of it."""

    candidate: Candidate
    gpu: str
    verdict: str
    reason: str
    answer: Answer | None = None

    @property
    def price_per_hour(self) -> float | None:
        price = self.candidate.price_per_hour
        return None if price is None else price * self.candidate.count

    @property
    def headroom_bytes(self) -> int | None:
        """What the plan leaves of the card's budget and headroom together; None where it is not known."""
        if self.answer is None or self.answer.measurement is None or self.answer.footprint_bytes is None:
            return None
        memory = self.answer.measurement.report.memory
        return memory.budget_bytes + memory.headroom_bytes - self.answer.footprint_bytes

    @property
    def samples_per_second(self) -> float | None:
        """Over all its cards; None where no real card was timed at the plan's size."""
        if self.answer is None or self.answer.plan is None or self.answer.seconds_per_batch is None:
            return None
        return self.answer.plan.effective_batch_size / self.answer.seconds_per_batch


class _LookedUpOnce:
    """The store for one request: each card is looked up once, however many candidates name it."""

    def __init__(self, store: MeasurementStore) -> None:
        self.series = functools.cache(store.series)


def rank_candidates(store: MeasurementStore, workload: str, request: PlacementRequest) -> PlacementList:
    """Put candidates in order.

    Raises:
        GpuProblem: a candidate names no card.
        StoreUnavailableError: the database is away.
    """
    known = _LookedUpOnce(store)
    considered = [_consider(known, workload, request, candidate) for candidate in request.candidates]
    ordered = sorted(considered, key=lambda one: _order(one, request.rank_by))
    return PlacementList(
        workload=workload,
        target=request.target,
        split=request.split,
        rank_by=request.rank_by,
        placements=[_placement(rank, one, request.rank_by) for rank, one in enumerate(ordered, start=1)],
    )


def _consider(store: SeriesSource, workload: str, request: PlacementRequest, candidate: Candidate) -> _Considered:
    gpu = canonical_gpu(candidate.gpu)
    if request.target < candidate.count:
        reason = f"target {request.target} is below the {candidate.count} cards: every rank needs a sample"
        return _Considered(candidate=candidate, gpu=gpu, verdict="no_plan", reason=reason)
    options = make_options(target=request.target, world_size=candidate.count, split=request.split)
    try:
        answer = answer_question(store, workload=workload, gpu=gpu, options=options)
    except PlanError as error:
        reason = refuse_plan(options, error).detail
        return _Considered(candidate=candidate, gpu=gpu, verdict="no_plan", reason=reason)
    reason = answer.reason
    if answer.missing_bytes:
        reason += f": about {answer.missing_bytes} bytes too large"
    return _Considered(candidate=candidate, gpu=gpu, verdict=answer.verdict, reason=reason, answer=answer)


def _order(one: _Considered, rank_by: str) -> tuple[float, ...]:
    return placement_key(
        verdict=one.verdict,
        rank_by=rank_by,
        count=one.candidate.count,
        price_per_hour=one.price_per_hour,
        headroom_bytes=one.headroom_bytes,
        samples_per_second=one.samples_per_second,
    )


_MISSING = {
    "cost": ("price_per_hour", "it has no price, so it comes after those that have one"),
    "throughput": ("samples_per_second", "no real card was timed at this size, so it comes after those that were"),
}


def _placement(rank: int, one: _Considered, rank_by: str) -> Placement:
    answer = one.answer
    reason = one.reason
    if one.verdict == "fits" and rank_by in _MISSING and getattr(one, _MISSING[rank_by][0]) is None:
        reason += f"; {_MISSING[rank_by][1]}"
    measurement = answer.measurement if answer else None
    plan = answer.plan if answer else None
    listed = 0 if plan is None else plan.accumulation_steps * len(plan.rank_micro_batch_sizes or (plan,))
    if listed > _LONGEST_LISTING:
        plan = None
        reason += f"; its plan lists {listed} micro-batches, which GET /v1/plan shows"
    return Placement(
        rank=rank,
        gpu=one.gpu,
        count=one.candidate.count,
        verdict=one.verdict,
        reason=reason,
        plan=plan,
        basis=measurement.report.basis if measurement else None,
        measurement=measurement.id if measurement else None,
        price_per_hour=one.price_per_hour,
        headroom_bytes=one.headroom_bytes,
        missing_bytes=answer.missing_bytes if answer else None,
        samples_per_second=one.samples_per_second,
    )
