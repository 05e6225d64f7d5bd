"""Cards in order for one training job: what fits first, each with its plan and the reason. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from autobatch.errors import UsageError

# Imported at run time: the JSON form resolves the annotations below.
from autobatch.plan import Plan, check_int
from autobatch.report import Basis, Report

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "RANK_BY",
    "Candidate",
    "Placement",
    "PlacementTable",
    "PlacementVerdict",
    "RankBy",
    "first_size_on",
    "headroom_left",
    "in_order",
    "parse_candidate",
    "parse_price",
    "placement_key",
]

RankBy = Literal["gpus", "cost", "headroom", "throughput"]
"""`gpus`: the fewest cards. `cost`: the lowest price of all cards together. `headroom`: the most memory left on a card.
`throughput`: the most samples in a second, which the service knows where a real card was timed."""
RANK_BY: tuple[str, ...] = get_args(RankBy)

PlacementVerdict = Literal["fits", "does_not_fit", "no_plan", "unknown"]
"""`no_plan`: the target cannot be split over so many cards. `unknown`: nothing could be found out; the reason says why."""
_VERDICT_ORDER = {"fits": 0, "does_not_fit": 1, "no_plan": 2, "unknown": 3}
_MOST_COUNT = 1_000_000
_HIGHEST_PRICE = 1e15


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """So many cards of a kind, each a data-parallel rank."""

    gpu: str
    """A card by any of its names."""
    count: int = 1
    price_per_hour: float | None = None
    """Of one card, in any currency; None where unknown."""

    def __post_init__(self) -> None:
        check_int(f"count of {self.gpu}", self.count, 1)
        if self.count > _MOST_COUNT:
            raise UsageError(f"count of {self.gpu} {self.count} is above {_MOST_COUNT}; give fewer cards")
        price = self.price_per_hour
        if price is not None and (
            isinstance(price, bool) or not isinstance(price, (int, float)) or not 0 <= price < math.inf
        ):
            raise UsageError(
                f"price of {self.gpu} {price!r} is not a price for an hour; give a number of at least 0, like 1.5"
            )
        if price is not None and price * self.count > _HIGHEST_PRICE:
            raise UsageError(
                f"price of {self.gpu} {price!r} times {self.count} cards is above {_HIGHEST_PRICE:.0e} for an hour; give less"
            )


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What was found for one candidate."""

    rank: int
    """From 1, the best."""
    gpu: str
    """The card's name in the catalogue."""
    count: int
    verdict: PlacementVerdict
    reason: str
    """One sentence that says why."""
    plan: Plan | None
    """The plan over all its cards, for the verdict `fits`."""
    basis: Basis | None
    """What the figures are; None where there are none."""
    price_per_hour: float | None
    """Of all its cards together; None where unknown."""
    headroom_bytes: int | None
    """Memory of a card that the plan leaves, headroom that was asked for included; None where nothing fits."""
    missing_bytes: int | None
    """For `does_not_fit`: by about how many bytes the smallest size is too large; None where that is not known."""
    report: Report | None = None
    """The probe behind it; None where none ran here."""
    measurement: str | None = field(default=None, metadata={"omit_none": True})
    """The id of the measurement behind it, where the service answered."""
    samples_per_second: float | None = field(default=None, metadata={"omit_none": True})
    """Over all its cards, where the service knows what a real one took."""


@dataclass(frozen=True, kw_only=True)
class PlacementTable:
    """Candidates in order."""

    workload: str
    target: int
    rank_by: RankBy
    placements: tuple[Placement, ...]
    """What fits first, then as `rank_by` says."""


def placement_key(
    *,
    verdict: str,
    rank_by: str,
    count: int,
    price_per_hour: float | None,
    headroom_bytes: int | None,
    samples_per_second: float | None = None,
) -> tuple[float, ...]:
    """What candidates are sorted by: first what fits; what lacks the figure asked for comes after what has it.

    Args:
        verdict: as in `Placement`.
        rank_by: one of `RANK_BY`.
        count: cards.
        price_per_hour: of all cards together.
        headroom_bytes: memory of a card that the plan leaves.
        samples_per_second: over all cards.
    """
    price = math.inf if price_per_hour is None else price_per_hour
    headroom = math.inf if headroom_bytes is None else -headroom_bytes
    keys: dict[str, tuple[float, ...]] = {
        "gpus": (count, price, headroom),
        "cost": (price, count, headroom),
        "headroom": (headroom, count),
        "throughput": (math.inf if samples_per_second is None else -samples_per_second, count),
    }
    return (_VERDICT_ORDER[verdict], *keys[rank_by])


def in_order(placements: Iterable[Placement], rank_by: RankBy) -> tuple[Placement, ...]:
    """Sort placements and number them; what is equal keeps its order."""
    import dataclasses

    ordered = sorted(
        placements,
        key=lambda one: placement_key(
            verdict=one.verdict,
            rank_by=rank_by,
            count=one.count,
            price_per_hour=one.price_per_hour,
            headroom_bytes=one.headroom_bytes,
        ),
    )
    return tuple(dataclasses.replace(one, rank=number) for number, one in enumerate(ordered, start=1))


def headroom_left(report: Report) -> int | None:
    """Bytes of the card that a report's plan leaves, of the budget and the headroom together; None without a plan."""
    if report.plan is None:
        return None
    size = report.plan.micro_batch_size
    footprints = [trial.footprint_bytes for trial in report.trials if trial.fits and trial.micro_batch_size == size]
    return report.memory.budget_bytes + report.memory.headroom_bytes - max(footprints) if footprints else None


def first_size_on(budget_bytes: int, reports: Iterable[Report]) -> int | None:
    """Where to begin the search on a card, from what the job took on others; None where nothing is known.

    What tensors take for a size differs little from card to card, so the size that fills the budget is read off between the
    sizes that ran. It only proposes: trials decide.

    Args:
        budget_bytes: what a trial may use on the card.
        reports: of the same job on other cards.
    """
    taken: dict[int, int] = {}
    for report in reports:
        for trial in report.trials:
            if trial.fits and trial.micro_batches_per_step == report.micro_batches_per_step:
                taken[trial.micro_batch_size] = max(taken.get(trial.micro_batch_size, 0), trial.footprint_bytes)
    known = sorted(taken.items())
    if not known:
        return None
    fitting = [pair for pair in known if pair[1] <= budget_bytes]
    if not fitting:
        size, taken_bytes = known[0]
        return max(1, size * budget_bytes // taken_bytes)
    above = known[len(fitting) :]
    (size, low), (next_size, high) = fitting[-1], above[0] if above else fitting[-1]
    if next_size == size:  # beyond all that is known, in the stride between the last two
        if len(fitting) < 2:
            return max(1, size * budget_bytes // low)
        before, least = fitting[-2]
        per_sample = max(1.0, (low - least) / (size - before))
    else:
        per_sample = max(1.0, (high - low) / (next_size - size))
    return size + int((budget_bytes - low) / per_sample)


def parse_candidate(text: str) -> Candidate:
    """Read `NAME` or `NAME:COUNT`.

    Raises:
        UsageError: it is not that.
    """
    name, colon, count = text.strip().rpartition(":")
    if not colon:
        name, count = count, "1"
    if not name.strip() or not count.strip().isdecimal() or len(count) > 20:
        raise UsageError(f"gpu {text!r} is not a card, or a card and a count: write L4, or L4:4 for four of them")
    return Candidate(gpu=name.strip(), count=int(count))


def parse_price(text: str) -> tuple[str, float]:
    """Read `NAME=PRICE`, the price of one card for an hour.

    Raises:
        UsageError: it is not that.
    """
    name, equals, price = text.partition("=")
    try:
        value = float(price)
    except ValueError:
        value = math.nan
    if not equals or not name.strip() or not 0 <= value < math.inf:
        raise UsageError(f"price {text!r} is not a card and a price: write L4=0.60, of one card for an hour")
    return name.strip(), value
